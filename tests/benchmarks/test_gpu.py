"""The benchmark of a GPU in miniature, on the CPU: from the command line to the report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import demo, determinism, ppo
from benchmarks.gpu.__main__ import main, run_part
from benchmarks.gpu.options import SHARES, Options
from benchmarks.gpu.part import MEASURES
from benchmarks.gpu.record import Record, spread
from benchmarks.gpu.report import as_markdown, tables
from benchmarks.gpu.throughput import decodings, rounds

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "device": "cpu",
    "models": ("tiny",),
    "rows": (4,),
    "prompt": 4,
    "response": 6,
    "repeats": 1,
    "demo_tokens": 200,
}


def measured(part: str, tmp_path: Path, seconds: float = 1000.0, **changes: Any) -> dict[str, Any]:
    """The figures of a part, measured in this process."""
    record = Record(tmp_path / "figures.json", time.time() + seconds)
    MEASURES[part](Options(**{**TINY, **changes}).resolved(), record)  # type: ignore[index]
    assert json.loads((tmp_path / "figures.json").read_text()) == json.loads(json.dumps(record.figures))
    return record.figures


def test_every_part_has_a_share_of_the_time_and_a_table() -> None:
    assert set(MEASURES) == set(SHARES)
    parts = {part: {"seconds": 1.0, "figures": {"x": {"error": "ValueError: a|b"}}} for part in SHARES}
    shown = list(tables({"parts": parts}))
    assert len(shown) == len(SHARES) + 1
    assert all(row[:2] == ("x", "ValueError: a|b") for table in shown[:-1] for row in table.rows)
    assert r"a\|b" in shown[0].markdown()


def test_rollouts_are_timed_on_all_sides_of_the_same_rounds(tmp_path: Path) -> None:
    figures = measured("throughput", tmp_path)
    ours = [f"tiny, 4 rows: ours, {decode}" for decode in decodings()]
    theirs = [f"tiny, 4 rows: generate, {cache} cache" for cache in ("dynamic", "static")]
    assert {name for name in figures if "gpt2" not in name} == {*ours, *theirs}
    assert len(figures) == 2 * len({*ours, *theirs})  # the other half is of texts that end by themselves
    for name in figures:
        assert figures[name]["rounds"] == 1
        assert figures[name]["tokens_per_second"]["median"] > 0
    for name in theirs:
        ratio = figures[ours[0]]["ratios"][f"÷ {name.removeprefix('tiny, 4 rows: ')}"]["median"]
        speed = figures[name]["tokens_per_second"]["median"]
        assert ratio == pytest.approx(figures[ours[0]]["tokens_per_second"]["median"] / speed)


def test_a_side_that_fails_is_reported_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no graphs here")

    monkeypatch.setattr("benchmarks.gpu.throughput.rollout.generate", broken)
    figures = measured("throughput", tmp_path)
    assert figures["tiny, 4 rows: generate, static cache"]["error"] == "RuntimeError: no graphs here"
    assert "in broken" in figures["tiny, 4 rows: generate, static cache"]["where"]
    assert figures["tiny, 4 rows: ours, eager"]["rounds"] == 1


def test_without_time_everything_is_skipped_and_says_so(tmp_path: Path) -> None:
    for part in ("throughput", "ppo", "profile", "precision", "determinism", "demo"):
        figures = measured(part, tmp_path, seconds=1.0)
        assert figures
        assert all(re.fullmatch(r"[01] s were left, \d+ s are needed", f["skipped"]) for f in figures.values()), part


def test_rounds_end_when_the_time_does() -> None:
    runs = {"a": lambda: time.sleep(0.05) or 1, "b": lambda: 2}
    assert [len(speeds) for speeds in rounds(runs, 3, 10.0).values()] == [3, 3]
    assert [len(speeds) for speeds in rounds(runs, 3, 0.0).values()] == [1, 1]  # but not before the first


def test_a_profile_counts_operators_by_step(tmp_path: Path) -> None:
    figures = measured("profile", tmp_path)
    assert set(figures) == {*(f"rollout, {decode}" for decode in decodings()), "update", "bare passes"}
    eager = figures["rollout, eager"]
    assert figures["update"]["steps"] == 8
    assert figures["update"]["operators_per_step"] > figures["bare passes"]["operators_per_step"]
    assert 20 < eager["operators_per_step"] < 5000
    assert eager["launches_per_step"] == 0  # nothing is launched on a CPU
    times = [row["milliseconds"] for row in eager["by_processor_time"]]
    assert times == sorted(times, reverse=True)
    assert len(times) == 15


def test_an_iteration_of_ppo_is_the_sum_of_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo, "trl_python", lambda: None)
    figures = measured("ppo", tmp_path)
    assert set(figures) == {"ours, value head", "update ÷ bare passes", "ours, separate critic", "TRL"}
    assert "is not installed (`make peers`)" in figures["TRL"]["error"]
    assert figures["update ÷ bare passes"]["time"]["median"] > 0
    for name in ("ours, value head", "ours, separate critic"):
        parts = {part: found["median"] for part, found in figures[name]["parts"].items()}
        assert set(parts) == {"rollout", "reward", "reference", "update"}
        assert all(seconds > 0 for seconds in parts.values())
        assert sum(parts.values()) == pytest.approx(figures[name]["seconds"]["median"], rel=0.3)
        assert figures[name]["first_ratio_max"] < 1e-5


def test_numbers_are_compared_with_the_cpu_in_float32(tmp_path: Path) -> None:
    figures = measured("precision", tmp_path)
    assert set(figures) == {
        f"{model}: cpu {dtype}" for model in ("builtin", "tiny") for dtype in ("float32", "bfloat16")
    }
    assert figures["builtin: cpu float32"]["largest"] == 0.0
    assert 1e-4 < figures["builtin: cpu bfloat16"]["largest"] < 1.0
    assert figures["builtin: cpu float32"]["first_ratio"]["highest"] == pytest.approx(1.0, abs=1e-4)


def test_on_a_cpu_the_same_seed_gives_the_same_weights_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(determinism, "ITERATIONS", 1)
    monkeypatch.setattr(determinism, "RESPONSE", 4)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # is put back afterwards
    figures = measured("determinism", tmp_path)
    assert len(figures) == 4
    for figure in figures.values():
        assert figure["same_weights"], figures
        assert figure["same_texts"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_demo_that_does_not_end_in_time_is_stopped() -> None:
    with pytest.raises(TimeoutError, match="not finished after 1 s"):
        demo.demo(10_000, {}, 1.0)


def test_the_command_writes_a_report_after_each_part_and_goes_on_after_one_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, float]] = []

    def fake(part: str, seconds: float, options: Options) -> dict[str, Any]:
        asked.append((part, seconds))
        if part == "tests":
            return {"seconds": 1.0, "figures": {}, "error": "failed with exit status -9", "log": ["Killed"]}
        return {"seconds": 1.0, "figures": {"cuda": {"skipped": "3 s were left, 20 s are needed"}}}

    monkeypatch.setattr("benchmarks.gpu.__main__.run_part", fake)
    assert main(Options(out=tmp_path, parts=("tests", "demo"), minutes=1.0, **TINY)) == 1
    assert [part for part, _ in asked] == ["tests", "demo"]
    assert asked[0][1] == pytest.approx(60 * SHARES["tests"] / (SHARES["tests"] + SHARES["demo"]), abs=1)
    assert asked[1][1] == pytest.approx(60, abs=1)  # what the first has left over
    [path] = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert report["parts"]["tests"]["log"] == ["Killed"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["options"]["rows"] == [4]
    page = path.with_suffix(".md").read_text()
    assert page == as_markdown(report)
    assert "| tests | 1 | failed with exit status -9 |" in page
    assert "3 s were left" in capsys.readouterr().out

    assert main(Options(out=tmp_path, parts=("demo",), minutes=0.1, **TINY)) == 1
    assert "6 s were left for it" in json.loads(path.read_text())["parts"]["demo"]["skipped"]


def test_a_part_runs_in_a_process_of_its_own_and_is_ended_with_it() -> None:
    options = Options(**TINY).resolved()
    found = run_part("throughput", 60.0, options)
    assert "error" not in found, found
    assert found["figures"]["tiny, 4 rows: ours, eager"]["rounds"] == 1
    ended = run_part("demo", 0.5, options)
    assert ended["error"] == "ended after 0 s"
    assert ended["figures"] == {}


def test_options_are_explained() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for option in ("--out", "--parts", "--minutes", "--models", "--rows", "--prompt", "--response", "--quick"):
        assert option in shown


def test_a_median_of_an_even_number_lies_between_the_middle_two() -> None:
    assert spread([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "low": 1.0, "high": 10.0, "all": [3.0, 1.0, 2.0, 10.0]}
