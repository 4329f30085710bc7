"""What figures came from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import provenance


def test_a_commit_is_dirty_if_its_code_was_changed_and_not_if_results_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "benchmarks" / "provenance.py"))
    for name in ("benchmarks/speed.py", "benchmarks/results/speed.json", "agents/ppo.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    assert provenance.commit() is None
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = str(provenance.commit())
    (tmp_path / "benchmarks/results/speed.json").write_text("2")
    (tmp_path / "benchmarks/new.py").write_text("2")
    assert provenance.commit() == clean
    (tmp_path / "agents/ppo.py").write_text("2")
    assert provenance.commit() == f"{clean}-dirty"
