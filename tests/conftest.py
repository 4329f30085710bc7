"""What every test relies on: no network, one thread, and warnings from a clean slate."""

from __future__ import annotations

import gc
import os
from functools import cache

# Before transformers is imported anywhere: a test that reaches for the hub is a mistake.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch.compile would start a process of its own to compile in, which imports all of PyTorch for a dozen small files.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from typing import TYPE_CHECKING, Any

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
    _refuse_to_read_what_was_never_logged()


@cache
def _refuse_to_read_what_was_never_logged() -> None:
    """SB3's logger says 0 of a name that it doesn't have, or has no more after a dump; a test would compare that."""
    import sys
    from collections import defaultdict

    from stable_baselines3.common.logger import Logger

    class Logged(defaultdict[str, float]):
        def __missing__(self, name: str) -> float:
            if sys._getframe(1).f_code.co_filename.startswith(os.path.dirname(__file__)):
                raise KeyError(f"{name} is not in the log, or has been dumped (learn(…, log_interval=0) dumps nothing)")
            return super().__missing__(name)

    init = Logger.__init__

    def strict(self: Logger, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.name_to_value = Logged(float)

    Logger.__init__ = strict


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
