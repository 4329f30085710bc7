"""Stage after stage in one process: ``python -m benchmarks.gpu.worker FILE END``, options and stages on its input.

After every figure the file holds all that were found, and which stage is going on since when: whoever started this
process ends it if a stage takes too long, and starts another for the rest.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.gpu import cuda_tests, demo, determinism, numbers, ppo, profiles, throughput
from benchmarks.gpu.options import Options, Part, Stage
from benchmarks.gpu.record import Record

MEASURES: dict[Part, Callable[[Options, Record, int], None]] = {
    "tests": cuda_tests.measure,
    "precision": numbers.measure,
    "determinism": determinism.measure,
    "throughput": throughput.measure,
    "profile": profiles.measure,
    "ppo": ppo.measure,
    "demo": demo.measure,
}


def main(path: Path, end: float, options: Options, stages: list[Stage]) -> None:
    """
    :param path: where the figures go.
    :param end: the time at which everything must end, in seconds since the epoch.
    :param options: resolved.
    :param stages: what is to be measured.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    record = Record(path, end)
    for stage in stages:
        if not record.begin(stage):
            break
        torch.manual_seed(0)
        torch.compiler.reset()
        print(f"---- {stage.part} {stage.which}, {record.seconds_left:.0f} s", flush=True)
        try:
            MEASURES[stage.part](options, record, stage.which)
        except Exception:
            record.fail(traceback.format_exc())
        record.finish()


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    main(Path(sys.argv[1]), float(sys.argv[2]), Options(**asked["options"]), [Stage(*each) for each in asked["stages"]])
