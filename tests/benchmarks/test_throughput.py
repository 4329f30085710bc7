"""The throughput benchmark in miniature, from the entry point that `make throughput` calls, and without its peers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from learners import save_model
from tiny import tiny_tokenizer
from transformers.utils import logging as transformers_logging

from agents.models import decoding
from benchmarks import long_texts, models, throughput, timing
from benchmarks.provenance import machine
from benchmarks.throughput import GOALS, KEYS, main

# TRL's own PPO needs an environment of its own, which `make peers` installs.
WITHOUT_TRL = [key for key in KEYS if "trl" not in key]


@pytest.fixture(autouse=True)
def loud_again() -> Iterator[None]:
    """The benchmark silences transformers, which other tests listen to."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


def test_every_figure_is_measured_also_on_an_instruct_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "smollm2")  # stands in for SmolLM2, which has a chat template
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    tokenizer.save_pretrained(tmp_path / "smollm2")
    # Before each of 40 timings; most of this test's time, and nothing here depends on the figures.
    monkeypatch.setattr(timing, "gc", SimpleNamespace(collect=lambda: 0))
    # Compiled steps are proved to be right elsewhere, and C++ takes a minute to compile.
    monkeypatch.setattr(decoding, "_compiled_step", lambda: decoding.decode_step)
    smaller = partial(models.gpt2_config, n_embd=32, n_layer=1, n_head=2)
    monkeypatch.setattr(models, "gpt2_config", smaller)
    monkeypatch.setattr(long_texts, "GROWN", (8, 32))
    for module in (models, throughput):
        monkeypatch.setattr(module, "PEERS", tmp_path)
    small = ["--repeats", "1", "--episodes", "4", "--response", "3", "--threads", "1", "--device", "cpu"]
    path = tmp_path / "results" / "throughput.json"
    main([*small, "--only", *WITHOUT_TRL, "--json", str(path)])

    report = json.loads(path.read_text())
    assert set(report["figures"]) == set(WITHOUT_TRL)
    assert all(figure["value"] > 0 for figure in report["figures"].values())
    assert report["figures"]["buffer_bytes_per_token"]["value"] < 100
    assert "smollm2, prompt 8, response 3 fixed, 4 rows" in report["figures"]["env_share_smollm2"]["what"]
    shown = capsys.readouterr().out
    assert re.search(r"rollout_vs_generate_smollm2 .*>= 1\.5", shown)
    assert set(GOALS) <= set(KEYS)
    assert not any({"goal", "reached"} & set(figure) for figure in report["figures"].values())
    assert "response 24 ÷ response 12;" in report["figures"]["growth_128_256"]["what"]
    assert [line for line in shown.splitlines() if not line.strip()] == []  # nobody watches a bar that isn't there

    main([*small, "--only", "buffer_bytes_per_token", "--json", str(path)])
    again = json.loads(path.read_text())["figures"]
    assert set(again) == set(WITHOUT_TRL), "what was not measured again stays, with its own command and commit"
    assert again["env_share"] == report["figures"]["env_share"]
    assert again["buffer_bytes_per_token"]["command"] != report["figures"]["buffer_bytes_per_token"]["command"]

    for name in ("cpu", "instructions"):
        path.write_text(json.dumps({**report, "machine": {**report["machine"], name: "another"}}))
        with pytest.raises(
            SystemExit, match=r"figures of this machine \(.*\), got some of \(.*'another'.*take another"
        ):
            main([*small, "--only", "buffer_bytes_per_token", "--json", str(path)])


def test_a_try_out_keeps_off_the_committed_file_and_out_of_uneven_minibatches(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for option in ("--repeats", "--episodes", "--response", "--threads"):
        with pytest.raises(SystemExit):
            main([option, "4", "--only", "buffer_bytes_per_token"])
        assert "needs a file of its own: --json FILE" in capsys.readouterr().err
    for episodes in ("2", "6"):
        with pytest.raises(ValueError, match=f"Expected a multiple of 4 episodes.*got {episodes}"):
            main(["--episodes", episodes, "--only", "buffer_bytes_per_token"])


@pytest.mark.parametrize(
    ("cpu", "instructions", "file"),
    [
        ("AMD EPYC", "AVX2", "throughput-amd-epyc-avx2.json"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "AVX512", "throughput-intel-xeon-avx512.json"),
        ("Intel(R) Xeon(R) Processor", "AVX512", "throughput-intel-xeon-avx512.json"),
    ],
)
def test_a_kind_of_processor_has_a_file_of_its_own(
    cpu: str, instructions: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {**machine(torch.device("cpu")), "cpu": cpu, "instructions": instructions}
    monkeypatch.setattr(throughput, "machine", lambda device: here)
    assert throughput.file_for(torch.device("cpu")).name == file
