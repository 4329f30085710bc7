"""Invariant 9: a run that was killed and resumed is the run that was never stopped, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import make_env, save_model

from agents.algorithms.ppo import PPO

ROLLOUTS = 3  # before the kill, and as many after it


class Killed(Exception):
    """Stands for SIGKILL."""


def new_run(model: str, **kwargs: Any) -> PPO:
    defaults = {"n_episodes": 6, "batch_size": 3, "n_epochs": 2, "learning_rate": 1e-3, "seed": 4, "device": "cpu"}
    policy_kwargs = {"model": model, **kwargs.pop("policy_kwargs", {})}
    return PPO("CausalLMPolicy", make_env(4), policy_kwargs=policy_kwargs, **{**defaults, **kwargs})


def record(run: PPO, log: list[dict[str, Any]], stop_after: int | None = None) -> PPO:
    """Write down what each iteration logs, except for times; stop after some."""
    dump = run._dump_logs

    def write_down(iteration: int) -> None:
        dump_to = run.logger.dump
        run.logger.dump = lambda step=0: log.append(  # type: ignore[method-assign]
            {name: value for name, value in run.logger.name_to_value.items() if "time" not in name}
        )
        dump(iteration)
        run.logger.dump = dump_to  # type: ignore[method-assign]
        run.logger.dump(step=run.num_timesteps)
        if len(log) == stop_after:
            raise Killed

    run._dump_logs = write_down  # type: ignore[method-assign]
    return run


def bits(run: PPO) -> dict[str, Any]:
    """Everything that the future depends on."""
    tensors = dict(run.policy.state_dict())
    for index, moments in run.policy.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer {index} {name}": torch.as_tensor(value) for name, value in moments.items()}
    tensors["torch"] = torch.get_rng_state()
    return {
        **{name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        "numpy": np.random.get_state()[1].tobytes(),
        "env": [generator.bit_generator.state for generator in run.vector_env.np_random],
        "counters": (run.num_timesteps, run._n_updates, run.kl.coef),
    }


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"kl_target": 0.5},
        {"kl_estimator": "exact"},
        {"policy_kwargs": {"separate_critic": True, "optimizer_kwargs": {"fused": True}}},
        {"policy_kwargs": {"lora": {"r": 2, "target_modules": "all-linear"}}},
        {"policy_kwargs": {"prefix_cache": False}, "missing_eos_penalty": 0.5, "stats_window_size": 9},
    ],
    ids=["ppo", "adaptive KL", "exact KL", "separate critic", "lora", "options"],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    model = save_model(tmp_path / "model")
    whole_log: list[dict[str, Any]] = []
    whole = record(new_run(model, **kwargs), whole_log, stop_after=2 * ROLLOUTS)
    with pytest.raises(Killed):
        whole.learn(10_000)
    expected = bits(whole)

    log: list[dict[str, Any]] = []
    first = record(new_run(model, **kwargs), log, stop_after=ROLLOUTS)
    with pytest.raises(Killed):
        first.learn(10_000)
    first.save(tmp_path / "checkpoint")
    # Whatever the process does before it dies, and whatever the next one does before it loads, must not matter.
    torch.rand(7)
    np.random.rand(7)
    first.vector_env.reset()
    del first
    second = PPO.load(tmp_path / "checkpoint", env=make_env(4), device="cpu")
    with pytest.raises(Killed):
        record(second, log, stop_after=2 * ROLLOUTS).learn(10_000, reset_num_timesteps=False)

    actual = bits(second)
    assert expected.keys() == actual.keys()
    assert [name for name in expected if expected[name] != actual[name]] == []
    assert log == whole_log


def test_a_killed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(save_model(tmp_path / "model"))
    run.learn(1)
    run.save(tmp_path / "checkpoint")
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()}
    run.learn(1)

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    monkeypatch.setattr("agents.state.checkpoint.save_file", killed)
    with pytest.raises(Killed):
        run.save(tmp_path / "checkpoint")
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()} == before
    monkeypatch.undo()
    run.save(tmp_path / "checkpoint")  # the leftovers of the killed one are not in the way
    assert (tmp_path / "checkpoint" / "policy.safetensors").read_bytes() != before["policy.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]


def test_a_kill_between_the_old_checkpoint_and_the_new_one_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The narrowest moment: the old directory is being replaced by the new one."""
    run = new_run(save_model(tmp_path / "model"))
    run.learn(1)
    run.save(tmp_path / "checkpoint")
    run.learn(1)

    def killed(*_: Any) -> None:
        raise Killed

    for function in ("replace", "rename"):
        monkeypatch.setattr(f"os.{function}", killed)
    with pytest.raises(Killed):
        run.save(tmp_path / "checkpoint")
    monkeypatch.undo()
    survivor = PPO.load(tmp_path / "checkpoint", env=make_env(4), device="cpu")
    assert survivor.num_timesteps > 0
    shutil.rmtree(tmp_path / "checkpoint")
