"""Whether a device is there, asked before anything is loaded for it."""

from __future__ import annotations

import torch


def check_device(device: str) -> None:
    """Stable-Baselines3 would train on the CPU, without a word, where ``"cuda"`` is asked for and there is none.

    :param device: ``"auto"``, or what PyTorch calls the device.
    :raises ValueError: if this PyTorch can't compute on the device.
    """
    if device == "auto":
        return
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend has an exception of its own for a device that isn't there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        none = device.partition(":")[0] == "cuda" and not torch.cuda.is_available()
        others = "; there is no CUDA device here, or this PyTorch is made without CUDA" if none else ", such as 'cuda'"
        raise ValueError(
            f"Expected device to be 'auto', 'cpu' or another that PyTorch can use on this machine{others}; got "
            f"{device!r}: {reason}"
        ) from error
