"""PPO and the shared on-policy loop: it learns, it logs, it stops when told to, and it says what is wrong."""

from __future__ import annotations

import copy
import itertools
import re
import threading
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from learners import (
    after_each_rollout,
    constant,
    counted_forwards,
    even_tokens,
    four_is_right,
    largest_difference,
    length_of,
    make_env,
    make_model,
    make_ppo,
    save_model,
    weights_of,
)
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from transformers import PreTrainedModel

from agents.algorithms.ppo import PPO
from agents.models.reference import Reference
from agents.objectives import losses
from agents.objectives.advantages import gae
from agents.objectives.kl import AdaptiveKL, FixedKL
from agents.rollouts.sb3_vec_env import make_vec_env
from agents.state.schedules import LearningRate
from benchmarks.logged import Rows
from text_env.rewards import RewardError


def logged(model: PPO, total_timesteps: int, **kwargs: Any) -> list[dict[str, Any]]:
    """Train, and return what each iteration logged."""
    memory = Rows()
    model.set_logger(Logger(folder=None, output_formats=[memory]))
    model.learn(total_timesteps, **kwargs)
    return memory.rows


# ---- learning ------------------------------------------------------------------------------------------------------


def one_layer() -> PreTrainedModel:
    """Enough to learn with, in half the time of two."""
    return make_model(num_hidden_layers=1)


def share_of_even_tokens(reward: Any, tokens: int) -> tuple[float, float]:
    """What so many tokens of training do to the share of even tokens: at first, and in the end."""
    env = make_env(32, reward=reward, metrics={"even": even_tokens}, max_new_tokens=6, min_new_tokens=6)
    model = make_ppo(env, one_layer(), n_episodes=32, batch_size=16, n_epochs=4, learning_rate=3e-3, kl_coef=0.0)
    rows = logged(model, tokens)
    return rows[0]["objective/even"], float(np.mean([row["objective/even"] for row in rows[-3:]]))


def test_ppo_learns_to_write_even_tokens_within_6000_tokens() -> None:
    before, after = share_of_even_tokens(even_tokens, 6_000)
    assert 0.3 < before < 0.7
    assert after > 0.9


ENOUGH = 3_000  # tokens after which the share has risen by 0.35 or more, if it is what is paid


def test_a_constant_reward_teaches_nothing() -> None:
    before, after = share_of_even_tokens(constant, ENOUGH)
    assert abs(after - before) < 0.2


def test_a_reward_of_other_texts_teaches_nothing() -> None:
    def of_somebody_else(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        scores = even_tokens(completion_ids=completion_ids, prompts=[], completions=[])
        return [scores[(i + 1) % len(scores)] for i in range(len(scores))]

    before, after = share_of_even_tokens(lambda prompts, completions, **kwargs: of_somebody_else(**kwargs), ENOUGH)
    assert abs(after - before) < 0.2


def test_the_value_function_learns_what_a_text_is_worth() -> None:
    env, lm = make_env(32, reward=length_of), make_model(ends=0.2, num_hidden_layers=1)
    model = make_ppo(env, lm, n_episodes=32, learning_rate=lambda _: 0.0, vf_coef=1.0, clip_range_vf=None)
    model.lr_schedule = lambda _: 3e-3
    for parameter in model.policy.lm.parameters():
        parameter.requires_grad_(False)  # the critic alone
    rows = logged(model, 3_000)
    assert rows[0]["train/explained_variance"] < 0.1
    assert rows[-1]["train/value_loss"] < rows[0]["train/value_loss"] / 2


def test_a_strong_kl_penalty_holds_the_policy_near_its_reference() -> None:
    kl = {}
    for coef in (0.0, 2.0):
        env = make_env(32, max_new_tokens=6, min_new_tokens=6)
        model = make_ppo(env, one_layer(), n_episodes=32, batch_size=8, learning_rate=3e-3, kl_coef=coef)
        kl[coef] = logged(model, 3_000)[-1]["objective/kl"]
    assert kl[2.0] < 0.3 * kl[0.0]


# ---- the update, step by step --------------------------------------------------------------------------------------


def test_the_whole_update_is_the_one_written_out_from_the_equations() -> None:
    """One epoch of one minibatch: GAE, whitening, surrogate, value loss, clipping and Adam, in twenty lines."""
    env = make_env(4)
    kwargs = {"n_epochs": 1, "batch_size": 8, "kl_coef": 0.3, "ent_coef": 0.01, "max_grad_norm": 0.05}
    model = make_ppo(env, learning_rate=1e-2, trust_region=None, **kwargs)
    twin = copy.deepcopy(model.policy)
    model.learn(1)
    buffer = model.buffer
    assert model.reference is not None
    samples = buffer.pack(np.arange(8))
    ref_log_prob = model.reference.log_probs(samples.observations, samples.actions).numpy()
    scores = np.zeros(buffer.n_tokens)
    scores[buffer.starts[1:] - 1] = [episode["r"] for episode in model.ep_info_buffer or []]
    rewards = scores - 0.3 * (samples.old_log_prob.numpy() - ref_log_prob)
    padded = buffer.padded(rewards), buffer.padded(samples.old_values.numpy()), np.zeros(8), buffer.mask, 1.0
    advantages, returns = gae(*padded, 0.98)[0], gae(*padded, 1.0)[1]
    advantages, returns = advantages[buffer.mask], torch.tensor(returns[buffer.mask]).float()
    advantages = torch.tensor((advantages - advantages.mean()) / advantages.std()).float()
    values, log_prob, entropy = twin.evaluate_actions(samples.observations, samples.actions)
    ratio = (log_prob - samples.old_log_prob).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    value_error = (values.flatten() - returns) ** 2
    loss = (-surrogate + 0.1 * 0.5 * value_error - 0.01 * entropy).mean()
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2, eps=1e-5)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
    assert float(norm) > 0.05  # so that clipping has something to do
    optimizer.step()
    assert largest_difference(weights_of(model.policy), weights_of(twin)) < 2e-5
    undone = torch.optim.Adam(twin.parameters(), lr=1e-2)
    undone.step()  # the control: one more step would be seen
    assert largest_difference(weights_of(model.policy), weights_of(twin)) > 1e-3


def test_advantages_are_whitened_over_the_whole_rollout_and_only_when_asked() -> None:
    model = make_ppo(normalize_advantage=True).learn(1)
    assert model.buffer.advantages.mean() == pytest.approx(0, abs=1e-5)
    assert model.buffer.advantages.std() == pytest.approx(1, abs=1e-3)
    plain = make_ppo(normalize_advantage=False, gae_lambda=1.0).learn(1)
    np.testing.assert_allclose(plain.buffer.advantages, plain.buffer.returns - plain.buffer.values, atol=1e-5)
    assert abs(plain.buffer.advantages.std() - 1) > 0.05


def test_a_missing_eos_costs_reward_but_never_score() -> None:
    rows, rewards = {}, {}
    for penalty in (None, 5.0):
        model = make_ppo(make_env(4, reward=length_of), missing_eos_penalty=penalty, kl_coef=0.0, n_episodes=12)
        after_each_rollout(model, lambda m=model, p=penalty: rewards.update({p: m.buffer.rewards.copy()}))
        [rows[penalty]] = logged(model, 1)
        last = model.buffer.starts[1:] - 1
    cut = model.buffer.lengths == 8
    cut &= model.buffer.actions[last] != 0
    assert 0 < cut.sum() < 12
    difference = rewards[None] - rewards[5.0]
    assert difference[last[cut]].tolist() == [5.0] * int(cut.sum())
    assert np.delete(difference, last[cut]).tolist() == [0.0] * (len(difference) - int(cut.sum()))
    for name in ("objective/scores", "rollout/ep_rew_mean", "completions/clipped_ratio"):
        assert rows[None][name] == rows[5.0][name]
    expected = rows[None]["objective/rlhf_reward"] - 5.0 * rows[5.0]["completions/clipped_ratio"]
    assert rows[5.0]["objective/rlhf_reward"] == pytest.approx(expected)


def test_target_kl_stops_an_update_early() -> None:
    calm = make_ppo(learning_rate=1e-2, n_epochs=10)
    calm.learn(1)
    assert calm._n_updates == 10
    stopped = make_ppo(learning_rate=1e-2, n_epochs=10, target_kl=0.001)
    with counted_forwards(stopped.policy.lm.backbone) as shapes:
        stopped.learn(1)
    assert 0 < stopped._n_updates < 3
    assert len([shape for shape in shapes if shape[1] > 1]) < 10
    assert largest_difference(weights_of(calm.policy), weights_of(stopped.policy)) > 1e-4


def test_dropout_is_off_even_while_training() -> None:
    model = make_ppo(model=make_model(ends=0.2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    rows = logged(model, 1)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    model.policy.train()
    assert not any(module.training for module in model.policy.lm.modules())


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    one, same, other = (weights_of(make_ppo(seed=seed).learn(60).policy) for seed in (1, 1, 2))
    assert largest_difference(one, same) == 0.0
    assert largest_difference(one, other) > 1e-4


def test_rollouts_and_updates_run_in_bfloat16() -> None:
    model = make_ppo(policy_kwargs={"model": make_model(ends=0.2).bfloat16()}, learning_rate=1e-2)
    before = weights_of(model.policy)
    rows = logged(model, 60)
    assert all(np.isfinite(row["train/loss"]) for row in rows)
    assert model.policy.lm.model.dtype == torch.bfloat16
    assert model.policy.value_head.weight.dtype == torch.float32
    assert largest_difference(before, weights_of(model.policy)) > 1e-3


# ---- logging, callbacks, schedules ---------------------------------------------------------------------------------

LOGGED = {
    "completions/clipped_ratio",
    "completions/mean_length",
    "objective/entropy",
    "objective/kl",
    "objective/kl_coef",
    "objective/kl_k2",
    "objective/kl_k3",
    "objective/rlhf_reward",
    "objective/scores",
    "rollout/ep_len_mean",
    "rollout/ep_rew_mean",
    "time/fps",
    "time/tokens_per_second",
    "time/total_timesteps",
    "train/approx_kl",
    "train/clip_fraction",
    "train/entropy_loss",
    "train/explained_variance",
    "train/grad_norm",
    "train/learning_rate",
    "train/loss",
    "train/n_updates",
    "train/policy_gradient_loss",
    "train/value_loss",
}


def test_the_logger_gets_every_name_of_the_design_and_finite_numbers() -> None:
    rows = logged(make_ppo(make_env(4, metrics={"gold_score": length_of})), 60)
    assert len(rows) >= 2
    for row in rows:
        assert set(row) >= LOGGED | {"objective/gold_score"}
        assert all(np.isfinite(value) for value in row.values())


def test_what_is_logged_of_a_rollout_is_what_happened_in_it() -> None:
    model = make_ppo(make_env(4, reward=length_of), kl_coef=0.5)
    [row] = logged(model, 1)
    lengths = model.buffer.lengths
    cut = (lengths == 8) & (model.buffer.actions[model.buffer.starts[1:] - 1] != 0)
    assert row["objective/scores"] == row["rollout/ep_rew_mean"] == lengths.mean()
    assert row["completions/mean_length"] == row["rollout/ep_len_mean"] == lengths.mean()
    assert row["completions/clipped_ratio"] == cut.mean()
    assert row["time/total_timesteps"] == lengths.sum() == model.num_timesteps
    assert row["objective/kl"] == pytest.approx(model.buffer.log_ratio.sum() / 8, abs=1e-6)
    assert row["objective/rlhf_reward"] == pytest.approx(lengths.mean() - 0.5 * row["objective/kl"], abs=1e-5)
    assert row["objective/entropy"] == pytest.approx(-model.buffer.log_probs.mean())
    assert row["train/n_updates"] == 2


def test_of_a_task_with_a_right_answer_the_verdicts_and_the_lengths_are_logged() -> None:
    model = make_ppo(make_env(4, reward=four_is_right), n_episodes=40)
    [row] = logged(model, 1)
    lengths = model.buffer.lengths
    right = lengths == 4
    assert 0 < right.sum() < 40
    assert row["objective/correct"] == row["objective/scores"] == pytest.approx(right.mean())
    assert row["objective/well_formed"] == pytest.approx(np.mean(lengths % 2 == 0))
    assert "objective/answer" not in row
    assert row["completions/mean_length_right"] == 4
    assert row["completions/mean_length_wrong"] == pytest.approx(lengths[~right].mean())


def test_no_mean_is_logged_of_texts_that_are_not_there() -> None:
    def none_is_right(completion_ids: list[list[int]], log_extra: Callable[..., None], **_: Any) -> list[float]:
        log_extra("correct", [0.0 for _ in completion_ids])
        return [0.0 for _ in completion_ids]

    [row] = logged(make_ppo(make_env(4, reward=none_is_right)), 1)
    assert row["completions/mean_length_wrong"] == row["completions/mean_length"]
    assert "completions/mean_length_right" not in row
    [ordinary] = logged(make_ppo(), 1)
    assert not {"completions/mean_length_wrong", "completions/mean_length_right", "objective/correct"} & set(ordinary)


class Recorder(BaseCallback):
    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.events: list[str] = []
        self.steps = 0
        self.stop_after = stop_after

    def _on_training_start(self) -> None:
        self.events.append("training start")

    def _on_rollout_start(self) -> None:
        self.events.append("rollout start")

    def _on_step(self) -> bool:
        self.steps += 1
        assert self.num_timesteps == self.model.num_timesteps
        return self.steps != self.stop_after

    def _on_rollout_end(self) -> None:
        self.events.append("rollout end")

    def _on_training_end(self) -> None:
        self.events.append("training end")


def test_callbacks_hear_of_everything_in_sb3s_order() -> None:
    recorder = Recorder()
    model = make_ppo()
    model.learn(40, callback=recorder)
    middle = recorder.events[1:-1]
    assert recorder.events[0] == "training start"
    assert recorder.events[-1] == "training end"
    assert middle == ["rollout start", "rollout end"] * (len(middle) // 2)
    assert recorder.steps >= len(middle) // 2


def test_a_callback_can_stop_the_training_in_the_middle_of_a_rollout() -> None:
    recorder, model = Recorder(stop_after=3), make_ppo()
    before = weights_of(model.policy)
    model.learn(1_000, callback=recorder)
    assert recorder.events == ["training start", "rollout start", "training end"]
    assert largest_difference(before, weights_of(model.policy)) == 0.0
    model.learn(1)  # and it can go on afterwards
    assert largest_difference(before, weights_of(model.policy)) > 0.0


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")  # SB3's bar is tqdm's rich one
def test_the_progress_bar_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    make_ppo().learn(30, progress_bar=True)
    captured = capfd.readouterr()
    assert re.search(r"(\d+)/\1 ", captured.out + captured.err)  # the last rollout overshoots, and the bar with it


def test_training_ends_with_the_rollout_in_which_its_tokens_are_spent() -> None:
    model = make_ppo()
    model.learn(50)
    assert 50 <= model.num_timesteps < 50 + 8 * 8
    once = model.num_timesteps
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps >= once + 20
    model.learn(1)
    assert model.num_timesteps <= 64


def test_schedules_run_from_one_to_zero_and_never_below() -> None:
    asked: list[float] = []

    def schedule(progress: float) -> float:
        asked.append(progress)
        return 1e-3 * progress

    rows = logged(make_ppo(learning_rate=schedule), 100)
    assert min(asked) > 0.0
    assert max(asked) == 1.0
    rates = [row["train/learning_rate"] for row in rows]
    assert rates == sorted(rates, reverse=True)
    # Each is that of the middle of its rollout, the last of which ends where the tokens do.
    ends = [0, *(min(row["time/total_timesteps"], 100) for row in rows)]
    assert rates == pytest.approx([1e-3 * (1 - (a + b) / 200) for a, b in itertools.pairwise(ends)])


def test_a_run_of_one_rollout_learns_although_its_rate_falls_to_zero() -> None:
    model = make_ppo(learning_rate=LearningRate(1e-3, "linear", 0.0))
    before = weights_of(model.policy)
    model.learn(1, log_interval=0)
    assert largest_difference(before, weights_of(model.policy)) > 1e-4


# ---- the KL coefficient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "factor"),
    # β ← β (1 + K e) with K = 0.5 and e = clip(KL / 4 − 1, −0.2, 0.2)
    [(4.4, 1 + 0.5 * 0.1), (40.0, 1 + 0.5 * 0.2), (-1.0, 1 - 0.5 * 0.2), (4.0, 1.0)],
)
def test_an_adaptive_kl_coefficient_moves_against_the_error(kl: float, factor: float) -> None:
    controller = AdaptiveKL(0.1, target=4.0, gain=0.5)
    controller.update(kl)
    assert controller.coef == pytest.approx(0.1 * factor)


def test_an_adaptive_kl_coefficient_finds_its_target_within_thirty_rollouts() -> None:
    # A policy whose KL is inversely proportional to β: 12 nats at 0.04, so 6 at 0.08.
    controller = AdaptiveKL(0.04, target=6.0)
    for _ in range(30):
        controller.update(kl=0.48 / controller.coef)
    assert 0.48 / controller.coef == pytest.approx(6.0, rel=0.05)


def test_a_fixed_kl_coefficient_does_not_move() -> None:
    controller = FixedKL(0.1)
    controller.update(kl=100.0)
    assert controller.coef == 0.1


@pytest.mark.parametrize(("target", "direction"), [(1e-6, 1), (1e6, -1)])
def test_ppo_adapts_its_kl_coefficient_to_the_target(target: float, direction: int) -> None:
    rows = logged(make_ppo(kl_coef=0.1, kl_target=target, learning_rate=1e-2), 150)
    coefs = [row["objective/kl_coef"] for row in rows]
    assert coefs[0] == 0.1
    assert np.sign(coefs[-1] - coefs[1]) == direction


def test_a_kl_coefficient_of_zero_still_measures_the_kl() -> None:
    rows = logged(make_ppo(kl_coef=0.0, learning_rate=1e-2), 100)
    assert rows[-1]["objective/kl"] > 0.01
    assert rows[-1]["objective/kl_k2"] > 0.01
    assert rows[-1]["objective/kl_k3"] > 0.01
    assert rows[-1]["objective/rlhf_reward"] == pytest.approx(rows[-1]["objective/scores"], abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_reward_pays_the_estimator_that_was_asked_for_and_the_log_names_each(estimator: str) -> None:
    reference = Reference(make_ppo(model=make_model(sharp=0.1)).policy.lm)
    model = make_ppo(make_env(4, reward=length_of), kl_coef=0.5, kl_estimator=estimator, reference=reference)
    [row] = logged(model, 1)
    x = model.buffer.log_ratio.astype(np.float64)
    by_hand = {"k1": x, "k2": 0.5 * x**2, "k3": np.exp(-x) - 1 + x}
    for name, values in by_hand.items():
        logged_as = "objective/kl" if name == "k1" else f"objective/kl_{name}"
        assert row[logged_as] == pytest.approx(values.sum() / 8, rel=1e-4)
    paid = 0.5 * by_hand[estimator].sum() / 8
    assert row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"] - paid, rel=1e-4)
    assert len({round(values.sum(), 2) for values in by_hand.values()}) == 3  # so that a wrong one would be seen


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_kl_target_is_of_k1_per_episode_whatever_is_paid(estimator: str) -> None:
    reference = Reference(make_ppo(model=make_model(sharp=0.1)).policy.lm)
    model = make_ppo(kl_coef=0.1, kl_target=5.0, kl_estimator=estimator, reference=reference)
    seen: list[float] = []
    update = model.kl.update
    model.kl.update = lambda kl: seen.append(kl) or update(kl)  # type: ignore[method-assign,func-returns-value]
    [row] = logged(model, 1)
    assert seen == [pytest.approx(row["objective/kl"])]
    assert seen[0] == pytest.approx(model.buffer.log_ratio.sum() / 8, rel=1e-4)
    assert abs(seen[0] - row["objective/kl_k3"]) > 0.1
    assert model.kl.coef == pytest.approx(0.1 * (1 + 0.5 * np.clip(seen[0] / 5.0 - 1, -0.2, 0.2)))


def test_a_checkpoint_carries_the_estimator(tmp_path: Any) -> None:
    make_ppo(model=save_model(tmp_path / "model"), kl_estimator="k2").save(tmp_path / "checkpoint")
    loaded = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu")
    assert loaded.kl_estimator == loaded.buffer.kl_estimator == "k2"


def test_an_estimator_that_would_be_ignored_or_does_not_exist_is_refused() -> None:
    class PenaltyInTheLoss(PPO):
        kl_in_reward = False

    with pytest.raises(ValueError, match="where PenaltyInTheLoss has none: its penalty is a term of its loss"):
        PenaltyInTheLoss("CausalLMPolicy", make_env(), policy_kwargs={"model": make_model()}, kl_estimator="k3")
    with pytest.raises(ValueError, match="Expected kl_estimator to be one of"):
        make_ppo(kl_estimator="k0")


def test_a_kl_target_needs_a_coefficient_to_start_from() -> None:
    with pytest.raises(ValueError, match=r"Expected a kl_coef > 0 to start from, got 0\.0"):
        make_ppo(kl_target=5.0, kl_coef=0.0)


def test_another_model_can_be_the_reference(tmp_path: Any) -> None:
    reference = Reference.load(save_model(tmp_path / "other"), n_tokens=300, device="cpu")
    [row] = logged(make_ppo(model=make_model(sharp=0.1), reference=reference), 1)
    assert abs(row["objective/kl"]) > 0.1


# ---- arguments -----------------------------------------------------------------------------------------------------


def test_an_environment_may_be_given_in_three_ways(tmp_path: Any) -> None:
    import text_env  # noqa: F401  registers the name

    options = {"tokenizer": make_env(1).tokenizer, "prompts": ["a", "b"], "reward": even_tokens, "max_new_tokens": 4}
    for env in (
        gym.make_vec("TextRLHF-v0", num_envs=2, **options),
        make_vec_env("TextRLHF-v0", n_envs=2, env_kwargs=options),
        make_env(2),
    ):
        model = PPO("CausalLMPolicy", env, policy_kwargs={"model": make_model()}, n_episodes=4, device="cpu")
        assert model.n_envs == 2
        model.learn(1)
        assert model.buffer.n_episodes == 4


def test_an_environment_that_is_no_text_environment_is_refused() -> None:
    env = gym.make_vec("CartPole-v1", num_envs=1)
    with pytest.raises(ValueError, match=r"Expected env to be a registered name \('TextRLHF-v0'\)"):
        PPO("CausalLMPolicy", env)
    env.close()


@pytest.mark.parametrize("name", ["n_episodes", "batch_size", "n_epochs"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"Expected {name} >= 1, got 0"):
        make_ppo(**{name: 0})


def test_a_number_of_tokens_that_is_none_is_refused() -> None:
    for wrong in ("100", None, float("nan")):
        with pytest.raises(ValueError, match=f"Expected total_timesteps to be a finite number, got {wrong!r}"):
            make_ppo().learn(wrong)  # type: ignore[arg-type]


def test_a_kl_target_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a target KL > 0 nats per episode, got 0"):
        make_ppo(kl_target=0.0)


def test_the_policy_takes_what_the_environment_knows() -> None:
    env = make_env(4, min_new_tokens=3)
    model = make_ppo(env, make_model(ends=0.9))
    assert (model.policy.distribution.min_new_tokens, model.policy.distribution.eos_token_ids) == (3, (0,))
    assert model.policy.tokenizer is env.tokenizer
    model.learn(1)
    assert model.buffer.lengths.min() == 4  # EOS comes after three tokens at the earliest, and then soon


def test_a_batch_may_be_larger_than_the_rollout_or_not_divide_it() -> None:
    for batch_size, steps in ((100, 1), (3, 3)):
        model = make_ppo(batch_size=batch_size, n_epochs=1)
        calls: list[int] = []
        backward = model._backward
        model._backward = lambda batch, b=backward, c=calls: c.append(len(batch)) or b(batch)  # type: ignore[method-assign,misc]
        model.learn(1)
        assert len(calls) == steps
        assert sum(calls) == 8


def test_ppos_loss_at_ratio_one_is_the_policy_gradient_and_the_value_loss() -> None:
    model = make_ppo(ent_coef=0.0, vf_coef=0.5, clip_range_vf=None)
    model.learn(1)
    samples = model.buffer.pack(np.arange(8))
    values, log_prob, entropy = model.policy.evaluate_actions(samples.observations, samples.actions)
    samples = samples._replace(old_log_prob=log_prob.detach())
    loss, means = model.loss(samples, values.flatten(), log_prob, entropy)
    value_loss = losses.value_loss(values.flatten(), samples.old_values, samples.returns, None)
    expected = losses.policy_gradient(log_prob, samples.advantages) + 0.5 * value_loss
    ours = torch.autograd.grad(loss.mean(), model.policy.value_head.weight, retain_graph=True)[0]
    theirs = torch.autograd.grad(expected.mean(), model.policy.value_head.weight, retain_graph=True)[0]
    torch.testing.assert_close(ours, theirs)
    weight = model.policy.lm.model.get_input_embeddings().weight
    ours = torch.autograd.grad(loss.mean(), weight, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected.mean(), weight)[0], atol=1e-6, rtol=1e-4)
    assert float(means["approx_kl"].abs().max()) == 0.0
    assert float(means["clip_fraction"].max()) == 0.0


def test_a_gradient_that_is_not_finite_is_refused_before_it_reaches_the_weights() -> None:
    class Broken(PPO):
        def loss(self, *args: Any) -> Any:
            loss, logged = super().loss(*args)
            return loss * float("nan"), logged

    env = make_env()
    sizes = {"n_episodes": 4, "batch_size": 4, "max_bad_updates": 1}
    model = Broken("CausalLMPolicy", env, policy_kwargs={"model": make_model()}, **sizes)
    before = {name: x.clone() for name, x in model.policy.state_dict().items()}
    with pytest.raises(FloatingPointError, match="The loss is nan"):
        model.learn(10)
    assert all(torch.equal(x, before[name]) for name, x in model.policy.state_dict().items())


def test_a_wrapped_environment_is_refused_rather_than_unwrapped() -> None:
    wrapped = gym.wrappers.vector.TransformReward(make_env(), lambda reward: -reward)
    with pytest.raises(ValueError, match="got it wrapped in TransformReward"):
        PPO("CausalLMPolicy", wrapped, policy_kwargs={"model": make_model()})


def test_the_progress_bar_gives_the_terminal_back_when_learning_fails() -> None:
    def failing(prompts: list[str], **_: Any) -> list[float]:
        raise RuntimeError("no score")

    others = set(threading.enumerate())
    model = PPO("CausalLMPolicy", make_env(reward=failing), policy_kwargs={"model": make_model()}, n_episodes=4)
    with pytest.raises(RewardError, match="no score"):
        model.learn(10, progress_bar=True)
    refreshing = [t for t in set(threading.enumerate()) - others if "Refresh" in type(t).__name__]
    for thread in refreshing:
        thread.join(timeout=10)  # it is asleep between two refreshes
    assert not any(thread.is_alive() for thread in refreshing)


# ---- the critic that it has unless told otherwise ------------------------------------------------------------------


def test_the_critic_is_a_decoder_of_its_own() -> None:
    model = make_ppo()
    assert model.policy_kwargs["separate_critic"] is True
    assert model.policy.critic is not None


def test_the_critic_starts_as_the_reward_model_where_the_reward_is_one() -> None:
    env = gym.make_vec("TextRLHF-v0", num_envs=4)
    assert PPO("CausalLMPolicy", env, n_episodes=4, batch_size=2).policy_kwargs["separate_critic"] == "builtin"
    limited = gym.make_vec("TextRLHF-v0", num_envs=4, reward_timeout=30.0)  # the same, in time
    assert PPO("CausalLMPolicy", limited, n_episodes=4, batch_size=2).policy_kwargs["separate_critic"] == "builtin"


@pytest.mark.parametrize("reward", ["sentiment", "builtin+0.1*sentiment"])
def test_the_critic_starts_as_the_policy_where_the_reward_is_something_else(reward: str) -> None:
    env = gym.make_vec("TextRLHF-v0", num_envs=4, reward=reward)
    assert PPO("CausalLMPolicy", env, n_episodes=4, batch_size=2).policy_kwargs["separate_critic"] is True


def test_the_critic_is_a_head_beside_an_adapter_and_where_one_is_asked_for() -> None:
    assert make_ppo(policy_kwargs={"separate_critic": False}).policy.critic is None
    assert make_ppo(policy_kwargs={"lora": {"r": 2, "target_modules": "all-linear"}}).policy.critic is None


def test_the_critic_predicts_a_distribution_only_as_a_copy() -> None:
    env = gym.make_vec("TextRLHF-v0", num_envs=4)
    model = PPO("CausalLMPolicy", env, n_episodes=4, batch_size=2, policy_kwargs={"value_bins": (-3.0, 3.0, 11)})
    assert model.policy_kwargs["separate_critic"] is True
