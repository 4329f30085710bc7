"""Many runs of a benchmark, several at a time, and where they were made."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.commits import commit_of
from benchmarks.timing import machine, today, versions

Row = dict[str, Any]


def all_runs(run: Callable[..., Row], todo: Sequence[tuple[Any, ...]], workers: int) -> list[Row]:
    """
    :param run: makes one run, or reads what it left.
    :param todo: the arguments of each run.
    :param workers: the number of runs at a time, each in a process of its own; 1: in this process.
    :return: the rows of the runs, in their order.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if workers == 1:
        return [run(*arguments) for arguments in todo]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        return list(pool.map(run, *zip(*todo, strict=True)))


def write_results(directory: Path, rows: list[Row], **settings: Any) -> None:
    """Write ``results.json``, and ``environment.json``: when, where and on what the runs were made.

    :param directory: it is made if there is none.
    :param rows: the rows of the runs.
    :param settings: what else ``environment.json`` says.
    """
    directory.mkdir(parents=True, exist_ok=True)
    where = {"date": today(), "commit": commit_of("HEAD"), "machine": machine(torch.device("cpu"))}
    environment = {**where, "versions": versions(), **settings}
    for name, value in (("results.json", rows), ("environment.json", environment)):
        (directory / name).write_text(json.dumps(value, indent=1) + "\n")
