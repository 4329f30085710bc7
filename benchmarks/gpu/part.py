"""One part, in a process of its own: ``python -m benchmarks.gpu.part PART FILE END``, the options on its input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.gpu import cuda_tests, demo, determinism, numbers, ppo, profiles, throughput
from benchmarks.gpu.options import Options, Part
from benchmarks.gpu.record import Record

MEASURES: dict[Part, Callable[[Options, Record], None]] = {
    "tests": cuda_tests.measure,
    "precision": numbers.measure,
    "determinism": determinism.measure,
    "throughput": throughput.measure,
    "profile": profiles.measure,
    "ppo": ppo.measure,
    "demo": demo.measure,
}


def main(part: Part, path: Path, end: float, options: Options) -> None:
    """
    :param part: which one.
    :param path: where its figures go.
    :param end: the time at which it must end, in seconds since the epoch.
    :param options: resolved.
    """
    torch.manual_seed(0)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    MEASURES[part](options, Record(path, end))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), Options(**json.load(sys.stdin)))  # type: ignore[arg-type]
