"""The benchmark of ways to compute an update, in miniature and from its entry point."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks import models
from benchmarks.training import WAYS, main

WITHOUT_COMPILER = [name for name in WAYS if name != "compile_forward"]  # it takes minutes


def test_each_way_is_measured_and_keeps_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "gpt2_config", partial(models.gpt2_config, n_embd=32, n_layer=3, n_head=2))
    small = ["--repeats", "1", "--episodes", "32", "--response", "8", "--device", "cpu"]
    main([*small, "--ways", *WITHOUT_COMPILER, "--json", str(tmp_path / "training.json")])
    figures = json.loads((tmp_path / "training.json").read_text())["figures"]
    assert set(figures) == set(WITHOUT_COMPILER)
    kept = {name: figure["kept_for_backward"] for name, figure in figures.items()}
    state = {name: figure["gradient_and_optimizer"] for name, figure in figures.items()}
    assert kept["plain"] == state["plain"] == 1
    assert kept["gradient_checkpointing"] < 1
    assert kept["LoRA, gradient_checkpointing"] < kept["LoRA"]
    assert kept["micro_batch_tokens, a text at a time"] == pytest.approx(1 / 8, rel=0.05)  # one text of eight
    assert state["micro_batch_tokens, a text at a time"] == state["gradient_checkpointing"] == 1
    assert state["LoRA"] < 0.3
    assert state["Adafactor"] < 0.6
    assert all(figure["time"] > 0 for figure in figures.values())
