"""Graphs of a device, without one: the operations of a step are recorded with the tensors that they read and write, and
launched again on the same tensors, without any of the Python code that launched them first. What a CUDA graph would do
wrong, because a number or an address has changed that it was captured with, this does wrong too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agents.models import decoding
from agents.models.decoding import Step


class Recording(TorchDispatchMode):
    """The operations inside it, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), (
            f"{func} needs the host, which a graph has not"
        )
        self.operations.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    def replay(self) -> None:
        """Do all of it again, with every result at its old place."""
        for func, args, kwargs, results in self.operations:
            for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordedGraphs:
    """What stands in for CUDA's graphs on the CPU.

    :param monkeypatch: pytest's, which takes it back after the test.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured = 0
        self.replayed = 0
        monkeypatch.setitem(decoding.CAPTURES, "cpu", self.capture)
        monkeypatch.setattr(decoding, "_compiled_step", lambda: decoding.decode_step)  # this is about graphs

    def capture(self, step: Step) -> Step:
        """As :func:`agents.models.decoding.cuda_graph`."""
        self.captured += 1
        for _ in range(2):
            step()
        recording = Recording()
        with recording:
            result = step()
        result.fill_(torch.nan)  # what is read must come from a replay

        def replay() -> torch.Tensor:
            self.replayed += 1
            recording.replay()
            return result

        return replay
