"""Two processes beside one: the same weights? How much memory has each, and how fast are they? Does the model that
``docs/scaling.md`` predicts larger machines with predict these two?

python -m benchmarks.scale_out --json benchmarks/results/scale_out/ranks.json

For the speeds the machine must be idle, with a core for each process. The figures of a part replace those that the
file has of it already; the others stay.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from agents.state import checkpoint
from benchmarks.provenance import provenance
from benchmarks.scale_out.model import of_processes
from benchmarks.scale_out.ranks import ALGORITHMS, JOBS, MINIBATCHES
from benchmarks.scale_out.trainings import RANKS

ROOT = Path(__file__).parents[2]
# Ways to train: the engine, and the number of processes.
WAYS = {"one process": ("Engine", 1), "replicated": ("AccelerateEngine", RANKS), "cut up": ("FSDPEngine", RANKS)}
SEVERAL = [way for way, (_, n) in WAYS.items() if n > 1]


def run(jobs: Sequence[str], way: str, directory: Path, **options: Any) -> list[dict[str, Any]]:
    """Start the processes of a way to train, each with one thread, and wait for them.

    :param jobs: what they do, one after the other.
    :param way: a name of :data:`WAYS`.
    :param directory: where they write; it is made.
    :param options: of the jobs.
    :return: of each process the results by the names of the jobs.
    :raises RuntimeError: if one has failed.
    """
    engine, n = WAYS[way]
    directory.mkdir(parents=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"] if n > 1 else []
    given = json.dumps({"engine": engine, **options})
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "benchmarks.scale_out.ranks", ",".join(jobs), str(directory), given],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FSDP_VERSION": "2"},
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{jobs} of {way!r} ended with {done.returncode}: {done.stderr[-3000:]}")
    return [json.loads((directory / f"rank_{rank}.json").read_text()) for rank in range(n)]


def measured(scratch: Path, parts: Sequence[str], rounds: int, **options: Any) -> dict[str, Any]:
    """
    :param scratch: an empty directory.
    :param parts: names of :data:`~benchmarks.scale_out.ranks.JOBS`.
    :param rounds: how often each way is timed, in turn.
    :param options: of the jobs.
    :return: the figures of each part.
    """
    results: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
    for number in range(rounds if "speed" in parts else 1):
        for way in list(WAYS) if number % 2 == 0 else reversed(WAYS):
            jobs = [part for part in parts if part != "decode" or way == "cut up"]  # which is about FSDP alone
            if number:  # only speeds differ from time to time
                jobs = ["speed"]
            if jobs:
                results[way].append(run(jobs, way, scratch / way / str(number), **options))
    report: dict[str, Any] = {}
    if "weights" in parts:
        report["weights"] = _differences(scratch)
        report["weights"]["texts of one process, tokens"] = results["one process"][0][0]["weights"]
    if "memory" in parts:
        report["memory"] = {way: [rank["memory"] for rank in rounds[0]] for way, rounds in results.items()}
    if "speed" in parts:
        first = {way: [ranks[0]["speed"] for ranks in rounds] for way, rounds in results.items()}
        report["speed"] = _speeds(first, options["episodes"] * options["response"])
    if "decode" in parts:
        report["decode"] = results["cut up"][0][0]["decode"]
    return report


def _differences(scratch: Path) -> dict[str, Any]:
    """Of each way of several processes and each algorithm the largest difference of a weight from one process's, and
    between the processes.
    """

    def difference(one: Path, other: Path) -> float:
        left, right = (checkpoint.load(path)["weights"] for path in (one, other))
        return max(float((left[key].double() - right[key].double()).abs().max()) for key in left)

    found: dict[str, Any] = {}
    for way in SEVERAL:
        found[way] = {}
        for name in ALGORITHMS:
            alone, *ranks = (
                scratch / of / "0" / f"{name}_{rank}" for of, rank in (("one process", 0), (way, 0), (way, 1))
            )
            found[way][name] = {
                "from one process": difference(alone, ranks[0]),
                "between processes": difference(*ranks),
            }
    return found


def _speeds(taken: dict[str, list[dict[str, Any]]], tokens: int) -> dict[str, Any]:
    """
    :param taken: of each way what the first process has measured, round by round. It counts everybody's tokens.
    :param tokens: of a rollout.
    :return: of each way all rounds, and the median speeds; of several processes their ratios to one process, and to
        what was predicted from the one process and from the seconds of what they do together.
    """
    found: dict[str, Any] = {}
    alone = taken["one process"]
    for way, results in taken.items():
        found[way] = {"rounds": results}
        expected = [
            of_processes(WAYS[way][1], one["rollout"], one["learner"], tokens, MINIBATCHES, several["seconds"])
            for one, several in zip(alone, results, strict=True)
        ]
        for part in ("rollout", "learner"):
            found[way][part] = float(np.median([result[part] for result in results]))
            if way in SEVERAL:
                found[way][f"{part} ÷ one process"] = _ratio(part, results, alone)
                found[way][f"{part} ÷ predicted"] = _ratio(part, results, expected)
    return found


def _ratio(part: str, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> float:
    return float(np.median([a[part] / b[part] for a, b in zip(ours, theirs, strict=True)]))


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: of the command line; by default the process's.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale_out", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--parts", nargs="+", choices=JOBS, default=list(JOBS), metavar="PART", help=", ".join(JOBS))
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is timed")
    parser.add_argument("--iterations", type=int, default=3, help="of PPO in each round")
    parser.add_argument("--episodes", type=int, default=64, help="of a rollout, a multiple of 32")
    parser.add_argument("--response", type=int, default=64, help="the budget of a text, in tokens")
    args = parser.parse_args(arguments)
    sizes = {"episodes": args.episodes, "response": args.response}
    origin = provenance("benchmarks.scale_out", arguments)
    origin["versions"]["accelerate"] = importlib.metadata.version("accelerate")
    origin |= {"model": "random GPT-2 of 4 million parameters, float32, gloo, one thread a process", **sizes}
    with tempfile.TemporaryDirectory() as scratch:
        figures = measured(Path(scratch), args.parts, args.rounds, iterations=args.iterations, **sizes)
    before = json.loads(args.json.read_text()) if args.json.exists() else {}
    report = {**before, **{part: {**origin, "figures": found} for part, found in figures.items()}}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _show(figures)


def _show(figures: dict[str, Any]) -> None:
    console = Console(width=120)
    for part, found in figures.items():
        table = Table(part, "")
        for name, value in found.items():
            table.add_row(name, json.dumps(value, ensure_ascii=False)[:600])
        console.print(table)


if __name__ == "__main__":
    main()
