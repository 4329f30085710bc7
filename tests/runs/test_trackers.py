"""`textrlhf train --track`: a tracker has what the directory of the run has, each row once, whatever fails in between.

A stand-in shows what happens when a tracker fails. The trackers themselves are tried where their packages are
installed (`make clients` installs them), without a network.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from test_resumed_run import configured

from agents.cli import main
from agents.runs.commands import ResumeConfig
from agents.runs.logs import ProgressTable
from agents.runs.stopping import Stopped
from agents.runs.trackers import TRACKERS, TrackedRun, Tracker, check_tracker
from agents.runs.train import resume, train

TIMESTEPS = "time/total_timesteps"


@dataclass
class Kept:
    """What a tracker has of a run.

    :param config: its parameters.
    :param numbers: tokens and numbers of each iteration.
    :param texts: tokens, and a row by column for each text.
    :param times_ended: how many connections to it were ended.
    """

    config: dict[str, Any]
    numbers: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    texts: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    times_ended: int = 0

    @property
    def steps(self) -> list[int]:
        return [timesteps for timesteps, _ in self.numbers]


class Service:
    """A tracker by itself. Each call is counted, and those that ``fails`` is true for don't get through."""

    def __init__(self) -> None:
        self.runs: dict[str, Kept] = {}
        self.calls = 0
        self.fails: Callable[[int], bool] = lambda call: False

    def reach(self) -> None:
        self.calls += 1
        if self.fails(self.calls):
            raise ConnectionError("No route to host")

    @property
    def only(self) -> Kept:
        [kept] = self.runs.values()
        return kept


service = Service()


class StandIn(TrackedRun):
    def __init__(self, identity: str | None, project: str, name: str, config: dict[str, Any], directory: Path) -> None:
        service.reach()
        self.identity = identity or f"{project}-{name}-{len(service.runs)}"
        self.kept = service.runs.setdefault(self.identity, Kept(config))

    def log(self, timesteps: int, numbers: dict[str, float]) -> None:
        service.reach()
        self.kept.numbers.append((timesteps, numbers))

    def log_texts(self, timesteps: int, columns: list[str], rows: list[list[Any]]) -> None:
        service.reach()
        self.kept.texts += [(timesteps, dict(zip(columns, row, strict=True))) for row in rows]

    def finish(self) -> None:
        service.reach()
        self.kept.times_ended += 1


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a tracker that the stand-in stands for."""
    service.__init__()  # type: ignore[misc]
    monkeypatch.setitem(TRACKERS, "mlflow", StandIn)
    monkeypatch.setattr("agents.runs.train.check_tracker", lambda name: None)
    yield "mlflow"
    service.__init__()  # type: ignore[misc]


def rows_of(directory: Path) -> list[tuple[int, dict[str, float]]]:
    """The finite numbers of the log."""
    with (directory / "progress.csv").open(newline="") as file:
        rows = [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
    return [(int(row[TIMESTEPS]), {k: v for k, v in row.items() if math.isfinite(v)}) for row in rows]


def without_clocks(rows: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    """A row that is made again takes another time."""
    return [(step, {k: v for k, v in row.items() if not k.startswith("time/")}) for step, row in rows]


def texts_of(directory: Path) -> list[tuple[int, str]]:
    lines = (directory / "samples.jsonl").read_text().split("\n")[:-1]
    return [(row["timesteps"], row["completion"]) for row in map(json.loads, lines)]


def written(kept: Kept) -> list[tuple[int, str]]:
    return [(timesteps, row["completion"]) for timesteps, row in kept.texts]


def stop_before(row: int, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    """The next training is stopped when it has so many rows of its log, ``at_once`` without a last checkpoint."""
    told = Tracker.write

    def write(self: Tracker, *args: Any, **kwargs: Any) -> None:
        told(self, *args, **kwargs)
        if len(self._table) == row:
            monkeypatch.setattr(Tracker, "write", told)
            raise Stopped(signal.SIGTERM, at_once)

    monkeypatch.setattr(Tracker, "write", write)


def test_the_tracker_has_what_the_directory_has(tmp_path: Path, tracker: str) -> None:
    train(configured(tmp_path, "run", track=tracker, track_project="films"))
    kept = service.only
    assert kept.numbers == rows_of(tmp_path / "run")
    assert len(kept.numbers) >= 4
    assert {"objective/scores", "objective/kl", "train/loss", TIMESTEPS} <= set(kept.numbers[-1][1])
    assert written(kept) == texts_of(tmp_path / "run")
    assert {"prompt", "completion", "score", "timesteps"} <= set(kept.texts[0][1])
    assert kept.config["algo"] == "ppo"
    assert kept.config["env.max_new_tokens"] == 6
    assert kept.times_ended == 1
    assert json.loads((tmp_path / "run" / "tracker.json").read_text())["id"] == "films-run-0"


@pytest.mark.parametrize("at_once", [False, True])
def test_a_resumed_run_goes_on_in_the_same_run_of_the_tracker(
    tmp_path: Path, tracker: str, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """Stopped at once it is taken up at an earlier checkpoint, and does again what the tracker has already."""
    stop_before(3, monkeypatch, at_once)
    with pytest.raises(Stopped):
        train(configured(tmp_path, "run", track=tracker, checkpoint_every=2, sample_every=1))
    assert service.only.steps == [timesteps for timesteps, _ in rows_of(tmp_path / "run")]
    resume(ResumeConfig(resume=tmp_path / "run", trust=True))
    assert service.only.steps == [timesteps for timesteps, _ in rows_of(tmp_path / "run")]
    assert len(service.only.steps) >= 4
    assert written(service.only) == texts_of(tmp_path / "run")


def test_what_a_tracker_missed_is_sent_when_it_answers_again(tmp_path: Path, tracker: str) -> None:
    service.fails = lambda call: call in (3, 4)
    with pytest.warns(UserWarning, match="mlflow failed: ConnectionError: No route to host The training goes on"):
        train(configured(tmp_path, "run", track=tracker))
    assert service.only.numbers == rows_of(tmp_path / "run")
    assert written(service.only) == texts_of(tmp_path / "run")


def test_a_tracker_that_stays_out_of_reach_costs_one_warning_and_is_sent_everything_by_resume(
    tmp_path: Path, tracker: str
) -> None:
    service.fails = lambda call: call > 2
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = train(configured(tmp_path, "run", track=tracker))
    assert [warning for warning in seen if "textrlhf train --resume" in str(warning.message)] == seen
    assert len(seen) == 1
    assert model.num_timesteps >= 250
    assert (tmp_path / "run" / "policy" / "config.json").exists()
    assert len(service.only.numbers) == 1
    service.fails = lambda call: False
    resume(ResumeConfig(resume=tmp_path / "run", trust=True))
    assert service.only.numbers == rows_of(tmp_path / "run")
    assert written(service.only) == texts_of(tmp_path / "run")


def test_a_tracker_that_refuses_at_the_start_ends_it_and_leaves_nothing_behind(tmp_path: Path, tracker: str) -> None:
    service.fails = lambda call: True
    with pytest.raises(ConnectionError, match="No route to host"):
        train(configured(tmp_path, "run", track=tracker))
    assert service.calls == 1
    assert not (tmp_path / "run").exists()


def test_another_tracker_than_before_gets_a_run_of_its_own(tmp_path: Path, tracker: str) -> None:
    (tmp_path / "tracker.json").write_text('{"tracker": "wandb", "id": "a1", "timesteps": 8, "texts": 8}')
    config = configured(tmp_path, ".", track=tracker)
    Tracker(tmp_path, config, ProgressTable(tmp_path / "progress.csv", 0)).begin()
    assert list(service.runs) == [json.loads((tmp_path / "tracker.json").read_text())["id"]] != ["a1"]


@pytest.mark.parametrize(
    "content",
    ["", "[1]", "{}", *('{"tracker": "mlflow", "timesteps": 1, "texts": 1, "id": ' + bad for bad in ("3}", '"../x"}'))],
)
def test_a_file_that_names_no_run_of_a_tracker_is_refused(tmp_path: Path, tracker: str, content: str) -> None:
    (tmp_path / "tracker.json").write_text(content)
    with pytest.raises(ValueError, match=r"tracker\.json doesn't say which of a tracker's runs this is"):
        Tracker(tmp_path, configured(tmp_path, ".", track=tracker), ProgressTable(tmp_path / "progress.csv", 0))


def test_a_tracker_whose_package_is_missing_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "wandb" else find_spec(name, *more)
    )
    assert main(["train", "--track", "wandb", "--model", "nothing", "--run-dir", str(tmp_path / "run")]) == 1
    assert 'pip install "textrlhf[wandb]"' in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb and MLflow make such folders where a training is started."""
    (tmp_path / "tracker_of_nobody").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="needs a package that isn't installed"):
        check_tracker("tracker_of_nobody")


# ---- the trackers themselves ---------------------------------------------------------------------------------------


def records(path: Path) -> Iterator[Any]:
    """The records of a file of wandb's, which is a log as LevelDB writes it: blocks of 32 KiB, each of whole pieces
    with a checksum, a length, and whether it is whole, first, middle or last (1 to 4)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record = (record if kind in (3, 4) else b"") + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)


def read_wandb(project: str, identity: str, directory: Path) -> Kept:
    kept = Kept({})
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.run.run_id:
                assert (record.run.run_id, record.run.project) == (identity, project)
            for item in [*record.run.config.update, *record.config.update]:
                kept.config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "texts.path" in row:
                table = json.loads((path.parent / "files" / row["texts.path"]).read_text())
                kept.texts += [(row[TIMESTEPS], dict(zip(table["columns"], r, strict=True))) for r in table["data"]]
            elif row:
                kept.numbers.append((row[TIMESTEPS], {k: v for k, v in row.items() if not k.startswith("_")}))
    return kept


def read_trackio(project: str, identity: str, directory: Path) -> Kept:
    from trackio.sqlite_storage import SQLiteStorage

    kept = Kept(SQLiteStorage.get_run_config(project, identity))
    for row in SQLiteStorage.get_logs(project, identity):
        if "texts" in row:
            kept.texts += [(row["step"], text) for text in row["texts"]["_value"]]
        else:
            kept.numbers.append((row["step"], {k: v for k, v in row.items() if "/" in k}))
    return kept


def read_mlflow(project: str, identity: str, directory: Path) -> Kept:
    from mlflow import MlflowClient

    client = MlflowClient()
    run = client.get_run(identity)
    assert client.get_experiment(run.info.experiment_id).name == project
    assert run.info.status == "FINISHED"
    steps: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(identity, name):
            steps.setdefault(metric.step, {})[name] = metric.value
    kept = Kept(run.data.params, sorted(steps.items()))
    for artifact in client.list_artifacts(identity, "texts"):
        table = json.loads(Path(client.download_artifacts(identity, artifact.path)).read_text())
        texts = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        kept.texts += [(text["timesteps"], text) for text in texts]
    return kept


READERS = {"wandb": read_wandb, "trackio": read_trackio, "mlflow": read_mlflow}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the trackers keep what they are told. trackio looks for it when it is imported, and then no more."""
    root = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(root / "trackio"))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "DO_NOT_TRACK": "true"}.items():
            patch.setenv(name, value)
        patch.chdir(root)
        yield root


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", TRACKERS)
def test_the_tracker_itself_has_the_whole_run_once_after_it_was_stopped_and_resumed(
    name: str, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    importlib.import_module(name)
    stop_before(3, monkeypatch, at_once=False)
    project = f"films-{name}"
    options: dict[str, Any] = {"checkpoint_every": 2, "sample_every": 1, "lr_schedule": "constant"}
    config = configured(tmp_path, "run", track=name, track_project=project, **options)
    with pytest.raises(Stopped):
        train(config)
    resume(ResumeConfig(resume=tmp_path / "run", total_timesteps=300, trust=True))
    told = json.loads((tmp_path / "run" / "tracker.json").read_text())
    kept = READERS[name](project, told["id"], tmp_path / "run")
    assert without_clocks(kept.numbers) == without_clocks(rows_of(tmp_path / "run"))
    assert kept.steps[-1] == told["timesteps"] >= 300
    assert written(kept) == texts_of(tmp_path / "run")
    assert str(kept.config["env.max_new_tokens"]) == "6"
    assert str(kept.config["learning_rate"]) == "0.003"
