"""VAPO's ablation in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents.algorithms.ppo import PPO
from agents.state.arguments import argument_defaults
from benchmarks import ablation
from benchmarks.ablation import NOTHING, VAPO, VARIANTS, Options, main, table


def test_every_part_is_taken_away_once_and_all_of_them_by_plain_ppo() -> None:
    single = [name for name in VARIANTS if name.startswith("without")]
    taken = [next(iter(VARIANTS[name].changes), "group_size") for name in single]
    assert sorted(taken) == sorted([*NOTHING, "group_size"])
    assert all(
        NOTHING[part] == VARIANTS[name].changes[part]
        for name, part in zip(single, taken, strict=True)
        if part in NOTHING
    )
    assert VARIANTS["plain PPO"].changes == NOTHING
    assert set(VAPO) - {"positive_score"} == set(NOTHING) <= {*argument_defaults(PPO)}


def test_a_difference_is_taken_seed_by_seed() -> None:
    def row(variant: str, seed: int, after: float) -> dict[str, object]:
        return {"variant": variant, "seed": seed, "after": after, "kl": 1.0, "lowest": 0.3}

    name = "without clip-higher"
    rows = [row("VAPO", 0, 0.5), row("VAPO", 1, 0.7), row(name, 0, 0.4), row(name, 1, 0.6)]
    body = {cells[0]: cells for cells in table(rows)[1:]}
    assert body["VAPO"][2].startswith("0.600")
    assert body[name][3] == "+0.100 [+0.100, +0.100]"
    assert body[name][1] == "46 %"


def test_the_ablation_runs_reports_and_is_not_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {name: VARIANTS[name] for name in ("VAPO", "plain PPO")}
    monkeypatch.setattr(ablation, "VARIANTS", few)
    monkeypatch.setattr(ablation, "VAPO", {**VAPO, "n_episodes": 8, "batch_size": 8, "critic_warmup_episodes": 8})
    options = Options(tmp_path, seeds=1, total_timesteps=1500, episodes=8)
    assert main(options) == 0
    assert "Held-out arithmetic" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["variant"] for row in rows] == list(few)
    assert all(0 <= row["after"] <= 1 and row["tokens"] >= 1500 for row in rows)
    assert (tmp_path / "learning_curves.png").stat().st_size > 5000
    monkeypatch.setattr(ablation, "PPO", None)
    assert main(options) == 0
