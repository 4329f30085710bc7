"""Wall time of our PPO and of TRL's, one run at a time on all cores, in turns. Keep the machine idle.

python -m benchmarks.algorithms.wall_time --rounds 5 --out benchmarks/results/algorithms/wall_time.json

The benchmark itself runs two processes of one thread each, which tells little of how long a single training takes on
the whole machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import provenance

SIDES = ("ppo", "trl-ppo")


def seconds_per_token(algorithm: str, total_timesteps: int, threads: int) -> float:
    """
    :param algorithm: as for ``benchmarks.algorithms.runs``.
    :param total_timesteps: tokens.
    :param threads: of torch.
    :return: of the training alone, in a process of its own.
    """
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "benchmarks.algorithms.runs", "--algorithm", algorithm, "--out", directory]
        command += ["--seed", "0", "--learning-rate", "1e-4", "--total-timesteps", str(total_timesteps)]
        command += ["--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, env=environment, capture_output=True, check=True)
        result: dict[str, Any] = json.loads((Path(directory) / "result.json").read_text())
    return float(result["seconds"] / result["tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--total-timesteps", type=int, default=15_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    origin = provenance("benchmarks.algorithms.wall_time")
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):  # nobody always comes second
            seconds[side].append(seconds_per_token(side, args.total_timesteps, args.threads))
    ratios = np.array(seconds["ppo"]) / np.array(seconds["trl-ppo"])
    low, value, high = np.percentile(ratios, [25, 50, 75])
    result = {
        **origin,
        "threads": args.threads,
        "total_timesteps": args.total_timesteps,
        "seconds_per_token": seconds,
        "ratio": {"value": float(value), "low": float(low), "high": float(high)},
    }
    print(f"wall time of our PPO ÷ TRL's, {args.threads} threads: {value:.2f} ({low:.2f} to {high:.2f})")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
