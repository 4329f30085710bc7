"""Invariant 6: what is sampled is what is scored, and every text that is started counts, the long ones too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import EOS, length_of, make_env, make_model, make_policy, observation_of, tensors_of

from agents.causal_lm import sample
from agents.collector import collect_episodes
from agents.episode_buffer import EpisodeBuffer
from agents.policy import CausalLMPolicy

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


# ---- every text that is started counts -----------------------------------------------------------------------------

BUDGET = 24
TEXTS = 800


def policy_of_varied_lengths(n: int) -> tuple[CausalLMPolicy, object]:
    env = make_env(n, max_new_tokens=BUDGET, prompts=["a"], reward=length_of, max_prompt_tokens=4)
    return make_policy(env, model=make_model(ends=0.12)), env


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
