"""What PPO and GRPO do with the ratio: bounds, the ratio of a text, clipped weights; PPO's imitation of good texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learners import even_tokens, largest_difference, make_env, make_model, make_ppo, weights_of

from agents.algorithms.a2c import A2C
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.objectives.losses import clipped_surrogate, policy_gradient, sequence_log_ratio
from agents.rollouts.episode_buffer import EpisodeSamples


def collected(algorithm: type[OnPolicyAlgorithm] = PPO, **kwargs: Any) -> Any:
    env = kwargs.pop("env", None) or make_env(group_size=2)
    model: Any = make_ppo(env, algorithm=algorithm, batch_size=8, n_epochs=1, **kwargs)
    _, callback = model._setup_learn(1, None)
    assert model.collect_rollouts(callback)
    return model


def samples_with(model: Any, ratios: list[float], advantages: list[float]) -> tuple[EpisodeSamples, torch.Tensor]:
    """A batch of the first episodes with as many tokens, and what the policy would have to say for these ratios."""
    buffer, count, n = model.buffer, len(ratios), 0
    while buffer.starts[n] < count:
        n += 1
    samples = buffer.pack(np.arange(n))
    log_ratio, advantage = torch.zeros(len(samples.actions)), torch.zeros(len(samples.actions))
    log_ratio[:count], advantage[:count] = torch.tensor(ratios).log(), torch.tensor(advantages)
    return samples._replace(advantages=advantage), samples.old_log_prob + log_ratio


@pytest.mark.parametrize("algorithm", [PPO, GRPO])
def test_the_clip_fraction_counts_what_is_outside_either_bound(algorithm: type[OnPolicyAlgorithm]) -> None:
    model = collected(algorithm, clip_range=0.2, clip_range_high=0.5)
    samples, log_prob = samples_with(model, [0.7, 0.9, 1.4, 1.6], [1.0, 1.0, 1.0, 1.0])
    _, logged = model.surrogate_loss(samples, log_prob)
    assert logged["clip_fraction"][:4].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert logged["clip_fraction"][4:].sum() == 0
    model.clip_range_high = None
    assert model.surrogate_loss(samples, log_prob)[1]["clip_fraction"][:4].tolist() == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("algorithm", [PPO, GRPO])
def test_the_bounds_are_those_of_the_arguments(algorithm: type[OnPolicyAlgorithm]) -> None:
    model = collected(algorithm, clip_range=0.1, clip_range_high=0.3, dual_clip=2.0)
    samples, log_prob = samples_with(model, [2.0, 0.5, 5.0], [1.0, -1.0, -1.0])
    loss, _ = model.surrogate_loss(samples, log_prob)
    torch.testing.assert_close(loss[:3], torch.tensor([-1.3, 0.9, 2.0]))


def test_gspo_clips_whole_texts_and_measures_how_many_of_their_tokens() -> None:
    model = collected(GRPO, surrogate="gspo", clip_range=0.2)
    first = int(model.buffer.lengths[0])
    ratios = [1.5, *[1.0] * (first - 1)] if first > 1 else [1.5]
    samples, log_prob = samples_with(model, [*ratios, 3.0], [1.0] * (first + 1))
    loss, logged = model.surrogate_loss(samples, log_prob)
    expected = clipped_surrogate(
        sequence_log_ratio(log_prob - samples.old_log_prob, samples.lengths), samples.advantages, 0.2
    )
    torch.testing.assert_close(loss, expected)
    of_first = 1.5 ** (1 / first)
    assert logged["clip_fraction"][:first].tolist() == [float(of_first > 1.2)] * first
    torch.testing.assert_close(loss[:first], torch.full((first,), -min(of_first, 1.2)))


def test_where_all_texts_have_one_token_gspo_takes_the_steps_of_ppo() -> None:
    after = []
    for surrogate in ("clip", "gspo"):
        model = make_ppo(make_env(max_new_tokens=1), surrogate=surrogate, n_epochs=3, learning_rate=1e-2)
        after.append(weights_of(model.learn(16).policy))
    assert largest_difference(*after) == 0
    longer = []
    for surrogate in ("clip", "gspo"):  # the control
        model = make_ppo(make_env(), surrogate=surrogate, n_epochs=3, learning_rate=1e-2)
        longer.append(weights_of(model.learn(16).policy))
    assert largest_difference(*longer) > 1e-5


@pytest.mark.parametrize("surrogate", ["clip", "gspo", "cispo"])
def test_before_the_first_step_every_surrogate_has_the_gradient_of_a2c(surrogate: Any) -> None:
    gradients = []
    same = {"gae_lambda": 0.95, "gae_lambda_value": 1.0, "policy_kwargs": {"separate_critic": False}}
    off = {"normalize_advantage": False, "clip_range_vf": None}
    for model in (collected(A2C, **same), collected(PPO, surrogate=surrogate, **off, **same)):
        assert model._backward(np.arange(8))
        gradients.append({name: p.grad.clone() for name, p in model.policy.named_parameters() if p.grad is not None})
    assert max(float(g.abs().max()) for g in gradients[0].values()) > 1e-3
    assert largest_difference(*gradients) < 1e-6


def test_cispo_in_the_loop_is_reinforce_weighted_by_clipped_ratios() -> None:
    model = collected(GRPO, surrogate="cispo", clip_range=1.0, clip_range_high=0.5)
    samples, log_prob = samples_with(model, [0.1, 4.0], [1.0, -2.0])
    loss, logged = model.surrogate_loss(samples, log_prob)
    expected = policy_gradient(log_prob[:2], torch.tensor([0.1, -3.0]))
    torch.testing.assert_close(loss[:2], expected)
    assert logged["clip_fraction"][:2].tolist() == [0.0, 1.0]


def test_target_kl_stops_an_update_of_grpo_too() -> None:
    for target, epochs in ((None, 6), (1e-6, 2)):  # the second epoch is where it is seen, and counts as SB3 counts it
        model: Any = make_ppo(make_env(group_size=2), algorithm=GRPO, n_epochs=6, batch_size=8, target_kl=target)
        model.learning_rate = 1e-2
        model.learn(1)
        assert model._n_updates == epochs


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"surrogate": "ppo"}, r"one of \('clip', 'gspo', 'cispo'\), got 'ppo'"),
        ({"clip_range": -0.1}, "clip_range >= 0, got -0.1"),
        ({"clip_range_high": -0.1}, "clip_range_high >= 0, got -0.1"),
        ({"dual_clip": 1.0}, "dual_clip > 1, got 1.0"),
        ({"dual_clip": 3.0, "surrogate": "cispo"}, "dual_clip=None with surrogate='cispo', got 3.0"),
        ({"positive_lm_coef": -1.0}, "positive_lm_coef >= 0, got -1.0"),
    ],
)
def test_what_is_out_of_range_is_refused(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_ppo(**argument)


# ---- imitation of good texts ---------------------------------------------------------------------------------------


def test_the_tokens_of_good_texts_are_imitated_and_no_others() -> None:
    model = collected(positive_lm_coef=0.5, positive_score=0.6)
    plain = collected()
    good = model.buffer.scores >= 0.6
    assert 0 < good.sum() < 8
    samples = model.buffer.pack(np.arange(8))
    log_prob = samples.old_log_prob - 0.05
    loss, logged = model.policy_loss(samples, log_prob)
    without, names = plain.policy_loss(plain.buffer.pack(np.arange(8)), log_prob)
    token_is_good = torch.from_numpy(np.repeat(good, model.buffer.lengths))
    torch.testing.assert_close(loss - without, torch.where(token_is_good, -0.5 * log_prob, 0.0))
    torch.testing.assert_close(logged["positive_lm_loss"], torch.where(token_is_good, -log_prob, 0.0))
    assert "positive_lm_loss" not in names
    [scores] = [[info["r"] for info in model.ep_info_buffer]]
    np.testing.assert_allclose(model.buffer.scores, scores, rtol=1e-6)


def test_imitation_alone_teaches_to_write_what_scored_well() -> None:
    class NoAdvantages(PPO):
        def estimate(self, buffer: Any) -> None:
            super().estimate(buffer)
            buffer.advantages[:] = 0

    shares = []
    for coefficient in (0.0, 1.0):
        env = make_env(32, reward=even_tokens, max_new_tokens=6, min_new_tokens=6)
        lm = make_model(num_hidden_layers=1)
        model: Any = make_ppo(
            env, lm, NoAdvantages, n_episodes=32, batch_size=16, n_epochs=4, learning_rate=3e-3, kl_coef=0.0,
            normalize_advantage=False, vf_coef=0.0, positive_lm_coef=coefficient, positive_score=0.8,
        )  # fmt: skip
        model.learn(3_000)
        shares.append(np.mean([info["r"] for info in model.ep_info_buffer]))
    assert shares[1] > shares[0] + 0.2
