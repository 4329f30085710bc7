"""Invariant 3: a packed minibatch has the gradient of its transitions taken one by one, however it is packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from learners import counted_forwards, in_float64, make_env, make_model, make_policy, observation_of, plain_log_probs

from agents.algorithms.ppo import PPO
from agents.models import sizes
from agents.objectives.losses import clipped_surrogate, value_loss
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer

KINDS = ("gpt2", "llama")
Gradient = dict[str, torch.Tensor]
Episode = tuple[list[int], list[int]]


def policy_in_float64(kind: str, **kwargs: Any) -> CausalLMPolicy:
    return make_policy(make_env(min_new_tokens=2), model=in_float64(make_model(kind)), min_new_tokens=2, **kwargs)


def random_episodes(n: int = 6) -> list[Episode]:
    """Prompt and response of n episodes of different lengths; the first two share their prompt."""
    random = np.random.default_rng(0)
    episodes = []
    for number in range(n):
        prompt = random.integers(2, 300, 1 + max(number - 1, 0)).tolist()
        episodes.append((prompt, random.integers(2, 300, random.integers(2, 8)).tolist()))
    episodes[1] = (episodes[0][0], episodes[1][1])
    return episodes


def transitions(episodes: list[Episode]) -> tuple[list[list[int]], list[int], torch.Tensor]:
    """Context, prompt length and action of every step."""
    rows = [
        (prompt + response[:t], len(prompt), response[t]) for prompt, response in episodes for t in range(len(response))
    ]
    contexts, prompt_lengths, actions = zip(*rows, strict=True)
    return list(contexts), list(prompt_lengths), torch.tensor(actions)


def packed(
    episodes: list[Episode], extra_columns: int = 0, padding: int = 9
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same steps as one row an episode."""
    total = [len(prompt) + len(response) - 1 for prompt, response in episodes]
    columns = max(total) + extra_columns
    input_ids = torch.full((len(episodes), columns), padding)
    mask = torch.zeros(len(episodes), columns, dtype=torch.bool)
    for row, (prompt, response) in enumerate(episodes):
        input_ids[row, : total[row]] = torch.tensor((prompt + response)[:-1])
        mask[row, len(prompt) - 1 : total[row]] = True
    lengths = torch.tensor([[len(prompt)] for prompt, _ in episodes])
    actions = torch.tensor([token for _, response in episodes for token in response])
    return {"input_ids": input_ids, "action_mask": mask, "prompt_length": lengths}, actions


def ppo_loss(values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """PPO's loss of each step; `keys` tells steps apart, and stands in for what a rollout would have stored."""
    old_log_prob, advantages, returns = log_prob.detach() + 0.3 * torch.sin(keys), torch.cos(keys), torch.sin(2 * keys)
    loss = clipped_surrogate(log_prob - old_log_prob, advantages, 0.2) - 0.01 * entropy
    return loss + 0.1 * value_loss(values.flatten(), values.flatten().detach() * 0, returns, 0.5)


def gradient_of(policy: CausalLMPolicy, loss: Callable[[], torch.Tensor]) -> Gradient:
    policy.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def packed_gradient(policy: CausalLMPolicy, order: list[int], **packing: Any) -> Gradient:
    episodes = random_episodes()
    starts = np.cumsum([0, *(len(response) for _, response in episodes)])
    keys = np.concatenate([np.arange(starts[e], starts[e + 1]) for e in order])
    observation, actions = packed([episodes[e] for e in order], **packing)

    def loss() -> torch.Tensor:
        return ppo_loss(*policy.evaluate_actions(observation, actions), torch.from_numpy(keys).double()).mean()

    return gradient_of(policy, loss)


def assert_same(left: Gradient, right: Gradient, tolerance: float = 1e-12) -> None:
    assert left.keys() == right.keys()
    assert max(float(gradient.abs().max()) for gradient in left.values()) > 1e-3
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy_kwargs", [{}, {"separate_critic": True}, {"temperature": 0.6}], ids=str)
def test_the_packed_gradient_is_the_mean_of_the_transitions_own(kind: str, policy_kwargs: dict[str, Any]) -> None:
    policy = policy_in_float64(kind, **policy_kwargs)
    contexts, prompt_lengths, actions = transitions(random_episodes())

    def one_by_one() -> torch.Tensor:
        losses = []
        for number, (context, prompt_length, action) in enumerate(zip(contexts, prompt_lengths, actions, strict=True)):
            scored = policy.evaluate_actions(observation_of([context], [prompt_length]), action[None])
            losses.append(ppo_loss(*scored, torch.tensor([number], dtype=torch.float64)))
        return torch.cat(losses).mean()

    assert_same(packed_gradient(policy, [0, 1, 2, 3, 4, 5]), gradient_of(policy, one_by_one))


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_gradient_is_that_of_the_model_without_any_of_our_code(kind: str) -> None:
    policy = policy_in_float64(kind)
    contexts, prompt_lengths, actions = transitions(random_episodes())

    def by_hand() -> torch.Tensor:
        log_probs, entropies, values = [], [], []
        for context, prompt_length, action in zip(contexts, prompt_lengths, actions, strict=True):
            output = policy.lm.model(torch.tensor([context]), output_hidden_states=True)
            allowed = torch.ones(300, dtype=torch.bool)
            allowed[0] = len(context) - prompt_length >= 2  # EOS
            log_softmax = torch.log_softmax(output.logits[0, -1, allowed], dim=-1)
            log_probs.append(log_softmax[action - (~allowed).sum()])
            entropies.append(-(log_softmax.exp() * log_softmax).sum())
            values.append(policy.value_head(output.hidden_states[-1][0, -1]))
        keys = torch.arange(len(contexts), dtype=torch.float64)
        return ppo_loss(torch.stack(values), torch.stack(log_probs), torch.stack(entropies), keys).mean()

    assert_same(packed_gradient(policy, [0, 1, 2, 3, 4, 5]), gradient_of(policy, by_hand))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("order", "packing"),
    [
        ([5, 2, 0, 4, 1, 3], {}),
        ([0, 1, 2, 3, 4, 5], {"extra_columns": 7}),
        ([0, 1, 2, 3, 4, 5], {"padding": 0}),
        ([3, 1, 0, 2, 5, 4], {"extra_columns": 2, "padding": 299}),
    ],
    ids=["order", "more padding", "other padding", "all of it"],
)
def test_padding_and_order_do_not_change_the_gradient(kind: str, order: list[int], packing: dict[str, Any]) -> None:
    policy = policy_in_float64(kind)
    assert_same(packed_gradient(policy, [0, 1, 2, 3, 4, 5]), packed_gradient(policy, order, **packing))


def test_a_gradient_of_other_episodes_is_another_one() -> None:
    """The control: these comparisons could fail."""
    policy = policy_in_float64("gpt2")
    all_six, five = packed_gradient(policy, [0, 1, 2, 3, 4, 5]), packed_gradient(policy, [0, 1, 2, 3, 4])
    with pytest.raises(AssertionError, match="not close"):
        assert_same(all_six, five, tolerance=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 45, 10_000])
def test_micro_batches_do_not_change_the_gradient(kind: str, micro_batch_tokens: int) -> None:
    def gradient(budget: int) -> Gradient:
        env = make_env()
        model = PPO(
            "CausalLMPolicy",
            env,
            n_episodes=10,
            seed=3,
            policy_kwargs={"model": in_float64(make_model(kind, ends=0.2))},
            ent_coef=0.01,
            micro_batch_tokens=budget,
            device="cpu",
        )
        model._setup_learn(1, None)
        callback = model._init_callback(None)
        assert model.collect_rollouts(callback)
        with counted_forwards(model.policy.lm.backbone) as shapes:
            means = model._backward(np.array([7, 2, 0, 5, 9]))
        assert len(shapes) == {1: 5, 10_000: 1}.get(budget, len(shapes))
        assert all(rows == 1 or rows * columns <= budget for rows, columns in shapes)
        gradients = {n: p.grad.clone() for n, p in model.policy.named_parameters() if p.grad is not None}
        return {**gradients, "logged": torch.tensor([means[name] for name in sorted(means)], dtype=torch.float64)}

    assert_same(gradient(4096), gradient(micro_batch_tokens))


# ---- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_any_batch_of_contexts_is_scored_as_each_of_them_alone(kind: str) -> None:
    """Shared prefixes: shuffled, repeated, some contexts the beginning of others, some not."""
    policy = policy_in_float64(kind)
    contexts, prompt_lengths, actions = transitions(random_episodes())
    order = np.random.default_rng(1).choice(len(contexts), 40)
    observation = observation_of([contexts[i] for i in order], [prompt_lengths[i] for i in order])
    values, log_prob, _ = policy.evaluate_actions(observation, actions[order])
    for i, at in enumerate(order):
        expected = plain_log_probs(policy, contexts[at], len(contexts[at]) - prompt_lengths[at])
        assert float(log_prob[i].detach()) == pytest.approx(float(expected[actions[at]]), abs=1e-12)
    alone = policy.evaluate_actions(
        observation_of([contexts[order[0]]], [prompt_lengths[order[0]]]), actions[order[:1]]
    )
    torch.testing.assert_close(values[:1], alone[0], atol=1e-12, rtol=1e-12)


def test_each_maximal_sequence_costs_one_row_of_one_forward_pass() -> None:
    policy = policy_in_float64("gpt2")
    contexts = [[5], [5, 6], [5, 6, 7], [5, 8], [9, 6], [5, 6], [5, 6, 7]]  # maximal: 5 6 7, 5 8, 9 6
    with counted_forwards(policy.lm.backbone) as shapes:
        policy.evaluate_actions(observation_of(contexts, [1] * 7), torch.full((7,), 10))
    assert shapes == [(3, 3)]


def test_a_packed_batch_costs_one_row_an_episode() -> None:
    policy = policy_in_float64("llama", separate_critic=True)
    episodes = random_episodes()
    observation, actions = packed(episodes)
    assert policy.critic is not None
    with counted_forwards(policy.lm.backbone) as actor, counted_forwards(policy.critic) as critic:
        policy.evaluate_actions(observation, actions)
    longest = max(len(prompt) + len(response) - 1 for prompt, response in episodes)
    assert actor == critic == [(6, longest)]


def test_stock_minibatches_of_whole_episodes_cost_one_row_an_episode() -> None:
    """SB3's own rollouts hold every prefix of an episode: only the episodes themselves are run."""
    env = make_env(4)
    policy = make_policy(env, model=make_model(ends=0.2))
    buffer = EpisodeBuffer(0, env.single_observation_space, env.single_action_space, "cpu", n_envs=4)
    collect_episodes(policy, env, 6, buffer)
    buffer.finalize()
    packed_samples = buffer.pack(np.arange(6))
    sequences = packed_samples.observations["input_ids"].tolist()
    contexts, prompt_lengths = [], []
    for row, mask in enumerate(packed_samples.observations["action_mask"].tolist()):
        for column in np.flatnonzero(mask):
            contexts.append(sequences[row][: column + 1])
            prompt_lengths.append(int(packed_samples.observations["prompt_length"][row]))
    with counted_forwards(policy.lm.backbone) as shapes:
        _, log_prob, _ = policy.evaluate_actions(observation_of(contexts, prompt_lengths), packed_samples.actions)
    assert len(shapes) == 1
    assert shapes[0][0] <= 6
    torch.testing.assert_close(log_prob, packed_samples.old_log_prob, atol=1e-5, rtol=1e-5)


def test_the_head_in_chunks_is_the_head_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_in_float64("gpt2")
    at_once = packed_gradient(policy, [0, 1, 2, 3, 4, 5])
    four_positions = sizes.CPU._replace(chunk_elements=4 * 300)
    monkeypatch.setattr(sizes, "CPU", four_positions)
    assert_same(at_once, packed_gradient(policy, [0, 1, 2, 3, 4, 5]))
