"""One run of the algorithm benchmark: what it notes while training, and that every text is looked at whole."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.logger import configure

from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sb3_vec_env import make_vec_env
from benchmarks.algorithms import __main__ as benchmark
from benchmarks.algorithms import runs
from benchmarks.algorithms.gradient_noise import ESTIMATORS, measure
from benchmarks.algorithms.learners import BATCH_EPISODES, ENV_KWARGS, LEARNERS, MAIN, PEERS, PPO_EPISODES


@pytest.mark.parametrize("name", ["reinforce", "sb3-a2c"])
def test_the_curve_holds_every_finished_episode_once(name: str) -> None:
    model = LEARNERS[name](1e-4, 0)
    model.set_logger(configure(None, []))
    curve = runs.Curve()
    model.learn(1, callback=curve)  # one rollout
    finished = 16 if name == "reinforce" else len(model.ep_info_buffer or [])
    assert len(curve.scores) == finished > 5
    (point,) = curve.points()
    assert point["score"] == pytest.approx(np.mean([score for _, score in curve.scores]))
    assert 0 < point["tokens"] <= model.num_timesteps


def test_points_are_means_of_bins_of_tokens() -> None:
    curve = runs.Curve()
    curve.scores = [(100, 1.0), (2000, 3.0), (2001, 5.0), (9000, 7.0)]
    assert curve.points() == [
        {"tokens": 1050.0, "score": 2.0},
        {"tokens": 2001.0, "score": 5.0},
        {"tokens": 9000.0, "score": 7.0},
    ]


class PointsOf:
    """Acts as an actor would: rows choose their own tokens' points, so that they end at different times."""

    def __init__(self, env: Any, ends: list[int]) -> None:
        self.points = env.get_attr("nearest_token")[0].points
        self.eos = env.vector_env.eos_token_id
        self.ends = ends

    def predict(self, observation: dict[str, np.ndarray], deterministic: bool) -> tuple[np.ndarray, None]:
        written = observation["attention_mask"].sum(axis=1) - observation["prompt_length"][:, 0]
        tokens = [
            self.eos if n + 1 >= end else 40 + row for row, (n, end) in enumerate(zip(written, self.ends, strict=True))
        ]
        return self.points[tokens], None


def test_every_row_plays_one_whole_episode() -> None:
    ends = [3, 1, 5]
    env = make_vec_env("TextRLHFContinuous-v0", n_envs=3, env_kwargs=ENV_KWARGS)
    text_env = env.vector_env
    spaces = text_env.single_observation_space, text_env.single_action_space
    buffer = EpisodeBuffer(0, *spaces, "cpu", n_envs=3)
    buffer.reset()
    model: Any = PointsOf(env, ends)
    episodes = runs.play_once(model, env, buffer) + runs.play_once(model, env, buffer)
    buffer.finalize()
    eos = text_env.eos_token_id
    assert buffer.lengths.tolist() == ends * 2
    assert buffer.actions.tolist() == [40, 40, eos, eos, 42, 42, 42, 42, eos] * 2
    assert [episode["finish_reason"] for episode in episodes] == ["eos"] * 6
    np.testing.assert_allclose(
        buffer.episode_sums(buffer.rewards), [episode["score"] for episode in episodes], rtol=1e-5
    )


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_all_learners_share_task_and_optimiser(name: str) -> None:
    model: Any = LEARNERS[name](3e-4, 0)
    assert model.gamma == 1.0
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5, 0.0, -0.1)] == [3e-4, 1.5e-4, 0.0, 0.0]
    if name in ("sb3-ddpg", "sb3-td3"):
        return
    assert model.max_grad_norm == 1.0
    assert type(model.policy.optimizer).__name__ == "Adam"
    assert model.policy.optimizer.defaults["eps"] == 1e-5
    buffer = model.rollout_buffer if name.startswith("sb3") else model.buffer
    assert buffer.reference is not None
    assert (buffer.kl_coef if name.startswith("sb3") else model.kl.coef) == 0.04
    assert model.n_envs == (PPO_EPISODES if "ppo" in name else BATCH_EPISODES)
    assert not hasattr(model, "vf_coef") or model.vf_coef == 0.1


def test_a_run_leaves_a_complete_result_and_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "EPISODES", 8)
    monkeypatch.setattr(runs, "ROWS", 8)
    run = benchmark.Run("reinforce", 3, 1e-4, 500, "builtin:eval")
    runs.run(*run, out=run.directory(tmp_path))
    result = benchmark.execute(run, tmp_path)  # finds the file
    assert result["algorithm"] == "reinforce"
    assert (result["seed"], result["learning_rate"], result["prompts"]) == (3, 1e-4, "builtin:eval")
    assert 500 <= result["tokens"] < 1500
    assert {"score", "gold_score", "kl", "perplexity", "distinct_2", "seconds", "cpu_seconds"} <= set(result)
    assert result["start"]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert result["curve"]
    again = benchmark.Run("reinforce", 4, 1e-4, 500, "builtin:eval")
    assert again.directory(tmp_path) != run.directory(tmp_path)


def test_tuning_takes_the_rate_of_the_best_objective(tmp_path: Path) -> None:
    outcomes = {1e-4: {"score": 1.0, "kl": 5.0}, 3e-4: {"score": 1.3, "kl": 40.0}, 1e-3: {"failed": "diverged"}}
    for rate in benchmark.LEARNING_RATES:
        for name in ("ppo", "sb3-td3"):
            directory = benchmark.Run(name, benchmark.TUNING_SEED, rate, 100, "builtin").directory(tmp_path)
            directory.mkdir(parents=True)
            outcome = outcomes[rate] | ({"kl": None} if name == "sb3-td3" and "kl" in outcomes[rate] else {})
            (directory / "result.json").write_text(json.dumps(outcome))
    trials = benchmark.tune(["ppo", "sb3-td3"], 100, tmp_path)
    chosen = {name: [t["learning_rate"] for t in mine if t["chosen"]] for name, mine in trials.items()}
    assert chosen == {"ppo": [1e-4], "sb3-td3": [3e-4]}  # 1.0 − 0.04·5 beats 1.3 − 0.04·40; without a KL 1.3 wins
    assert [t["objective"] for t in trials["ppo"]] == pytest.approx([0.8, -0.3, None])


def in_this_process(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Stands in for a process of its own, which would spend most of its time on imports."""
    assert command[:3] == [sys.executable, "-m", runs.__name__]
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", command[2:])
        try:
            runs.main()
        except SystemExit as ended:
            return subprocess.CompletedProcess(command, int(ended.code or 0), "", errors.getvalue())
    return subprocess.CompletedProcess(command, 0, "", errors.getvalue())


def test_a_run_that_fails_for_another_reason_than_divergence_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", in_this_process)
    run = benchmark.Run("no-such-algorithm", 0, 1e-4, 100, "builtin")
    with pytest.raises(RuntimeError, match="invalid choice: 'no-such-algorithm'"):
        benchmark.execute(run, tmp_path)


def test_a_miniature_of_the_whole_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runs are made in this process, one after another, instead of in processes of their own."""
    monkeypatch.setattr(runs, "EPISODES", 8)
    monkeypatch.setattr(runs, "ROWS", 8)
    monkeypatch.setitem(ENV_KWARGS, "max_new_tokens", 4)
    few = [estimator for estimator in ESTIMATORS if estimator.key in ("reinforce", "rloo")]
    monkeypatch.setattr(benchmark, "measure", partial(measure, episodes=4, past_episodes=8, estimators=few))
    one_at_a_time = Lock()

    def here(run: benchmark.Run, directory: Path) -> dict[str, Any]:
        with one_at_a_time:
            if not (run.directory(directory) / "result.json").exists():
                runs.run(*run, out=run.directory(directory))
        result: dict[str, Any] = execute(run, directory)
        return result

    execute = benchmark.execute
    monkeypatch.setattr(benchmark, "execute", here)
    out, kept = tmp_path / "out", tmp_path / "runs"
    sizes = ["--seeds", "2", "--total-timesteps", "100", "--gradient-rollouts", "3"]
    benchmark.main(["--algos", "reinforce", *sizes, "--runs", str(kept), "--out", str(out)])

    results = json.loads((out / "results.json").read_text())
    assert [(result["algorithm"], result["seed"]) for result in results] == [("reinforce", 0), ("reinforce", 1)]
    trials = json.loads((out / "tuning.json").read_text())["reinforce"]
    assert [trial["learning_rate"] for trial in trials] == list(benchmark.LEARNING_RATES)
    [rate] = [trial["learning_rate"] for trial in trials if trial["chosen"]]
    assert {result["learning_rate"] for result in results} == {rate}
    assert set(json.loads((out / "gradient_noise.json").read_text())["estimators"]) == {"reinforce", "rloo"}
    environment = json.loads((out / "environment.json").read_text())
    assert environment["command"].startswith("python -m benchmarks.algorithms --algos reinforce --seeds 2 ")
    assert "`reinforce`" in (out / "table.md").read_text()
    assert (out / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_duration_counts_what_was_before_an_interruption(tmp_path: Path) -> None:
    (tmp_path / "seconds").write_text("100\n")

    def interrupted() -> None:
        with benchmark.measured(tmp_path) as seconds:
            assert 100 <= seconds() < 110
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with benchmark.measured(tmp_path) as seconds:
        assert 100 <= seconds() < 120
    assert float((tmp_path / "seconds").read_text()) >= 100


def test_the_main_algorithms_are_the_ones_that_the_question_names() -> None:
    assert {"ppo", "a2c", "reinforce"} <= set(MAIN) <= {*LEARNERS, *PEERS}


def test_ppo_with_two_thirds_of_the_tokens_gets_just_these_in_tuning_and_in_the_runs() -> None:
    assert [benchmark.budget(name, 30_000) for name in ("ppo", "ppo-two-thirds", "trl-ppo")] == [30_000, 20_000, 30_000]
