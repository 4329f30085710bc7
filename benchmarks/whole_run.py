"""What the benchmarks of a real language model share: the settings of its adapter, a training from nothing, and what
is kept of it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.cli import console
from agents.runs.config import TrainConfig
from agents.runs.train import train

ADAPTER: dict[str, Any] = {"lora_r": 16, "lora_alpha": 32, "lora_target_modules": "q_proj,v_proj", "dtype": "bfloat16"}
"""How SmolLM2 is trained on two CPU cores: the weights in bfloat16, a LoRA adapter on queries and values."""


def train_anew(settings: TrainConfig) -> float:
    """Train, in the place of an earlier run.

    :param settings: the run, with its directory.
    :return: the seconds that it took, reading the models included.
    """
    assert settings.run_dir is not None
    if settings.run_dir.exists():
        shutil.rmtree(settings.run_dir)
    start = time.perf_counter()
    train(settings)
    return time.perf_counter() - start


def keep(result: Mapping[str, Any], run_dir: Path, out: Path) -> None:
    """Write ``evaluation.json``, and copy ``config.yaml`` and ``learning_curve.png`` from the run beside it.

    :param result: what ``evaluation.json`` is to hold.
    :param run_dir: the directory of the run.
    :param out: where the files go.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n")
    for name in ("config.yaml", "learning_curve.png"):
        shutil.copy(run_dir / name, out / name)


def verdict(checks: Mapping[str, bool]) -> int:
    """Print what was claimed, each claim with whether it holds.

    :param checks: the claims.
    :return: the exit status: 0 if all hold, else 1.
    """
    for claim, holds in checks.items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {claim}")
    return 0 if all(checks.values()) else 1
