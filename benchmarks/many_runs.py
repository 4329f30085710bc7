"""Many runs of a benchmark, several at a time, each kept in a file of its own; and where they were made."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.provenance import CPU, commit, machine, provenance

Row = dict[str, Any]


def file_of(out: Path, name: str, tokens: int, episodes: int, seed: int) -> Path:
    """The file that the row of a run is kept in. Whatever is in its name makes it another run, to be made anew.

    :param out: the directory of the benchmark's results.
    :param name: what was trained, in words.
    :param tokens: the number of tokens that it was trained for.
    :param episodes: the number of texts that it was evaluated on.
    :param seed: the seed.
    :return: a path in the folder runs/.
    """
    words = re.sub(r"[^\w.-]+", "-", name)
    return out / "runs" / f"{words}-{tokens}-{episodes}-{seed}.json"


def all_runs(run: Callable[..., Row], todo: Mapping[Path, tuple[Any, ...]], workers: int) -> list[Row]:
    """Make the runs that have not been made yet. Whatever interrupts them, those that are finished are kept.

    :param run: makes one run, and returns its row.
    :param todo: the arguments of each run, by the file that its row is kept in. A run whose file exists is not made
        again.
    :param workers: the number of runs at a time, each in a process of its own; 1: in this process.
    :return: the rows of all runs, in their order, each with the commit and the processor that it was made with.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    missing = {path: arguments for path, arguments in todo.items() if not path.exists()}
    make = functools.partial(_make, run)
    if workers == 1:
        for path, arguments in missing.items():
            make(path, arguments)
    elif missing:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
            list(pool.map(make, missing, missing.values()))
    return [json.loads(path.read_text()) for path in todo]


def _make(run: Callable[..., Row], path: Path, arguments: tuple[Any, ...]) -> None:
    processor = machine(CPU)
    origin = {"commit": commit(), "cpu": f"{processor['cpu']}, {processor['instructions']}"}
    row = {**run(*arguments), **origin}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(row) + "\n")
    os.replace(partial, path)  # a run that is cut off in mid-write is one that has not been made


def write_results(module: str, directory: Path, rows: list[Row], **settings: Any) -> None:
    """Write ``results.json``, and ``environment.json``: when, where and on what the runs were made.

    :param module: the name of the benchmark's module.
    :param directory: it is made if there is none.
    :param rows: the rows of the runs, as :func:`all_runs` returns them; ``environment.json`` says how many are of each
        commit, which may be several, since finished runs are not made again.
    :param settings: what else ``environment.json`` says.
    """
    directory.mkdir(parents=True, exist_ok=True)
    origin = provenance(module)
    del origin["commit"]
    environment = {**origin, "commits": Counter(row["commit"] for row in rows), **settings}
    for name, value in (("results.json", rows), ("environment.json", environment)):
        (directory / name).write_text(json.dumps(value, indent=1) + "\n")
