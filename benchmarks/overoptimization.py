"""How far can a reward model be trusted? Gold and proxy score over √KL, for reward models of several sizes.

    python -m benchmarks.overoptimization --out benchmarks/results/overoptimization

After "Scaling Laws for Reward Model Overoptimization" (Gao, Schulman & Hilton 2022, https://arxiv.org/abs/2210.10760).
The gold score is the annotator that chose in the built-in preference pairs, the `sentiment` lexicon. The proxies are
reward models of several sizes that `textrlhf reward-model` trains on the same pairs, and `textrlhf train` runs PPO
against each of them, with several KL coefficients. Every process has one thread, and two run at a time; what is
finished is kept under `runs/overoptimization` and never run again. `--report` only writes table and plot anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from stable_baselines3.common.utils import set_random_seed
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from agents.evaluation.evaluate import draw_prompts
from agents.policies.causal_lm_policy import load_policy
from agents.rollouts.sampling import sample_texts
from agents.runs.config import EnvConfig
from benchmarks.plot_style import STYLE
from benchmarks.provenance import provenance
from text_env.builtin import LANGUAGE_MODEL

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

GOLD = "sentiment"
BEST_GOLD = 1.0  # no text scores higher by the lexicon
HEAD_WIDTH = 16


class Size(NamedTuple):
    """A reward model's base.

    :param width: of its residual stream; None is the built-in language model itself.
    :param layers: transformer blocks.
    :param learning_rate: of the reward model's training: the smaller, the higher.
    """

    width: int | None
    layers: int
    learning_rate: float


SIZES = {
    "16x1": Size(16, 1, 5e-3),
    "48x2": Size(48, 2, 3e-3),
    "96x3": Size(96, 3, 1e-3),
    "builtin": Size(None, 4, 1e-3),
}
PARTS = 12  # of a run's tokens; a curve has a point for each, which is one or more rollouts
FINAL = 5  # the last rollouts of a run, whose mean is its end

Run = dict[str, Any]
Point = dict[str, float]


# ---- statistics ----------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """R(d) = d·(α − β·log d), the paper's form for reinforcement learning (its equation 2).

    :param alpha: α.
    :param beta: β.
    :param residual: root mean square of what the form doesn't explain.
    :param points: that were fitted.
    """

    alpha: float
    beta: float
    residual: float
    points: int

    def __call__(self, d: ArrayLike) -> NDArray[np.float64]:
        """
        :param d: √KL, any shape, at least 0.
        :return: R(d), the same shape; R(0) = 0, the limit.
        """
        return _terms(d) @ np.array([self.alpha, self.beta])

    @property
    def peak(self) -> float:
        """Where R has its maximum, exp(α/β − 1); infinite where it never falls."""
        return math.exp(min(self.alpha / self.beta - 1, 700.0)) if self.beta > 0 else math.inf


def _terms(d: ArrayLike) -> NDArray[np.float64]:
    """What α and β multiply, [..., 2]."""
    d = np.asarray(d, np.float64)
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], axis=-1)


def fit_scaling_law(d: Sequence[float], gold: Sequence[float]) -> Fit | None:
    """Least squares; the form is linear in α and β.

    :param d: √KL of each rollout, [n].
    :param gold: gains in gold score over the start, [n].
    :return: the fit; None if fewer than three rollouts, or than two different ones, have moved from the start.
    """
    moved = np.asarray(d) > 0  # at the start every α and β fits
    x, y = _terms(np.asarray(d)[moved]), np.asarray(gold, np.float64)[moved]
    if len(y) < 3 or np.linalg.matrix_rank(x) < 2:
        return None
    (alpha, beta), *_ = np.linalg.lstsq(x, y, rcond=None)
    residual = float(np.sqrt(np.mean((y - x @ np.array([alpha, beta])) ** 2)))
    return Fit(float(alpha), float(beta), residual, len(y))


def root_kl(kl: float) -> float:
    """
    :param kl: nats per episode; the mean of sampled log-ratios can be below 0.
    :return: its root, 0 for those.
    """
    return math.sqrt(max(kl, 0.0))


class Step(NamedTuple):
    """Means over a part of a run.

    :param d: √KL.
    :param proxy: score.
    :param gold: score.
    :param rollouts: how many.
    """

    d: float
    proxy: float
    gold: float
    rollouts: int


def path(points: Sequence[Point], parts: int = PARTS) -> list[Step]:
    """Where a run went, in the order of time: under a KL penalty scores go on changing while the KL stays.

    :param points: rollouts of one run, or of several of the same length.
    :param parts: of the tokens, equally large.
    :return: the parts that hold rollouts, the first one first.
    """
    columns = ("tokens", "kl", "proxy", "gold")
    rows = np.array([[point[name] for name in columns] for point in points]).reshape(-1, len(columns))
    numbers = np.ceil(parts * rows[:, 0] / rows[:, 0].max(initial=1.0))
    groups = [rows[numbers == number] for number in np.unique(numbers)]
    means = ([float(mean) for mean in group.mean(axis=0)] for group in groups)
    return [Step(root_kl(kl), *scores, len(group)) for (_, kl, *scores), group in zip(means, groups, strict=True)]


def peak(steps: Sequence[Step]) -> Step:
    """
    :param steps: of :func:`path`.
    :return: that of the highest gold score.
    """
    return max(steps, key=lambda step: step.gold)


def ending(curve: Sequence[Point], last: int = FINAL) -> Point:
    """
    :param curve: of a run.
    :param last: so many rollouts.
    :return: means over those, and the ``gap`` proxy − gold.
    """
    means = {name: float(np.mean([point[name] for point in curve[-last:]])) for name in curve[0]}
    return {**means, "gap": means["proxy"] - means["gold"]}


# ---- runs ----------------------------------------------------------------------------------------------------------


class Proxy(NamedTuple):
    """One reward model. The seed is of its base's weights, of the pairs' order and of its head.

    :param size: a key of ``SIZES``.
    :param seed: of everything.
    :param max_pairs: to train on.
    :param start_texts: of the untrained policy, which the score is normalised by.
    :param device: where it trains.
    """

    size: str
    seed: int
    max_pairs: int
    start_texts: int
    device: str

    def directory(self, runs: Path) -> Path:
        """What the result depends on is in its name: with something else it is another run."""
        rate = SIZES[self.size].learning_rate
        return runs / f"proxy-{self.size}-{rate:g}-{self.max_pairs}-{self.start_texts}-{self.seed}"

    def train(self, runs: Path) -> None:
        """
        :param runs: where all runs are.
        """
        options = {
            "preferences": "builtin",
            "base": self.base(runs),
            "policy": "builtin",
            "learning-rate": SIZES[self.size].learning_rate,
            "max-pairs": self.max_pairs,
            "n-normalisation-texts": self.start_texts,
            "seed": self.seed,
            "device": self.device,
        }
        once(self.directory(runs), lambda out: textrlhf("reward-model", {**options, "out": out}))

    def base(self, runs: Path) -> str:
        """
        :return: what the reward model starts from; it is made if it isn't there.
        """
        size = SIZES[self.size]
        if size.width is None:
            return "builtin"
        directory = runs / f"base-{self.size}-{self.seed}"
        once(directory, lambda out: save_base(size, self.seed, out))
        return str(directory)


class Policy(NamedTuple):
    """One PPO run against a proxy.

    :param proxy: the reward, with the seed of both.
    :param kl_coef: β of the KL penalty.
    :param total_timesteps: tokens.
    :param learning_rate: constant, so that the policy goes on moving.
    :param n_episodes: of a rollout, which is a point of the curve.
    """

    proxy: Proxy
    kl_coef: float
    total_timesteps: int
    learning_rate: float
    n_episodes: int

    def directory(self, runs: Path) -> Path:
        """What the result depends on is in its name, and in that of the proxy before it."""
        own = f"{self.kl_coef:g}-{self.total_timesteps}-{self.learning_rate:g}-{self.n_episodes}"
        return runs / f"{self.proxy.directory(Path()).name.replace('proxy', 'policy')}-{own}"

    def train(self, runs: Path) -> None:
        """
        :param runs: where all runs are.
        """
        options = {
            "algo": "ppo",
            "model": "builtin",
            "reward": self.proxy.directory(runs),
            "gold": GOLD,
            "kl-coef": self.kl_coef,
            "learning-rate": self.learning_rate,
            "lr-schedule": "constant",
            "n-episodes": self.n_episodes,
            "total-timesteps": self.total_timesteps,
            "sample-every": 1_000_000,  # texts of the start and of the end only
            "seed": self.proxy.seed,
            "device": self.proxy.device,
        }
        once(self.directory(runs), lambda out: textrlhf("train", {**options, "run-dir": out}))


def once(directory: Path, make: Callable[[Path], None]) -> None:
    """Make a directory, unless it was made before. One that bears this name is complete.

    :param directory: what is made; notes in ``seconds`` how long it took.
    :param make: is told where to.
    """
    if directory.exists():
        return
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
    partial.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    make(partial)
    (partial / "seconds").write_text(f"{time.perf_counter() - start:.1f}\n")
    partial.rename(directory)


def textrlhf(command: str, options: dict[str, Any]) -> None:
    """Run ``textrlhf`` in a process of its own, on one thread.

    :param command: of its commands.
    :param options: name → value.
    :raises RuntimeError: with the process's last words, if it fails.
    """
    arguments = [command, "--no-progress", *(part for name, value in options.items() for part in (f"--{name}", value))]
    words = [sys.executable, "-m", "agents.cli", *map(str, arguments)]
    done = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def save_base(size: Size, seed: int, directory: Path) -> None:
    """A language model that has learned nothing, shaped as the built-in one and with its tokenizer.

    :param size: its width and layers.
    :param seed: of its weights.
    :param directory: is made.
    """
    assert size.width is not None
    heads = size.width // HEAD_WIDTH
    config = AutoConfig.from_pretrained(
        LANGUAGE_MODEL,
        hidden_size=size.width,
        intermediate_size=8 * size.width // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_WIDTH,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(LANGUAGE_MODEL).save_pretrained(directory)


def measure_start(n_texts: int, device: str, directory: Path) -> None:
    """The gold score of the untrained policy's texts for the training prompts, into ``directory/start.json``.

    :param n_texts: as many as normalise the proxies.
    :param device: where it writes.
    :param directory: is made.
    """
    env = EnvConfig(reward=GOLD, gold=None).make(min(64, n_texts), "builtin")
    set_random_seed(0)
    prompts = [env.prompts[i].text for i in draw_prompts(len(env.prompts), n_texts, seed=0)]
    infos = sample_texts(load_policy("builtin", env, device), env, prompts)
    scores = np.array([info["score"] for info in infos])
    directory.mkdir()
    write(
        directory / "start.json", {"gold_mean": float(scores.mean()), "gold_std": float(scores.std()), "texts": n_texts}
    )


def run_all(policies: Sequence[Policy], runs: Path) -> Point:
    """Everything that isn't there yet, two processes at a time; the others are finished also if one fails.

    :param policies: what to train, their proxies first.
    :param runs: where all runs are.
    :return: ``gold_mean`` and ``gold_std`` of the start.
    """
    proxies = list(dict.fromkeys(policy.proxy for policy in policies))
    n_texts, device = proxies[0].start_texts, proxies[0].device
    start = runs / f"start-{n_texts}"
    once(start, lambda out: measure_start(n_texts, device, out))
    with ThreadPoolExecutor(max_workers=2) as pool, tqdm(total=len(proxies) + len(policies)) as bar:
        # The largest first. A policy waits for its proxy, which has begun whenever the policy has its turn.
        proxies.sort(key=lambda proxy: -list(SIZES).index(proxy.size))
        trained = {proxy: pool.submit(proxy.train, runs) for proxy in proxies}

        def train(policy: Policy) -> None:
            trained[policy.proxy].result()
            policy.train(runs)

        futures: list[Future[None]] = [*trained.values(), *(pool.submit(train, policy) for policy in policies)]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
    for future in futures:
        future.result()
    point: Point = json.loads((start / "start.json").read_text())
    return point


# ---- what they left ------------------------------------------------------------------------------------------------


def result(policy: Policy, runs: Path, start: Point) -> Run:
    """One entry of ``results.json``, from what the two runs left. Scores are in standard deviations of the start's.

    :param policy: that was trained.
    :param runs: where all runs are.
    :param start: of :func:`run_all`.
    """
    proxy, directory = policy.proxy.directory(runs), policy.directory(runs)
    report = json.loads((proxy / "reward_model.json").read_text())
    curve = read_curve(directory / "progress.csv", start)
    with (directory / "samples.jsonl").open() as file:  # by lines of the file: texts may hold other ends of lines
        samples = [json.loads(line) for line in file]
    last = [row for row in samples if row["timesteps"] == samples[-1]["timesteps"]]
    return {
        "size": policy.proxy.size,
        "parameters": report["parameters"],
        "non_embedding_parameters": non_embedding_parameters(proxy),
        "held_out_accuracy": report["held_out"]["accuracy"],
        "held_out_accuracy_se": report["held_out"]["accuracy_se"],
        "train_accuracy": report["train"]["accuracy"],
        "annotator_ceiling": report["annotator_ceiling"],
        "proxy_learning_rate": report["settings"]["learning_rate"],
        "pairs": report["pairs"]["train"],
        "kl_coef": policy.kl_coef,
        "seed": policy.proxy.seed,
        "proxy_seconds": float((proxy / "seconds").read_text()),
        "seconds": float((directory / "seconds").read_text()),
        "final": ending(curve),
        "texts": [
            {
                "text": row["prompt"] + row["completion"],
                "proxy": row["score"],
                "gold": (row["gold_score"] - start["gold_mean"]) / start["gold_std"],
            }
            for row in last
        ],
        "curve": curve,
    }


def read_curve(progress: Path, start: Point) -> list[Point]:
    """
    :param progress: a run's ``progress.csv``.
    :param start: mean and standard deviation of the start's gold score.
    :return: ``tokens``, ``kl``, ``proxy``, ``gold`` and mean ``length`` of every rollout.
    """
    table = np.atleast_1d(np.genfromtxt(progress, delimiter=",", names=True, deletechars=""))
    columns = {
        "tokens": table["time/total_timesteps"],
        "kl": table["objective/kl"],
        "proxy": table["objective/scores"],
        "gold": (table["objective/gold_score"] - start["gold_mean"]) / start["gold_std"],
        "length": table["completions/mean_length"],
    }
    return [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]


def non_embedding_parameters(directory: Path) -> int:
    """
    :param directory: of a reward model.
    :return: its parameters without those of the token embeddings.
    """
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(directory, num_labels=1))
    embeddings = sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
    return int(model.num_parameters()) - embeddings


def grouped(results: Sequence[Run], *keys: str) -> dict[tuple[Any, ...], list[Run]]:
    """
    :param results: all runs.
    :param keys: what those of a group share.
    :return: the groups, in order of appearance.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in results:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return groups


def rollouts(group: Iterable[Run]) -> list[Point]:
    """The points of all their curves, except the first ones: those are the start's, which is 0 by definition."""
    return [point for run in group for point in run["curve"][1:]]


def fit_of(group: Sequence[Run]) -> Fit | None:
    """The fit to all rollouts of some runs."""
    points = rollouts(group)
    return fit_scaling_law([root_kl(point["kl"]) for point in points], [point["gold"] for point in points])


# ---- table ---------------------------------------------------------------------------------------------------------


def write_table(results: Sequence[Run], start: Point, file: Path) -> None:
    """
    :param results: all runs.
    :param start: of :func:`run_all`.
    :param file: a Markdown file.
    """
    some = results[0]
    ceiling = (BEST_GOLD - start["gold_mean"]) / start["gold_std"]
    seeds, lowest = len({run["seed"] for run in results}), min(run["kl_coef"] for run in results)
    lines = [
        "# Over-optimisation",
        "",
        f"Reward models on the same {some['pairs']:,} built-in pairs; the best possible accuracy, the annotator's, is "
        f"{some['annotator_ceiling']:.1%}. Seeds: {seeds}.",
        "",
        *markdown(
            ["reward model", "parameters", "without embeddings", "learning rate", "held-out accuracy", "on training"],
            [
                [
                    size,
                    f"{runs[0]['parameters']:,}",
                    f"{runs[0]['non_embedding_parameters']:,}",
                    f"{runs[0]['proxy_learning_rate']:g}",
                    f"{mean_of(runs, 'held_out_accuracy'):.1%} ± {mean_of(runs, 'held_out_accuracy_se'):.1%}",
                    f"{mean_of(runs, 'train_accuracy'):.1%}",
                ]
                for (size,), runs in grouped(results, "size").items()
            ],
        ),
        "",
        "Scores are in standard deviations of the untrained policy's texts, whose mean is 0. No text has more than "
        f"{ceiling:.2f} gold. The peak is that of means over a {PARTS}th of the tokens, the end the mean of the last "
        f"{FINAL} rollouts, length in tokens. α, β and residual (root mean square): R(d) = d·(α − β·log d), d = √KL, "
        "fitted to the gold score of all rollouts, where the KL coefficient is lowest; R's own peak is an "
        "extrapolation if the runs end before it.",
        "",
        *markdown(
            [
                *("reward model", "KL coef", "gold at its peak", "√KL there", "gold at the end", "proxy at the end"),
                *("gap", "√KL at the end", "length at the end", "α", "β", "residual", "√KL of R's peak"),
            ],
            [
                row_of(size, kl_coef, runs, fit_of(runs) if kl_coef == lowest else None)
                for (size, kl_coef), runs in grouped(results, "size", "kl_coef").items()
            ],
        ),
        "",
        "What the policies wrote at the end for the first held-out prompt:",
        "",
        *markdown(
            ["reward model", "KL coef", "proxy", "gold", "text"],
            [
                [
                    *(
                        size,
                        f"{kl_coef:g}",
                        f"{runs[0]['texts'][0]['proxy']:.2f}",
                        f"{runs[0]['texts'][0]['gold']:.2f}",
                    ),
                    cell(runs[0]["texts"][0]["text"]),
                ]
                for (size, kl_coef), runs in grouped(results, "size", "kl_coef").items()
            ],
        ),
    ]
    file.write_text("\n".join(lines) + "\n")


def row_of(size: str, kl_coef: float, runs: Sequence[Run], fit: Fit | None) -> list[str]:
    """The table's row of a size and a KL coefficient."""
    best = peak(path(rollouts(runs)))
    end = {name: mean_of([run["final"] for run in runs], name) for name in ("kl", "proxy", "gold", "gap", "length")}
    return [
        size,
        f"{kl_coef:g}",
        f"{best.gold:.2f}",
        f"{best.d:.1f}",
        f"{end['gold']:.2f}",
        f"{end['proxy']:.2f}",
        f"{end['gap']:+.2f}",
        f"{root_kl(end['kl']):.1f}",
        f"{end['length']:.0f}",
        *(("–",) * 4 if fit is None else (f"{number:.2f}" for number in fit[:3])),
        *(() if fit is None else (f"{fit.peak:.0f}" if fit.peak < 100 else "> 100",)),
    ]


def cell(text: str) -> str:
    """A text of a model that stands in a table's cell as it is."""
    return " ".join(text.replace("|", "\\|").split())


def mean_of(rows: Iterable[dict[str, Any]], name: str) -> float:
    """Of one column."""
    return float(np.mean([row[name] for row in rows]))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines, numbers to the right."""
    rule = ["---" if name in ("reward model", "text") else "---:" for name in header]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


# ---- plot ----------------------------------------------------------------------------------------------------------

X_LABEL = "√KL to the start (√nats per text)"
Y_LABEL = "score (standard deviations of the start's)"
COEF_COLOURS = ("#E69F00", "#56B4E9", "#000000", "#CC79A7")  # light and dark by turns; from the lowest coefficient
SIZE_COLOURS = ("#E69F00", "#009E73", "#0072B2", "#000000")  # four of Okabe and Ito's, from the smallest size


def write_plot(results: Sequence[Run], start: Point, file: Path) -> None:
    """Above, the sizes at the lowest KL coefficient, proxy and gold score apart; below, each size's KL coefficients.

    :param results: all runs.
    :param start: of :func:`run_all`.
    :param file: a PNG file.
    """
    by_size = grouped(results, "size")
    coefs = sorted({run["kl_coef"] for run in results})
    styles = [("-", "o"), ((0, (6, 2)), "s"), ((0, (2, 1.2)), "^"), ((0, (6, 2, 1.5, 2)), "D")]
    size_looks = {key: (SIZE_COLOURS[i % 4], *styles[i % 4]) for i, key in enumerate(by_size)}
    coef_looks = {c: (COEF_COLOURS[i % 4], ("o", "s", "^", "D")[i % 4]) for i, c in enumerate(coefs)}
    ceiling = (BEST_GOLD - start["gold_mean"]) / start["gold_std"]
    with plt.rc_context({**STYLE, "axes.titlesize": 11}):
        figure = plt.figure(figsize=(12.4, 8.6), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))

        proxy, gold = above.subplots(1, 2, sharex=True)
        for key, runs in by_size.items():
            steps = path(rollouts([run for run in runs if run["kl_coef"] == coefs[0]]))
            colour, line, marker = size_looks[key]
            for axis, name in ((proxy, "proxy"), (gold, "gold")):
                scores = [0.0, *(getattr(step, name) for step in steps)]
                axis.plot(
                    [0.0, *(step.d for step in steps)], scores, linestyle=line, marker=marker, markersize=4.5,
                    markeredgewidth=0, color=colour, linewidth=2, label=f"{key[0]}: {label_of(runs)}",
                )  # fmt: skip
        finish(proxy, f"Proxy score: what is trained on (KL coefficient {coefs[0]:g})", None)
        finish(gold, "Gold score of the same policies: what is wanted", ceiling)
        gold.set_ylim(top=1.12 * ceiling)
        gold.annotate(
            "the most gold there is", (0.01, ceiling), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", color="#666666", fontsize=9,
        )  # fmt: skip
        for axis in (proxy, gold):
            axis.set_xlabel(X_LABEL)
        proxy.set_ylabel(Y_LABEL)
        handles, labels = proxy.get_legend_handles_labels()
        above.legend(handles, labels, loc="outside lower center", ncols=2, title="reward model", title_fontsize=10)

        small = list(np.atleast_1d(below.subplots(1, len(by_size), sharex=True, sharey=True)))
        for axis, (key, runs) in zip(small, by_size.items(), strict=True):
            for kl_coef in coefs:
                draw_curves(axis, [run for run in runs if run["kl_coef"] == kl_coef], *coef_looks[kl_coef])
            finish(axis, f"{key[0]}, {mean_of(runs, 'held_out_accuracy'):.0%} right", ceiling)
            axis.set_xlabel(X_LABEL)
        small[0].set_ylabel(Y_LABEL)
        dark: Any = {"color": "#444444"}
        below.legend(
            handles=[
                *(
                    Line2D([], [], color=paint, marker=mark, linewidth=3, label=f"KL coefficient {c:g}")
                    for c, (paint, mark) in coef_looks.items()
                ),
                Line2D([], [], linewidth=2.2, label="gold score", **dark),
                Line2D([], [], linewidth=1.6, linestyle="--", label="proxy score", **dark),
                Line2D([], [], marker="*", markersize=11, linestyle="none", label="gold at its peak", **dark),
            ],
            loc="outside lower center", ncols=len(coefs) + 3,
        )  # fmt: skip
        for axis in (proxy, small[0]):
            axis.set_xlim(left=0)
        figure.savefig(file, dpi=130)
        plt.close(figure)


def draw_curves(axis: Axes, runs: Sequence[Run], colour: Any, marker: str) -> None:
    """The path of a policy. It begins at the start, where both scores are 0 by definition."""
    steps = path(rollouts(runs))
    d = [0.0, *(step.d for step in steps)]
    style: Any = {"color": colour, "marker": marker, "markersize": 4, "markeredgewidth": 0}
    axis.plot(d, [0.0, *(step.proxy for step in steps)], linewidth=1.6, linestyle="--", **style)
    axis.plot(d, [0.0, *(step.gold for step in steps)], linewidth=2.2, **style)
    best = peak(steps)
    axis.plot(best.d, best.gold, color=colour, marker="*", markersize=13, markeredgecolor="white", zorder=4)


def finish(axis: Axes, title: str, ceiling: float | None) -> None:
    """What all panels share."""
    if ceiling is not None:
        axis.axhline(ceiling, color="#888888", linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    axis.set_title(title)


def label_of(runs: Sequence[Run]) -> str:
    """Parameters without embeddings, and accuracy."""
    n = runs[0]["non_embedding_parameters"]
    size = f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.0f} k"
    return f"{size} parameters, {mean_of(runs, 'held_out_accuracy'):.1%} right"


# ---- command -------------------------------------------------------------------------------------------------------


def write(file: Path, value: Any) -> None:
    """As JSON, one level of it a line."""
    file.write_text(json.dumps(value, indent=1) + "\n")


def write_report(out: Path) -> None:
    """Table and plot from ``results.json`` and ``environment.json``.

    :param out: the directory of them all.
    """
    results = json.loads((out / "results.json").read_text())
    start = json.loads((out / "environment.json").read_text())["start"]
    write_table(results, start, out / "table.md")
    write_plot(results, start, out / "overoptimization.png")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """
    :param arguments: of the command line.
    :return: everything.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overoptimization"))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="width x layers, or")
    parser.add_argument("--kl-coefs", nargs="+", type=float, default=[0.0, 0.02, 0.1])
    parser.add_argument("--seeds", type=int, default=1, help="of reward model and policy together")
    parser.add_argument("--total-timesteps", type=int, default=60_000, help="tokens of a PPO run")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of PPO, constant")
    parser.add_argument("--n-episodes", type=int, default=64, help="of a rollout, one point of a curve")
    parser.add_argument("--max-pairs", type=int, default=5_000, help="that reward models are trained on")
    parser.add_argument("--start-texts", type=int, default=1024, help="of the untrained policy, to normalise by")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/overoptimization"), help="where every run's files go")
    parser.add_argument("--report", action="store_true", help="run nothing: table and plot from --out/results.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: of the command line.
    """
    args = parse(arguments)
    if args.report:
        write_report(args.out)
        return
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    environment = provenance("benchmarks.overoptimization", arguments, torch.device(args.device))
    policies = [
        Policy(
            Proxy(size, seed, args.max_pairs, args.start_texts, args.device),
            kl_coef,
            args.total_timesteps,
            args.learning_rate,
            args.n_episodes,
        )
        for seed, size, kl_coef in itertools.product(range(args.seeds), args.sizes, sorted(args.kl_coefs))
    ]
    start = run_all(policies, args.runs)
    results = [result(policy, args.runs, start) for policy in policies]
    results.sort(key=lambda run: (args.sizes.index(run["size"]), run["kl_coef"], run["seed"]))
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    proxy_seconds = {(run["size"], run["seed"]): run["proxy_seconds"] for run in results}
    environment |= {
        "settings": {**settings, "algo": "ppo", "gold": GOLD},
        "start": start,
        # Of all processes together, those of earlier, interrupted calls as well.
        "process_seconds": round(sum(proxy_seconds.values()) + sum(run["seconds"] for run in results)),
    }
    write(args.out / "results.json", results)
    write(args.out / "environment.json", environment)
    write_report(args.out)


if __name__ == "__main__":
    main()
