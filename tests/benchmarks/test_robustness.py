"""The robustness benchmark, in miniature, and the rule by which a run ends below its start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agents.algorithms.ppo import PPO
from agents.models.critic import ScaledHead
from benchmarks import robustness
from benchmarks.robustness import FACTORS, TASKS, Options, grid, is_below, is_lower, main


def test_every_setting_is_written_down_with_its_figures_and_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(robustness, "FACTORS", {**FACTORS, "learning_rate": (1.0,), "kl_coef": (0.0, 0.2)})
    scales: list[float] = []
    learn = PPO.learn

    def learn_and_note(model: PPO, *args: Any, **kwargs: Any) -> Any:
        scales.append(model.policy.value_head.SCALE)
        if len(scales) == 1:
            raise FloatingPointError("not a number")
        return learn(model, *args, **kwargs)

    monkeypatch.setattr(PPO, "learn", learn_and_note)
    # The picture has a colour for each of the grid's KL coefficients, of which there are fewer here.
    monkeypatch.setattr(robustness, "plot", lambda rows, path: path.touch())
    options = Options(tmp_path, ("fixed-token",), tokens=1, episodes=8)
    assert main(options) == 1  # the one that failed
    rows = json.loads((tmp_path / "results.json").read_text())
    assert len(rows) == 3 * 2 * 2
    assert scales == [row["head_scale"] for row in rows]
    assert ScaledHead.SCALE == 10
    assert rows[0]["error"] == "not a number"
    assert rows[0]["after"] is None
    for row in rows[1:]:
        assert row["error"] is None
        assert all(0 <= row[name] <= 1 for name in ("before", "after", "lowest"))
        assert row["tokens"] > 0
        assert row["kl"] != 0  # from the policy as it was before training
    assert {"commits", "machine", "versions"} <= set(json.loads((tmp_path / "environment.json").read_text()))
    assert "fixed-token" in capsys.readouterr().out
    monkeypatch.setattr(robustness, "train", None)
    main(options)
    assert json.loads((tmp_path / "results.json").read_text()) == rows


def test_the_picture_has_a_panel_for_every_task(tmp_path: Path) -> None:
    measured = {"before": 0.5, "after": 0.6, "before_error": 0.01, "after_error": 0.01}
    rows = [{**setting._asdict(), **measured} for task in TASKS for setting in grid(task, 1)]
    rows[0]["after"] = None
    robustness.plot(rows, tmp_path / "robustness.png")
    assert (tmp_path / "robustness.png").stat().st_size > 50_000


def test_large_tasks_vary_one_factor_at_a_time_and_have_corners_besides() -> None:
    settings = grid("arithmetic", 1)
    assert len(settings) == len(set(settings)) == 1 + 3 * 2 + 4
    assert max(s.learning_rate for s in settings) == pytest.approx(10 * min(s.learning_rate for s in settings))
    assert len(grid("copy-prompt", 1)) == 27 * 2


def test_a_run_is_below_its_start_beyond_two_standard_errors_of_the_difference() -> None:
    row = {"before": 0.5, "before_error": 0.03, "after_error": 0.04}  # 0.05 of the difference
    assert [is_below({**row, "after": after}) for after in (0.39, 0.41, 0.6, None)] == [True, False, False, True]
    assert [is_lower({**row, "after": after}) for after in (0.39, 0.41, 0.6, None)] == [True, True, False, True]


def test_an_unknown_task_is_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sentiment.*got \['chess'\]"):
        main(Options(tmp_path, ("chess",)))
