"""`agents.policies.optimizers`: optimisers by name, with whatever learns by them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from learners import largest_difference, make_env, make_model, make_ppo, weights_of

from agents.algorithms.ppo import PPO
from agents.policies.optimizers import optimizer_named


def test_a_name_stands_for_a_class_whose_weights_do_not_decay() -> None:
    assert optimizer_named("adamw_torch") == (
        torch.optim.AdamW,
        {"betas": (0.9, 0.999), "eps": 1e-5, "weight_decay": 0.0},
    )
    assert optimizer_named("sgd") == (torch.optim.SGD, {"weight_decay": 0.0})


def test_a_checkpoint_holds_the_name_and_what_the_optimizer_remembers(tmp_path: Path) -> None:
    whole = make_ppo(policy_kwargs={"optimizer_class": "adafactor"}).learn(100)
    assert type(whole.policy.optimizer).__name__ == "Adafactor"
    first = make_ppo(policy_kwargs={"optimizer_class": "adafactor"}).learn(1)
    first.save(tmp_path / "checkpoint")
    resumed = PPO.load(tmp_path / "checkpoint", env=make_env(), policy_kwargs={"model": make_model(ends=0.2)})
    assert type(resumed.policy.optimizer).__name__ == "Adafactor"
    resumed.learn(100 - resumed.num_timesteps, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps
    assert largest_difference(weights_of(resumed.policy), weights_of(whole.policy)) == 0


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_a_package_that_is_missing_is_named(package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    name = {"bitsandbytes": "adamw_8bit", "torchao": "adamw_torch_8bit"}[package]
    with pytest.raises(ValueError, match=rf"got '{name}': .*{package}"):
        make_ppo(policy_kwargs={"optimizer_class": name})


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"got 'bogus': .*'adamw_torch'.*'adafactor'"):
        optimizer_named("bogus")
