"""Errors end a command in one line; where they happened is shown if it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from agents.cli import FUNCTIONS, main
from text_env.rewards import RewardError

FULL = SafetensorError('Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space" }')


def fails(error: BaseException) -> Any:
    def command(_: Any) -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("Expected\n  this."), "ValueError: Expected this."),
        (RewardError("no number"), "RewardError: no number"),
        (yaml.YAMLError("a tab"), "YAMLError: a tab"),
        (SafetensorError("header too large"), "SafetensorError: header too large"),
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        (OSError(28, "No space left on device"), "Disk full: [Errno 28] No space left on device. Free some space."),
        (FULL, "Disk full: Error while serializing"),
        (MemoryError(), "Out of memory: there is none left. Use smaller micro-batches"),
        (torch.OutOfMemoryError("CUDA out of memory."), "Out of memory: CUDA out of memory. Use smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "Out of memory: DefaultCPUAllocator: "),
        (KeyError("x"), "KeyError: 'x' (With --debug, the command says where this happened.)"),
    ],
)
def test_an_error_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FUNCTIONS, "demo", fails(error))
    assert main(["demo"]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith(line)
    assert shown.out.count("\n") == 1
    assert shown.err == ""
    assert main(["demo", "--debug"]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith(line)
    assert "Traceback" in shown.err
    assert "raise error" in shown.err


def test_what_else_went_wrong_stands_behind_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ValueError("the cause.")
    error.add_note("Besides, OSError: no room.")
    monkeypatch.setitem(FUNCTIONS, "demo", fails(error))
    assert main(["demo"]) == 1
    assert capsys.readouterr().out == "ValueError: the cause. Besides, OSError: no room.\n"


def test_weights_that_are_none_are_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)

    def command(_: Any) -> int:
        load_file(tmp_path / "model.safetensors")
        return 0

    monkeypatch.setitem(FUNCTIONS, "demo", command)
    assert main(["demo"]) == 1
    assert capsys.readouterr().out.startswith("SafetensorError: ")
