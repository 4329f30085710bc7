"""Copies from the host to a device.

Each copy costs a GPU as much time as a small kernel, whatever its size, so what is needed together travels together. It
starts from memory that the GPU reads by itself, so the host goes on while it is under way.
"""

from __future__ import annotations

import numpy as np
import torch

ALIGNMENT = 8  # bytes: the size of the largest numbers


def to_device(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Copy arrays to a device in one transfer.

    :param device: the device. On a CPU nothing is copied: the tensors share the memory of the arrays.
    :param arrays: the arrays, of any shapes and dtypes.
    :return: a tensor of each. On another device than a CPU they are parts of one buffer, which is freed when all of
        them are.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    flat = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
    ends = np.cumsum([-(-len(part) // ALIGNMENT) * ALIGNMENT for part in flat]).tolist()
    host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    buffer = host.numpy()
    starts = [0, *ends[:-1]]
    for start, part in zip(starts, flat, strict=True):
        buffer[start : start + len(part)] = part
    moved = host.to(device, non_blocking=True)
    return [
        moved[start : start + len(part)].view(torch.from_numpy(array).dtype).reshape(array.shape)
        for start, part, array in zip(starts, flat, arrays, strict=True)
    ]
