"""The states of all random generators that a training draws from, as data."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def generator_states(rows: Sequence[np.random.Generator]) -> dict[str, Any]:
    """
    :param rows: the environment's generators, one a row.
    :return: their states and those of Python, NumPy, PyTorch and (if there is one) the current CUDA device: tensors and
        JSON values.
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
    """Put every generator back to where it was.

    :param states: what :func:`generator_states` returned, also after a way through JSON. That of a CUDA device is left
        out where there is no such device.
    :param rows: the environment's generators, one a row.
    :raises ValueError: if they are fewer or more than those whose states these are.
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
