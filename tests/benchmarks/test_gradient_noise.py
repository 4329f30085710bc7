"""The benchmark of gradients: its statistics on gradients whose truth is known, and the gradients themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from learners import constant, make_env, make_model, prompt_of
from stable_baselines3.common.utils import explained_variance

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.rollouts.episode_buffer import EpisodeBuffer
from benchmarks.algorithms import gradient_noise
from benchmarks.algorithms.gradient_noise import ESTIMATORS, PLAIN, Estimator, interval, measure, signal
from benchmarks.algorithms.gradient_noise import signal_to_noise as snr

BY_KEY = {estimator.key: estimator for estimator in ESTIMATORS}
SPREAD = np.linspace(0.2, 2.0, 50)  # standard deviations of 50 independent components
NOISE = float((SPREAD**2).sum())


def gaussian_gradients(m: int, ratio: float, seed: int) -> np.ndarray:
    """[M, 50] with a mean of squared length ratio · NOISE."""
    mean = np.zeros(50)
    mean[3] = np.sqrt(ratio * NOISE)
    return mean + SPREAD * np.random.default_rng(seed).standard_normal((m, 50))


def length_of_prompt(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A score that the context gives away before the first token."""
    return [len(prompt) / 10 for prompt in prompts]


def even_or_odd(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A score about 0 at the start, so that the signal is clear without a baseline too."""
    return [2.0 * float(np.mean([token % 2 == 0 for token in ids])) - 1.0 for ids in completion_ids]


def nothing(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [0.0 for _ in completions]


class Rollouts:
    """Two small rollouts on a tiny model, and every estimator's gradients of them."""

    def __init__(self, n: int = 2, past: int = 64, **env_arguments: Any) -> None:
        self.env = make_env(8, group_size=4, **env_arguments)
        self.lm = make_model(ends=0.2)
        self.sampler = self.algorithm(PLAIN)
        self.past = gradient_noise._collect(self.sampler, past)
        gradient_noise.fit_value_head(self.sampler.policy, self.past)
        self.buffers = [gradient_noise._collect(self.sampler, 8) for _ in range(n)]

    def algorithm(self, estimator: Estimator) -> OnPolicyAlgorithm:
        return gradient_noise._algorithm(estimator, self.lm, self.env, 8, seed=0)

    def gradients(self, estimator: Estimator) -> np.ndarray:
        return gradient_noise.gradients(estimator, self.algorithm(estimator), self.buffers, self.past)


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    return Rollouts()


# ---- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_many_gaussian_gradients_show_the_ratio_that_they_were_made_with(ratio: float) -> None:
    g = gaussian_gradients(2000, ratio, seed=0)
    assert snr(g @ g.T)[0] == pytest.approx(ratio, rel=0.1)
    assert signal(g @ g.T)[0] == pytest.approx(ratio * NOISE, rel=0.1)


def test_without_signal_the_estimate_is_0_on_average_where_that_of_the_mean_gradient_is_not() -> None:
    many = [gaussian_gradients(12, 0.0, seed) for seed in range(300)]
    estimates = np.array([signal(g @ g.T)[0] for g in many])
    assert abs(estimates.mean()) < 4 * estimates.std() / np.sqrt(300)
    assert (estimates < 0).any()
    biased = np.array([(g.mean(axis=0) ** 2).sum() for g in many])
    assert biased.mean() == pytest.approx(NOISE / 12, rel=0.1)


@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.5])
def test_the_interval_covers_the_truth_19_times_of_20_or_more_and_is_not_vacuous(ratio: float) -> None:
    grams = [g @ g.T for g in (gaussian_gradients(48, ratio, seed) for seed in range(400))]
    found = np.array([interval(snr(gram)) for gram in grams])
    covered = ((found[:, 1] <= ratio) & (ratio <= found[:, 2])).mean()
    assert covered >= 0.92  # 0.95 less three standard errors of 400 tries
    assert np.mean(found[:, 2] - found[:, 1]) < 2 * 3.92 * found[:, 0].std()


def test_products_of_gradients_say_the_same_as_the_gradients_and_each_is_left_out_once() -> None:
    g = gaussian_gradients(7, 0.3, seed=1)
    h = g + gaussian_gradients(7, 0.1, seed=2)

    def direct(g: np.ndarray) -> float:
        m, mean = len(g), g.mean(axis=0)
        noise = ((g - mean) ** 2).sum() / (m - 1)
        return ((mean**2).sum() - noise / m) / noise

    left_out = [np.delete(np.arange(7), i) for i in range(7)]
    np.testing.assert_allclose(snr(g @ g.T), [direct(g), *(direct(g[rest]) for rest in left_out)], rtol=1e-9)
    different = [g[i] @ h[j] for i in range(7) for j in range(7) if i != j]
    expected = [np.mean(different), *(signal(g[rest] @ h[rest].T)[0] for rest in left_out)]
    np.testing.assert_allclose(signal(g @ h.T), expected, rtol=1e-9)


def test_an_interval_is_that_of_a_mean_by_the_textbook() -> None:
    x = np.array([1.0, 2.0, 4.0, 9.0])
    without = [np.delete(x, i).mean() for i in range(4)]
    margin = 1.96 * x.std(ddof=1) / 2
    assert interval(np.array([4.0, *without])) == pytest.approx([4.0, 4.0 - margin, 4.0 + margin])
    assert interval(np.array([4.0, *without[:3], np.nan])) is None


# ---- gradients ------------------------------------------------------------------------------------------------------


def plain_gradient(lm: torch.nn.Module, buffer: EpisodeBuffer, weights: list[torch.nn.Parameter]) -> np.ndarray:
    """−Σ score · log π(token) over tokens, one call of the Hugging Face model an episode."""
    loss = torch.zeros(())
    for episode in range(buffer.n_episodes):
        prompt = torch.tensor(prompt_of(buffer, episode))
        tokens = slice(buffer.starts[episode], buffer.starts[episode + 1])
        actions = torch.from_numpy(buffer.actions[tokens].astype(np.int64))
        logits = lm(torch.cat([prompt, actions])[None]).logits[0, len(prompt) - 1 : -1]
        log_prob = torch.log_softmax(logits, dim=-1)[torch.arange(len(actions)), actions]
        loss = loss - float(buffer.rewards[tokens][-1]) * log_prob.sum()
    found = torch.autograd.grad(loss / buffer.n_tokens, weights)
    return torch.cat([g.flatten() for g in found]).numpy()


def test_plain_reinforce_has_the_gradient_of_plain_autograd(rollouts: Rollouts) -> None:
    found = rollouts.gradients(PLAIN)
    weights = list(rollouts.sampler.policy.lm.parameters())
    expected = np.stack([plain_gradient(rollouts.lm, buffer, weights) for buffer in rollouts.buffers])
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_estimators_agree_where_theory_says_so_and_differ_otherwise(rollouts: Rollouts) -> None:
    found = {key: rollouts.gradients(estimator) for key, estimator in BY_KEY.items()}
    unwhitened = BY_KEY["ppo-fitted"]._replace(options={**BY_KEY["ppo-fitted"].options, "normalize_advantage": False})
    scale = np.abs(found[PLAIN.key]).max()
    # Zero values are no baseline; PPO at ratio 1 without whitening is A2C.
    np.testing.assert_allclose(found["reinforce-value-cold"], found[PLAIN.key], atol=1e-5 * scale)
    np.testing.assert_allclose(rollouts.gradients(unwhitened), found["a2c-fitted"], atol=1e-5 * scale)
    distinct = [key for key in found if key != "reinforce-value-cold"]
    for i, key in enumerate(distinct):
        for other in distinct[:i]:
            assert np.abs(found[key] - found[other]).max() > 1e-3 * scale, (key, other)


def test_the_running_mean_is_that_of_past_episodes_whatever_was_measured_before(rollouts: Rollouts) -> None:
    estimator = BY_KEY["reinforce"]
    both = rollouts.gradients(estimator)
    second = gradient_noise.gradients(estimator, rollouts.algorithm(estimator), rollouts.buffers[1:], rollouts.past)
    np.testing.assert_array_equal(both[1:], second)


def test_a_reward_of_zero_gives_a_gradient_of_zero_and_no_ratio() -> None:
    silent = Rollouts(reward=nothing)
    for estimator in ESTIMATORS:
        assert np.abs(silent.gradients(estimator)).max() < 1e-6, estimator.key
    row = measure(3, 8, 16, silent.lm, silent.env, [BY_KEY["rloo"]])["estimators"]["rloo"]
    assert row == {"algorithm": "rloo", "critic": None, "snr": None, "low": None, "high": None} | {
        "cosine": None,
        "minus": {},
    }


def test_the_fitted_critic_predicts_scores_of_new_episodes() -> None:
    # Enough prompts on both sides: 0.65 to 0.72 over twelve seeds (6 rollouts after 64 episodes gave 0.2 to 0.7).
    told = Rollouts(n=24, past=256, reward=length_of_prompt)
    values = np.concatenate([buffer.values for buffer in told.buffers])
    scores = np.concatenate([np.repeat(b.episode_sums(b.rewards), b.lengths) for b in told.buffers])
    assert explained_variance(values, scores) > 0.5


# ---- all of it ------------------------------------------------------------------------------------------------------


def small_measurement(seed: int, estimators: Sequence[Estimator] = ESTIMATORS) -> dict[str, Any]:
    env = make_env(16, group_size=4, reward=even_or_odd)
    return measure(8, 16, 32, make_model(ends=0.2), env, estimators, seed)["estimators"]


def test_a_measurement_compares_every_estimator_on_the_same_episodes() -> None:
    rows = small_measurement(seed=0)
    assert list(rows) == list(BY_KEY)
    assert rows[PLAIN.key]["cosine"] == pytest.approx([1.0, 1.0, 1.0], abs=1e-4)
    for key, row in rows.items():
        assert row["low"] <= row["snr"] <= row["high"]
        assert set(row["minus"]) == set(rows) - {key}
        for other, difference in row["minus"].items():
            assert difference[0] == pytest.approx(row["snr"] - rows[other]["snr"])
    # Paired: of two estimators that are the same, the difference is known better than either.
    assert rows["reinforce-value-cold"]["minus"][PLAIN.key] == pytest.approx([0.0, 0.0, 0.0], abs=1e-4)


def test_a_measurement_repeats_itself_with_the_same_seed_only() -> None:
    first, again, other = (small_measurement(seed, [PLAIN]) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_constant_reward_has_no_signal_for_those_who_compare_texts_with_each_other() -> None:
    found = Rollouts(reward=constant)
    for key in ("rloo", "grpo", "reinforce"):
        assert np.abs(found.gradients(BY_KEY[key])).max() < 1e-6, key
    assert np.abs(found.gradients(PLAIN)).max() > 1e-2


def test_two_rollouts_are_too_few_for_an_interval() -> None:
    with pytest.raises(ValueError, match="at least 3 rollouts"):
        measure(2)
