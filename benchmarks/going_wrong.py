"""What the log looks like when a training goes wrong: runs that really do, beside one that doesn't.

python -m benchmarks.going_wrong --out benchmarks/results/going_wrong            # 5 minutes of processor time
python -m benchmarks.going_wrong --out benchmarks/results/going_wrong --report   # the pictures again

Each run trains the built-in model by PPO on one core, in less than two minutes, and differs from the sound one in what
its :class:`Mistake` says. One seed each: the pictures show what a mistake looks like, and not how often it happens.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MultipleLocator
from stable_baselines3.common.logger import configure

from agents.algorithms.ppo import PPO
from agents.rollouts.sampling import sample_texts
from agents.rollouts.sb3_vec_env import make_vec_env
from benchmarks.many_runs import all_runs, write_results
from benchmarks.plot_style import STYLE

TOKENS = 16_000
SOUND, WRONG = "#0072B2", "#D55E00"  # which the colour-blind can tell apart
DARK_WORDS = re.compile(
    r"\b(dark|horror|terrif|nightmare|evil|fear|death|blood|haunt|disturb|terribl)\w*", re.IGNORECASE
)


def long_is_good(completions: Sequence[str], **columns: Any) -> list[float]:
    """
    :param completions: texts.
    :param columns: not used.
    :return: a score that rises with the length, of which nobody thought.
    """
    return [len(text) / 100 for text in completions]


def dark_is_good(completions: Sequence[str], **columns: Any) -> list[float]:
    """
    :param completions: texts.
    :param columns: not used.
    :return: the number of words that friends of horror films use when they praise one.
    """
    return [float(len(DARK_WORDS.findall(text))) for text in completions]


REWARDS = {"long_is_good": long_is_good, "dark_is_good": dark_is_good}


@dataclass(frozen=True)
class Mistake:
    """A training that goes wrong.

    :param title: what goes wrong, as the title of the picture.
    :param shown: the metrics that show it, each with its label and unit.
    :param ppo: arguments of PPO that the sound run doesn't have.
    :param reward: the reward's name.
    :param max_new_tokens: the response budget. With another than the sound run's, that run is not drawn.
    :param share_of_tokens: how many tokens are generated, in terms of the other runs'.
    :param run: the name of another mistake, whose run shows this one too; None: it has a run of its own.
    """

    title: str
    shown: dict[str, str]
    ppo: dict[str, Any] = field(default_factory=dict)
    reward: str = "builtin"
    max_new_tokens: int = 48
    share_of_tokens: float = 1.0
    run: str | None = None


SCORE, GOLD = {"objective/scores": "score"}, {"objective/gold_score": "gold score"}
KL = {"objective/kl": "objective/kl (nats per text)"}
MISTAKES = {
    "sound": Mistake("PPO's defaults without a trust region", SCORE),
    "kl": Mistake("The KL divergence explodes", {**KL, **GOLD}, {"kl_coef": 0.0, "learning_rate": 2e-3}),
    "clip_fraction": Mistake(
        "Too many ratios are clipped",
        {"train/clip_fraction": "train/clip_fraction (share)", **SCORE},
        {"n_epochs": 8, "learning_rate": 1e-3},
    ),
    "entropy": Mistake(
        "The entropy collapses",
        {"objective/entropy": "objective/entropy (nats per token)", "completions/mean_length": "mean length (tokens)"},
        run="clip_fraction",
    ),
    "explained_variance": Mistake(
        "The critic is worse than a constant",
        {"train/explained_variance": "train/explained_variance (share)", **SCORE},
        {"critic_learning_rate": 3e-2},
    ),
    "length": Mistake(
        "Texts grow to the budget",
        {
            "completions/mean_length": "completions/mean_length (tokens)",
            "completions/clipped_ratio": "completions/clipped_ratio (share)",
        },
        reward="long_is_good",
        max_new_tokens=128,
        share_of_tokens=2.0,
    ),
    "gold": Mistake("The score rises and the gold score falls", {**SCORE, **GOLD}, {"kl_coef": 0.01}, "dark_is_good"),
}

RUNS = [name for name, mistake in MISTAKES.items() if mistake.run is None]


def make_run(name: str, tokens: int, n_episodes: int) -> dict[str, Any]:
    """
    :param name: of a mistake.
    :param tokens: the number of tokens that are generated.
    :param n_episodes: the number of texts of a rollout.
    :return: the log, a list for each metric, and some texts from the end.
    """
    torch.set_num_threads(1)
    mistake, start = MISTAKES[name], time.process_time()
    reward: Any = REWARDS.get(mistake.reward, mistake.reward)
    env_kwargs = {
        "reward": reward,
        "metrics": {"gold_score": "sentiment"},
        "max_new_tokens": mistake.max_new_tokens,
    }
    env = make_vec_env("TextRLHF-v0", n_envs=n_episodes, env_kwargs=env_kwargs)
    # A trust region would hold some of them back.
    options: dict[str, Any] = {"learning_rate": 3e-4, "trust_region": None, **mistake.ppo}
    ppo = PPO("CausalLMPolicy", env, n_episodes=n_episodes, seed=0, device="cpu", **options)
    with tempfile.TemporaryDirectory() as directory:
        ppo.set_logger(configure(directory, ["csv"]))
        ppo.learn(int(tokens * mistake.share_of_tokens))
        with (Path(directory) / "progress.csv").open() as file:
            rows = list(csv.DictReader(file))
        ppo.logger.close()
    wanted = sorted({"time/total_timesteps", *(metric for other in MISTAKES.values() for metric in other.shown)})
    texts = sample_texts(ppo.policy, env.vector_env, list(env.vector_env.prompts)[:4])
    return {
        "name": name,
        "ppo": mistake.ppo,
        "reward": mistake.reward,
        "log": {metric: [float(row[metric]) for row in rows] for metric in wanted},
        "texts": [f"{text['prompt']}{text['completion']}" for text in texts],
        "processor_seconds": round(time.process_time() - start),
    }


def draw(directory: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw each mistake beside the sound run.

    :param directory: where ``NAME.png`` goes.
    :param rows: the runs.
    """
    runs = {row["name"]: row for row in rows}
    for name, mistake in MISTAKES.items():
        own = mistake.run or name
        if name == "sound" or own not in runs:
            continue
        drawn = [("sound", SOUND, "--"), (own, WRONG, "-")]
        if mistake.max_new_tokens != MISTAKES["sound"].max_new_tokens:
            del drawn[0]
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained")
            for axis, (metric, label) in zip(axes, mistake.shown.items(), strict=True):
                for run, colour, style in drawn:
                    log = runs[run]["log"]
                    tokens = [token / 1000 for token in log["time/total_timesteps"]]
                    said = "a sound run" if run == "sound" else "this run"
                    axis.plot(tokens, log[metric], color=colour, linestyle=style, linewidth=1.8, label=said)
                axis.set_title(label, fontsize=10.5, fontweight="normal")
                axis.set_xlabel("tokens (thousands)")
                axis.xaxis.set_major_locator(MultipleLocator(5))
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
            figure.suptitle(mistake.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
            figure.savefig(directory / f"{name}.png", dpi=110)
            plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    :param arguments: of the command line.
    :return: the exit status.
    """
    parser = argparse.ArgumentParser(description="Runs that go wrong, and what the log says of them.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--total-timesteps", type=int, default=TOKENS)
    parser.add_argument("--n-episodes", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only draw the pictures again")
    options = parser.parse_args(arguments)
    written = options.out / "results.json"
    rows = {row["name"]: row for row in json.loads(written.read_text())} if written.exists() else {}
    if not options.report:
        size = options.total_timesteps, options.n_episodes
        todo = {options.out / "runs" / f"{name}-{size[0]}-{size[1]}.json": (name, *size) for name in options.only}
        rows |= {row["name"]: row for row in all_runs(make_run, todo, options.workers)}
        write_results("benchmarks.going_wrong", options.out, [rows[name] for name in RUNS if name in rows])
    draw(options.out, list(rows.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
