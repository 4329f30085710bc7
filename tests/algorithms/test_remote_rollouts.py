"""Training on texts that another program has written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import after_each_rollout, largest_difference, make_env, save_model, weights_of
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from transformers import AutoModelForCausalLM
from vllm_stand_in import StandIn, served

from agents.algorithms.dapo import DAPO
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.vineppo import VinePPO
from agents.rollouts.backend import Continuation, Request, Sampling
from agents.rollouts.vllm_servers import NoServerLeft, VllmServers
from benchmarks.logged import Rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@contextmanager
def stand_ins(model: str, n: int = 1, **options: Any) -> Iterator[list[StandIn]]:
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    with ExitStack() as stack:
        yield [stack.enter_context(served(StandIn(loaded, **options))) for _ in range(n)]


def learner(
    model: str, servers: Sequence[StandIn], algorithm: Any = PPO, env: Any = None, patience: float = 0.0, **kwargs: Any
) -> tuple[OnPolicyAlgorithm, Rows]:
    """An algorithm with eight episodes a rollout, and its log."""
    rollouts = VllmServers([server.url for server in servers], patience=patience) if servers else "local"
    policy_kwargs = {"model": model, **kwargs.pop("policy_kwargs", {})}
    defaults = {"n_episodes": 8, "batch_size": 4, "n_epochs": 2, "seed": 0, "device": "cpu", "rollouts": rollouts}
    env = make_env(8) if env is None else env
    made = algorithm("CausalLMPolicy", env, policy_kwargs=policy_kwargs, **{**defaults, **kwargs})
    rows = Rows()
    made.set_logger(Logger(None, [rows]))
    return made, rows


def test_ppo_learns_from_texts_that_a_server_writes(model: str) -> None:
    with stand_ins(model, 2) as servers:
        ppo, rows = learner(model, servers, n_episodes=16, learning_rate=3e-3, kl_coef=0.01, env=make_env(16))
        looked: list[np.ndarray] = []
        after_each_rollout(ppo, lambda: looked.append(ppo.buffer.behaviour_log_probs - ppo.buffer.log_probs))
        ppo.learn(1500)
    scores = [row["objective/scores"] for row in rows.rows]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.15
    for row in rows.rows:
        assert row["mismatch/log_prob_max"] < 1e-4
        assert row["mismatch/effective_sample_size"] == pytest.approx(1, abs=1e-6)
        assert row["mismatch/lag"] == row["mismatch/masked"] == row["mismatch/truncated"] == 0
        assert row["train/ratio_first_max"] < 1e-4
    assert max(np.abs(difference).max() for difference in looked) > 0  # two programs, and two numbers


@pytest.mark.parametrize("algorithm", [GRPO, DAPO, VinePPO])
def test_other_algorithms_learn_from_them_alike(algorithm: Any, model: str) -> None:
    groups = {} if algorithm is VinePPO else {"group_size": 4}
    with stand_ins(model) as servers:
        made, rows = learner(model, servers, algorithm, make_env(8, **groups))
        before = weights_of(made.policy)
        made.learn(60)
    assert largest_difference(before, weights_of(made.policy)) > 1e-5
    assert rows.rows[-1]["mismatch/log_prob_max"] < 1e-4
    assert rows.rows[-1]["mismatch/lag"] == 0


def test_values_are_the_critics_for_the_tokens_that_were_replayed(model: str) -> None:
    with stand_ins(model) as servers:
        ppo, _ = learner(model, servers)
        ppo.learn(1)  # from here on values are not zero

        def look() -> None:
            samples = ppo.buffer.pack(np.arange(8))
            with torch.no_grad():
                values, log_probs, _ = ppo.policy.evaluate_actions(samples.observations, samples.actions)
            assert float((values.flatten() - samples.old_values).abs().max()) < 1e-5
            assert float((log_probs - samples.old_log_prob).abs().max()) < 1e-5
            assert float(samples.old_values.abs().max()) > 1e-3

        after_each_rollout(ppo, look)
        ppo.learn(1, reset_num_timesteps=False)
    assert ppo._iterations == 2


def test_a_training_on_replayed_texts_ends_with_the_weights_of_one_that_wrote_them(model: str) -> None:
    """A backend that returns what the policy itself would have written, in the same rollouts."""
    written: list[list[Continuation]] = []

    def note(algorithm: OnPolicyAlgorithm) -> None:
        buffer = algorithm.buffer
        parts = [np.split(array, buffer.starts[1:-1]) for array in (buffer.actions, buffer.log_probs)]
        written.append(
            [Continuation(ids.astype(np.int64), log.astype(float), 1) for ids, log in zip(*parts, strict=True)]
        )

    class Again:
        def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Continuation]:
            torch.set_rng_state(generator)  # seeds were drawn, which the policy would not have done
            return written.pop(0)

        def take_weights(self, policy: Any, version: int) -> None:
            pass

    states: list[dict[str, Any]] = []
    local, _ = learner(model, [])
    after_each_rollout(local, lambda: note(local))
    local.learn(1)
    states.append(weights_of(local.policy))
    generator = torch.get_rng_state()
    replayed, rows = learner(model, [], rollouts=Again())
    replayed.learn(1)
    states.append(weights_of(replayed.policy))
    assert rows.rows[0]["mismatch/log_prob_max"] < 1e-4
    assert largest_difference(*states) < 1e-6


def test_advantages_are_multiplied_by_truncated_importance_weights(model: str) -> None:
    """A program that says other log-probabilities than it samples with: π_old / μ = exp(−distort)."""
    cases: list[tuple[float, dict[str, Any], float]] = [
        (0.3, {}, np.exp(-0.3)),
        (-0.5, {}, np.exp(0.5)),
        (-1.0, {}, 2.0),  # truncated
        (-1.0, {"importance_cap": 1.5}, 1.5),
        (-1.0, {"importance_cap": None}, 1.0),
        (-1.0, {"importance_bound": 3.0}, 2.0),
        (-1.0, {"importance_bound": 2.0}, 0.0),
        (1.0, {"importance_bound": 2.0}, 0.0),
    ]
    for distort, options, factor in cases:
        advantages = []
        for wrong in (0.0, distort):
            with stand_ins(model, distort=wrong) as servers:
                ppo, rows = learner(model, servers, **options)
                with pytest.warns(UserWarning, match="log-probabilities of whoever writes") if wrong else _nothing():
                    ppo.learn(1)
            advantages.append(ppo.buffer.advantages)
        assert np.abs(advantages[0]).max() > 0.1
        assert np.abs(advantages[1] - factor * advantages[0]).max() < 1e-4, (distort, options)
        row = rows.rows[0]
        assert row["mismatch/log_prob_mean"] == pytest.approx(abs(distort), abs=1e-5)
        assert row["mismatch/masked"] == float(factor == 0)
        assert row["mismatch/effective_sample_size"] == pytest.approx(1, abs=1e-4)  # the same factor everywhere
        if options.get("importance_cap", 2.0) is not None:
            assert row["mismatch/truncated"] == float(np.exp(-distort) > options.get("importance_cap", 2.0))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def test_with_a_lag_the_next_rollout_is_written_while_this_one_is_learned_from(model: str) -> None:
    with stand_ins(model) as [server]:
        ppo, rows = learner(model, [server], max_lag=1)
        during: list[int] = []
        train = ppo.train

        def slowly() -> None:
            begun = 8 * (len(during) + 1)  # the texts of this rollout and of those before it
            # After the last rollout there is nothing to wait for; otherwise a busy machine is waited for.
            deadline = time.monotonic() + (60 if ppo.num_timesteps < 200 else 1)
            while len(server.completions) < begun + 8 and time.monotonic() < deadline:
                time.sleep(0.01)
            during.append(len(server.completions) - begun)
            train()

        ppo.train = slowly  # type: ignore[method-assign]
        ppo.learn(200)
    lags = [row["mismatch/lag"] for row in rows.rows]
    assert len(lags) >= 4
    assert lags == [0] + [1] * (len(lags) - 1)
    assert during[:-1] == [8] * (len(lags) - 1)
    assert during[-1] == 0  # no rollout follows the last one
    assert rows.rows[-1]["mismatch/log_prob_max"] > 1e-3  # of weights that are one update older


def test_a_greater_lag_saves_sending_weights_and_is_never_exceeded(model: str) -> None:
    for max_lag, sent in ((0, 6), (1, 6), (2, 3), (3, 2)):
        with stand_ins(model) as [server]:
            ppo, rows = learner(model, [server], max_lag=max_lag)
            ppo.learn(10**6, callback=lambda *_, ppo=ppo: ppo._iterations < 6)
            reloads = [path for path, _ in server.asked if path == "/collective_rpc"]
        lags = [row["mismatch/lag"] for row in rows.rows]
        assert len(lags) == 6
        assert max(lags) == max_lag
        # The seventh rollout, which was begun, may have had weights of its own.
        assert sent <= len(reloads) <= sent + 1


def test_a_run_whose_server_is_killed_goes_on_with_the_others_and_loses_no_episode(model: str) -> None:
    with stand_ins(model, 2) as servers:
        ppo, rows = learner(model, servers, max_lag=1)
        servers[0].dies_after = 12
        ppo.learn(200)
    assert servers[0].is_dead
    assert all(len(row) for row in rows.rows)
    assert ppo.num_timesteps >= 200
    assert len(servers[1].completions) > 8 * (len(rows.rows) - 2)
    assert ppo.buffer.n_episodes == 8


class SaveAtStart(BaseCallback):
    """Saves the algorithm at the start of rollouts, as runs do."""

    def __init__(self, path: Path, number: int | None = None) -> None:
        super().__init__()
        self.path, self.number, self.starts = path, number, 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.starts += 1
        if self.number in (None, self.starts):
            self.model.save(self.path)


@pytest.mark.parametrize("max_lag", [0, 1])
def test_a_run_that_nobody_writes_for_stops_with_an_error_and_goes_on_from_its_state(
    max_lag: int, model: str, tmp_path: Path
) -> None:
    with stand_ins(model) as [server]:
        whole, _ = learner(model, [server], max_lag=max_lag)
        whole.learn(300)
        stopped, rows = learner(model, [server], max_lag=max_lag)
        server.dies_after = len(server.completions) + 20
        with pytest.raises(NoServerLeft):
            stopped.learn(300, SaveAtStart(tmp_path / "saved"))
        server.restart()
        again = PPO.load(tmp_path / "saved", make_env(8), device="cpu", rollouts=VllmServers(server.url))
        assert again._iterations == len(rows.rows) == 2
        again.learn(300 - again.num_timesteps, reset_num_timesteps=False)
    assert again.num_timesteps >= 300
    if max_lag == 0:  # otherwise the texts that could not be written ahead are others now
        assert again.num_timesteps == whole.num_timesteps
        assert largest_difference(weights_of(whole.policy), weights_of(again.policy)) == 0.0


def test_an_address_in_a_checkpoint_must_be_given_again(model: str, tmp_path: Path) -> None:
    with stand_ins(model) as [server]:
        PPO("CausalLMPolicy", make_env(8), rollouts=server.url, policy_kwargs={"model": model}, n_episodes=8).save(
            tmp_path / "saved"
        )
        with pytest.raises(ValueError, match=r"\['rollouts'\] can't be written down and must be given again"):
            PPO.load(tmp_path / "saved", make_env(8))
        assert PPO.load(tmp_path / "saved", make_env(8), rollouts=server.url).rollouts == server.url


def test_with_a_lag_a_resumed_run_has_what_was_written_ahead(model: str, tmp_path: Path) -> None:
    with stand_ins(model) as [server]:
        whole, rows = learner(model, [server], max_lag=1)
        whole.learn(300, SaveAtStart(tmp_path / "saved", 3))
        asked = len(server.completions)
        again = PPO.load(tmp_path / "saved", make_env(8), device="cpu", rollouts=VllmServers(server.url))
        again.set_logger(Logger(None, [resumed := Rows()]))
        again.learn(300 - again.num_timesteps, reset_num_timesteps=False)
        asked_again = len(server.completions) - asked
    assert again.num_timesteps == whole.num_timesteps
    assert largest_difference(weights_of(whole.policy), weights_of(again.policy)) == 0.0
    assert [row["mismatch/lag"] for row in resumed.rows] == [1] * (len(rows.rows) - 2)
    assert asked_again == asked - 3 * 8  # the texts of the third rollout are in the checkpoint, too


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": "all-linear"}], ids=["all weights", "adapter"])
def test_the_same_servers_write_for_a_training_that_goes_back_and_for_another_one(
    lora: Any, model: str, tmp_path: Path
) -> None:
    """Both have the version of the weights that the servers have already, and other weights."""
    with stand_ins(model) as [server]:
        ppo, _ = learner(model, [server], policy_kwargs={"lora": lora}, learning_rate=1e-2)
        ppo.learn(1)
        ppo.save(tmp_path / "saved")
        ppo.learn(1, reset_num_timesteps=False)
        back = PPO.load(tmp_path / "saved", make_env(8), device="cpu", rollouts=ppo.rollouts, seed=1)
        other, _ = learner(model, [], policy_kwargs={"lora": lora}, rollouts=ppo.rollouts)
        for algorithm in (back, other, other):
            algorithm.set_logger(Logger(None, [rows := Rows()]))
            algorithm.learn(1, reset_num_timesteps=False)
            assert rows.rows[0]["mismatch/lag"] == 0
            assert rows.rows[0]["mismatch/log_prob_max"] < 1e-4


def test_a_policy_that_writes_itself_can_not_be_behind_itself(model: str) -> None:
    with pytest.raises(ValueError, match=r"max_lag=0 with rollouts='local', got 2"):
        learner(model, [], max_lag=2)


def test_several_processes_are_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.algorithms.on_policy.launched", lambda: (0, 2))
    with pytest.raises(ValueError, match="rollouts='local' with several processes"):
        learner(model, [], rollouts="http://localhost:1")


def test_an_environment_by_its_name_has_a_row_for_every_text_that_a_server_writes() -> None:
    for rollouts, rows in (("local", 64), ("http://localhost:1", 96)):
        made = GRPO("CausalLMPolicy", "TextRLHF-v0", n_episodes=96, rollouts=rollouts)
        assert made.n_envs == rows
