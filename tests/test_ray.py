"""`examples/ray_train.py` on a local Ray, where Ray is installed: beside the packages, or in `.venv-ray`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from learners import PROMPTS, save_model
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
APART = ROOT / ".venv-ray" / "bin" / "python"
PYTHON = Path(sys.executable) if importlib.util.find_spec("ray") else APART


@pytest.mark.skipif(not PYTHON.exists(), reason="Ray is not installed")
def test_ray_starts_two_learners_and_they_train_one_policy(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    run = tmp_path / "run"
    train = ["--model", save_model(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt"), "--device", "cpu"]
    train += ["--reward", "length(budget=3)", "--gold", "None", "--max-new-tokens", "6", "--n-episodes", "8"]
    train += [
        "--batch-size",
        "4",
        "--total-timesteps",
        "60",
        "--n-samples",
        "2",
        "--no-progress",
        "--run-dir",
        str(run),
    ]
    program = [str(PYTHON), str(ROOT / "examples" / "ray_train.py"), "--learners", "2", "--cpus", "0.5", "--fsdp"]
    done = subprocess.run(
        [*program, "--python", sys.executable, "--", *train],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "model", run / "policy"))
    assert any(not after[name].equal(before[name]) for name in before)
    assert (run / "progress.csv").exists()
