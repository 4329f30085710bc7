"""`textrlhf demo` on the device, and on the processor of the same machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Record

ROOT = Path(__file__).parents[2]


def demo(tokens: int, environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """
    :param tokens: of the training.
    :param environment: further variables: without a visible device the demo runs on the processor.
    :param seconds: after which it is stopped.
    :return: how long training took and what the evaluation found.
    :raises TimeoutError: if it takes longer than ``seconds``.
    :raises RuntimeError: if it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "demo"
        options = ["--run-dir", str(run_dir), "--total-timesteps", str(tokens)]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "agents.cli", "demo", *options],
                cwd=ROOT,
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                timeout=max(seconds, 1),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"not finished after {seconds:.0f} s") from error
        total = time.perf_counter() - start
        path = run_dir / "evaluation.json"
        if not path.exists():  # an exit status of 1 says that too little was learned
            raise RuntimeError((done.stdout + done.stderr)[-2000:])
        result = json.loads(path.read_text())
        trained = re.search(r"Trained in (\d+) s", done.stdout)
        return {
            "tokens": tokens,
            "seconds": total,
            "training_seconds": float(trained[1]) if trained else None,
            "before": result["reference"]["score"],
            "after": result["policy"]["score"],
            "score_gain_std": result["score_gain_std"],
            "gold_gain": result["policy"]["gold_score"] - result["reference"]["gold_score"],
            "kl": result["kl"],
            "learned": done.returncode == 0,
        }


def measure(options: Options, record: Record, which: int = 0) -> None:
    """
    :param options: resolved.
    :param record: where the figures go.
    :param which: the number of the place.
    """
    places: dict[str, dict[str, str]] = {"cpu": {"CUDA_VISIBLE_DEVICES": ""}}
    if torch.device(options.device or "cpu").type == "cuda":
        places = {"cuda": {}, **places}
    place, environment = list(places.items())[which]
    with record.attempt(place, needs=20) as enough:
        if enough:
            record.add(place, demo(options.demo_tokens, environment, record.seconds_left - 2))
