"""Invariant 6: what is sampled is what is scored, masks included, and every text that is started counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import stable_baselines3
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import (
    EOS,
    PROMPTS,
    after_each_rollout,
    even_tokens,
    length_of,
    make_env,
    make_model,
    make_policy,
    make_ppo,
    observation_of,
    tensors_of,
)
from sb3_contrib import MaskablePPO
from tiny import tiny_tokenizer

from agents.algorithms.ppo import PPO
from agents.models.distribution import sample
from agents.models.reference_constraints import ReferenceMinP, ReferenceTopK, ReferenceTopP
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.policies.maskable import MaskableCausalLMPolicy
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sampling import collect_texts
from agents.rollouts.sb3_vec_env import TextVecEnv
from text_env.constraints import Contexts, ForbiddenTokens
from text_env.episodes import NO_ACTION
from text_env.vector_env import TextVectorEnv

DRAWS = 6000


def chi_square_deviation(draws: torch.Tensor, probabilities: torch.Tensor) -> float:
    """How far observed frequencies are from the expected ones, in standard deviations of the chi-square statistic."""
    expected = probabilities.double().numpy() * len(draws)
    observed = np.bincount(draws.numpy(), minlength=len(expected)).astype(float)
    assert observed[expected == 0].sum() == 0
    rare = expected < 5  # too rare for the statistic: all of them together are one outcome
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    keep = expected > 0
    statistic = float(((observed - expected)[keep] ** 2 / expected[keep]).sum())
    degrees = int(keep.sum()) - 1
    assert degrees >= 10
    return (statistic - degrees) / np.sqrt(2 * degrees)


def frequencies_deviate(policy: CausalLMPolicy, step: int, scored_by: CausalLMPolicy | None = None) -> float:
    """Sample thousands of times after one context, and compare with the probabilities that `evaluate_actions` gives."""
    context = [7, 8, 9, 10][: 2 + step]
    one = observation_of([context], [2])
    torch.manual_seed(0)
    with torch.no_grad():
        actions, _, _ = policy.forward({name: x.expand(DRAWS, -1) for name, x in one.items()})
        every = {name: x.expand(300, -1) for name, x in one.items()}
        log_prob = (scored_by or policy).evaluate_actions(every, torch.arange(300))[1]
    assert float(log_prob.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    return chi_square_deviation(actions, log_prob.exp())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("step", [1, 2])
def test_tokens_are_as_frequent_as_they_are_probable(kind: str, temperature: float, step: int) -> None:
    model = make_model(kind, ends=0.3, sharp=0.3)
    policy = make_policy(make_env(), model=model, temperature=temperature, min_new_tokens=2)
    assert abs(frequencies_deviate(policy, step)) < 4


def test_the_frequencies_are_not_those_of_another_temperature_or_minimum_length() -> None:
    """The control: the statistic sees such differences."""
    model = make_model(ends=0.7, sharp=0.3)
    policy = make_policy(make_env(), model=model, temperature=0.8)
    warmer = make_policy(make_env(), model=model, temperature=1.0)
    masked = make_policy(make_env(), model=model, temperature=0.8, min_new_tokens=2)
    assert frequencies_deviate(policy, 1, scored_by=warmer) > 20
    assert frequencies_deviate(masked, 1, scored_by=policy) > 20


def test_eos_is_not_sampled_before_the_minimum_length_and_is_thereafter() -> None:
    policy = make_policy(make_env(), model=make_model(ends=0.5), min_new_tokens=2)
    for step in (0, 1, 2):
        one = observation_of([[7, 8, 9, 10][: 2 + step]], [2])
        with torch.no_grad():
            actions, _, log_prob = policy.forward({name: x.expand(500, -1) for name, x in one.items()})
            greedy = policy.forward(one, deterministic=True)[0]
        assert bool((actions == EOS).any()) == (step >= 2)
        assert torch.isfinite(log_prob).all()
        assert (int(greedy) == EOS) <= (step >= 2)


@given(
    logits=st.lists(st.one_of(st.just(-np.inf), st.floats(-80, 80, width=32)), min_size=2, max_size=60).filter(
        lambda values: any(np.isfinite(values))
    ),
    uniform=st.one_of(st.sampled_from([0.0, 0.5, float(np.nextafter(1.0, 0.0))]), st.floats(0, 1, exclude_max=True)),
)
@settings(max_examples=300, deadline=None)
def test_a_forbidden_token_is_never_sampled_whatever_the_uniform_number(logits: list[float], uniform: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **kwargs: torch.full(shape, uniform, **kwargs))
        [token] = sample(torch.softmax(torch.tensor([logits], dtype=torch.float32), dim=-1)).tolist()
    assert np.isfinite(logits[token])


def test_rare_tokens_at_the_end_of_a_large_vocabulary_are_sampled() -> None:
    """A cumulative sum in float32 would be flat there: steps of 5e-8 vanish beside 1."""
    probabilities = torch.full((1, 20_000), 5e-8)
    probabilities[0, 0] = 1.0  # the others together: 1e-3
    torch.manual_seed(0)
    draws = torch.cat([sample(probabilities.expand(100, -1)) for _ in range(200)])
    rare = draws[draws > 0].double()
    # Of 20,000 draws 20 ± 4.5 should be rare ones, evenly spread: a mean of 10,000 ± 5,774 / √20.
    assert 5 <= len(rare) <= 40
    assert float(rare.mean()) == pytest.approx(10_000, abs=4 * 5_774 / np.sqrt(20))


# ---- under constraints ---------------------------------------------------------------------------------------------


class RandomMasks:
    """Allows a random share of the tokens, another one after every context: each token of it counts.

    :param seed: of everything random.
    :param share: of the tokens that are allowed, about.
    """

    def __init__(self, seed: int, share: float) -> None:
        self.seed = seed
        self.share = share

    def __call__(self, contexts: Contexts, n_tokens: int) -> np.ndarray:
        masks = []
        for ids, length in zip(contexts.input_ids, contexts.length, strict=True):
            rng = np.random.default_rng([self.seed, *ids[:length]])
            mask = rng.random(n_tokens) < self.share
            mask[rng.integers(1, n_tokens)] = True  # one at least, and not EOS: min_new_tokens may forbid that
            masks.append(mask)
        return np.array(masks)


class Watched(TextVectorEnv):
    """Counts what is sampled, and what of it the environment's masks forbid."""

    sampled = 0
    forbidden = 0

    def step(self, actions: Any) -> Any:
        rows = np.flatnonzero(np.asarray(actions) != NO_ACTION)
        self.sampled += len(rows)
        self.forbidden += int((~self.action_masks()[rows, np.asarray(actions)[rows]]).sum())
        return super().step(actions)


def watched_env(constraint: Any, rows: int = 4, **kwargs: Any) -> Watched:
    return Watched(
        rows,
        **{
            "tokenizer": tiny_tokenizer(),
            "prompts": PROMPTS,
            "reward": even_tokens,
            "max_new_tokens": 6,
            "constraint": constraint,
            **kwargs,
        },
    )


def own_ppo(env: Watched, constraint: Any) -> None:
    policy_kwargs = {"constraint": constraint, "min_new_tokens": env.min_new_tokens}
    make_ppo(env, policy_kwargs=policy_kwargs, learning_rate=3e-2, n_episodes=8).learn(80)


def stock_ppo(env: Watched, constraint: Any) -> None:
    policy_kwargs = {"model": make_model(ends=0.2), "constraint": constraint, "min_new_tokens": env.min_new_tokens}
    stable_baselines3.PPO(
        CausalLMPolicy,
        TextVecEnv(env),
        learning_rate=3e-2,
        n_steps=10,
        batch_size=20,
        n_epochs=2,
        device="cpu",
        policy_kwargs=policy_kwargs,
    ).learn(80)


def maskable_ppo(env: Watched, constraint: Any) -> None:
    MaskablePPO(
        MaskableCausalLMPolicy,
        TextVecEnv(env),
        learning_rate=3e-2,
        n_steps=10,
        batch_size=20,
        n_epochs=2,
        device="cpu",
        policy_kwargs={"model": make_model(ends=0.2)},  # the masks are the environment's
    ).learn(80)


LEARNERS = [own_ppo, stock_ppo, maskable_ppo]


@pytest.mark.parametrize("learn", LEARNERS)
@given(
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.95]),
    minimum=st.integers(0, 3),
    forbidden=st.sets(st.integers(1, 299), max_size=5),
)
@settings(max_examples=8, deadline=None)
def test_no_learner_ever_samples_a_forbidden_token(
    learn: Callable[[Watched, Any], None], seed: int, share: float, minimum: int, forbidden: set[int]
) -> None:
    # A forbidden token may be the only one that the random masks allow: then it is left to them.
    parts = [RandomMasks(seed, share)] + ([ForbiddenTokens(forbidden)] if forbidden and share > 0.05 else [])
    env = watched_env(parts, min_new_tokens=minimum)
    torch.manual_seed(seed)
    learn(env, parts)
    assert env.sampled >= 80
    assert env.forbidden == 0


def test_a_policy_that_is_not_told_of_the_constraint_samples_forbidden_tokens() -> None:
    """The negative control: the environment takes every token."""
    env = watched_env([RandomMasks(0, 0.5)])
    policy = make_policy(env, model=make_model(ends=0.2))
    collect_texts(policy, env, 16)
    assert env.forbidden > 0.3 * env.sampled


def test_an_algorithm_whose_policy_is_not_told_of_the_constraint_is_refused() -> None:
    with pytest.raises(ValueError, match=r"constraint is None for the policy and .*RandomMasks.* for the environment"):
        own_ppo(watched_env([RandomMasks(0, 0.5)]), None)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_under_a_constraint_tokens_are_as_frequent_as_they_are_probable(kind: str, share: float) -> None:
    model = make_model(kind, ends=0.3, sharp=0.3)
    policy = make_policy(make_env(), model=model, constraint=RandomMasks(1, share), min_new_tokens=2)
    assert abs(frequencies_deviate(policy, 1)) < 4
    assert abs(frequencies_deviate(policy, 2)) < 4


CONSTRAINTS = ["random", "top-k", "top-p", "min-p"]


def constraints_of(name: str, kind: str) -> Any:
    if name == "random":
        return RandomMasks(2, 0.4)
    make, parameter = {"top-k": (ReferenceTopK, 20), "top-p": (ReferenceTopP, 0.8), "min-p": (ReferenceMinP, 0.1)}[name]
    return [make(make_model(kind, ends=0.2), parameter, device="cpu"), RandomMasks(3, 0.7)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_under_a_constraint_ratios_are_one_and_the_divergence_is_zero_at_the_start(kind: str, name: str) -> None:
    constraint = constraints_of(name, kind)
    env = watched_env(constraint, min_new_tokens=2)
    policy_kwargs = {"constraint": constraint, "min_new_tokens": 2}
    model = make_ppo(env, make_model(kind, ends=0.2), policy_kwargs=policy_kwargs, n_episodes=8)
    after_each_rollout(model, looks := Looks(model))
    model.learn(1)
    assert env.forbidden == 0
    assert looks.largest_log_ratio < 1e-5
    assert np.abs(model.buffer.log_ratio).max() < 1e-5  # to the reference
    # After the first update the policy has moved, and the divergence is still a finite number.
    model.learn(1)
    assert np.isfinite(model.buffer.log_ratio).all()
    assert np.abs(model.buffer.log_ratio).max() > 1e-3


class Looks:
    """The largest |log ratio| between sampling and scoring, right after a rollout."""

    def __init__(self, model: PPO) -> None:
        self.model = model
        self.largest_log_ratio = -1.0

    def __call__(self) -> None:
        buffer, policy = self.model.buffer, self.model.policy
        samples = buffer.pack(np.arange(buffer.n_episodes))
        log_prob = policy.evaluate_actions(samples.observations, samples.actions)[1].detach()
        if self.largest_log_ratio < 0:
            self.largest_log_ratio = float((log_prob - samples.old_log_prob).abs().max())


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_under_a_constraint_the_memo_changes_nothing(name: str) -> None:
    """Rows that grow, end and restart: with and without memo, and as one-context batches."""
    constraint = constraints_of(name, "llama")
    env = watched_env(constraint)
    memoised, plain = (
        make_policy(env, model=make_model("llama", ends=0.2), constraint=constraint, prefix_cache=choice)
        for choice in (True, False)
    )
    observation, _ = env.reset(seed=0)
    torch.manual_seed(0)
    for _ in range(20):
        tensors = tensors_of(observation)
        with torch.no_grad():
            actions, values, log_prob = memoised.forward(tensors)
            again = plain.evaluate_actions(tensors, actions)
            alone = [
                plain.evaluate_actions({key: x[row : row + 1] for key, x in tensors.items()}, actions[row : row + 1])[1]
                for row in range(4)
            ]
        torch.testing.assert_close(log_prob, again[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(log_prob, torch.cat(alone), rtol=0, atol=1e-5)
        torch.testing.assert_close(values, again[0], rtol=0, atol=1e-5)
        observation, *_ = env.step(actions.numpy())
    assert env.forbidden == 0


# ---- every text that is started counts -----------------------------------------------------------------------------

BUDGET = 12
TEXTS = 800


def policy_of_varied_lengths(n: int) -> tuple[CausalLMPolicy, object]:
    env = make_env(n, max_new_tokens=BUDGET, prompts=["a"], reward=length_of, max_prompt_tokens=4)
    return make_policy(env, model=make_model(ends=0.2, num_hidden_layers=1)), env


def one_at_a_time() -> np.ndarray:
    """Lengths of texts written one after the other by the model itself: what there is to be matched.

    All texts that are still running share a forward pass, which changes nothing: rows do not see each other.
    """
    policy, env = policy_of_varied_lengths(1)
    prompt = env.prompts[0].token_ids  # type: ignore[attr-defined]
    torch.manual_seed(1)
    running = torch.tensor([prompt] * TEXTS)
    lengths = []
    with torch.no_grad():
        for length in range(1, BUDGET + 1):
            logits = policy.lm.model(running).logits[:, -1]
            tokens = torch.multinomial(torch.softmax(logits, -1), 1)
            ended = (tokens[:, 0] == EOS) | (length == BUDGET)
            lengths += [length] * int(ended.sum())
            running = torch.cat([running, tokens], dim=1)[~ended]
            if len(running) == 0:
                break
    return np.array(lengths)


def all_that_were_started(rows: int, n_episodes: int) -> np.ndarray:
    policy, env = policy_of_varied_lengths(rows)
    spaces = env.single_observation_space, env.single_action_space  # type: ignore[attr-defined]
    buffer = EpisodeBuffer(0, *spaces, "cpu", n_envs=rows)
    torch.manual_seed(2)
    lengths = []
    for _ in range(TEXTS // n_episodes):
        lengths += [info["length"] for info in collect_episodes(policy, env, n_episodes, buffer)]  # type: ignore[arg-type]
    return np.array(lengths)


def the_first_to_finish(rows: int, n_episodes: int) -> np.ndarray:
    """The tempting mistake: let rows restart at once, and stop when enough texts are done."""
    policy, env = policy_of_varied_lengths(rows)
    torch.manual_seed(3)
    lengths: list[int] = []
    for _ in range(TEXTS // n_episodes):
        observation, _ = env.reset()  # type: ignore[attr-defined]
        done: list[int] = []
        age = np.zeros(rows, dtype=int)
        while len(done) < n_episodes:
            with torch.no_grad():
                actions = policy.forward(tensors_of(observation))[0].numpy()
            observation, _, terminated, _, _ = env.step(actions)  # type: ignore[attr-defined]
            age += 1
            done += age[terminated].tolist()
            age[terminated] = 0
        lengths += done[:n_episodes]
    return np.array(lengths)


def standard_errors_apart(left: np.ndarray, right: np.ndarray) -> float:
    return abs(left.mean() - right.mean()) / np.sqrt(left.var() / len(left) + right.var() / len(right))


@pytest.fixture(scope="module")
def expected_lengths() -> np.ndarray:
    lengths = one_at_a_time()
    assert lengths.std() > 2
    assert (lengths == BUDGET).any()
    return lengths


@pytest.mark.parametrize(("rows", "n_episodes"), [(8, 8), (4, 10)])
def test_texts_collected_side_by_side_are_as_long_as_texts_written_one_at_a_time(
    expected_lengths: np.ndarray, rows: int, n_episodes: int
) -> None:
    collected = all_that_were_started(rows, n_episodes)
    assert standard_errors_apart(collected, expected_lengths) < 3


def test_stopping_at_the_first_to_finish_favours_short_texts(expected_lengths: np.ndarray) -> None:
    """The negative control: the mistake that the comparison above is there to catch, and does."""
    assert standard_errors_apart(the_first_to_finish(8, 8), expected_lengths) > 6
