"""The log of a run: columns in one order, metrics that appear late, and files that are cut back."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.runs.logs import ProgressTable, keep_lines, replace_text, run_logger


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def log(directory: Path, *rows: dict[str, Any], timesteps: int | None = None) -> None:
    logger = run_logger(directory, timesteps)
    for row in rows:
        for name, value in row.items():
            logger.record(name, value)
        logger.dump(row["time/total_timesteps"])
    logger.close()


def row(timesteps: int, **more: Any) -> dict[str, Any]:
    return {"z": timesteps / 8, "time/total_timesteps": timesteps, "a": np.float32(0.1), **more}


def test_columns_stand_in_alphabetical_order_and_those_that_appear_late_among_them(tmp_path: Path) -> None:
    log(tmp_path, row(8), row(16, m='a "text", with a comma'), row(24))
    assert (tmp_path / "progress.csv").read_text().splitlines()[0] == "a,m,time/total_timesteps,z"
    rows = read(tmp_path / "progress.csv")
    assert [line["m"] for line in rows] == ["", 'a "text", with a comma', ""]
    assert [line["z"] for line in rows] == ["1.0", "2.0", "3.0"]


def test_a_log_that_is_continued_is_the_log_that_was_never_interrupted(tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        log(tmp_path / name, row(8), row(16), row(24, late=1))
    whole, cut = (tmp_path / name / "progress.csv" for name in ("whole", "cut"))
    log(tmp_path / "cut", timesteps=16)
    assert cut.read_text().splitlines()[0] == "a,time/total_timesteps,z"
    log(tmp_path / "cut", row(24, late=1), timesteps=16)
    assert cut.read_text() == whole.read_text()


def test_half_a_row_is_no_row(tmp_path: Path) -> None:
    """Not even where half a number is a number that the checkpoint knows of."""
    path = tmp_path / "progress.csv"
    path.write_text("time/total_timesteps,z\n8,1.0\n1")
    assert len(ProgressTable(path, 100)) == 1
    assert path.read_text() == "time/total_timesteps,z\n8,1.0\n"
    path.write_text("time/tot")
    assert len(ProgressTable(path, 100)) == 0
    assert path.read_text() == ""


def test_lines_are_cut_back_by_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    text = '{"timesteps": 0, "text": "a\u2028b"}\n'  # which Python's splitlines would take for two lines
    path.write_text(text + '{"timesteps": 9, "text": ""}\n{"timesteps": 0')
    keep_lines(path, lambda line: line["timesteps"] < 9)
    assert path.read_text() == text
    keep_lines(tmp_path / "nothing", lambda line: False)
    assert [found.name for found in tmp_path.iterdir()] == ["samples.jsonl"]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    replace_text(path, "new")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "new")]
