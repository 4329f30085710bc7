"""The benchmark of what checkpoints survive: strangers are refused, and its file keeps the figures of other parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import PARTS, main, measure


def test_every_stranger_is_refused_by_name(tmp_path: Path) -> None:
    [(_, found)] = measure(["strangers"], tmp_path, flips=1, step=64)
    assert found["cases"] >= 49
    assert found["wrong"] == []


def test_a_part_that_is_measured_again_leaves_the_others_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.reliability.measure", lambda parts, *_: ((part, {"lost": []}) for part in parts))
    results = tmp_path / "reliability.json"
    results.write_text(json.dumps({"kills": {"figures": 1}, "killed": {"figures": 2}}))
    assert main(["killed", "damages", "--json", str(results)]) == 0
    written = json.loads(results.read_text())
    assert written["kills"] == {"figures": 1}
    assert written["killed"]["figures"] == written["damages"]["figures"] == {"lost": []}
    assert written["damages"]["command"].startswith("python -m benchmarks.reliability killed damages --json ")


def test_a_part_that_is_done_is_in_the_file_when_a_later_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> dict[str, Any]:
        raise RuntimeError("no strace")

    monkeypatch.setattr("benchmarks.reliability.killed_at_every_call", lambda _: {"lost": []})
    monkeypatch.setattr("benchmarks.reliability.at_every_system_call", fails)
    results = tmp_path / "reliability.json"
    with pytest.raises(RuntimeError, match="no strace"):
        main(["killed", "system-calls", "--json", str(results)])
    written = json.loads(results.read_text())
    assert {part: values["figures"] for part, values in written.items()} == {"killed": {"lost": []}}


def test_a_part_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["damage"])
    assert f"Expected parts among {', '.join(PARTS)}, got damage." in capsys.readouterr().err
