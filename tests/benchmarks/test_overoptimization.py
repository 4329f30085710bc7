"""The over-optimisation benchmark: its statistics by hand, what it keeps, and a miniature of the whole command."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from agents import cli
from benchmarks import overoptimization
from benchmarks.overoptimization import (
    SIZES,
    Fit,
    Policy,
    Proxy,
    Step,
    ending,
    fit_scaling_law,
    main,
    non_embedding_parameters,
    once,
    path,
    peak,
    read_curve,
    root_kl,
    save_base,
    textrlhf,
)

# ---- statistics ----------------------------------------------------------------------------------------------------


def test_the_scaling_law_at_points_where_the_logarithm_is_whole() -> None:
    law = Fit(alpha=2.0, beta=0.5, residual=0.0, points=0)
    e = math.e
    assert law([0.0, 1.0, e, e**2]) == pytest.approx([0.0, 2.0, 1.5 * e, e**2])


def test_its_peak_is_where_the_slope_is_zero() -> None:
    law = Fit(alpha=2.0, beta=0.5, residual=0.0, points=0)
    assert law.peak == pytest.approx(math.e**3)
    assert law(law.peak) == pytest.approx(0.5 * math.e**3)
    assert law(law.peak) > max(law(0.99 * law.peak), law(1.01 * law.peak))
    assert Fit(alpha=2.0, beta=-0.5, residual=0.0, points=0).peak == math.inf  # it never falls


@pytest.mark.parametrize(("alpha", "beta"), [(0.9, 0.3), (2.0, -0.1), (-0.4, 0.2)])
def test_a_fit_recovers_what_made_the_points(alpha: float, beta: float) -> None:
    d = np.linspace(0.0, 8.0, 30)
    law = Fit(alpha, beta, 0.0, 0)
    found = fit_scaling_law(d, law(d))
    assert found is not None
    assert found[:3] == pytest.approx((alpha, beta, 0.0), abs=1e-9)
    assert found.points == 29  # all but the start


def test_noise_becomes_the_residual() -> None:
    d = np.linspace(0.01, 8.0, 4000)
    noise = np.random.default_rng(0).normal(0.0, 0.3, len(d))
    found = fit_scaling_law(d, Fit(0.9, 0.3, 0.0, 0)(d) + noise)
    assert found is not None
    assert found[:3] == pytest.approx((0.9, 0.3, 0.3), abs=0.02)


def test_a_curve_of_another_form_is_not_explained() -> None:
    d = np.linspace(0.0, 8.0, 30)
    found = fit_scaling_law(d, np.where(d > 4, 1.0, 0.0))
    assert found is not None
    assert found.residual > 0.2


@pytest.mark.parametrize("d", [[], [0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 2.0, 2.0]])
def test_without_enough_points_nothing_is_fitted(d: list[float]) -> None:
    assert fit_scaling_law(d, [0.5] * len(d)) is None


def test_a_sampled_kl_below_zero_is_no_distance() -> None:
    assert [root_kl(kl) for kl in (-0.3, 0.0, 4.0)] == [0.0, 0.0, 2.0]


def test_a_path_is_means_over_equal_parts_of_the_tokens() -> None:
    points = [
        {"tokens": 10.0, "kl": 0.0, "proxy": 1.0, "gold": 0.0},
        {"tokens": 50.0, "kl": 8.0, "proxy": 3.0, "gold": 1.0},
        {"tokens": 51.0, "kl": 9.0, "proxy": 4.0, "gold": 0.5},  # the first of the second half
        {"tokens": 80.0, "kl": 8.0, "proxy": 5.0, "gold": 0.5},
        {"tokens": 100.0, "kl": 10.0, "proxy": 6.0, "gold": 0.5},
    ]
    assert path(points, parts=2) == [Step(2.0, 2.0, 0.5, 2), Step(3.0, 5.0, 0.5, 3)]
    assert [step.rollouts for step in path(points, parts=10)] == [1, 1, 1, 1, 1]  # parts without any are left out
    assert path([]) == []


def test_a_path_keeps_the_order_of_time_where_the_kl_stands_still() -> None:
    golds = [0.1, 0.9, 0.5]
    points = [{"tokens": i + 1.0, "kl": 4.0, "proxy": 1.0 + i, "gold": gold} for i, gold in enumerate(golds)]
    steps = path(points, parts=3)
    assert [step.gold for step in steps] == golds
    assert peak(steps) == steps[1]


def test_the_end_is_the_mean_of_the_last_rollouts() -> None:
    curve = [{"tokens": float(i), "kl": 2.0 * i, "proxy": 3.0 * i, "gold": 1.0} for i in range(10)]
    assert ending(curve, last=4) == {"tokens": 7.5, "kl": 15.0, "proxy": 22.5, "gold": 1.0, "gap": 21.5}


def test_gold_is_measured_in_the_spread_of_the_start(tmp_path: Path) -> None:
    columns = "objective/gold_score,objective/kl,objective/scores,time/total_timesteps,completions/mean_length"
    (tmp_path / "progress.csv").write_text(f"{columns}\n0.25,0.0,0.1,100,40\n0.75,4.0,1.5,220,30\n")
    assert read_curve(tmp_path / "progress.csv", {"gold_mean": 0.25, "gold_std": 0.5}) == [
        {"tokens": 100.0, "kl": 0.0, "proxy": 0.1, "gold": 0.0, "length": 40.0},
        {"tokens": 220.0, "kl": 4.0, "proxy": 1.5, "gold": 1.0, "length": 30.0},
    ]


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_a_base_has_its_size_and_its_seed(tmp_path: Path) -> None:
    weights = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        save_base(SIZES["16x1"], seed, tmp_path / name)
        weights[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name).model.layers[0].mlp.up_proj.weight
    assert weights["first"].shape == (42, 16)
    assert torch.equal(weights["first"], weights["again"])
    assert not torch.allclose(weights["first"], weights["other"])


def test_parameters_are_counted_without_the_embeddings(tmp_path: Path) -> None:
    save_base(SIZES["16x1"], 0, tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1).save_pretrained(tmp_path / "rm")
    attention, feed_forward, norms, head = 4 * 16 * 16, 3 * 16 * 42, 3 * 16, 16
    assert non_embedding_parameters(tmp_path / "rm") == attention + feed_forward + norms + head


def test_what_is_there_is_not_made_again_and_what_was_interrupted_is(tmp_path: Path) -> None:
    made = []

    def fails(out: Path) -> None:
        out.mkdir()
        (out / "left").touch()
        raise RuntimeError("interrupted")

    def works(out: Path) -> None:
        out.mkdir()
        made.append(out)

    with pytest.raises(RuntimeError, match="interrupted"):
        once(tmp_path / "runs" / "it", fails)
    assert not (tmp_path / "runs" / "it").exists()
    for _ in range(2):
        once(tmp_path / "runs" / "it", works)
    assert len(made) == 1
    assert [file.name for file in (tmp_path / "runs" / "it").iterdir()] == ["seconds"]
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["it"]


def test_different_runs_have_different_directories(tmp_path: Path) -> None:
    proxy = Proxy("16x1", 0, 1000, 64, "cpu")
    proxies = [proxy, proxy._replace(size="48x2"), proxy._replace(seed=1), proxy._replace(max_pairs=2000)]
    policy = Policy(proxy, 0.0, 1000, 3e-4, 64)
    policies = [policy._replace(proxy=other) for other in proxies]
    policies += [policy._replace(kl_coef=0.1), policy._replace(learning_rate=1e-4), policy._replace(n_episodes=32)]
    policies += [policy._replace(total_timesteps=2000), policy._replace(proxy=proxy._replace(start_texts=32))]
    assert len({run.directory(tmp_path) for run in [*proxies, *policies]}) == len(proxies) + len(policies)


def test_a_process_has_one_thread_and_its_last_words_are_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "threads: $OMP_NUM_THREADS" >&2\nexit $STATUS\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("STATUS", "3")
    with pytest.raises(RuntimeError, match=r"agents.cli train --no-progress --seed 4 failed:\nthreads: 1\n"):
        textrlhf("train", {"seed": 4})
    monkeypatch.setenv("STATUS", "0")
    textrlhf("train", {"seed": 4})


def in_this_process(command: str, options: dict[str, Any]) -> None:
    """Stands in for a process of its own, which would spend most of its time on imports."""
    torch.set_num_threads(1)  # of this thread
    arguments = [command, "--no-progress", *(part for name, value in options.items() for part in (f"--{name}", value))]
    assert not cli.main([str(argument) for argument in arguments])


def test_a_miniature_of_the_whole_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overoptimization, "textrlhf", in_this_process)
    out, runs = tmp_path / "out", tmp_path / "runs"
    small: dict[str, Any] = {"sizes": "16x1", "kl-coefs": 0.1, "total-timesteps": 2200, "n-episodes": 8}
    small |= {"max-pairs": 64, "start-texts": 32, "learning-rate": 1e-2, "out": out, "runs": runs}
    arguments = [str(part) for name, value in small.items() for part in (f"--{name}", value)]
    main(arguments)

    (run,) = json.loads((out / "results.json").read_text())
    assert (run["size"], run["kl_coef"], run["seed"], run["pairs"]) == ("16x1", 0.1, 0, 64)
    assert (run["parameters"], run["non_embedding_parameters"]) == (35872, 3104)
    assert 0.4 < run["held_out_accuracy"] < 0.7
    assert run["curve"][0]["kl"] == pytest.approx(0.0, abs=1e-3)
    assert run["curve"][-1]["tokens"] >= 2200 > run["curve"][-2]["tokens"]
    assert run["curve"][-1]["kl"] > 0.5
    assert run["final"]["gap"] == pytest.approx(run["final"]["proxy"] - run["final"]["gold"])
    environment = json.loads((out / "environment.json").read_text())
    assert 0 < environment["start"]["gold_std"] < 1
    table = (out / "table.md").read_text()
    assert "| 16x1 | 35,872 | 3,104 | 0.005 |" in table
    assert "| 16x1 | 0.1 |" in table
    assert (out / "overoptimization.png").stat().st_size > 10_000

    # Everything is kept: a second call runs nothing, and finds the same.
    monkeypatch.setattr(overoptimization, "textrlhf", None)
    (out / "table.md").unlink()
    main(arguments)
    assert json.loads((out / "results.json").read_text()) == [run]
    assert (out / "table.md").read_text() == table
    # And table and plot need only what is committed.
    (out / "table.md").unlink()
    main(["--out", str(out), "--report"])
    assert (out / "table.md").read_text() == table
