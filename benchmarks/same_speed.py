"""Is this commit as fast as another one?

    python -m benchmarks.same_speed BASE --rounds 5 --json benchmarks/results/same_speed.json

checks BASE out beside this tree and runs ``benchmarks.throughput`` in both, in turns, each time in a process of its
own. Of each figure it compares this project's side alone: above 1, this commit is the faster one. The machine must be
idle.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.commits import ROOT, checked_out, commit_of, run_in
from benchmarks.provenance import provenance

KEYS = (
    "rollout_vs_generate",
    "rollout_vs_generate_builtin",
    "rollout_vs_generate_varied",
    "update_vs_bare",
    "update_vs_bare_builtin",
    "growth_128_256",
    "stock_ppo_speedup",
    "buffer_bytes_per_token",
)
SLOWER = 0.97
"""A figure below this counts as slower."""


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """
    :param ours: the figures of one run of ``benchmarks.throughput`` in this tree.
    :param theirs: the figures of one in the other.
    :return: for each figure how many times as fast, or as small, this tree's is.
    """
    found = {}
    for key in ours.keys() & theirs.keys():
        mine, other = ours[key]["ours"], theirs[key]["ours"]
        # Rates grow with speed; seconds and bytes shrink.
        found[key] = mine / other if ours[key]["unit"].endswith("/s") else other / mine
    return found


def main(args: list[str] | None = None) -> int:

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(KEYS), metavar="KEY", help=", ".join(KEYS))
    parser.add_argument("--models", nargs="+", default=["builtin", "gpt2-4m"])
    parser.add_argument("--repeats", type=int, help="of each figure in each run; fewer, to try something out")
    parser.add_argument("--json", type=Path, help="write the ratios here")
    options = parser.parse_args(args)
    origin, base = provenance("benchmarks.same_speed", args), commit_of(options.base)
    found: dict[str, list[float]] = {}
    with checked_out(base) as other, tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            figures = {}
            trees = [other, ROOT] if number % 2 == 0 else [ROOT, other]
            for tree in trees:
                out = Path(scratch) / f"{number}-{len(figures)}.json"
                command = ["-m", "benchmarks.throughput", "--quick", "--json", str(out), "--only", *options.only]
                command += ["--models", *options.models]
                run_in(tree, command + (["--repeats", str(options.repeats)] if options.repeats else []))
                figures[tree] = json.loads(out.read_text())["figures"]
            for key, ratio in ratios(figures[ROOT], figures[other]).items():
                found.setdefault(key, []).append(ratio)
    table = {
        key: {"median": float(np.median(values)), "low": min(values), "high": max(values), "rounds": values}
        for key, values in sorted(found.items())
    }
    for key, row in table.items():
        said = "slower" if row["median"] < SLOWER else ""
        print(f"{key:30} {row['median']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]  {said}")
    if options.json is not None:
        result = {
            "what": "speed of this commit ÷ speed of the base, of this project's side of each figure",
            "base": base,
            **origin,
            "figures": table,
        }
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return 1 if any(row["median"] < SLOWER for row in table.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
