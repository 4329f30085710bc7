"""Runs of a benchmark that are kept one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.many_runs import all_runs, file_of, write_results
from benchmarks.provenance import commit


def square(number: int) -> dict[str, Any]:
    if number < 0:
        raise RuntimeError("no root")
    return {"square": number * number}


@pytest.mark.parametrize("workers", [1, 2])
def test_only_what_is_missing_is_run_and_rows_keep_their_order(tmp_path: Path, workers: int) -> None:
    kept = {"square": "as it was", "commit": "an older one", "cpu": "another one"}
    (tmp_path / "2.json").write_text(json.dumps(kept))
    rows = all_runs(square, {tmp_path / f"{n}.json": (n,) for n in (3, 2, 1)}, workers)
    assert [row["square"] for row in rows] == [9, "as it was", 1]
    assert [row["commit"] for row in rows] == [commit(), "an older one", commit()]
    assert json.loads((tmp_path / "3.json").read_text()) == rows[0]
    write_results("benchmarks.nothing", tmp_path, rows, setting=5)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["commits"] == {commit(): 2, "an older one": 1}
    assert environment["setting"] == 5


def test_a_run_of_another_length_or_evaluated_on_other_texts_is_another_one(tmp_path: Path) -> None:
    name = "reward model, 1 epoch at 4e-4: twice"
    assert file_of(tmp_path, name, 60, 8, 0) == tmp_path / "runs" / "reward-model-1-epoch-at-4e-4-twice-60-8-0.json"
    others = [(name, 60, 8, 0), ("copy", 60, 8, 0), (name, 61, 8, 0), (name, 60, 9, 0), (name, 60, 8, 1)]
    assert len({file_of(tmp_path, *other) for other in others}) == 5


def test_a_run_that_fails_leaves_the_finished_ones_and_no_file_of_its_own(tmp_path: Path) -> None:
    todo = {tmp_path / "runs" / f"{n}.json": (n,) for n in (1, -1)}
    with pytest.raises(RuntimeError, match="no root"):
        all_runs(square, todo, workers=1)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["1.json"]
