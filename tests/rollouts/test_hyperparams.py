"""`hyperparams/*.yml`, which rl-zoo3 reads. It is no dependency; tests/clients/test_rl_zoo3.py trains with it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import stable_baselines3 as sb3
import yaml
from stable_baselines3.common.env_util import make_vec_env

from agents.policies.causal_lm_policy import CausalLMPolicy
from text_env.imports import import_object

FOLDER = Path(__file__).parents[2] / "hyperparams"
FILES = sorted(FOLDER.glob("*.yml"))
ALGORITHMS = {"ppo": sb3.PPO, "a2c": sb3.A2C}
OF_RL_ZOO = {"n_envs", "n_timesteps", "policy"}  # which are no arguments of the algorithm


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    assert set(content) == {"TextRLHF-v0"}
    return dict(content["TextRLHF-v0"])


def test_every_algorithm_has_its_file() -> None:
    assert {path.stem for path in FILES} == set(ALGORITHMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_names_are_arguments_of_the_algorithm_and_of_the_policy(path: Path) -> None:
    values = read(path)
    assert set(values) - OF_RL_ZOO <= set(inspect.signature(ALGORITHMS[path.stem]).parameters)
    module, _, name = values["policy"].rpartition(".")
    assert import_object(f"{module}:{name}") is CausalLMPolicy
    policy_kwargs = eval(values["policy_kwargs"])  # as rl-zoo3 reads them
    assert set(policy_kwargs) <= set(inspect.signature(CausalLMPolicy).parameters)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_algorithm_takes_the_values(path: Path) -> None:
    values = read(path)
    policy_kwargs = eval(values.pop("policy_kwargs"))
    rate = float(values.pop("learning_rate").removeprefix("lin_"))
    arguments = {name: value for name, value in values.items() if name not in OF_RL_ZOO}
    env = make_vec_env("TextRLHF-v0", n_envs=values["n_envs"])
    model = ALGORITHMS[path.stem](CausalLMPolicy, env, learning_rate=rate, policy_kwargs=policy_kwargs, **arguments)
    assert model.n_steps == values["n_steps"]
    assert values["n_envs"] * values["n_steps"] % values.get("batch_size", 1) == 0
