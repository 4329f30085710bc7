"""What every test relies on: no network, one thread, and warnings from a clean slate."""

from __future__ import annotations

import gc
import os

# Before transformers is imported anywhere: a test that reaches for the hub is a mistake.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch.compile would start a process of its own to compile in, which imports all of PyTorch for a dozen small files.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedTokenizerFast


def pytest_collectstart() -> None:
    """Comes before the first test is imported, and not in the process that only hands out tests to the workers."""
    import accelerator
    import torch

    # With several threads the order of additions, and the last digits with it, would depend on the machine.
    torch.set_num_threads(1)
    accelerator.announce()


def pytest_collection_finish() -> None:
    """What was imported stays until the end: no garbage collection has to look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tiny tokenizer with pad ≠ eos."""
    from tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def accelerator() -> Iterator[torch.device]:
    """A device that is none of the CPU's, although there is no GPU."""
    from accelerator import simulated_accelerator

    with simulated_accelerator() as device:
        yield device
