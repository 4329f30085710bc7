"""The devices that everything in this folder runs on: a GPU, where there is one (`pytest -m cuda`), and the CPU."""

from __future__ import annotations

import pytest
import torch

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])])
def device(request: pytest.FixtureRequest) -> str:
    """The name of the device that a test's models run on."""
    name: str = request.param
    return name


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The type of a test's weights."""
    found: torch.dtype = getattr(torch, request.param)
    return found
