"""The trials from which PPO's defaults were chosen: what each setting reaches, in tokens and in processor time.

    python -m benchmarks.trials --workers 2 --out benchmarks/results/trials      # 41 minutes of processor time

Two tasks, :data:`TASKS`: short texts with a score from a reward model, where less tokens than PPO's benchmark has are
given, and longer ones that are right or wrong. Two seeds at most: a trial's objective is known to about 0.04, so only
differences that come back in other rows count. A trial that is there is not run again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch
import tyro
from stable_baselines3.common.utils import set_random_seed

from agents.algorithms.ppo import PPO
from agents.evaluation.evaluate import evaluate
from agents.policies.causal_lm_policy import load_policy
from agents.state.schedules import LearningRate
from benchmarks.many_runs import all_runs, file_of, write_results
from text_env.arithmetic import MODEL

KL_COEF = 0.04


class Task(NamedTuple):
    """What is trained on.

    :param env: the registered name.
    :param model: the policy's.
    :param kwargs: the environment's arguments.
    :param held_out: those that differ in evaluation.
    """

    env: str
    model: str
    kwargs: dict[str, Any]
    held_out: dict[str, Any]


def arithmetic(*n_steps: int) -> Task:
    """Calculations of so many operations."""
    held_out = {"task_kwargs": {"n_steps": n_steps, "split": "eval"}}
    return Task("TextArithmetic-v0", MODEL, {"task_kwargs": {"n_steps": n_steps}}, held_out)


TASKS: dict[str, Task] = {
    "sentiment": Task("TextRLHF-v0", "builtin", {"max_prompt_tokens": 16}, {"prompts": "builtin:eval"}),
    "arithmetic-2": arithmetic(2),
    "arithmetic": arithmetic(3, 4),
}

HEAD: dict[str, Any] = {"policy_kwargs": {"separate_critic": False}}
COPY: dict[str, Any] = {"policy_kwargs": {"separate_critic": True}}
REWARD: dict[str, Any] = {"policy_kwargs": {"separate_critic": "builtin"}}
BEFORE: dict[str, Any] = {"n_epochs": 4, "learning_rate": 1e-4, "gae_lambda": 0.95, "gae_lambda_value": None}
BEFORE |= {"trust_region": None}
"""PPO's defaults before these trials, with a head for a critic."""
ONE = {**BEFORE, "n_epochs": 1, "learning_rate": 3e-4}
TWO = {**BEFORE, "n_epochs": 2, "learning_rate": 3e-4, "gae_lambda_value": 1.0}


class Trial(NamedTuple):
    """One setting on one task.

    :param task: a key of ``TASKS``.
    :param tokens: of training.
    :param seeds: how many seeds, from 0.
    :param arguments: PPO's.
    """

    task: str
    tokens: int
    seeds: int
    arguments: Mapping[str, Any]


SHORT, LONG = 27_000, 60_000
TRIALS: dict[str, Trial] = {
    # Which critic, at 40,000 tokens?
    "head, 4 epochs": Trial("sentiment", 40_000, 1, {**HEAD, **BEFORE}),
    "copy, 4 epochs": Trial(
        "sentiment", 40_000, 2, {**COPY, **BEFORE, "critic_learning_rate": 3e-4, "gae_lambda_value": 1.0}
    ),
    "reward model, 4 epochs": Trial("sentiment", 40_000, 2, {**REWARD, **BEFORE}),
    "head, 2 epochs at 2e-4": Trial("sentiment", 40_000, 2, {**HEAD, **BEFORE, "n_epochs": 2, "learning_rate": 2e-4}),
    "head, 1 epoch": Trial("sentiment", 40_000, 2, {**HEAD, **ONE, "gae_lambda_value": 1.0}),
    "copy, 1 epoch": Trial("sentiment", 40_000, 1, {**COPY, **ONE, "gae_lambda_value": 1.0}),
    "reward model, 1 epoch": Trial("sentiment", 40_000, 2, {**REWARD, **ONE}),
    "head, lambda 1": Trial("sentiment", 40_000, 2, {**HEAD, **BEFORE, "gae_lambda": 1.0}),
    "head, critic lambda 1": Trial("sentiment", 40_000, 2, {**HEAD, **BEFORE, "gae_lambda_value": 1.0}),
    "head, detached": Trial(
        "sentiment", 40_000, 2, {**HEAD, **BEFORE, "gae_lambda_value": 1.0, "vf_coef": 0.0, "critic_epochs": 2}
    ),
    "head, trust region 0.1": Trial(
        "sentiment", 40_000, 2, {**HEAD, **BEFORE, "learning_rate": 3e-4, "trust_region": 0.1}
    ),
    # How many steps, how long, and which lambda, at two thirds of the tokens?
    "reward model, 1 epoch at 4e-4": Trial(
        "sentiment", SHORT, 2, {**REWARD, **TWO, "n_epochs": 1, "learning_rate": 4e-4}
    ),
    "reward model, 2 epochs at 2e-4": Trial("sentiment", SHORT, 2, {**REWARD, **TWO, "learning_rate": 2e-4}),
    "reward model, 2 epochs": Trial("sentiment", SHORT, 2, {**REWARD, **TWO}),
    "reward model, 4 epochs at 1.5e-4": Trial(
        "sentiment", SHORT, 1, {**REWARD, **TWO, "n_epochs": 4, "learning_rate": 1.5e-4}
    ),
    "reward model, 2 epochs, lambda 0.9": Trial("sentiment", SHORT, 1, {**REWARD, **TWO, "gae_lambda": 0.9}),
    "reward model, 2 epochs, lambda 0.8": Trial("sentiment", SHORT, 2, {**REWARD, **TWO, "gae_lambda": 0.8}),
    "reward model, 2 epochs, lambda 0.6": Trial("sentiment", SHORT, 2, {**REWARD, **TWO, "gae_lambda": 0.6}),
    "reward model, 2 epochs, adaptive lambda": Trial(
        "sentiment", SHORT, 1, {**REWARD, **TWO, "length_adaptive_alpha": 0.05}
    ),
    "copy, 2 epochs": Trial("sentiment", SHORT, 1, {**COPY, **TWO}),
    "copy, 2 epochs, lambda 0.8": Trial("sentiment", SHORT, 1, {**COPY, **TWO, "gae_lambda": 0.8}),
    "head, 2 epochs": Trial("sentiment", SHORT, 1, {**HEAD, **TWO}),
    # The same where texts are right or wrong.
    "right or wrong: head, 4 epochs": Trial("arithmetic-2", LONG, 1, {**HEAD, **BEFORE}),
    "right or wrong: copy, 1 epoch": Trial("arithmetic-2", LONG, 1, {**COPY, **ONE, "gae_lambda_value": 1.0}),
    "right or wrong: copy, 2 epochs": Trial("arithmetic-2", LONG, 1, {**COPY, **TWO}),
    "right or wrong: copy, 2 epochs, lambda 0.99": Trial("arithmetic-2", LONG, 1, {**COPY, **TWO, "gae_lambda": 0.99}),
    "right or wrong: copy, 2 epochs, lambda 0.8": Trial("arithmetic-2", LONG, 1, {**COPY, **TWO, "gae_lambda": 0.8}),
    "right or wrong: head, 2 epochs": Trial("arithmetic-2", LONG, 1, {**HEAD, **TWO}),
    "right or wrong: head, 2 epochs at 1e-3": Trial("arithmetic-2", LONG, 1, {**HEAD, **TWO, "learning_rate": 1e-3}),
    "harder: copy, lambda 0.95": Trial("arithmetic", LONG, 1, {**COPY, **TWO}),
    "harder: copy, lambda 0.99": Trial("arithmetic", LONG, 1, {**COPY, **TWO, "gae_lambda": 0.99}),
    "harder: head, lambda 0.95": Trial("arithmetic", LONG, 1, {**HEAD, **TWO}),
    "harder: head, lambda 0.99": Trial("arithmetic", LONG, 1, {**HEAD, **TWO, "gae_lambda": 0.99}),
}
"""Name → trial. The learning rate falls to 0 in a straight line; all else is as PPO's signature has it."""


@dataclass
class Options:
    """Train PPO with each of the settings that its defaults were chosen from."""

    out: Path
    """Where results.json and environment.json go; the trials themselves go to its folder runs/."""
    only: tuple[str, ...] = tuple(TRIALS)
    """The names of the trials."""
    share: float = 1.0
    """The share of the tokens, for trying it out."""
    episodes: int = 256
    """The number of held-out texts that a trial is evaluated on."""
    workers: int = 1
    """The number of trials at a time, of one thread each."""


def tokens_of(name: str, options: Options) -> int:
    """
    :param name: a key of ``TRIALS``.
    :param options: the settings of the benchmark.
    :return: the number of tokens of the trial.
    """
    return round(TRIALS[name].tokens * options.share)


def run(name: str, seed: int, options: Options) -> dict[str, Any]:
    """Train and evaluate once.

    :param name: a key of ``TRIALS``.
    :param seed: the seed.
    :param options: the settings of the benchmark.
    :return: the trial's row of ``results.json``.
    """
    trial = TRIALS[name]
    torch.set_num_threads(1)
    task = TASKS[trial.task]
    arguments = dict(trial.arguments)
    rate = LearningRate(arguments.pop("learning_rate"), "linear", 0.0)
    policy_kwargs = {"model": task.model, **arguments.pop("policy_kwargs")}
    env: Any = gym.make_vec(task.env, num_envs=64, **task.kwargs)
    model = PPO(
        "CausalLMPolicy", env, learning_rate=rate, kl_coef=KL_COEF, seed=seed, policy_kwargs=policy_kwargs, **arguments
    )
    start = time.process_time()
    model.learn(tokens_of(name, options))
    seconds = time.process_time() - start
    set_random_seed(1000 + seed)
    held_out: Any = gym.make_vec(task.env, num_envs=64, **{**task.kwargs, **task.held_out})
    policy, reference = (load_policy(task.model, held_out, "cpu", "float32", 1.0) for _ in range(2))
    policy.lm.load_state_dict(model.policy.lm.state_dict())
    result = evaluate(policy, reference, held_out, options.episodes)
    return {
        "trial": name,
        "task": trial.task,
        "seed": seed,
        "tokens": model.num_timesteps,
        "cpu_seconds": seconds,
        "before": result["reference"]["score"],
        "score": result["policy"]["score"],
        "kl": result["kl"],
        "objective": result["policy"]["score"] - KL_COEF * result["kl"],
    }


def report(rows: list[dict[str, Any]], options: Options) -> None:
    """Write ``results.json`` and ``environment.json``, and print a line for each trial.

    :param rows: the trials.
    :param options: the settings of the benchmark.
    """
    write_results("benchmarks.trials", options.out, rows)
    for name in dict.fromkeys(row["trial"] for row in rows):
        mine = [row for row in rows if row["trial"] == name]
        objectives = " ".join(f"{row['objective']:.3f}" for row in mine)
        seconds = sum(row["cpu_seconds"] for row in mine) / len(mine)
        print(
            f"{name:48} objective {objectives:12} score {mine[0]['score']:.2f} KL {mine[0]['kl']:.1f} {seconds:.0f} s"
        )


def main(options: Options) -> int:
    """Run what has not been run yet, and report.

    :param options: the settings.
    :return: the exit status, 0.
    :raises ValueError: for an unknown trial.
    """
    if unknown := set(options.only) - set(TRIALS):
        raise ValueError(f"Expected names of trials, got {sorted(unknown)}; there are {list(TRIALS)}.")
    todo = {
        file_of(options.out, name, tokens_of(name, options), options.episodes, seed): (name, seed, options)
        for name in options.only
        for seed in range(TRIALS[name].seeds)
    }
    rows = all_runs(run, todo, options.workers)
    report(rows, options)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
