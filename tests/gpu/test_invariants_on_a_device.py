"""Invariants 1 to 4 in the precisions of GPUs: memo and plain, decoding and training, packed and one by one, agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learners import make_env, make_model, make_policy, make_ppo, observation_of, plain_log_probs, plain_value

from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeSamples
from agents.rollouts.sampling import collect_texts

KINDS = ("gpt2", "llama")
V, WIDTH = 300, 24


def bound(policy: CausalLMPolicy, input_ids: torch.Tensor) -> float:
    """How far two roundings of the same log-probability may lie apart.

    In float32 1e-4, ten times what a CPU needs, since a GPU adds in an order of its own. In bfloat16 0.04 of the
    largest logit, as ``tests/invariants/test_ratio_is_one.py`` derives.
    """
    if policy.lm.model.dtype == torch.float32:
        return 1e-4
    with torch.no_grad():
        hidden = policy.lm.hidden_states(input_ids)
        return 0.04 * float(policy.lm.model.get_output_embeddings()(hidden).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_memoised_log_probs_and_values_are_the_plain_ones(device: str, dtype: torch.dtype, kind: str) -> None:
    """Rows that grow, end, restart and leave, and an evaluation of another batch in between."""
    policy = make_policy(make_env(), kind, model=make_model(kind).to(dtype), min_new_tokens=2).to(device)
    assert policy._actor_memo is not None
    assert policy._actor_memo.enabled
    random = np.random.default_rng(0)

    def restart() -> list[int]:
        return random.integers(2, V, random.integers(1, 7)).tolist()

    rows = [restart() for _ in range(4)]
    prompts = [len(row) for row in rows]
    for _ in range(12):
        for number, row in enumerate(rows):
            if random.random() < 0.1 or len(row) > WIDTH - 4:
                rows[number] = restart()
                prompts[number] = len(rows[number])
            else:
                row.append(int(random.integers(2, V)))
        chosen = random.permutation(4)[: random.integers(1, 5)]
        contexts, lengths = [rows[i] for i in chosen], [prompts[i] for i in chosen]
        observation = observation_of(contexts, lengths, WIDTH)
        tolerance = bound(policy, observation["input_ids"].to(device))
        with torch.no_grad():
            logits = policy.get_distribution(observation).distribution.logits.double().cpu()
            values = policy.predict_values(observation).double().cpu()
        for i, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
            expected = plain_log_probs(policy, context, len(context) - length)
            allowed = expected > -torch.inf
            torch.testing.assert_close(logits[i][allowed], expected[allowed], atol=tolerance, rtol=0)
            assert float(values[i]) == pytest.approx(plain_value(policy, context), abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_every_ratio_is_one_at_the_first_minibatch(device: str, dtype: torch.dtype, kind: str) -> None:
    model = make_ppo(model=make_model(kind, ends=0.2).to(dtype), n_episodes=12, device=device)
    buffer, _ = collect_texts(model.policy, model.vector_env, 12, model.reference)
    buffer.finalize()
    samples = buffer.pack(np.arange(12))
    with torch.no_grad():
        log_prob = model.policy.evaluate_actions(samples.observations, samples.actions)[1]
    tolerance = bound(model.policy, samples.observations["input_ids"])
    assert float((log_prob - samples.old_log_prob).abs().max()) < tolerance
    assert float(np.abs(buffer.log_ratio).max()) < tolerance  # and the KL to the reference is 0
    assert abs(float((log_prob - samples.old_log_prob).mean())) < tolerance / 4  # it is noise, not a bias


def gradient(policy: CausalLMPolicy, samples: EpisodeSamples) -> torch.Tensor:
    """Of the mean log-probability and the mean square of the values, all parameters in a row, float32 on the CPU."""
    policy.zero_grad()
    values, log_prob, _ = policy.evaluate_actions(samples.observations, samples.actions)
    (log_prob.mean() + values.square().mean()).backward()
    return torch.cat([p.grad.flatten().float().cpu() for p in policy.parameters() if p.grad is not None])


def one_by_one(policy: CausalLMPolicy, samples: EpisodeSamples) -> torch.Tensor:
    """The same from one context a time, each of which is a batch of its own."""
    policy.zero_grad()
    mask = samples.observations["action_mask"].cpu()
    places = mask.nonzero().tolist()
    for action, (row, column) in zip(samples.actions, places, strict=True):
        context = samples.observations["input_ids"][row, : column + 1].tolist()
        observation = observation_of([context], [int(samples.observations["prompt_length"][row])], len(context))
        values, log_prob, _ = policy.evaluate_actions(observation, action[None])
        ((log_prob + values.flatten().square()).sum() / len(places)).backward()
    return torch.cat([p.grad.flatten().float().cpu() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_gradient_is_the_mean_of_the_transitions_own(device: str, dtype: torch.dtype, kind: str) -> None:
    env = make_env()
    policy = make_policy(env, kind, model=make_model(kind, ends=0.2).to(dtype)).to(device)
    buffer, _ = collect_texts(policy, env, 4)
    buffer.finalize()
    samples, other = buffer.pack(np.arange(4)), buffer.pack(np.arange(2))
    packed, single = gradient(policy, samples), one_by_one(policy, samples)
    assert float(packed.norm()) > 1e-2
    # bfloat16 rounds each of some thirty gradients that are added up, by 2⁻⁹ of the sum so far.
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert float((packed - single).norm() / single.norm()) < tolerance
    assert float((gradient(policy, other) - single).norm() / single.norm()) > 2 * tolerance  # the control
