"""The states of all random generators that a training uses, as data."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def generator_states(rows: Sequence[np.random.Generator]) -> dict[str, Any]:
    """
    :param rows: the generators of the environment, one per row.
    :return: their states, and those of the generators of Python, NumPy, PyTorch and, if there is one, the current CUDA
        device, as tensors and JSON values.
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "env": [generator.bit_generator.state for generator in rows],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states: Mapping[str, Any], rows: Sequence[np.random.Generator]) -> None:
    """Restore the states of all generators.

    :param states: what :func:`generator_states` returned, possibly after it was written as JSON and read again. The
        state of a CUDA device is ignored if there is no such device.
    :param rows: the generators of the environment, one per row.
    :raises ValueError: if the number of rows is not that of ``states``.
    """
    if len(rows) != len(states["env"]):
        raise ValueError(
            f"Expected an environment of {len(states['env'])} rows, as the one was whose random generators these are, "
            f"got {len(rows)}."
        )
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    for generator, state in zip(rows, states["env"], strict=True):
        generator.bit_generator.state = state
