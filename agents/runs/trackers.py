"""A run on a tracker: Weights & Biases, trackio or MLflow, through the tracker's own package, which is imported only
when it is asked for.

The tracker shows what the directory of the run holds: the numbers of ``progress.csv``, the texts of ``samples.jsonl``
as tables, and the configuration as parameters. ``tracker.json`` says which of the tracker's runs it is and how much of
it has been sent, so that a resumed run goes on there, and what could not be sent is sent later.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import re
import secrets
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from stable_baselines3.common.logger import KVWriter

from agents.runs.config import TrainConfig, dump_config
from agents.runs.hints import resume_command
from agents.runs.logs import ProgressTable, replace_text
from agents.runs.run_files import TIMESTEPS, whole_lines
from agents.runs.yaml_values import hints_of, mapping, typed

# After an attempt that failed, the next one waits so many times as long as that one took. A tracker out of reach may
# take minutes to say so, and then costs a tenth of the run's time at most.
TIMES_ITS_COST = 10


class TrackedRun(ABC):
    """One of a tracker's runs, begun or taken up again when the object is made.

    :param identity: what the tracker knows the run by; None: it is begun.
    :param project: the project, or what the tracker has for one.
    :param name: what a run that is begun is called.
    :param config: its parameters.
    :param directory: where the package may keep files of its own.
    """

    @abstractmethod
    def __init__(
        self, identity: str | None, project: str, name: str, config: dict[str, Any], directory: Path
    ) -> None: ...

    identity: str

    @abstractmethod
    def log(self, timesteps: int, numbers: dict[str, float]) -> None:
        """
        :param timesteps: the tokens so far.
        :param numbers: the numbers of an iteration, by name.
        """

    @abstractmethod
    def log_texts(self, timesteps: int, columns: list[str], rows: list[list[Any]]) -> None:
        """
        :param timesteps: the tokens so far.
        :param columns: the names of the columns.
        :param rows: numbers and strings, a row for each text.
        """

    @abstractmethod
    def finish(self) -> None:
        """Send what is still on its way, and end the connection."""


class _WandbRun(TrackedRun):
    """A run of Weights & Biases."""

    def __init__(self, identity: str | None, project: str, name: str, config: dict[str, Any], directory: Path) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=project,
            id=identity or secrets.token_hex(4),
            name=name,
            config=config,
            allow_val_change=True,  # a run may have been made longer
            dir=str(directory),
            resume="allow",
        )
        self._run.define_metric("*", step_metric=TIMESTEPS)
        self._table: Any = wandb.Table
        self.identity = str(self._run.id)

    def log(self, timesteps: int, numbers: dict[str, float]) -> None:
        self._run.log({**numbers, TIMESTEPS: timesteps})

    def log_texts(self, timesteps: int, columns: list[str], rows: list[list[Any]]) -> None:
        self._run.log({"texts": self._table(columns=columns, data=rows), TIMESTEPS: timesteps})

    def finish(self) -> None:
        self._run.finish()


class _TrackioRun(TrackedRun):
    """A run of trackio, which knows its runs by their names."""

    def __init__(self, identity: str | None, project: str, name: str, config: dict[str, Any], directory: Path) -> None:
        import trackio

        self.identity = identity or f"{name}-{secrets.token_hex(4)}"
        self._run: Any = trackio.init(project, name=self.identity, config=config, resume="allow")
        self._table: Any = trackio.Table

    def log(self, timesteps: int, numbers: dict[str, float]) -> None:
        self._run.log(dict(numbers), step=timesteps)

    def log_texts(self, timesteps: int, columns: list[str], rows: list[list[Any]]) -> None:
        named = [dict(zip(columns, row, strict=True)) for row in rows]
        self._run.log({"texts": self._table(data=named)}, step=timesteps)

    def finish(self) -> None:
        self._run.finish()


class _MlflowRun(TrackedRun):
    """A run of MLflow, where a project is an experiment."""

    def __init__(self, identity: str | None, project: str, name: str, config: dict[str, Any], directory: Path) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client: Any = MlflowClient()
        self._metric: Any = Metric
        if identity is None:
            known = self._client.get_experiment_by_name(project)
            experiment = self._client.create_experiment(project) if known is None else known.experiment_id
            self.identity = self._client.create_run(experiment, run_name=name).info.run_id
            params = [Param(key, str(value)) for key, value in config.items()]
            for start in range(0, len(params), 100):  # no more at once
                self._client.log_batch(self.identity, params=params[start : start + 100])
        else:
            self.identity = identity
            self._client.update_run(identity, status="RUNNING")

    def log(self, timesteps: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(re.sub(r"[^\w./: -]", "_", name), value, now, timesteps) for name, value in numbers.items()
        ]
        self._client.log_batch(self.identity, metrics=metrics)

    def log_texts(self, timesteps: int, columns: list[str], rows: list[list[Any]]) -> None:
        table = {column: [row[number] for row in rows] for number, column in enumerate(columns)}
        self._client.log_table(self.identity, table, f"texts/{timesteps:09d}.json")

    def finish(self) -> None:
        self._client.set_terminated(self.identity)


TRACKERS: dict[str, type[TrackedRun]] = {"wandb": _WandbRun, "trackio": _TrackioRun, "mlflow": _MlflowRun}


def check_tracker(name: str | None) -> None:
    """Look whether the package of a tracker is there. It is not imported for that.

    :param name: the tracker; None: there is none.
    :raises ImportError: if its package isn't installed.
    """
    if name is None:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a folder without an __init__.py, such as wandb makes for its runs
        raise ImportError(f'--track {name} needs a package that isn\'t installed: pip install "textrlhf[{name}]"')


@dataclass(frozen=True)
class Sent:
    """What ``tracker.json`` holds.

    :param tracker: the name of the tracker.
    :param id: what the tracker knows the run by.
    :param timesteps: the tokens up to which numbers have been sent.
    :param texts: the tokens up to which texts have been sent.
    """

    tracker: str
    id: str
    timesteps: int = -1
    texts: int = -1


class Tracker(KVWriter):
    """Keeps one of a tracker's runs as the directory of a run is. What goes wrong with it does not end the training.

    :param directory: of the run.
    :param config: its configuration, which names a tracker.
    :param table: its log, which is written before this.
    :raises ValueError: if there is a ``tracker.json`` that is none.
    """

    def __init__(self, directory: Path, config: TrainConfig, table: ProgressTable) -> None:
        assert config.track is not None
        self._name = config.track
        self._project = config.track_project
        self._directory = directory
        self._config = _flat(yaml.safe_load(dump_config(config)))
        self._table = table
        self._path = directory / "tracker.json"
        sent = _read(self._path)
        self._sent = sent if sent is not None and sent.tracker == self._name else None
        self._run: TrackedRun | None = None
        self._not_before = -math.inf
        self._has_warned = False

    def begin(self) -> None:
        """Begin a run of the tracker's, unless an earlier process has. Nothing has been trained yet, so that an error
        ends the training: a login is missing, or an address is wrong.

        :raises Exception: whatever the tracker raises.
        """
        if self._sent is None:
            self._open()

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Send all rows of the log and all texts that have not been sent.

        :param key_values: the row that the log has just been given.
        :param key_excluded: the outputs that a name is not for, of which the log knows.
        :param step: the number of tokens so far.
        """
        if time.monotonic() >= self._not_before:
            self._attempt(self._send)

    def close(self) -> None:
        """Send what there still is, and end the connection."""
        self._attempt(self._send)
        if self._run is not None:
            self._attempt(self._run.finish)

    def _attempt(self, action: Callable[[], None]) -> None:
        start = time.monotonic()
        try:
            action()
        except Exception as error:
            now = time.monotonic()
            self._not_before = now + TIMES_ITS_COST * (now - start)
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"{self._name} failed: {type(error).__name__}: {error} The training goes on, and so does its own "
                    f"log; what {self._name} has missed is sent when it answers again, by "
                    f"`{resume_command(self._directory)}` if need be.",
                    stacklevel=2,
                )

    def _open(self) -> TrackedRun:
        identity = None if self._sent is None else self._sent.id
        name = re.sub(r"[^\w.-]+", "-", self._directory.resolve().name)
        self._run = TRACKERS[self._name](identity, self._project, name, self._config, self._directory)
        if self._sent is None:
            self._sent = Sent(self._name, self._run.identity)
            self._note()
        return self._run

    def _note(self) -> None:
        assert self._sent is not None
        replace_text(self._path, json.dumps(asdict(self._sent)) + "\n")

    def _send(self) -> None:
        sent = self._sent or Sent(self._name, "")
        rows = [row for row in self._table.rows if int(row[TIMESTEPS]) > sent.timesteps]
        texts = [row for row in _lines(self._directory / "samples.jsonl") if row["timesteps"] > sent.texts]
        if not rows and not texts:
            return
        run = self._run or self._open()
        assert self._sent is not None
        try:
            for row in rows:
                timesteps = int(row[TIMESTEPS])
                run.log(timesteps, _numbers(row))
                self._sent = replace(self._sent, timesteps=timesteps)
            for timesteps, group in itertools.groupby(texts, lambda row: row["timesteps"]):
                run.log_texts(timesteps, *_as_table(list(group)))
                self._sent = replace(self._sent, texts=timesteps)
        finally:
            self._note()


def _read(path: Path) -> Sent | None:
    """What has been sent, as an earlier process has written it down."""
    if not path.exists():
        return None
    try:
        values = mapping("it", json.loads(path.read_text()))
        sent = Sent(**{name: typed(name, values.get(name), hint) for name, hint in hints_of(Sent).items()})
        if not re.fullmatch(r"\w[\w.-]*", sent.id):  # packages name files by it
            raise ValueError(f"Expected id to be letters, digits and hyphens, got {sent.id!r}.")
    except ValueError as error:
        raise ValueError(f"{path} doesn't say which of a tracker's runs this is: {error}") from error
    return sent


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in whole_lines(path).split("\n")[:-1]]


def _numbers(row: dict[str, str]) -> dict[str, float]:
    """The numbers of a row of the log, but for those that are not finite, which not every tracker takes."""
    found = {}
    for name, text in row.items():
        with contextlib.suppress(ValueError):
            found[name] = float(text)
    return {name: number for name, number in found.items() if math.isfinite(number)}


def _as_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Texts that were written at one time, as columns and rows; what is neither a number nor a string is left out."""
    columns = [name for name in rows[0] if all(isinstance(row.get(name), str | int | float) for row in rows)]
    return columns, [[row[name] for name in columns] for row in rows]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration without levels: ``{"env": {"task": 1}}`` becomes ``{"env.task": 1}``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return found
