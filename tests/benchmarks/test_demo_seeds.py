"""The demo's seeds: a process that was ended is said to have been, and its seed is run again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo_seeds


def test_a_seed_whose_process_was_ended_says_why_and_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"gold_score": 0.5, "distinct_2": 0.5}
    evaluation = {"policy": texts, "reference": texts, "score_gain_std": 1.5, "kl": 9.0}

    def killed(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        (tmp_path / "0").mkdir()
        return subprocess.CompletedProcess(command, -9, b"", "it was öut of memory".encode())

    def finished(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        (tmp_path / "0" / "evaluation.json").write_text(json.dumps(evaluation))
        return subprocess.CompletedProcess(command, 1, b"", b"")  # evaluated, and one of the four goals missed

    monkeypatch.setattr(subprocess, "run", killed)
    with pytest.raises(RuntimeError, match="ended with -9 before it was evaluated:\nit was öut of memory"):
        demo_seeds.run_seed(0, tmp_path)
    monkeypatch.setattr(subprocess, "run", finished)
    assert demo_seeds.run_seed(0, tmp_path)["learned"] is False
    monkeypatch.setattr(subprocess, "run", None)
    assert demo_seeds.run_seed(0, tmp_path)["kl"] == 9.0
