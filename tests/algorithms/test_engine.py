"""The engine: several processes with their own episodes take the step that one process with all of them takes."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from learners import four_is_right, largest_difference, make_env, make_model, make_ppo, weights_of
from stable_baselines3.common.callbacks import BaseCallback

from agents.algorithms.dapo import DAPO
from agents.algorithms.engine import Engine
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.rollouts.collector import collect_episodes

HALVES = (np.array([0, 1, 2, 3, 4]), np.array([5, 6, 7]))


class Meeting:
    """Where threads that stand for processes exchange numbers and gradients."""

    def __init__(self, n: int) -> None:
        self._barrier = threading.Barrier(n, timeout=60)
        self._said: list[Any] = [None] * n

    def everybody(self, rank: int, said: Any) -> list[Any]:
        self._said[rank] = said
        self._barrier.wait()
        heard = list(self._said)
        self._barrier.wait()
        return heard


class OfSeveral(Engine):
    """One of several processes, as an engine for them would be written."""

    def __init__(self, policy: Any, meeting: Meeting, rank: int) -> None:
        super().__init__(policy)
        self._meeting, self._rank = meeting, rank
        self.backwards: list[bool] = []

    def total(self, value: float) -> float:
        return float(sum(self._meeting.everybody(self._rank, float(value))))

    def mean(self, values: np.ndarray) -> float:
        return float(np.concatenate(self._meeting.everybody(self._rank, values)).mean())

    def largest(self, value: float) -> float:
        return max(self._meeting.everybody(self._rank, float(value)))

    def names(self, names: Iterable[str]) -> list[str]:
        return sorted(set().union(*self._meeting.everybody(self._rank, set(names))))

    def give_up(self, error: BaseException) -> None:
        nothing = sum(p.sum() for group in self.policy.optimizer.param_groups for p in group["params"])
        self.backward(0.0 * nothing, last=True)

    def micro_batches(self, parts: Sequence[np.ndarray]) -> list[tuple[np.ndarray, float]]:
        missing = max(self._meeting.everybody(self._rank, len(parts))) - len(parts)
        return [*((part, 1.0) for part in parts), *[(parts[-1][:1], 0.0)] * missing]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        super().backward(loss, last)
        self.backwards.append(last)
        if last:
            for group in self.policy.optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.stack(self._meeting.everybody(self._rank, p.grad)).sum(dim=0)


def collected(**kwargs: Any) -> PPO:
    """PPO whose rollout of eight episodes is in the buffer."""
    model = make_ppo(model=make_model(ends=0.2).double(), batch_size=8, n_epochs=1, learning_rate=1e-2, **kwargs)
    _, callback = model._setup_learn(1, None)
    assert model.collect_rollouts(callback)
    model.policy.set_training_mode(True)
    return model


def one_step(model: OnPolicyAlgorithm, minibatch: np.ndarray) -> dict[str, float]:
    means = model._backward(minibatch)
    means["grad_norm"] = model.engine.clip(model.max_grad_norm)
    model.engine.step()
    return means


@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 4096])
def test_two_processes_with_their_own_episodes_take_the_step_of_one_with_all(
    micro_batch_tokens: int, max_grad_norm: float
) -> None:
    """Five episodes here and three there: other token weights, other numbers of micro-batches."""
    alone = collected(micro_batch_tokens=micro_batch_tokens, max_grad_norm=max_grad_norm)
    meeting = Meeting(2)
    before, models = weights_of(alone.policy), []
    for rank in range(2):
        model = copy.copy(alone)
        model.policy = copy.deepcopy(alone.policy)
        model.engine = OfSeveral(model.policy, meeting, rank)
        models.append(model)
    expected = one_step(alone, np.arange(8))
    with ThreadPoolExecutor(2) as pool:
        means = list(pool.map(one_step, models, HALVES))

    assert largest_difference(before, weights_of(alone.policy)) > 1e-3
    for model, logged in zip(models, means, strict=True):
        assert largest_difference(weights_of(model.policy), weights_of(alone.policy)) < 1e-8
        assert logged == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert means[0] == means[1]  # the number that `stop_early` decides on, to the last bit
    backwards = [model.engine.backwards for model in models]
    assert backwards[0] == backwards[1]  # in step with each other, and the last one says so
    assert backwards[0] == [False] * (len(backwards[0]) - 1) + [True]
    assert micro_batch_tokens > 1 or len(backwards[0]) == 5


def test_without_the_others_the_step_is_another() -> None:
    """The negative control of the test above."""
    alone, half = collected(), collected()
    one_step(alone, np.arange(8))
    one_step(half, HALVES[0])
    assert largest_difference(weights_of(half.policy), weights_of(alone.policy)) > 1e-4


class Elsewhere(Engine):
    """As if another process had brought the same numbers, and all means were 7."""

    def total(self, value: float) -> float:
        return 2 * float(value)

    def mean(self, values: np.ndarray) -> float:
        assert len(values) > 0
        return 7.0


class PPOElsewhere(PPO):
    engine_class = Elsewhere


def test_an_algorithm_takes_the_engine_that_its_class_names() -> None:
    model = make_ppo()
    assert type(model.engine) is Engine
    model = PPOElsewhere("CausalLMPolicy", make_env(), policy_kwargs={"model": make_model()}, device="cpu")
    assert type(model.engine) is Elsewhere


def test_what_is_counted_and_logged_is_everybodys() -> None:
    model = PPOElsewhere(
        "CausalLMPolicy", make_env(), policy_kwargs={"model": make_model()}, n_episodes=8, device="cpu", seed=0
    )
    seen: list[float] = []
    model.kl.update = seen.append  # type: ignore[method-assign]
    logged: dict[str, Any] = {}
    dump = model._dump_logs

    def keep_then_dump(iteration: int) -> None:
        logged.update(model.logger.name_to_value)
        dump(iteration)

    model._dump_logs = keep_then_dump  # type: ignore[method-assign]
    model.learn(1)
    assert seen == [7.0]
    assert model.num_timesteps == 2 * model.buffer.n_tokens
    rollout = {"scores", "kl", "kl_k2", "kl_k3", "rlhf_reward"}
    assert {name: logged[f"objective/{name}"] for name in rollout} == dict.fromkeys(rollout, 7.0)
    assert logged["objective/entropy"] == -7.0
    assert logged["objective/scores_std"] == math.sqrt(7.0)
    assert logged["completions/mean_length"] == logged["completions/clipped_ratio"] == 7.0
    assert logged["train/explained_variance"] == 0.0  # 1 - 7 / 7


class OneMore(Engine):
    """As if another process had one right text of one token, with a metric of its own."""

    def total(self, value: float) -> float:
        return float(value) + 1

    def names(self, names: Iterable[str]) -> list[str]:
        return sorted({*names, "completions/mean_length_right", "objective/theirs"})


def test_a_process_without_right_texts_logs_the_mean_length_of_those_of_the_others() -> None:
    model = make_ppo(make_env(reward=four_is_right, max_new_tokens=2))
    model._setup_learn(1)
    episodes = collect_episodes(model.policy, model.vector_env, 8, model.buffer)
    model.buffer.finalize()
    model.engine = OneMore(model.policy)
    model._log_rollout(episodes)
    logged = model.logger.name_to_value
    assert logged["objective/correct"] == 1 / 9
    assert logged["objective/theirs"] == 1.0
    assert logged["completions/mean_length_right"] == 1.0
    assert logged["completions/mean_length_wrong"] == (model.buffer.n_tokens + 1) / 9


def test_advantages_are_whitened_by_everybodys_mean() -> None:
    model = PPOElsewhere(
        "CausalLMPolicy", make_env(), policy_kwargs={"model": make_model()}, n_episodes=8, device="cpu", seed=0
    )
    model.learn(1)
    whitened = model.buffer.advantages
    model.estimate(model.buffer)
    np.testing.assert_allclose(whitened, (model.buffer.advantages - 7.0) / np.sqrt(7.0), rtol=1e-5)


def test_the_running_mean_of_reinforce_is_that_of_everybodys_returns() -> None:
    class Reinforce(REINFORCE):
        engine_class = Elsewhere

    model = Reinforce("CausalLMPolicy", make_env(), policy_kwargs={"model": make_model()}, device="cpu", seed=0)
    model.learn(1)
    assert model.mean_return == 7.0


class CountsTokens(BaseCallback):
    """:param goes_on: False stops the training in the first step."""

    def __init__(self, goes_on: bool) -> None:
        super().__init__()
        self.goes_on = goes_on
        self.tokens = 0

    def _on_step(self) -> bool:
        self.tokens += self.locals["n_tokens"]
        return self.goes_on


def test_a_callback_that_stops_one_process_stops_all_at_the_same_count() -> None:
    """One stops in its first step; the other finishes its rollout, hears of it, and stops as well."""
    meeting = Meeting(2)
    models, counters = [make_ppo() for _ in range(2)], [CountsTokens(True), CountsTokens(False)]
    callbacks = []
    for rank, (model, counter) in enumerate(zip(models, counters, strict=True)):
        model.engine = OfSeveral(model.policy, meeting, rank)
        callbacks.append(model._setup_learn(1, counter)[1])
    with ThreadPoolExecutor(2) as pool:
        goes_on = list(pool.map(lambda model, callback: model.collect_rollouts(callback), models, callbacks))
    assert goes_on == [False, False]
    assert counters[0].tokens > 8
    assert counters[1].tokens == 4  # a token in each of the four rows
    assert [model.num_timesteps for model in models] == [counters[0].tokens + 4] * 2


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_callback_that_stops_one_process_of_dapo_stops_all(stopped: int) -> None:
    meeting = Meeting(2)
    models, callbacks = [], []
    counters = [CountsTokens(rank != stopped) for rank in range(2)]
    for rank in range(2):
        model: Any = make_ppo(make_env(group_size=2), algorithm=DAPO, batch_size=None)
        model.engine = OfSeveral(model.policy, meeting, rank)
        models.append(model)
        callbacks.append(model._setup_learn(10**6, counters[rank])[1])
    with ThreadPoolExecutor(2) as pool:
        goes_on = list(pool.map(lambda model, callback: model.collect_rollouts(callback), models, callbacks))
    assert goes_on == [False, False]
    assert [model.num_timesteps for model in models] == [counters[0].tokens + counters[1].tokens] * 2


def test_a_gradient_that_is_not_finite_is_not_applied() -> None:
    model = collected()
    before = weights_of(model.policy)
    model._backward(np.arange(8))
    next(iter(model.policy.parameters())).grad[0] = math.nan  # type: ignore[index]
    model.engine.clip(1.0)
    with pytest.raises(FloatingPointError, match=r"norm is nan; the weights are as before .* Expected a finite one"):
        model.engine.step()
    assert largest_difference(before, weights_of(model.policy)) == 0.0


def test_clipping_says_how_long_the_gradient_was_and_leaves_one_of_the_norm_asked_for() -> None:
    model = collected()
    model._backward(np.arange(8))
    gradients = [p.grad for p in model.policy.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients))
    assert norm > 0.05
    assert model.engine.clip(0.05) == pytest.approx(norm, rel=1e-5)
    assert math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients)) == pytest.approx(0.05, rel=1e-4)
