"""The ways of computing attention in miniature; that they agree is asserted by the benchmark itself."""

from __future__ import annotations

import pytest
import torch

from benchmarks import attention

EAGER = [way for way in attention.WAYS if "compiled" not in way]


def test_each_way_has_its_column(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--columns", "3", "5", "--rows", "2", "--groups", "3", "--head-dim", "8", "--repeats", "1"]
    attention.main([*small, "--ways", *EAGER])
    shown = capsys.readouterr().out
    assert all(word in shown for way in EAGER for word in way.split())
    assert len([line for line in shown.splitlines() if line.startswith("│")]) == 2


def test_a_way_that_computes_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.WAYS, "sums of products", lambda query, keys, values: torch.zeros_like(query))
    with pytest.raises(AssertionError, match="not close"):
        attention.main(["--columns", "3", "--rows", "2", "--repeats", "1", "--ways", "sums of products"])
