"""PPO beside A2C, REINFORCE and everybody else, on one task at one budget of tokens.

    python -m benchmarks.algorithms --seeds 10 --total-timesteps 40000 --out benchmarks/results/algorithms

First every algorithm gets the same number of tuning trials (learning rates, on the training prompts, with a seed of
their own, otherwise as the runs), then come the runs with the rate that was best. Each run is a process, two at a time
with one thread each; what is there already is not run again, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.algorithms.gradient_noise import measure
from benchmarks.algorithms.learners import BUDGETS, DEFAULT, KL_COEF, LEARNERS, MAIN, PEERS
from benchmarks.algorithms.report import write_report
from benchmarks.provenance import provenance

LEARNING_RATES = (1e-4, 3e-4, 1e-3)
TUNING_SEED = 1_000


class Run(NamedTuple):
    """One process.

    :param algorithm: its name.
    :param seed: of the training.
    :param learning_rate: at its start.
    :param total_timesteps: tokens.
    :param prompts: to evaluate on.
    """

    algorithm: str
    seed: int
    learning_rate: float
    total_timesteps: int
    prompts: str

    def directory(self, runs: Path) -> Path:
        """Every argument is in its name: a run with others is another run."""
        name = f"{self.learning_rate:g}-{self.total_timesteps}-{self.prompts.replace(':', '-')}-{self.seed}"
        return runs / self.algorithm / name


def execute(run: Run, runs: Path) -> dict[str, Any]:
    """Run it, if it wasn't run before.

    :param run: what to do.
    :param runs: where all runs are.
    :return: its result; a training that diverged (a gradient that is not finite) gives ``{"failed": message}``.
    :raises RuntimeError: if it failed in any other way.
    """
    directory = run.directory(runs)
    file = directory / "result.json"
    if not file.exists():
        options = {f"--{name.replace('_', '-')}": str(value) for name, value in run._asdict().items()}
        command = [sys.executable, "-m", "benchmarks.algorithms.runs", "--out", str(directory)]
        command += [part for option in options.items() for part in option]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            if "FloatingPointError" not in done.stderr:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
            directory.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"failed": done.stderr.strip().splitlines()[-1]}) + "\n")
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def execute_all(todo: Sequence[Run], runs: Path, title: str) -> list[dict[str, Any]]:
    """Two at a time; the others are finished also if one fails.

    :return: results in the order of the runs.
    """
    with ThreadPoolExecutor(max_workers=2) as pool, tqdm(total=len(todo), desc=title) as bar:
        futures = [pool.submit(execute, run, runs) for run in todo]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
    return [future.result() for future in futures]


def budget(algorithm: str, total_timesteps: int) -> int:
    """
    :return: the number of tokens that an algorithm gets.
    """
    return round(total_timesteps * BUDGETS.get(algorithm, 1.0))


def objective(result: dict[str, Any]) -> float:
    """What tuning maximises: what the algorithms do, score − β·KL (the score alone where there is no KL)."""
    if "failed" in result or not math.isfinite(result["score"]):
        return -math.inf
    value: float = result["score"] - KL_COEF * (result["kl"] or 0.0)
    return value


def tune(algorithms: Sequence[str], total_timesteps: int, runs: Path) -> dict[str, list[dict[str, Any]]]:
    """
    :return: the trials of each algorithm, one of them ``chosen``.
    """
    todo = [
        Run(algorithm, TUNING_SEED, rate, budget(algorithm, total_timesteps), "builtin")
        for rate in LEARNING_RATES
        for algorithm in algorithms
    ]
    trials: dict[str, list[dict[str, Any]]] = {algorithm: [] for algorithm in algorithms}
    for run, result in zip(todo, execute_all(todo, runs, "tuning"), strict=True):
        trials[run.algorithm].append(
            {
                "learning_rate": run.learning_rate,
                "score": result.get("score"),
                "kl": result.get("kl"),
                "objective": objective(result) if "failed" not in result else None,
            }
        )
    for mine in trials.values():
        best = max(mine, key=lambda trial: -math.inf if trial["objective"] is None else trial["objective"])
        for trial in mine:
            trial["chosen"] = trial is best
    return trials


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: of the command line; by default the process's.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", nargs="+", choices=[*LEARNERS, *PEERS], default=list(DEFAULT))
    parser.add_argument("--seeds", type=int, default=10, help=f"of {', '.join(MAIN)}")
    parser.add_argument("--other-seeds", type=int, default=5, help="of all others")
    parser.add_argument("--total-timesteps", type=int, default=40_000, help="tokens of a run")
    parser.add_argument("--gradient-rollouts", type=int, default=48, help="for the gradients' signal-to-noise")
    parser.add_argument("--runs", type=Path, default=Path("runs/algorithms"), help="where every run's files go")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/algorithms"))
    args = parser.parse_args(arguments)
    origin = provenance("benchmarks.algorithms", arguments)
    with measured(args.runs) as seconds_so_far:
        run_all(args, origin, seconds_so_far)


@contextlib.contextmanager
def measured(runs: Path) -> Iterator[Callable[[], float]]:
    """Count the seconds of this benchmark, those before an interruption included.

    :param runs: where all runs are.
    :return: a function that says how many there are so far.
    """
    runs.mkdir(parents=True, exist_ok=True)
    file, start = runs / "seconds", time.perf_counter()
    before = float(file.read_text()) if file.exists() else 0.0

    def so_far() -> float:
        return before + time.perf_counter() - start

    try:
        yield so_far
    finally:
        file.write_text(f"{so_far():.0f}\n")


def run_all(args: argparse.Namespace, origin: dict[str, Any], seconds_so_far: Callable[[], float]) -> None:
    """Tuning, runs, gradients, report."""
    args.out.mkdir(parents=True, exist_ok=True)
    trials = tune(args.algos, args.total_timesteps, args.runs)
    write(args.out / "tuning.json", trials)
    rates = {name: next(t["learning_rate"] for t in mine if t["chosen"]) for name, mine in trials.items()}
    # Seed by seed: whoever looks at a benchmark that is not over yet sees every algorithm.
    todo = [
        Run(name, seed, rates[name], budget(name, args.total_timesteps), "builtin:eval")
        for seed in range(max(args.seeds, args.other_seeds))
        for name in args.algos
        if seed < (args.seeds if name in MAIN else args.other_seeds)
    ]
    results = execute_all(todo, args.runs, "runs")
    if failed := [run for run, result in zip(todo, results, strict=True) if "failed" in result]:
        raise RuntimeError(f"These runs diverged with the rate that tuning chose: {failed}")
    write(args.out / "results.json", sorted(results, key=lambda r: (args.algos.index(r["algorithm"]), r["seed"])))
    write(args.out / "gradient_noise.json", measure(args.gradient_rollouts))
    environment = {
        **origin,
        "duration": seconds_so_far(),
        "total_timesteps": args.total_timesteps,
        "kl_coef": KL_COEF,
    }
    write(args.out / "environment.json", environment)
    write_report(args.out)


def write(path: Path, value: Any) -> None:
    """As JSON, one level of it a line."""
    path.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
