"""Which kernels compute attention on a GPU.

cuDNN's attention makes an execution plan for every shape that it has not seen, which takes longer than a forward pass.
Contexts grow with every token and batches differ in their rows, so nearly every call here has a new shape. On an H200,
the first rollout of 256 tokens took 27 s with it and the next ones 9 s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_cudnn_attention(device: torch.device) -> Iterator[None]:
    """Within it, PyTorch chooses another kernel for attention than cuDNN's.

    :param device: the device of the computation; nothing is changed if it is no CUDA device.
    """
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
