"""The benchmark of a GPU in miniature, on the CPU: from the command line to the report."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agents.algorithms import on_policy
from agents.algorithms.snapshot import Snapshot
from benchmarks import update
from benchmarks.gpu import demo, determinism, ppo, throughput
from benchmarks.gpu.__main__ import main, merge, name_of, work
from benchmarks.gpu.models import subject
from benchmarks.gpu.options import PARTS, Options, Stage
from benchmarks.gpu.record import Record, spread
from benchmarks.gpu.report import as_markdown, tables
from benchmarks.gpu.throughput import decodings, rounds
from benchmarks.gpu.worker import MEASURES

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


@pytest.fixture(autouse=True)
def only_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes half a minute, and PyTorch warns of itself while it does."""
    for module in ("throughput", "profiles", "ppo"):
        monkeypatch.setattr(f"benchmarks.gpu.{module}.decodings", lambda: ["eager"])


def test_every_way_of_decoding_is_asked_of_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decodings() == ["eager", "compiled"]
    monkeypatch.setattr(throughput, "decodings", decodings)
    what = subject("tiny", 4, 4, 6, torch.device("cpu"))
    for decode in decodings():
        assert throughput.ours(what, decode).policy.constructor_arguments["decode"] == decode
    assert [side for side in throughput.all_sides(what, ends=False) if "ours" in side] == [
        "ours, compiled",
        "ours, eager",
    ]
    assert next(iter(throughput.all_sides(what, ends=True))) == "ours, eager"


def measured(part: Any, tmp_path: Path, seconds: float = 1000.0, which: int = 0) -> dict[str, Any]:
    """The figures of a stage, measured in this process."""
    record = Record(tmp_path / "figures.json", time.time() + 1000)
    assert record.begin(Stage(part, which, seconds))
    MEASURES[part](Options(**TINY).resolved(), record, which)
    record.finish()
    state = json.loads((tmp_path / "figures.json").read_text())
    assert state["parts"][part]["figures"] == json.loads(json.dumps(record.figures))
    assert state["finished"] == 1
    return record.figures


def test_every_part_is_measured_and_has_a_table() -> None:
    assert set(MEASURES) == set(PARTS)
    parts = {part: {"seconds": 1.0, "figures": {"x": {"error": "ValueError: a|b"}}} for part in PARTS}
    shown = list(tables({"parts": parts}))
    assert len(shown) == len(PARTS) + 1
    assert all(row[:2] == ("x", "ValueError: a|b") for table in shown[:-1] for row in table.rows)
    assert r"a\|b" in shown[0].markdown()


def test_what_matters_most_comes_first_and_every_model_and_number_of_rows_has_its_stage() -> None:
    options = Options(device="cuda").resolved()
    assert options.models == ("135m", "0.5b")
    assert options.rows == (64, 512)
    stages = options.stages()
    assert [stage.which for stage in stages if stage.part == "throughput"] == [0, 1, 2, 3, 4]
    assert [stage.which for stage in stages if stage.part == "demo"] == [0, 1]
    assert [stage.part for stage in stages[:3]] == ["precision", "throughput", "ppo"]
    one = Options(device="cpu", parts=("demo", "throughput"), minutes=0.95).resolved().stages()
    assert [(stage.part, stage.which) for stage in one] == [("throughput", 0), ("throughput", 1), ("demo", 0)]
    assert one[0].seconds == pytest.approx(0.1 * stages[1].seconds)


def test_rollouts_are_timed_on_all_sides_of_the_same_rounds(tmp_path: Path) -> None:
    figures = measured("throughput", tmp_path)
    assert len(measured("throughput", tmp_path, which=1)) == len(figures)  # texts that end by themselves
    ours = ["tiny, 4 rows: ours, eager"]
    theirs = [f"tiny, 4 rows: generate, {cache} cache" for cache in ("dynamic", "static")]
    assert set(figures) == {*ours, *theirs}
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
    for part in set(PARTS) - {"tests"}:
        figures = measured(part, tmp_path, seconds=1.0)
        assert figures
        assert all(re.fullmatch(r"[01] s were left, \d+ s are needed", f["skipped"]) for f in figures.values()), part


def test_a_slow_side_has_fewer_turns_than_a_fast_one_but_at_least_one() -> None:
    runs = {"a": lambda: time.sleep(0.05) or 1, "b": lambda: 2}
    # With 0.18 there is no time for a second turn, and for a third only as if there had been a second.
    for seconds, counted in ((100.0, [3, 3]), (0.12, [1, 3]), (0.18, [1, 3])):
        seen: list[list[int]] = []
        rounds(runs, 3, seconds, lambda speeds, seen=seen: seen.append([len(of) for of in speeds.values()]))
        assert seen[:2] == [[1, 0], [1, 1]]
        assert seen[-1] == counted


def test_a_profile_counts_operators_by_step(tmp_path: Path) -> None:
    figures = measured("profile", tmp_path)
    assert set(figures) == {"rollout, eager", "update", "bare passes"}
    eager = figures["rollout, eager"]
    assert figures["update"]["steps"] == 8
    assert figures["update"]["operators_per_step"] > figures["bare passes"]["operators_per_step"]
    assert 20 < eager["operators_per_step"] < 5000
    assert eager["launches_per_step"] == 0  # nothing is launched on a CPU
    times = [row["milliseconds"] for row in eager["by_processor_time"]]
    assert times == sorted(times, reverse=True)
    assert len(times) == 15


def test_an_update_that_is_timed_is_the_one_that_learn_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = update.own_ppo(subject("tiny", 4, 4, 6, torch.device("cpu")))
    copied: list[Any] = []
    monkeypatch.setattr(on_policy, "Snapshot", lambda policy: copied.append(policy) or Snapshot(policy))
    assert update.update(algorithm)() == 2 * algorithm.buffer.n_tokens
    assert copied == [algorithm.policy]


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


def test_trl_and_ours_take_turns_in_alternating_order() -> None:
    turns: list[str] = []
    child: Any = SimpleNamespace(
        turn=lambda: turns.append("TRL") or {"seconds": 2.0}, stop=lambda: turns.append("stop")
    )
    assert len(ppo.beside_trl(partial(turns.append, "ours"), child, 2)["TRL ÷ ours"]["all"]) == 2
    assert turns == ["TRL", "ours", "TRL", "TRL", "ours", "stop"]


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
    monkeypatch.setattr(determinism, "EPISODES", 4)
    asked: list[str] = []

    def here(command: list[str], env: dict[str, str], **kwargs: Any) -> SimpleNamespace:
        """In place of a process, which would take many seconds for its imports alone."""
        assert command[:3] == [sys.executable, "-m", determinism.__name__]
        assert env["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        asked.append(command[-1])
        with contextlib.redirect_stdout(io.StringIO()) as said:
            determinism.main(*command[3:])
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(False)
        return SimpleNamespace(stdout=said.getvalue())

    monkeypatch.setattr(determinism.subprocess, "run", here)
    figures = measured("determinism", tmp_path)
    assert len(figures) == 4
    for figure in figures.values():
        assert figure["same_weights"], figures
        assert figure["same_texts"]
        assert figure["warnings"] == []
    assert asked == ["float32", "bfloat16"]
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_a_demo_that_does_not_end_in_time_is_stopped() -> None:
    with pytest.raises(TimeoutError, match="not finished after 1 s"):
        demo.demo(10_000, {}, 1.0)


def test_the_command_goes_on_after_a_stage_that_dies_and_keeps_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def fake(stages: list[Stage], end: float, options: Options, look: Any) -> int:
        asked.append([stage.part for stage in stages])
        if len(asked) == 1:
            precise = {"figures": {"x": {"skipped": "3 s were left, 20 s are needed"}}, "seconds": 2.0}
            look({"precision": precise, "tests": {"figures": {}, "seconds": 1.0, "error": "failed", "log": ["Killed"]}})
            return 2
        look({"demo": {"figures": {}, "seconds": 4.0}})
        return 1

    monkeypatch.setattr("benchmarks.gpu.__main__.work", fake)
    assert main(Options(out=tmp_path, parts=("precision", "tests", "demo"), minutes=1.0, **TINY)) == 1
    assert asked == [["precision", "tests", "demo"], ["demo"]]
    [path] = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert report["parts"]["tests"]["log"] == ["Killed"]
    assert report["parts"]["demo"]["seconds"] == 4.0
    assert report["versions"]["torch"] == torch.__version__
    assert report["options"]["rows"] == [4]
    page = path.with_suffix(".md").read_text()
    assert page == as_markdown(report)
    assert "| tests | 1 | failed |" in page
    assert "3 s were left" in capsys.readouterr().out

    assert "| precision | 2 | failed or left out: x |" in page
    assert "| demo | 4 | to its end |" in page

    assert main(Options(out=tmp_path, parts=("demo",), minutes=0.1, **TINY)) == 1
    assert len(asked) == 2
    assert path.with_suffix(".md").read_text() == page, "another choice of parts has a report of its own"
    [other] = set(tmp_path.glob("*.md")) - {path.with_suffix(".md")}
    assert "no time for 1 of its stages" in other.read_text()


@pytest.mark.parametrize(
    ("figure", "status"),
    [({"passed": True}, 0), ({"passed": False}, 1), ({"error": "RuntimeError: no"}, 1), ({"skipped": "no pytest"}, 1)],
)
def test_the_exit_status_says_whether_every_figure_is_there(
    figure: dict[str, Any], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(stages: list[Stage], end: float, options: Options, look: Any) -> int:
        look({"tests": {"figures": {"tests": {"summary": "", **figure}}, "seconds": 1.0}})
        return len(stages)

    monkeypatch.setattr("benchmarks.gpu.__main__.work", fake)
    assert main(Options(out=tmp_path, parts=("tests",), **TINY)) == status


def test_only_a_whole_run_has_the_name_of_the_device_alone() -> None:
    whole = Options(out=Path("x"), minutes=9.2, device="cuda")
    assert name_of(whole, "NVIDIA H200 ") == "nvidia-h200"
    assert name_of(dataclasses.replace(whole, quick=True), "NVIDIA H200 ") == "nvidia-h200-quick-true"
    some = dataclasses.replace(whole, parts=("ppo", "demo"), rows=(64,))
    assert name_of(some, "NVIDIA H200 ") == "nvidia-h200-parts-ppo-demo-rows-64"


def test_figures_of_two_workers_are_added_up() -> None:
    parts: dict[str, Any] = {}
    merge(parts, {"throughput": {"figures": {"a": {}}, "seconds": 1.0, "error": "ended"}})
    merge(parts, {"throughput": {"figures": {"b": {}}, "seconds": 2.0}})
    assert parts == {"throughput": {"figures": {"a": {}, "b": {}}, "seconds": 3.0, "error": "ended"}}


def test_a_worker_is_ended_at_a_stage_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__.GRACE", 0.0)
    seen: list[dict[str, Any]] = []
    stages = [Stage("precision", 0, 500.0), Stage("ppo", 0, 0.01), Stage("demo", 0, 60.0)]
    done = work(stages, time.time() + 600, Options(**TINY).resolved(), seen.append)
    assert done in (2, 3)  # two, unless the second was faster than whoever looks at its clock
    assert seen[-1]["precision"]["figures"]["tiny: cpu float32"]["largest"] == 0.0
    assert "error" not in seen[-1]["precision"]


def test_a_worker_that_dies_says_at_which_stage_and_why() -> None:
    seen: list[dict[str, Any]] = []
    unknown = Stage("nosuch", 0, 60.0)  # type: ignore[arg-type]
    options = Options(**{**TINY, "device": "nosuch"})
    done = work([Stage("throughput", 0, 60.0), unknown], time.time() + 120, options, seen.append)
    assert done == 2
    assert "nosuch" in seen[-1]["throughput"]["error"]  # of an error, the stage alone
    assert "KeyError" in seen[-1]["nosuch"]["error"]


def test_options_are_explained() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for option in ("--out", "--parts", "--minutes", "--models", "--rows", "--prompt", "--response", "--quick"):
        assert option in shown


def test_a_median_of_an_even_number_lies_between_the_middle_two() -> None:
    assert spread([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "low": 1.0, "high": 10.0, "all": [3.0, 1.0, 2.0, 10.0]}
