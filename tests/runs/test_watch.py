"""Following a run in the terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_report import write_run

from agents.cli import main
from agents.runs.look_commands import WatchConfig
from agents.runs.run_files import RunFiles
from agents.runs.watch import LEVELS, sparkline, view, watch
from agents.state.lock import in_use, locked


def test_one_look_shows_curves_with_units_and_the_latest_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    assert main(["watch", str(run), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "finished, 4,000 tokens" in " ".join(shown.split())
    assert any(level in shown for level in LEVELS[1:])
    for said in ("Score (trained on)", "Clip fraction", "nats per", "+4.00 The movie good"):
        assert said in shown


def test_a_look_takes_no_longer_for_each_text_the_more_texts_there_are() -> None:
    rows = [{"timesteps": number, "prompt": "a", "completion": "b", "score": 1.0} for number in range(32_000)]
    start = time.perf_counter()
    view(RunFiles(Path("run"), {}, {}, rows, [], False), 3)
    assert time.perf_counter() - start < 5  # it takes 0.01 s; a look at all rows for each row, a minute


def test_a_run_is_followed_until_it_ends(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", iterations=4, words=" begun")
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    seen = threading.Thread(target=watch, args=(WatchConfig(run, every=0.02), console))
    with locked(run):
        seen.start()
        time.sleep(0.1)
        assert seen.is_alive()
        row = {"timesteps": 10_000, "prompt": "The movie", "completion": " over", "score": 1.0}
        with (run / "samples.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    seen.join(timeout=30)
    assert not seen.is_alive()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "running, 400" in shown
    assert " over" in shown


def test_ctrl_c_ends_the_watching_and_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", iterations=4)

    def press(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("agents.runs.watch.time.sleep", press)
    with locked(run):
        assert main(["watch", str(run)]) == 0
    assert "running, 400" in capsys.readouterr().out


def test_a_text_is_shown_as_it_is_and_gives_no_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", words="[red]x[/red] \x1b[2J")
    assert main(["watch", str(run), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "[red]x[/red] \ufffd[2J" in shown
    assert "\x1b[2J" not in shown


def test_a_directory_is_in_use_as_long_as_somebody_holds_its_lock(tmp_path: Path) -> None:
    assert not in_use(tmp_path)
    with locked(tmp_path):
        assert in_use(tmp_path)
        ask = "import sys, pathlib, agents.state.lock as l; print(l.in_use(pathlib.Path(sys.argv[1])))"
        done = subprocess.run(
            [sys.executable, "-c", ask, str(tmp_path)],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.stdout == "True\n"
        assert in_use(tmp_path)  # asking has not released it
    assert not in_use(tmp_path)


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    assert sparkline(np.arange(8.0)) == LEVELS
    assert sparkline(np.arange(800.0), 8) == LEVELS
    assert sparkline(np.full(3, 0.04)) == LEVELS[0] * 3
    assert sparkline(np.array([0.04, 0.04 + 1e-17])) == LEVELS[0] * 2
