"""The report of the algorithm benchmark, on results whose right answers are known by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rliable import metrics

from benchmarks.algorithms import plots, report, sentences
from benchmarks.algorithms.sentences import Estimate, Evidence, Verdict

Run = dict[str, Any]
START = {"score": 0.0, "score_std": 1.0, "gold_score": 0.2, "perplexity": 10.0, "distinct_2": 0.6}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "BOOTSTRAP_REPETITIONS", 200)


def run(algorithm: str = "ppo", seed: int = 0, score: float = 1.6, kl: float | None = 10.0, **more: Any) -> Run:
    """A run whose curve rises to its score within ``rise`` tokens and stays there; bins of 1,000 tokens, 40 of them."""
    rise = more.pop("rise", 20_000)
    bins = np.arange(1_000, 41_000, 1_000)
    return {
        "algorithm": algorithm,
        "seed": seed,
        "learning_rate": 1e-4,
        "score": score,
        "gold_score": 0.2 + score / 3,
        "kl": kl,
        "perplexity": 9.0,
        "distinct_1": 0.2,
        "distinct_2": 0.5,
        "mean_length": 40.0,
        "terminated_ratio": 0.4,
        "tokens": 40_000,
        "seconds": 100.0,
        "cpu_seconds": 150.0,
        "curve": [{"tokens": int(t), "score": score * min(t / rise, 1.0)} for t in bins],
        "start": START,
        "episodes": 256,
    } | more


def runs_of(name: str, n: int, score: float, spread: float, rise: float = 20_000, **more: Any) -> list[Run]:
    """Scores evenly spaced around their mean; tokens to the top, too, a little."""
    steps = np.linspace(-1, 1, n)
    return [run(name, i, score + spread * s, rise=rise * (1 + 0.05 * s), **more) for i, s in enumerate(steps)]


def ppo_and_a2c(ppo: tuple[float, float, float], a2c: tuple[float, float, float], n: int = 10) -> Evidence:
    """Each: score, spread, tokens to the top."""
    runs = {"ppo": runs_of("ppo", n, *ppo), "a2c": runs_of("a2c", n, *a2c), "reinforce": runs_of("reinforce", n, *a2c)}
    return Evidence(runs, tuning={}, noise={}, kl_coef=0.04)


def verdicts(evidence: Evidence) -> dict[str, Verdict]:
    return {sentence.text: sentence.verdict for sentence in sentences.judge(evidence)}


GOOD, BAD = (1.6, 0.05, 10_000.0), (1.5, 1.6, 30_000.0)


def test_what_clearly_holds_is_supported() -> None:
    found = verdicts(ppo_and_a2c(ppo=GOOD, a2c=BAD))
    assert found["PPO is stable"] == Verdict.SUPPORTED
    assert found["PPO is efficient"] == Verdict.SUPPORTED
    assert found["A2C is less stable"] == Verdict.SUPPORTED
    assert found["A2C is less sample-efficient"] == Verdict.SUPPORTED
    assert found["REINFORCE is unstable (with a mean baseline)"] == Verdict.SUPPORTED


def test_the_reversed_data_contradict_it() -> None:
    found = verdicts(ppo_and_a2c(ppo=BAD, a2c=GOOD))
    assert found["PPO is stable"] == Verdict.CONTRADICTED
    assert found["PPO is efficient"] == Verdict.CONTRADICTED
    assert found["A2C is less stable"] == Verdict.CONTRADICTED
    assert found["A2C is less sample-efficient"] == Verdict.CONTRADICTED
    assert found["REINFORCE is unstable (with a mean baseline)"] == Verdict.CONTRADICTED


def test_few_seeds_decide_nothing_that_is_random() -> None:
    random = ("stable", "efficient", "unstable (with a mean baseline)")
    found = verdicts(ppo_and_a2c(ppo=GOOD, a2c=(1.5, 0.3, 30_000.0), n=sentences.FEWEST_SEEDS - 1))
    assert {v for text, v in found.items() if text.endswith(random)} == {Verdict.UNDECIDED}


def test_overlapping_intervals_are_undecided() -> None:
    same = (1.5, 0.3, 20_000.0)
    found = verdicts(ppo_and_a2c(ppo=same, a2c=same))
    assert found["A2C is less stable"] == found["A2C is less sample-efficient"] == Verdict.UNDECIDED


def test_what_was_not_measured_is_undecided() -> None:
    found = verdicts(Evidence({"ppo": runs_of("ppo", 10, *GOOD)}, {}, {}, 0.04))
    assert found["PPO is stable"] == Verdict.SUPPORTED
    assert found["A2C is less stable"] == Verdict.UNDECIDED
    assert (
        found["REINFORCE is high in variance (without a baseline), beside PPO with a cold critic"] == Verdict.UNDECIDED
    )
    assert found["DDPG and TD3 suit continuous actions and are hard for discrete text"] == Verdict.UNDECIDED


@pytest.mark.parametrize(
    ("scores", "distinct_2", "verdict"),
    [
        ([0.1, 0.2, 0.1, 0.2, 0.1], 0.6, Verdict.SUPPORTED),
        ([0.9, 0.9, 0.9, 0.9, 0.9], 0.6, Verdict.CONTRADICTED),
        ([0.9, 0.2, 0.1, 0.2, 0.1], 0.6, Verdict.UNDECIDED),
        ([1.9, 1.9, 1.9, 1.9, 1.9], 0.01, Verdict.SUPPORTED),  # one word repeated is no text
        ([0.1, 0.2, 0.1, 0.2], 0.6, Verdict.UNDECIDED),  # too few
    ],
)
def test_ddpg_and_td3_are_hard_if_no_seed_writes_texts(
    scores: list[float], distinct_2: float, verdict: Verdict
) -> None:
    text = "DDPG and TD3 suit continuous actions and are hard for discrete text"
    runs = {"sb3-ppo": runs_of("sb3-ppo", 5, 1.0, 0.05), "sb3-ddpg": runs_of("sb3-ddpg", 5, 0.1, 0.05, kl=None)}
    td3 = runs_of("sb3-td3", len(scores), 0.0, 0.1, kl=None)
    runs["sb3-td3"] = [
        {**run, "score": score, "distinct_2": distinct_2} for run, score in zip(td3, scores, strict=True)
    ]
    assert verdicts(Evidence(runs, {}, {}, 0.04))[text] == verdict


@pytest.mark.parametrize(
    ("collapses", "seeds", "verdict"),
    [
        (0, 10, Verdict.SUPPORTED),
        (0, 9, Verdict.UNDECIDED),
        (1, 10, Verdict.UNDECIDED),
        (2, 10, Verdict.CONTRADICTED),
    ],
)
def test_never_collapsing_takes_ten_seeds_and_two_collapses_refute_it(
    collapses: int, seeds: int, verdict: Verdict
) -> None:
    runs = [run(seed=i, score=-0.1 if i < collapses else 1.0) for i in range(seeds)]
    assert sentences.never_collapses("ppo", runs).verdict == verdict


def test_a_collapse_is_a_score_under_the_start_or_a_quarter_of_its_distinct_2() -> None:
    assert not sentences.collapsed(run(score=0.0, distinct_2=0.15))
    assert sentences.collapsed(run(score=-0.01))
    assert sentences.collapsed(run(distinct_2=0.149))


def test_tokens_to_a_score_are_interpolated_on_the_smoothed_curve() -> None:
    curve = [{"tokens": t, "score": s} for t, s in ((100, 0.0), (200, 3.0), (300, 0.0), (400, 3.0), (500, 3.0))]
    noisy = run(curve=curve)
    # Windows of 1, 3, 5, 3, 1 bins: 0, 1, 1.8, 2, 3.
    np.testing.assert_allclose(sentences.smoothed_curve(noisy)[1], [0, 0, 1, 1.8, 2, 3])
    assert sentences.tokens_to(noisy, 1.4) == pytest.approx(250)
    assert sentences.tokens_to(noisy, 2.5) == pytest.approx(450)
    assert sentences.tokens_to(noisy, 3.1) == math.inf
    assert sentences.tokens_to(noisy, 0.0) == 0


def test_the_target_is_80_percent_of_the_best_gain() -> None:
    start = START | {"score": -0.5}
    runs = {"ppo": [run(score=1.0, start=start)], "a2c": [run("a2c", score=2.0, start=start)]}
    assert sentences.target_score(runs) == pytest.approx(-0.5 + 0.8 * 2.5)


def test_runs_that_never_arrive_are_counted_with_their_budget() -> None:
    runs = {"ppo": [run(seed=i, rise=10_000) for i in range(3)] + [run(seed=3, score=0.5)]}
    text = report.tokens_to_target(Evidence(runs, {}, {}, 0.04), "ppo")
    assert text.startswith("≥ 8 [")  # IQM of 8, 8, 8 and 40 thousand
    assert text.endswith("(3/4)")
    low = {"ppo": runs["ppo"], "a2c": [run("a2c", score=0.5)]}
    assert report.tokens_to_target(Evidence(low, {}, {}, 0.04), "a2c") == "not reached (0/1)"


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    assert sentences.iqm([100.0, 1.0, 2.0, 3.0, -100.0]) == pytest.approx(2.0)


def test_the_statistics_are_rliables() -> None:
    generator = np.random.default_rng(0)
    for n, m in ((5, 10), (7, 3), (10, 10), (1, 4)):
        ours, theirs = generator.normal(size=n).round(1), generator.normal(size=m).round(1)
        assert sentences.iqm(ours) == pytest.approx(metrics.aggregate_iqm(ours[:, None]))
        expected = metrics.probability_of_improvement(ours[:, None], theirs[:, None])
        assert sentences.probability_of_improvement(ours, theirs).value == pytest.approx(expected)


def test_bootstrap_intervals_are_those_of_the_statistic_and_repeat() -> None:
    values = list(np.random.default_rng(0).normal(2.0, 1.0, 200))
    np.random.seed(7)
    first = sentences.bootstrap(np.mean, values)
    after = np.random.rand()
    np.random.seed(7)
    assert after == np.random.rand()  # NumPy's global generator is left as it was
    assert first == sentences.bootstrap(np.mean, values)
    error = np.std(values) / np.sqrt(200)
    assert first.value == pytest.approx(np.mean(values))
    assert first.high - first.low == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_the_interval_of_one_seed_is_the_whole_line() -> None:
    estimate = sentences.bootstrap(sentences.iqm, [1.0])
    assert estimate == Estimate(1.0, -math.inf, math.inf)
    assert report.with_interval(estimate) == "1.00"


def test_probability_of_improvement_counts_pairs_and_ties_half() -> None:
    assert sentences.probability_of_improvement([1.0, 3.0], [2.0, 3.0]).value == pytest.approx((0 + 0 + 1 + 0.5) / 4)
    assert sentences.probability_of_improvement([5.0] * 3, [5.0] * 4) == Estimate(0.5, 0.5, 0.5)


def tuned(ppo: list[float], a2c: list[float]) -> Evidence:
    rates = [1e-5, 1e-4, 1e-3]
    trials = {
        name: [{"learning_rate": r, "score": o, "kl": 0.0, "objective": o} for r, o in zip(rates, found, strict=True)]
        for name, found in (("ppo", ppo), ("a2c", a2c))
    }
    runs = {"ppo": runs_of("ppo", 10, 1.0, 0.1), "a2c": runs_of("a2c", 10, 1.0, 0.1)}
    return Evidence(runs, trials, {}, 0.04)


def test_needing_tuning_is_losing_more_than_others_by_an_average_learning_rate() -> None:
    sensitive, robust = [0.0, 1.2, 0.0], [0.9, 1.0, 0.9]
    assert sentences.tuning_loss(tuned(sensitive, robust), "ppo")[0] == pytest.approx(1.2 - 0.4)
    text = "PPO needs tuning"
    assert verdicts(tuned(sensitive, robust))[text] == Verdict.SUPPORTED
    assert verdicts(tuned(robust, sensitive))[text] == Verdict.CONTRADICTED
    assert verdicts(tuned(robust, [0.89, 1.0, 0.9]))[text] == Verdict.UNDECIDED


def test_few_seeds_of_another_algorithm_decide_nothing_about_tuning() -> None:
    evidence = tuned([0.0, 1.2, 0.0], [0.9, 1.0, 0.9])
    for seeds, verdict in ((sentences.FEWEST_SEEDS, Verdict.SUPPORTED), (1, Verdict.UNDECIDED)):
        evidence.runs["a2c"] = runs_of("a2c", seeds, 1.0, 0.1)
        assert verdicts(evidence)["PPO needs tuning"] == verdict


def test_a_trial_that_diverged_is_reported_and_no_loss_is_made_of_it(tmp_path: Path) -> None:
    evidence = tuned([0.0, 1.2, 0.0], [0.9, 1.0, 0.9])
    evidence.tuning["a2c"][2] |= {"score": None, "kl": None, "objective": None}  # as `benchmarks.algorithms` writes it
    assert verdicts(evidence)["PPO needs tuning"] == Verdict.UNDECIDED
    write(tmp_path, [*evidence.runs["ppo"], *evidence.runs["a2c"]], tuning=evidence.tuning)
    report.write_report(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| `a2c` | 3 | 1.0e-05: 0.90, **1.0e-04: 1.00**, 1.0e-03: diverged | n/a |" in table
    assert "loss of `ppo` (0.800) − mean loss" not in table
    assert "not measured: a loss of `a2c`, of whose trials some diverged" in table


def test_a_learning_rate_that_was_never_tried_is_an_error() -> None:
    evidence = tuned([0.0, 1.0, 0.0], [0.0, 1.0, 0.0])
    for one in evidence.runs["ppo"]:
        one["learning_rate"] = 5e-4
    with pytest.raises(ValueError, match=r"ppo ran with learning rate 0.0005, but tuning.json tried"):
        sentences.judge(evidence)


@pytest.mark.parametrize("critic", ["cold", "fitted"])
def test_high_variance_takes_a_noisier_gradient_and_a_larger_spread(critic: str) -> None:
    text = f"REINFORCE is high in variance (with a mean baseline), beside PPO with a {critic} critic"
    runs = {"ppo": runs_of("ppo", 10, *GOOD), "reinforce": runs_of("reinforce", 10, 1.5, 0.3, 30_000.0)}
    assert verdicts(Evidence(runs, {}, {}, 0.04))[text] == Verdict.UNDECIDED  # the gradient was not measured
    for difference, verdict in (
        ([0.2, 0.1, 0.3], Verdict.SUPPORTED),
        ([-0.2, -0.3, -0.1], Verdict.CONTRADICTED),
        ([0.1, -0.1, 0.3], Verdict.UNDECIDED),
    ):
        noise = {f"ppo-{critic}": {"minus": {"reinforce": difference}}}
        assert verdicts(Evidence(runs, {}, noise, 0.04))[text] == verdict
    steady = {**runs, "reinforce": runs_of("reinforce", 10, *GOOD)}
    noise = {f"ppo-{critic}": {"minus": {"reinforce": [0.2, 0.1, 0.3]}}}
    assert verdicts(Evidence(steady, {}, noise, 0.04))[text] == Verdict.UNDECIDED  # as steady as PPO


def test_lines_of_code_leave_out_docstrings_comments_and_blank_lines(tmp_path: Path) -> None:
    source = '"""Two\nlines."""\n\nimport x  # why\n\n# a comment\n'
    source += 'def f(a,\n      b):\n    """Doc."""\n    return """1\n2"""\n'
    (tmp_path / "a2c.py").write_text(source)
    (tmp_path / "ppo.py").write_text(source + "y = 1\n")
    assert sentences.lines_of_code(tmp_path / "a2c.py") == 1 + 2 + 2
    assert sentences.fewer_lines(Evidence({}, {}, {}, 0, tmp_path), "a2c", "ppo").verdict == Verdict.SUPPORTED
    assert sentences.fewer_lines(Evidence({}, {}, {}, 0, tmp_path), "ppo", "a2c").verdict == Verdict.CONTRADICTED
    assert sentences.fewer_lines(Evidence({}, {}, {}, 0, tmp_path), "none", "ppo").verdict == Verdict.UNDECIDED


@pytest.mark.parametrize("simple", ["a2c", "reinforce"])
def test_the_files_whose_lines_are_counted_are_named_by_their_paths(simple: str) -> None:
    claim = sentences.fewer_lines(Evidence({}, {}, {}, 0), simple, "ppo")
    assert claim.verdict != Verdict.UNDECIDED
    paths = [span for span in claim.text.split("`") if span.endswith(".py")]
    assert paths == [f"agents/algorithms/{simple}.py", "agents/algorithms/ppo.py"]
    assert all((Path(__file__).parents[2] / path).exists() for path in paths)


def test_scores_at_equal_kl_are_brought_down_each_in_favour_of_the_other_side() -> None:
    ours, theirs = [run(score=2.0, kl=16.0)], [run("trl-ppo", score=1.0, kl=4.0)]
    assert report.frontier(ours, theirs).ours == pytest.approx(0.5)  # the chord: a quarter of the KL, of the gain
    assert report.frontier(theirs, ours).theirs.value == pytest.approx(1.0)  # the law: √¼ of the gain
    assert report.frontier(ours, theirs).kl == 4.0


def test_the_goals_are_met_or_not_by_the_numbers() -> None:
    trials = {name: [{"learning_rate": 1e-4, "objective": 1.0}] for name in ("ppo", "trl-ppo")}

    def goals(ours: float, seconds: float, seeds: int = 5, critic: float | None = None, ratio: float = 0.0) -> str:
        runs = {
            "ppo": runs_of("ppo", 10, ours, 0.1),
            "trl-ppo": runs_of("trl-ppo", seeds, 1.0, 0.1, cpu_seconds=1.5 * seconds),
        }
        if critic is not None:
            runs["ppo-two-thirds"] = runs_of("ppo-two-thirds", 5, critic, 0.1)
        timed = {"ppo": [ratio] * 3, "trl-ppo": [1.0] * 3}
        ratios = {"value": ratio, "low": ratio, "high": ratio}
        wall_time = {"threads": 2, "seconds_per_token": timed, "ratio": ratios} if ratio else {}
        return report.goals(Evidence(runs, trials, {}, 0.04), wall_time)

    met = goals(ours=1.5, seconds=201.0)
    assert (met.count("**met**"), met.count("above the interval")) == (6, 2)
    missed = goals(ours=0.8, seconds=199.0)
    assert (missed.count("**not met**"), missed.count("below the interval")) == (3, 2)
    assert goals(ours=1.0, seconds=201.0).count("in the interval") == 2
    both = goals(ours=0.8, seconds=199.0, critic=1.5, ratio=0.45)
    assert (both.count("**not met**"), both.count("above the interval")) == (4, 2)  # neither is fast enough
    assert "in turns: ratio 0.45 (quartiles 0.45 to 0.45) | 450.00 s per 1,000 tokens | 1000.00 s" in both
    assert goals(ours=0.8, seconds=199.0, ratio=0.55).count("**not met**") == 4
    assert goals(ours=0.8, seconds=201.0, seeds=1).count("undecided (no interval from one seed)") == 2
    assert goals(ours=-1.0, seconds=201.0).count("10 of 10 | 0 of 5 | **not met**") == 1


def full_study() -> list[Run]:
    generator = np.random.default_rng(0)
    levels = {  # score, spread, tokens to the top, seconds, KL
        "ppo": (1.7, 0.08, 18_000, 100, 10),
        "a2c": (1.2, 0.15, 35_000, 70, 8),
        "reinforce": (1.1, 0.25, 42_000, 70, 9),
        "reinforce-no-baseline": (0.5, 0.5, 60_000, 70, 11),
        "reinforce-value": (1.2, 0.2, 38_000, 72, 8),
        "rloo": (2.0, 0.1, 15_000, 75, 10),
        "grpo": (1.65, 0.1, 22_000, 75, 9.5),
        "sb3-ppo": (1.3, 0.15, 30_000, 180, 9),
        "sb3-a2c": (0.8, 0.2, 40_000, 160, 6),
        "sb3-ddpg": (-1.0, 0.3, 40_000, 150, None),
        "sb3-td3": (-0.8, 0.3, 40_000, 170, None),
        "trl-ppo": (1.4, 0.12, 30_000, 320, 10),
        "trl-rloo": (1.5, 0.12, 26_000, 240, 9),
    }
    results = []
    for name, (score, spread, rise, seconds, kl) in levels.items():
        for seed in range(10 if name in ("ppo", "a2c", "reinforce") else 5):
            s, r = score + spread * generator.normal(), rise * np.exp(0.1 * generator.normal())
            bins = np.arange(1_000, 41_000, 1_000)
            level = s * (1 - np.exp(-2.5 * bins / r)) / (1 - np.exp(-2.5 * 40_000 / r))
            curve = [
                {"tokens": int(t), "score": float(y)}
                for t, y in zip(bins, level + generator.normal(0, 0.12, 40), strict=True)
            ]
            start = START | ({"score": -1.2} if kl is None else {})
            spent = seconds * np.exp(0.05 * generator.normal())
            more = {"seconds": spent, "cpu_seconds": spent, "start": start, "curve": curve}
            results.append(run(name, seed, float(s), kl and float(kl * np.exp(0.08 * generator.normal())), **more))
    return results


ENVIRONMENT = {
    "date": "2026-01-01T00:00:00+00:00",
    "machine": {"cpu": "Some CPU", "cores": 2},
    "versions": {"python": "3.11", "torch": "2.13"},
    "command": "python -m benchmarks.algorithms --seeds 10",
    "duration": 7_380,
    "total_timesteps": 40_000,
    "kl_coef": 0.04,
}


def write(directory: Path, results: list[Run], **others: Any) -> None:
    files = {"results": results, "environment": ENVIRONMENT} | others
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def test_the_report_of_a_full_study_says_what_its_numbers_say(tmp_path: Path) -> None:
    results = full_study()
    rates = (3e-5, 1e-4, 3e-4)
    trials = [
        {"learning_rate": r, "score": 1.0, "kl": 5.0, "objective": o} for r, o in zip(rates, (0.5, 1, 0.7), strict=True)
    ]
    noise = {
        "rollouts": 48,
        "episodes_per_rollout": 16,
        "estimators": {
            "reinforce": {"snr": 0.02, "low": 0.01, "high": 0.03, "cosine": [1.0, 0.9, 1.1], "minus": {}},
            "ppo-fitted": {
                "snr": 0.06, "low": 0.05, "high": 0.07, "cosine": None, "minus": {"reinforce": [0.04, 0.03, 0.05]}
            },
        },
    }  # fmt: skip
    tuning = dict.fromkeys({one["algorithm"] for one in results}, trials)
    write(tmp_path, results, tuning=tuning, gradient_noise=noise)
    report.write_report(tmp_path)
    table = (tmp_path / "table.md").read_text()
    for name in ("learning_curves", "score_kl", "seeds", "probability_of_improvement"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"({name}.png)" in table
    assert "It took 2 h 3 min on Some CPU" in table
    assert "`rloo` (score, objective" in table  # wins over PPO
    assert "0.0600 [0.0500, 0.0700]" in table
    assert "| A2C is less sample-efficient | **supported** |" in table
    assert table.count("**met**") == 6
    rows = [line for line in table.splitlines() if line.startswith("| `sb3-ddpg`")]
    assert " n/a " in rows[0]
    assert "nan" not in table


def test_score_against_kl_has_a_panel_for_no_more_than_a_handful_of_algorithms() -> None:
    own = ("ppo", "ppo-reward-critic", "a2c", "reinforce", "reinforce-value", "rloo", "grpo")
    names = [*own, "sb3-ppo", "sb3-a2c", "trl-ppo"]
    assert plots.in_panels({name: [run(name, 0)] for name in names}) == {
        "This project, with a critic": ["ppo", "ppo-reward-critic", "a2c", "reinforce-value"],
        "This project, without a critic": ["reinforce", "rloo", "grpo"],
        "Stable-Baselines3": ["sb3-ppo", "sb3-a2c"],
        "TRL": ["trl-ppo"],
    }


def test_a_study_without_tuning_gradients_or_peers_is_reported_too(tmp_path: Path) -> None:
    write(tmp_path, [run("ppo", 0), run("mine", 0, score=1.0)])
    report.write_report(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "Not measured: no runs of `trl-ppo`" in table
    assert next(line for line in table.splitlines() if line.startswith("| `mine`")).count("|") == 9
    assert "nan" not in table


def test_a_study_of_algorithms_without_a_likelihood_alone_is_reported_too(tmp_path: Path) -> None:
    write(tmp_path, [run("sb3-td3", seed, kl=None, score=0.1 * seed) for seed in range(2)])
    report.write_report(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "## What is learned" not in table
    assert "| `sb3-td3` | 2 |" in table
    assert "nan" not in table


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "has no runs"),
        ([{k: v for k, v in run().items() if k != "gold_score"}], "has no gold_score"),
        ([run(score=math.nan)], "expected a finite score, got nan"),
        ([run(curve=[])], "empty curve"),
        ([run(), run()], "stands there twice"),
    ],
)
def test_results_that_cannot_be_reported_are_errors_that_say_why(results: list[Run], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.by_algorithm(results)
