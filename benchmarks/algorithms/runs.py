"""One run: train an algorithm with a seed and a learning rate, evaluate what it learned, write ``result.json``.

python -m benchmarks.algorithms.runs --algorithm ppo --seed 0 --learning-rate 1e-4 --total-timesteps 80000 --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

from agents.evaluation.evaluate import describe, measure_policy
from agents.models.reference import Reference
from agents.policies.causal_lm_policy import CausalLMPolicy, load_policy
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sb3_vec_env import make_vec_env
from benchmarks.algorithms.learners import ENV_KWARGS, KL_COEF, LEARNERS, MAX_NEW_TOKENS, PEERS
from benchmarks.models import PEERS as PEERS_ENVIRONMENT
from text_env.builtin import LANGUAGE_MODEL, REWARD_MODEL
from text_env.prompts import load_prompts
from text_env.vector_env import TextVectorEnv

EPISODES, ROWS = 256, 64
EVALUATION_SEED = 12_345
BIN = 2_000  # tokens of a point of the learning curve


class Curve(BaseCallback):
    """Notes the score of every finished episode, and the tokens generated until then."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        self.scores += [(self.num_timesteps, info["score"]) for info in self.locals["infos"] if "score" in info]
        return True

    def points(self) -> list[dict[str, float]]:
        """
        :return: the mean score of the episodes that ended in each bin of tokens.
        """
        tokens, scores = (np.array(column) for column in zip(*self.scores, strict=True))
        bins = (tokens - 1) // BIN
        return [
            {"tokens": float(tokens[bins == b].mean()), "score": float(scores[bins == b].mean())}
            for b in np.unique(bins)
        ]


def run(algorithm: str, seed: int, learning_rate: float, total_timesteps: int, prompts: str, out: Path) -> None:
    """Train, evaluate, and write ``out/result.json``.

    :param algorithm: a key of ``LEARNERS`` or ``PEERS``.
    :param seed: of the training.
    :param learning_rate: at its start.
    :param total_timesteps: tokens.
    :param prompts: to evaluate on.
    :param out: directory.
    """
    out.mkdir(parents=True, exist_ok=True)
    env = make_vec_env(n_envs=ROWS, env_kwargs={**ENV_KWARGS, "prompts": prompts}).vector_env
    if algorithm in PEERS:
        before = evaluate(load_policy("builtin", env, device="cpu"), env)
        trained = train_peer(PEERS[algorithm], seed, learning_rate, total_timesteps, out)
        after = evaluate(load_policy(out / "policy", env, device="cpu"), env)
    else:
        model = LEARNERS[algorithm](learning_rate, seed)
        before = evaluate_learner(model, env, prompts)
        set_random_seed(seed)  # what the evaluation drew is forgotten
        trained = train(model, total_timesteps)
        after = evaluate_learner(model, env, prompts)
    result = {
        "algorithm": algorithm,
        "seed": seed,
        "learning_rate": learning_rate,
        **after,
        **trained,
        "start": before,
        "episodes": EPISODES,
        "prompts": prompts,
    }
    partial = out / "result.json.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, out / "result.json")


def train(model: BaseAlgorithm, total_timesteps: int) -> dict[str, Any]:
    """
    :param model: an algorithm that was set up.
    :param total_timesteps: tokens.
    :return: ``tokens``, ``seconds``, ``cpu_seconds`` and ``curve``.
    """
    curve = Curve()
    wall, cpu = time.perf_counter(), time.process_time()
    model.learn(total_timesteps, callback=curve)
    return {
        "tokens": model.num_timesteps,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "curve": curve.points(),
    }


def train_peer(algorithm: str, seed: int, learning_rate: float, total_timesteps: int, out: Path) -> dict[str, Any]:
    """Train with TRL in its own environment.

    :return: as :func:`train`.
    :raises RuntimeError: with the process's last words, if it fails.
    """
    prompts = out / "prompts.json"
    prompts.write_text(json.dumps([prompt["prompt"] for prompt in load_prompts("builtin")]))
    options = {
        "algorithm": algorithm,
        "model": LANGUAGE_MODEL,
        "reward-model": REWARD_MODEL,
        "prompts": prompts,
        "seed": seed,
        "learning-rate": learning_rate,
        "kl-coef": KL_COEF,
        "total-timesteps": total_timesteps,
        "max-new-tokens": MAX_NEW_TOKENS,
        "out": out,
    }
    command = [str(PEERS_ENVIRONMENT / "bin/python"), "-m", "benchmarks.peers.trl_train"]
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    trained = json.loads((out / "train.json").read_text())
    curve = json.loads((out / "curve.json").read_text())
    return {**{name: trained[name] for name in ("tokens", "seconds", "cpu_seconds")}, "curve": curve}


def evaluate_learner(model: BaseAlgorithm, env: TextVectorEnv, prompts: str) -> dict[str, Any]:
    """By what it has: a language model's likelihood, or an actor."""
    if isinstance(model.policy, CausalLMPolicy):
        return evaluate(model.policy, env)
    return evaluate_continuous(model, prompts)


def evaluate(policy: CausalLMPolicy, env: TextVectorEnv) -> dict[str, float]:
    """
    :param policy: a language model.
    :param env: prompts and rewards.
    :return: what ``agents.evaluation.evaluate.describe`` says of its texts; the same random numbers for every policy.
    """
    reference = Reference(load_policy("builtin", env, device="cpu").lm)
    set_random_seed(EVALUATION_SEED)
    env.reset(seed=EVALUATION_SEED)
    return measure_policy(policy, reference, env, EPISODES)


def evaluate_continuous(model: BaseAlgorithm, prompts: str) -> dict[str, Any]:
    """The same for an algorithm without a likelihood, by its deterministic actor.

    :return: likewise, with ``kl`` None.
    """
    env = make_vec_env("TextRLHFContinuous-v0", n_envs=ROWS, env_kwargs={**ENV_KWARGS, "prompts": prompts})
    text_env = env.vector_env.unwrapped
    spaces = text_env.single_observation_space, text_env.single_action_space
    frozen = Reference(load_policy("builtin", text_env, device="cpu").lm)
    buffer = EpisodeBuffer(0, *spaces, "cpu", n_envs=ROWS, reference=frozen)
    buffer.reset()
    env.seed(EVALUATION_SEED)
    episodes: list[dict[str, Any]] = []
    for _ in range(EPISODES // ROWS):
        episodes += play_once(model, env, buffer)
    described = describe(buffer, episodes)
    return {**described, "kl": None}


def play_once(model: BaseAlgorithm, env: VecEnv, buffer: EpisodeBuffer) -> list[dict[str, Any]]:
    """One whole episode of every row: whoever took the first to finish would take the short ones.

    :param model: acts.
    :param env: rows that start anew by themselves; what they play after their first episode doesn't count.
    :param buffer: takes the tokens.
    :return: final infos in the order of the rows.
    """
    observation = env.reset()
    assert isinstance(observation, dict)
    rows = np.arange(env.num_envs)
    finals: dict[int, dict[str, Any]] = {}
    start = True
    while len(rows):
        actions, _ = model.predict(observation, deterministic=True)
        following, rewards, dones, infos = env.step(actions)
        seen = {name: array[rows].copy() for name, array in observation.items()}
        assert isinstance(following, dict)
        length = seen["attention_mask"].sum(axis=1)
        ends = [infos[row]["terminal_observation"] if dones[row] else _row(following, row) for row in rows]
        tokens = np.array([end["input_ids"][n] for end, n in zip(ends, length, strict=True)])
        nothing = np.zeros(len(rows), np.float32)
        buffer.add(seen, tokens, rewards[rows], np.full(len(rows), start), nothing, nothing, rows=rows)
        for row in rows[dones[rows]]:
            buffer.close(row)
            finals[int(row)] = infos[row]
        rows, observation, start = rows[~dones[rows]], following, False
    return [finals[row] for row in range(env.num_envs)]


def _row(observation: dict[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    return {name: array[row] for name, array in observation.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithm", choices=[*LEARNERS, *PEERS], required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--total-timesteps", type=int, required=True)
    parser.add_argument("--prompts", default="builtin:eval", help="to evaluate on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1, help="two runs share two cores")
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    run(**options)


if __name__ == "__main__":
    main()
