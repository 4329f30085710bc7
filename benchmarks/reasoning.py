"""A real language model learns a data set of reasoning-gym on two CPU cores: SmolLM2-135M-Instruct adds and subtracts.

    make reasoning      # fetches the model and runs this

PPO with LoRA in bfloat16 on sums and differences of two or three digits, such as 4 - 1 + 7, of which the model gets
some right. It is paid 1 for a text whose last number is the answer, and nothing for its form. Before and after, it is
posed the same held-out problems; ``evaluation.json`` says how often it is right, sampled at temperature 1 and greedily.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from agents.cli import EvaluateConfig, evaluate_policy, print_evaluation, print_pairs
from agents.evaluation.intervals import compare, wilson_interval
from agents.runs.config import EnvConfig, TrainConfig
from benchmarks.provenance import provenance
from benchmarks.whole_run import ADAPTER, keep, train_anew, verdict

TASK_KWARGS = {
    "min_terms": "2",
    "max_terms": "3",
    "min_digits": "1",
    "max_digits": "1",
    "extract": "last_number",
    "instruction": "''",  # the question itself asks for the final answer
}

MAX_MINUTES = 60.0

TEXTS = 12
"""The number of pairs of texts, before and after, that are printed and kept."""


@dataclass
class Config:
    """Train SmolLM2 on a data set of reasoning-gym by PPO and LoRA, and say whether it is right more often."""

    model: Path = Path("runs/smollm2/base")
    """The model's directory, as benchmarks.peers.convert_smollm2 makes it."""
    run_dir: Path = Path("runs/reasoning/run")
    """An earlier run there is replaced."""
    out: Path = Path("benchmarks/results/reasoning")
    """Where evaluation.json, config.yaml and learning_curve.png go."""
    task: str = "reasoning_gym:chain_sum"
    """What it learns, any task with a right answer."""
    task_kwargs: dict[str, str] = field(default_factory=TASK_KWARGS.copy)
    """Arguments of the task, as `textrlhf train` takes them."""
    total_timesteps: int = 15_000
    """Tokens to generate."""
    max_new_tokens: int = 24
    """The response budget."""
    n_episodes: int = 64
    """Texts of a rollout."""
    batch_size: int = 16
    learning_rate: float = 7e-4
    kl_coef: float = 0.01
    episodes: int = 200
    """Held-out problems, a text of the model before and one after for each."""
    seed: int = 0


def train_config(config: Config) -> TrainConfig:
    """
    :return: the whole run, as ``textrlhf train --config`` would read it.
    """
    return TrainConfig(
        model=str(config.model),
        env=EnvConfig(task=config.task, task_kwargs=config.task_kwargs, max_new_tokens=config.max_new_tokens),
        total_timesteps=config.total_timesteps,
        run_dir=config.run_dir,
        seed=config.seed,
        learning_rate=config.learning_rate,
        n_episodes=config.n_episodes,
        batch_size=config.batch_size,
        n_epochs=1,
        kl_coef=config.kl_coef,
        sample_every=10,
        **ADAPTER,
    )


def before_and_after(result: dict[str, Any], seed: int) -> dict[str, Any]:
    """
    :param result: what ``evaluate_policy`` returned, with all of its texts.
    :param seed: the seed of the bootstrap.
    :return: ``before`` and ``after``, with ``difference``. An easy problem may be posed more than once, so the 95 %
        intervals are clustered by problem; ``problems`` is the number of different ones.
    """
    pairs = result["texts"]
    _, problems = np.unique([pair["prompt"] for pair in pairs], return_inverse=True)
    right = {writer: _right(pairs, writer) for writer in ("reference", "policy")}
    found = {}
    for name, writer in (("before", "reference"), ("after", "policy")):
        answers = result["answers"][writer]
        found[name] = {
            "accuracy": float(right[writer].mean()),
            "interval": list(wilson_interval(right[writer], problems)),
            "greedy_accuracy": answers["greedy_accuracy"],
            "greedy_interval": result["answers"]["intervals"][writer]["greedy_accuracy"],
            "well_formed": result[writer]["well_formed"],
            "mean_length": result[writer]["mean_length"],
        }
    compared = compare(right["policy"], right["reference"], problems, seed)
    difference = {"accuracy": compared["difference"], "interval": compared["difference_interval"]}
    return {**found, "difference": difference, "items": len(pairs), "problems": len(set(problems.tolist()))}


def _right(pairs: Sequence[dict[str, Any]], writer: str) -> np.ndarray:
    return np.array([pair[writer]["correct"] for pair in pairs])


def main(config: Config) -> int:
    """
    :return: 0 if the interval of the difference is above 0, and the training was short enough.
    """
    origin, settings = provenance("benchmarks.reasoning"), train_config(config)
    seconds = train_anew(settings)
    question = EvaluateConfig(
        policy=str(config.run_dir / "policy"),
        trust=True,  # the run above
        episodes=config.episodes,
        texts=config.episodes,
        seed=config.seed,
        dtype=settings.dtype,
    )
    evaluated = evaluate_policy(question)
    result = before_and_after(evaluated, config.seed)
    evaluated["texts"] = evaluated["texts"][:TEXTS]
    print_evaluation(evaluated)
    print_pairs(evaluated)
    result |= {"kl": evaluated["kl"], "seconds": seconds, "minutes": seconds / 60}
    texts = [{"prompt": t["prompt"], "before": t["reference"], "after": t["policy"]} for t in evaluated["texts"]]
    keep({**result, **origin, "settings": dataclasses.asdict(settings), "texts": texts}, config.run_dir, config.out)
    before, after, difference = result["before"], result["after"], result["difference"]
    low, high = difference["interval"]
    claim = f"right {after['accuracy']:.1%} of the time instead of {before['accuracy']:.1%}"
    return verdict(
        {
            f"{claim}: {difference['accuracy']:+.1%} [{low:+.1%}, {high:+.1%}], above 0": low > 0,
            f"trained in {seconds / 60:.0f} minutes, at most {MAX_MINUTES:g}": seconds <= 60 * MAX_MINUTES,
        }
    )


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Config)))
