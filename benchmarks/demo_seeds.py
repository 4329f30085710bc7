"""Does the demo learn with every seed? Runs `textrlhf demo` once a seed, and tabulates what it found.

python -m benchmarks.demo_seeds --seeds 10 --runs runs/seeds --json benchmarks/results/demo_seeds.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance


def run_seed(seed: int, runs: Path) -> dict[str, Any]:
    """Run the demo in a process of its own, on one thread; a seed that was evaluated before is not run again.

    :param seed: of the demo.
    :param runs: directory of the runs.
    :return: the seed's row of the table.
    :raises RuntimeError: with the process's last words, if it ended before the evaluation.
    """
    directory = runs / str(seed)
    exit_status = directory / "exit_status"
    if not exit_status.exists():
        command = [sys.executable, "-m", "agents.cli", "demo", "--run-dir", str(directory), "--seed", str(seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        if not (directory / "evaluation.json").exists():
            last = done.stderr.decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode} before it was evaluated:\n{last}")
        exit_status.write_text(f"{done.returncode}\n")
    result = json.loads((directory / "evaluation.json").read_text())
    policy, reference = result["policy"], result["reference"]
    return {
        "seed": seed,
        "learned": exit_status.read_text().strip() == "0",
        "score_gain_std": result["score_gain_std"],
        "gold_gain": policy["gold_score"] - reference["gold_score"],
        "kl": result["kl"],
        "distinct_2_ratio": policy["distinct_2"] / reference["distinct_2"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    origin = provenance("benchmarks.demo_seeds")
    args.runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=2) as pool:
        rows = list(pool.map(lambda seed: run_seed(seed, args.runs), range(args.seeds)))
    table = Table(*rows[0], title="textrlhf demo, held-out prompts")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {**origin, "seeds": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["learned"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
