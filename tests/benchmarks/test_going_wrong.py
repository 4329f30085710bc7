"""Runs that go wrong, for the page about troubleshooting, in miniature."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.going_wrong import MISTAKES, dark_is_good, long_is_good, main

ROOT = Path(__file__).parents[2]


def test_the_rewards_pay_for_what_nobody_wanted() -> None:
    assert long_is_good(completions=["x" * 50, ""]) == [0.5, 0.0]
    assert dark_is_good(completions=["A dark film of terrifying fear.", "A lovely film."]) == [3.0, 0.0]


def test_each_run_is_written_down_and_drawn_beside_the_sound_one(tmp_path: Path) -> None:
    small = ["--out", str(tmp_path), "--total-timesteps", "1", "--n-episodes", "16", "--only", "sound", "length"]
    assert main(small) == 0
    runs = {row["name"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    assert set(runs) == {"sound", "length"}
    assert runs["length"]["reward"] == "long_is_good"
    assert all(len(run["log"]["objective/kl"]) == 1 for run in runs.values())
    assert (tmp_path / "length.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "length.png").unlink()
    assert main([*small[:2], "--report"]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"length.png"}


def test_the_committed_pictures_are_small_and_all_shown() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    for name in MISTAKES:
        picture = ROOT / "benchmarks" / "results" / "going_wrong" / f"{name}.png"
        assert name == "sound" or (picture.stat().st_size < 100_000 and f"going_wrong/{name}.png" in page)
