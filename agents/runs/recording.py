"""What a training run writes besides its log: texts while it is running and, at its end, the learning curve."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.rollouts.sampling import sample_texts
from agents.runs.config import TrainConfig
from agents.runs.curves import TOKENS, colour, dashes, smoothed
from agents.runs.hints import resume_command
from agents.runs.run_files import read_run
from agents.state.lock import LOCK
from agents.state.replacing import sync

CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
LOGS = ("progress.csv", "samples.jsonl", "episodes.jsonl", "tracker.json")
RESULTS = ("policy", "learning_curve.png")


def check_directory(directory: Path) -> None:
    """
    :param directory: where a run is to go.
    :raises FileExistsError: if there is a run already, or something else that the run would write over.
    :raises OSError: if no directory can be made there.
    """
    if (directory / "config.yaml").exists():
        raise FileExistsError(
            f"{directory} holds a run already: `{resume_command(directory)}` goes on with it; choose another --run-dir "
            "for a new one."
        )
    if (directory / CHECKPOINTS).exists():
        raise FileExistsError(
            f"{directory} holds checkpoints of a run without its config.yaml; choose another --run-dir, or remove them."
        )
    if found := [name for name in (*RESULTS, *LOGS) if (directory / name).exists()]:
        raise FileExistsError(
            f"{directory} holds no run, but {' and '.join(found)}, which a run would replace; choose another "
            "--run-dir, or move what is there."
        )
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file; choose another --run-dir than {directory}.")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"{nearest} can't be written to; choose another --run-dir than {directory}.")


def remove_start(directory: Path, before: set[Path]) -> None:
    """Remove what a run wrote that learned nothing.

    :param directory: of the run.
    :param before: what was in it before the run began, such as event files of others. It stays.
    """
    for pattern in ("config.yaml", "events.out.tfevents.*", *LOGS):
        for path in set(directory.glob(pattern)) - before:
            path.unlink()


def remove_run(directory: Path) -> None:
    """Remove all that is in the directory of a run, whose lock is held. ``config.yaml`` goes last, so that what is left
    after an interrupt is still known for what it was.

    :param directory: of the run.
    """
    for path in sorted(directory.iterdir(), key=lambda path: path.name == "config.yaml"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


class SampleTexts(BaseCallback):
    """Writes texts for fixed prompts, held-out ones if there are some, to a file: at the start, every few iterations
    and at the end.

    :param path: the file, ``samples.jsonl``, with one line per text: the final info of its episode, ``timesteps``, and
        the ``columns`` of its prompt, if it has any.
    :param config: the configuration of the run.
    """

    def __init__(self, path: Path, config: TrainConfig) -> None:
        super().__init__()
        self._path = path
        self._every = config.sample_every
        assert config.model is not None
        # Prompts without a held-out part are those of the training, so texts are written for the first of them.
        self._env = config.env.held_out().make(config.n_samples, config.model)
        self._prompts = self._env.prompts[: config.n_samples]  # with their columns, which rewards may need

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if cast(OnPolicyAlgorithm, self.model)._iterations % self._every == 0:
            self._write()

    def _on_training_end(self) -> None:
        self._write()

    def _write(self) -> None:
        model = cast(OnPolicyAlgorithm, self.model)
        # The same random numbers every time, without changing those of the training.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            infos = sample_texts(model.policy, self._env, self._prompts)
        with self._path.open("a") as file:
            for prompt, info in zip(self._prompts, infos, strict=True):
                row = {"timesteps": model.num_timesteps, **info}
                if prompt.columns:  # such as the right answer; `answer` in the row itself is what the text answers
                    row["columns"] = dict(prompt.columns)
                file.write(json.dumps(row, ensure_ascii=False, default=_as_json) + "\n")
        sync(self._path)  # as a checkpoint that knows of them will be


def _as_json(value: Any) -> Any:
    """A value that is none of JSON's: a number of NumPy's, or what somebody's prompts have in a column."""
    return value.item() if isinstance(value, np.generic) else str(value)


def plot_learning_curve(directory: Path) -> None:
    """Plot score, gold score and KL divergence over tokens, from ``progress.csv`` to ``learning_curve.png``.

    :param directory: the directory of the run.
    """
    import matplotlib.figure

    run = read_run(directory)
    if not run.curves:
        return  # no iteration was finished
    figure = matplotlib.figure.Figure(figsize=(7, 5), layout="constrained")
    scores, distance = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    shown = {
        "objective/scores": (scores, "score (trained on)"),
        "objective/gold_score": (scores, "gold score (only measured)"),
        "objective/kl": (distance, "KL to the reference"),
    }
    for number, (column, (axes, label)) in enumerate(shown.items()):
        tokens, values = run.curve(column)
        if not len(tokens):
            continue
        axes.plot(tokens / 1000, values, color=colour(number), linewidth=0.9, alpha=0.4)
        style = {"color": colour(number), "linestyle": dashes(number), "linewidth": 2}
        axes.plot(tokens / 1000, smoothed(values), label=label, **style)
    for axes in (scores, distance):
        axes.grid(color="#E5E5E5")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    scores.set_ylabel("score")
    distance.set_ylabel("KL (nats per episode)")
    distance.set_xlabel(TOKENS)
    facts = [run.config.get("algo"), run.config.get("model"), f"seed {run.config.get('seed')}"]
    scores.set_title(" · ".join(str(fact) for fact in facts), loc="left", fontweight="bold", parse_math=False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)  # above the title, where no curve goes
    figure.savefig(directory / "learning_curve.png", dpi=120)
