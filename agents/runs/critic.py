"""The critic of a run under the microscope, in the run's own environment and by what the run paid."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from stable_baselines3.common.utils import set_random_seed

from agents.evaluation.critic_microscope import CriticTarget, examine_critic
from agents.models.reference import Reference
from agents.policies.causal_lm_policy import VALUE_HEAD_FILE, load_policy
from agents.runs.algorithms import discount
from agents.runs.commands import CriticConfig
from agents.runs.config import TrainConfig, load_config, names_from_run, separate_critic
from agents.state.devices import check_device


def examine_run(config: CriticConfig) -> dict[str, Any]:
    """Examine the critic of a run on held-out prompts, or on those of the training where there are no others.

    :param config: the options.
    :return: what :func:`agents.evaluation.critic_microscope.examine_critic` returns; ``kl_coef``, the β that the
        returns pay; and what :meth:`agents.runs.config.EnvConfig.prompt_set` says.
    :raises FileNotFoundError: if the directory belongs to no run, which says what the critic was trained to predict,
        or if there is no critic.
    :raises UntrustedNameError: if the run names code, and ``config.trust`` is False.
    :raises ValueError: if the critic is untrained.
    """
    check_device(config.device)
    run_dir, directory = _directories(config.policy)
    path = run_dir / "config.yaml"
    run = load_config(path)
    with names_from_run(path, run, config):
        return _examined(config, run, run_dir, directory)


def _examined(config: CriticConfig, run: TrainConfig, run_dir: Path, directory: Path) -> dict[str, Any]:
    gamma, model = discount(run), run.model or run.env.model()
    env_config = run.env.for_evaluation(config.prompts)
    n_rows = min(64, config.texts * config.branches)
    env = env_config.make(n_rows, str(directory), gamma, group_size=1)
    set_random_seed(config.seed)
    critic = separate_critic(run.critic or "head")
    policy = load_policy(directory, env, config.device, config.dtype, run.temperature, critic)
    policy.load_value_head(directory)
    kl_coef = _last_kl_coef(run, run_dir)
    reference = None
    if kl_coef > 0:
        reference = Reference(load_policy(model, env, config.device, config.dtype, run.temperature).lm)
    target = CriticTarget(reference, kl_coef, run.kl_estimator, run.missing_eos_penalty or 0.0, gamma)
    sizes = (config.texts, config.positions, config.branches)
    found = examine_critic(policy, env, target, *sizes, config.seed)
    return {**found, "kl_coef": kl_coef, **env_config.prompt_set(run.env)}


def _directories(given: Path) -> tuple[Path, Path]:
    """The directory of the run and that of the policy, of which either is given."""
    if not given.is_dir():
        raise FileNotFoundError(
            f"There is no directory {str(given)!r}. A critic is looked for in the directory of a run or of a run's "
            "policy; a model by its name has none that was trained."
        )
    given = given.resolve()
    run_dir = given if (given / "config.yaml").exists() else given.parent
    if not (run_dir / "config.yaml").exists():
        raise FileNotFoundError(
            f"Expected {given} to be the directory of a run or of a run's policy, got one without config.yaml, which "
            "says what the critic was trained to predict. For any other policy there is "
            "agents.evaluation.critic_microscope.examine_critic."
        )
    directory = given / "policy" if given == run_dir else given
    if not (directory / VALUE_HEAD_FILE).exists():
        raise FileNotFoundError(f"Expected a policy with a critic; {directory} holds no {VALUE_HEAD_FILE}.")
    return run_dir, directory


def _last_kl_coef(run: TrainConfig, run_dir: Path) -> float:
    """β at the end of the run, which an adaptive one has changed."""
    if run.kl_target is None and run.kl_coef is not None:
        return run.kl_coef
    with (run_dir / "progress.csv").open() as file:
        return float(list(csv.DictReader(file))[-1]["objective/kl_coef"])
