"""The algorithms by their names, and what they say where a run's configuration leaves the choice to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

from agents.algorithms.a2c import A2C
from agents.algorithms.dapo import DAPO
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.algorithms.vineppo import VinePPO
from agents.runs.config import TrainConfig, parsed
from agents.state.arguments import argument_defaults
from text_env.imports import import_object, is_object_name

# Arguments of the algorithms that `TrainConfig` has fields for, or that are made from them.
OWN_OPTIONS = {
    *("policy", "env", "learning_rate", "n_episodes", "batch_size", "n_epochs", "kl_coef", "kl_target"),
    *("kl_estimator", "missing_eos_penalty", "policy_kwargs", "seed", "device", "reference", "rollouts", "max_lag"),
}

ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {
    "ppo": PPO,
    "a2c": A2C,
    "reinforce": REINFORCE,
    "rloo": RLOO,
    "grpo": GRPO,
    "dapo": DAPO,
    "vineppo": VinePPO,
}


def algorithm_named(name: str) -> type[OnPolicyAlgorithm]:
    """
    :param name: a known one, or ``"module:Class"``.
    :return: the class.
    :raises ValueError: naming the known ones.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if not is_object_name(name):
        raise ValueError(f"Expected algo to be one of {sorted(ALGORITHMS)} or 'module:Class', got {name!r}.")
    found = import_object(name)
    if isinstance(found, type) and issubclass(found, BaseAlgorithm) and not issubclass(found, OnPolicyAlgorithm):
        raise ValueError(
            f"{found.__name__} is Stable-Baselines3's: use it in Python, on agents.make_vec_env('TextRLHF-v0') or, for "
            "continuous actions, on 'TextRLHFContinuous-v0'. The table of what plugs in (docs/sb3.md) says with which "
            "policy."
        )
    if not (isinstance(found, type) and issubclass(found, OnPolicyAlgorithm)):
        raise ValueError(
            f"Expected {name!r} to be a subclass of agents.algorithms.on_policy.OnPolicyAlgorithm, got {found!r}."
        )
    return found


def discount(config: TrainConfig) -> float:
    """
    :param config: of a run.
    :return: γ, the algorithm's own if the configuration doesn't say.
    """
    defaults = argument_defaults(algorithm_named(config.algo))
    return float(parsed(config.algo_kwargs).get("gamma", defaults.get("gamma", 1.0)))


def resolved(config: TrainConfig) -> TrainConfig:
    """
    :param config: may leave to the algorithm what None stands for.
    :return: the same with the algorithm's own numbers.
    :raises ValueError: for an unknown algorithm, and for numbers that no run can be made of.
    """
    algorithm = algorithm_named(config.algo)
    defaults = argument_defaults(algorithm)
    own = ("learning_rate", "n_episodes", "batch_size", "n_epochs", "kl_coef")
    if missing := sorted(set(own) - set(defaults)):
        raise ValueError(
            f"Expected {algorithm.__name__}.__init__ to hand on **kwargs to OnPolicyAlgorithm; it doesn't take "
            f"{missing}."
        )
    changes: dict[str, Any] = {name: defaults[name] for name in own if getattr(config, name) is None}
    if changes.get("batch_size") is not None:  # the algorithm's minibatch may be more than the rollout that was chosen
        n_episodes = changes.get("n_episodes", config.n_episodes)
        changes["batch_size"] = min(changes["batch_size"], n_episodes)
    env = dataclasses.replace(config.env, gold=config.env.gold_reward())
    if env.group_size is None:
        env = dataclasses.replace(env, group_size=algorithm.default_group_size)
    changes["env"] = env
    if config.model is None:
        changes["model"] = config.env.model()
    if config.run_dir is None:
        changes["run_dir"] = Path("runs") / config.algo.rpartition(":")[2].lower()
    config = dataclasses.replace(config, **changes)
    config.check()
    return config
