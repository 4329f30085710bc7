"""The trust region of PPO: an update never goes further than it may, whatever the learning rate is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learners import largest_difference, make_env, make_model, make_ppo, weights_of

from agents.algorithms.engine import Engine
from agents.algorithms.ppo import PPO
from agents.algorithms.snapshot import Weights
from agents.algorithms.trust_region import LEAST_BY_ENTROPY, TOLERANCE, TrustRegion
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer


def distance(model: PPO) -> float:
    """KL(π_old ‖ π) in nats per episode, from all texts of the last rollout: the mean of ρ − 1 − log ρ."""
    buffer = model.buffer
    samples = buffer.pack(np.arange(buffer.n_episodes))
    with torch.no_grad():
        _, log_prob, _ = model.policy.evaluate_actions(samples.observations, samples.actions)
    log_ratio = (log_prob - samples.old_log_prob).double()
    return float((torch.expm1(log_ratio) - log_ratio).sum()) / buffer.n_episodes


def actor(model: PPO) -> Weights:
    """A copy of the actor's weights."""
    return Weights(model.policy.optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("learning_rate", [1e-3, 1e-2, 1e-1])
def test_an_update_stays_within_the_limit_whatever_the_learning_rate(learning_rate: float) -> None:
    free = make_ppo(make_env(32), learning_rate=learning_rate, n_episodes=32, batch_size=8)
    free.learn(1)
    assert distance(free) > 0.1
    held = make_ppo(make_env(32), learning_rate=learning_rate, n_episodes=32, batch_size=8, trust_region=0.05)
    for _ in range(3):
        held.learn(1)
        assert 0.005 < distance(held) <= TOLERANCE * 0.05


@pytest.mark.parametrize("sharp", [1.0, 2.0])
def test_an_update_stays_within_the_entropy_of_the_texts_however_large_the_limit_is(sharp: float) -> None:
    sampled = []
    for limit in (None, 1e6):
        torch.manual_seed(0)
        model = make_ppo(
            make_env(32),
            model=make_model(sharp=sharp),
            learning_rate=1e-1,
            n_episodes=32,
            batch_size=8,
            trust_region=limit,
        )
        model.learn(1)
        entropy = -float(model.buffer.log_probs.sum()) / 32
        assert entropy > LEAST_BY_ENTROPY
        if limit is None:
            assert distance(model) > 2 * entropy
        else:
            assert 0.1 * entropy < distance(model) <= TOLERANCE * entropy
        sampled.append(entropy)
    assert sampled[0] == sampled[1]


def test_a_policy_that_seems_to_be_sure_of_all_it_writes_may_still_be_updated() -> None:
    class Sure(TrustRegion):
        """Of whose texts the rollout has only the likeliest ones."""

        def entropy(self, buffer: EpisodeBuffer) -> float:
            return 0.0

    model = make_ppo(make_env(32), learning_rate=1e-2, n_episodes=32, batch_size=8)
    region = Sure(model.policy, actor(model), 8.0, model.engine, None)
    model.learn(1)
    assert distance(model) > 2 * LEAST_BY_ENTROPY
    _, kept = region.hold(model.buffer)
    assert 0 < kept < 1
    assert LEAST_BY_ENTROPY / 2 < distance(model) <= TOLERANCE * LEAST_BY_ENTROPY


def test_an_update_of_which_no_part_is_within_the_limit_is_taken_back() -> None:
    model = make_ppo(make_env(32), learning_rate=1e-2, n_episodes=32, batch_size=8)
    before = weights_of(model.policy.lm)
    region = TrustRegion(model.policy, actor(model), 1e-3, model.engine, None)
    model.learn(1)
    model.buffer.log_probs = model.buffer.log_probs + np.float32(1.0)  # from which the policy is far before any update
    assert region.hold(model.buffer)[1] == 0
    assert largest_difference(before, weights_of(model.policy.lm)) == 0


def test_what_rounding_alone_amounts_to_does_not_count() -> None:
    class Rounded(PPO):
        """Whose log-probabilities of sampling and of training differ, as in bfloat16."""

        def train(self) -> None:
            noise = np.random.default_rng(0).normal(0.0, 0.02, self.buffer.n_tokens)
            self.buffer.log_probs = self.buffer.log_probs + noise.astype(np.float32)
            self.before_any_step = distance(self)
            super().train()

    env = make_env(32)
    options: dict[str, Any] = {"learning_rate": 1e-2, "n_episodes": 32, "batch_size": 32, "trust_region": 1e-4}
    model = make_ppo(env, algorithm=Rounded, **options)
    model.learn(1, log_interval=0)
    assert model.before_any_step > 2 * TOLERANCE * 1e-4  # so that no part of an update is within the limit itself
    assert 0 < model.logger.name_to_value["train/update_kept"] < 1
    assert distance(model) < model.before_any_step + 1e-3


def test_an_update_that_stays_within_the_limit_is_not_touched() -> None:
    ends = []
    for limit in (None, 100.0):
        model = make_ppo(trust_region=limit)
        model.learn(60)
        ends.append(weights_of(model.policy))
    assert largest_difference(*ends) == 0


def test_it_goes_back_to_the_copies_that_undo_a_bad_update_or_to_its_own() -> None:
    ends = []
    for undone in (0, 3):  # with no such copies, and with them
        torch.manual_seed(0)
        model = make_ppo(make_env(32), learning_rate=1e-2, n_episodes=32, batch_size=8, trust_region=0.05)
        model.max_bad_updates = undone
        model.learn(300, log_interval=0)
        assert model.before is None
        assert model.logger.name_to_value["train/update_kept"] < 1
        ends.append(weights_of(model.policy))
    assert largest_difference(*ends) == 0


def test_the_learning_rate_follows_what_was_taken_back_and_recovers() -> None:
    model = make_ppo(make_env(32), learning_rate=1e-2, n_episodes=32, batch_size=8, trust_region=0.05)
    model.learn(1)
    assert model.step_factor == 0.5  # the update went too far by much more
    model.trust_region = 1e6
    model.learn(1)
    actor, critic = (group["lr"] for group in model.policy.optimizer.param_groups)
    assert (actor, critic) == (pytest.approx(0.5e-2), pytest.approx(1e-2))  # the critic's is left alone
    assert model.step_factor == pytest.approx(0.6)


def test_of_many_texts_every_so_manyth_is_measured() -> None:
    model = make_ppo(make_env(32), learning_rate=1e-2, n_episodes=96, batch_size=8, trust_region=None)
    region = TrustRegion(model.policy, actor(model), 1.0, model.engine, None)
    model.learn(1)
    log_ratios = []
    for episode in range(0, 96, 3):
        samples = model.buffer.pack(np.array([episode]))
        log_prob = model.policy.evaluate_log_probs(samples.observations, samples.actions)
        log_ratios.append((log_prob.detach() - samples.old_log_prob).double())
    expected = sum(float((torch.expm1(x) - x).sum()) for x in log_ratios) / 32
    assert region.distance(model.buffer) == pytest.approx(expected, rel=1e-4)


def test_two_processes_measure_the_texts_that_one_would() -> None:
    model = make_ppo(make_env(32), n_episodes=96, batch_size=8)
    before, sampled = actor(model), model.new_buffer()
    collect_episodes(model.policy, model.vector_env, 96, sampled)
    with torch.no_grad():  # an update
        for parameter in model.policy.lm.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)

    def measured(episodes: np.ndarray, engine: Engine) -> tuple[float, float]:
        buffer = model.new_buffer()
        buffer.extend(sampled, episodes)
        buffer.finalize()
        region = TrustRegion(model.policy, before, 1.0, engine, None)
        return region.distance(buffer), region.entropy(buffer)

    class OneOfTwo(Engine):
        """Has one half of the texts; what is added up is its own part."""

        def total(self, value: float) -> float:
            return 96.0 if value == 48 else value

    parts = [measured(half, OneOfTwo(model.policy)) for half in np.split(np.arange(96), 2)]
    whole = measured(np.arange(96), model.engine)
    assert (np.array(parts[0]) != parts[1]).all()
    distances, entropies = zip(*parts, strict=True)
    assert np.mean(distances) == pytest.approx(whole[0], rel=1e-6)
    assert sum(entropies) == pytest.approx(whole[1], rel=1e-6)  # each is a process's own part of the mean


def test_the_distance_is_the_mean_over_episodes_of_summed_divergences() -> None:
    model = make_ppo(make_env(8), learning_rate=1e-2)
    region = TrustRegion(model.policy, actor(model), 1.0, model.engine, 64)
    model.learn(1)
    assert region.distance(model.buffer) == pytest.approx(distance(model), rel=1e-4)


def test_weights_that_are_no_numbers_are_taken_back() -> None:
    model = make_ppo(model=make_model(ends=0.2))
    model.learn(1)
    region = TrustRegion(model.policy, actor(model), 0.05, model.engine, 4096)
    with torch.no_grad():
        for parameter in model.policy.lm.model.parameters():
            parameter += 1e4 * torch.randn_like(parameter)
    region.hold(model.buffer)
    assert region.distance(model.buffer) < np.inf


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_not_above_zero_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected trust_region .*> 0, got"):
        make_ppo(trust_region=limit)


def test_a_warm_up_of_the_critic_is_no_update_of_the_policy() -> None:
    model = make_ppo(critic_warmup_episodes=8, trust_region=1e-9)
    model.learn(1, log_interval=0)
    assert not {"train/update_kl", "train/update_kept"} & set(model.logger.name_to_value)
    assert model.step_factor == 1.0
    model.learn(1, log_interval=0)
    assert model.logger.name_to_value["train/update_kl"] > 0


def test_a_trust_region_that_is_switched_off_leaves_the_learning_rate_as_it_is() -> None:
    model = make_ppo(learning_rate=1e-2, trust_region=1e-4)
    model.learn(1, log_interval=0)
    assert model.logger.name_to_value["train/step_factor"] == model.step_factor == 0.5
    model.trust_region = None
    model.learn(1, log_interval=0)
    assert model.step_factor == 1.0
    assert model.policy.optimizer.param_groups[0]["lr"] == 1e-2
