"""Does PPO learn the same whether the policy writes its texts itself or a server of vLLM does?

    benchmarks/vllm/install.sh
    python -m benchmarks.vllm

Trainings with the same settings and several seeds, once with ``rollouts="local"``, once with a real server and
``max_lag=0``, and once with ``max_lag=1``; and one whose server is killed with SIGKILL while it writes texts of a
rollout, and started again at once. Learner and server have one thread each. On a CPU vLLM is no faster than the policy
itself: this is about whether it is right. A training that is there is not run again, and the trainings of other seeds
and writers stay in the file of the results.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import set_random_seed

from agents.algorithms.ppo import PPO
from agents.evaluation.evaluate import evaluate
from agents.evaluation.intervals import bootstrap_interval
from agents.policies.causal_lm_policy import load_policy
from agents.rollouts.vllm_servers import VllmServers
from agents.state.schedules import LearningRate
from benchmarks.logged import Rows
from benchmarks.many_runs import all_runs, file_of
from benchmarks.provenance import provenance
from benchmarks.vllm.killed import KilledWhileWriting
from benchmarks.vllm.server import Server, running, untied, version
from text_env.arithmetic import MODEL
from text_env.builtin import ARITHMETIC_MODEL
from text_env.vector_env import TextVectorEnv

WRITERS = ("local", "vllm", "vllm, max_lag=1", "vllm, killed")
LAST = 3  # rollouts, over which the score at the end is taken
KILLED_ROLLOUT = 4  # the one in which the server is killed, from 1


class Subject(NamedTuple):
    """A model and what it learns.

    :param model: the model, as the policy takes it.
    :param served: its directory, for the server.
    :param env: the arguments of the environment.
    :param held_out: those that differ in evaluation; None: there is none.
    :param arguments: PPO's.
    :param server: options of the server's command line.
    """

    model: str
    served: Path
    env: dict[str, Any]
    held_out: dict[str, Any] | None
    arguments: dict[str, Any]
    server: tuple[str, ...]


def subjects(smollm2: Path) -> dict[str, Subject]:
    """
    :param smollm2: the directory of SmolLM2-135M-Instruct.
    :return: the subjects by their names.
    """
    two_steps = {"task": "arithmetic", "task_kwargs": {"n_steps": 2}}
    films = {"prompts": "examples.film_reviews:training_prompts", "max_prompt_tokens": 64, "max_new_tokens": 40}
    lora = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    return {
        "arithmetic": Subject(
            MODEL,
            ARITHMETIC_MODEL,
            two_steps,
            {"task_kwargs": {"n_steps": 2, "split": "eval"}},
            {"n_episodes": 64, "batch_size": 16, "learning_rate": LearningRate(3e-4, "linear", 0.0), "kl_coef": 0.04},
            (),
        ),
        "smollm2": Subject(
            str(smollm2),
            smollm2,
            {"tokenizer": str(smollm2), **films},
            None,
            {
                "n_episodes": 16,
                "batch_size": 8,
                "learning_rate": LearningRate(7e-4, "linear", 0.0),
                "kl_coef": 0.05,
                "n_epochs": 1,
                "policy_kwargs": {"lora": lora},
            },
            ("--enable-lora", "--max-lora-rank", "16"),
        ),
    }


@dataclass
class Options:
    """Train with rollouts of vLLM, and beside that without."""

    out: Path = Path("benchmarks/results/scale_out/vllm.json")
    """The file of the results. What is in it already and not measured again is kept."""
    subject: str = "arithmetic"
    """'arithmetic' (the built-in model, calculations of two steps, all weights) or 'smollm2' (film reviews, LoRA)."""
    seeds: int = 5
    """The number of seeds, from 0. The server is killed with seed 0 alone."""
    tokens: int = 20_000
    """The tokens of a training."""
    writers: tuple[str, ...] = WRITERS
    """Who writes."""
    episodes: int = 256
    """The number of held-out texts that a policy is evaluated on."""
    smollm2: Path = Path("runs/smollm2/base")
    """The directory that benchmarks.peers.convert_smollm2 makes."""
    runs: Path = Path("runs/vllm")
    """Where the figures of each training are kept, and the server's output."""


def run(subject: Subject, writer: str, seed: int, server: Server | None, options: Options) -> dict[str, Any]:
    """Train once.

    :param subject: the subject.
    :param writer: one of ``WRITERS``.
    :param seed: the seed.
    :param server: the server; None for the policy itself.
    :param options: the settings of the benchmark.
    :return: the figures of the training.
    :raises RuntimeError: if the server should have been killed while it writes, and was not.
    """
    killed = None
    arguments = dict(subject.arguments)
    if server is not None:
        servers = VllmServers(server.url, patience=900.0)
        killed = KilledWhileWriting(servers, server, KILLED_ROLLOUT) if writer.endswith("killed") else None
        arguments |= {"rollouts": killed or servers, "max_lag": int(writer.endswith("max_lag=1"))}
    policy_kwargs = {"model": subject.model, **arguments.pop("policy_kwargs", {})}
    env = TextVectorEnv(arguments["n_episodes"], **subject.env)
    model = PPO("CausalLMPolicy", env, seed=seed, policy_kwargs=policy_kwargs, **arguments)
    rows = Rows()
    model.set_logger(Logger(None, [rows]))
    start = time.perf_counter()
    model.learn(options.tokens)
    seconds = time.perf_counter() - start
    scores = [row["objective/scores"] for row in rows.rows]
    row: dict[str, Any] = {
        "writer": writer,
        "seed": seed,
        "tokens": model.num_timesteps,
        "rollouts": len(scores),
        "episodes": model.n_episodes * len(scores),
        "seconds": seconds,
        "score_at_start": scores[0],
        "score_at_end": float(np.mean(scores[-LAST:])),
        "kl_at_end": float(np.mean([row["objective/kl"] for row in rows.rows[-LAST:]])),
        "scores": scores,
    }
    if killed is not None:
        if not killed.cut_off:
            raise RuntimeError(
                f"Expected the server to be killed while it writes texts of rollout {KILLED_ROLLOUT}, but it was asked "
                f"for none at the moment; there were {len(scores)} rollouts. Train for more --tokens."
            )
        row["requests_cut_off"] = killed.cut_off
    if server is not None:
        row |= {
            "mean_log_prob_difference": float(np.mean([row["mismatch/log_prob_mean"] for row in rows.rows])),
            "largest_log_prob_difference": max(row["mismatch/log_prob_max"] for row in rows.rows),
            "least_effective_sample_size": min(row["mismatch/effective_sample_size"] for row in rows.rows),
            "lag": max(row["mismatch/lag"] for row in rows.rows),
        }
    if subject.held_out is not None:
        row["held_out"] = held_out_score(subject, model, seed, options.episodes)
    print(f"{writer:16} seed {seed} score {row['score_at_end']:.3f} {seconds:.0f} s", flush=True)
    return row


def held_out_score(subject: Subject, model: PPO, seed: int, episodes: int) -> float:
    """
    :param subject: the subject.
    :param model: what was trained.
    :param seed: of the training.
    :param episodes: the number of texts.
    :return: the mean score of sampled texts for held-out prompts.
    """
    assert subject.held_out is not None
    set_random_seed(1000 + seed)
    env = TextVectorEnv(64, **{**subject.env, **subject.held_out})
    policy, reference = (load_policy(subject.model, env, "cpu", "float32", 1.0) for _ in range(2))
    policy.lm.load_state_dict(model.policy.lm.state_dict())
    return float(evaluate(policy, reference, env, episodes)["policy"]["score"])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """
    :param rows: the trainings.
    :return: of each writer the mean score at the end over its seeds, with its 95 % interval, and the largest difference
        of a log-probability.
    """
    found: dict[str, Any] = {}
    for writer in dict.fromkeys(row["writer"] for row in rows):
        mine = [row for row in rows if row["writer"] == writer]
        found[writer] = {"seeds": len(mine)}
        for name in ("score_at_end", "held_out"):
            values = np.array([row[name] for row in mine if name in row])
            if len(values):
                found[writer][name] = float(values.mean())
                if len(values) > 1:
                    found[writer][f"{name}_interval"] = list(bootstrap_interval(values, np.arange(len(values))))
        if "largest_log_prob_difference" in mine[0]:
            found[writer]["largest_log_prob_difference"] = max(row["largest_log_prob_difference"] for row in mine)
    return found


@contextlib.contextmanager
def served(subject: Subject, options: Options) -> Iterator[Server]:
    """
    :param subject: the subject.
    :param options: the settings of the benchmark.
    :return: a context manager, within which a server runs that serves the subject's model.
    """
    env = TextVectorEnv(1, **subject.env)
    options.runs.mkdir(parents=True, exist_ok=True)
    model = untied(subject.served, options.runs / f"{options.subject}-untied")
    length = env.max_prompt_tokens + env.max_new_tokens
    with running(Server(model, (options.runs / "server.log").resolve(), length, subject.server)) as server:
        yield server


def main(options: Options) -> int:
    """
    :param options: the settings.
    :return: the exit status, 0.
    :raises ValueError: if the file of the results has trainings with other settings.
    """
    torch.set_num_threads(1)
    subject = subjects(options.smollm2)[options.subject]
    origin = provenance("benchmarks.vllm")
    del origin["commit"]  # each training has its own
    settings = {"tokens": options.tokens, "episodes": options.episodes}
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    before = results.get(options.subject, {"settings": settings, "trainings": []})
    if before["settings"] != settings:
        raise ValueError(
            f"Expected the settings of the trainings that are in {options.out}, {before['settings']}, got {settings}. "
            "Pass those, or another file as --out."
        )
    todo = {
        file_of(options.runs, f"{options.subject} {writer}", options.tokens, options.episodes, seed): (writer, seed)
        for seed in range(options.seeds)
        for writer in options.writers
        if not (writer.endswith("killed") and seed)
    }
    with contextlib.ExitStack() as stack:
        server = None
        if any(writer != "local" and not path.exists() for path, (writer, _) in todo.items()):
            server = stack.enter_context(served(subject, options))
            before["server"] = version()
        runs = {
            path: (subject, writer, seed, None if writer == "local" else server, options)
            for path, (writer, seed) in todo.items()
        }
        rows = all_runs(run, runs, workers=1)
    trainings = {(row["writer"], row["seed"]): row for row in (*before["trainings"], *rows)}
    rows = sorted(trainings.values(), key=lambda row: row["seed"])
    results[options.subject] = {
        **origin,
        "server": before.get("server"),
        "settings": settings,
        "commits": Counter(row["commit"] for row in rows),
        "summary": summary(rows),
        "trainings": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
