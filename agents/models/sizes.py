"""How much is computed at once. A CPU is fastest when what it works on stays in its cache, and loses little by starting
anew. An accelerator waits for the next launch most of the time, so it is given as much as its memory allows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sizes(NamedTuple):
    """What suits a kind of device.

    :param chunk_elements: logits of one chunk, positions × tokens. In float32, 2^22 values are 16 MB, enough for a
        CPU's matrix products to run at full speed. On an accelerator each chunk costs some thirty launches, whatever
        its size; 2^27 values are 512 MB.
    :param pass_tokens: tokens of one forward pass over whole sequences, padding included.
    :param pass_overhead: what a forward pass and its backward pass cost besides their tokens, in tokens. To save
        padding, a batch is split where that saves more. On a CPU, models of 3 and 4 million parameters took the time of
        54 and 49 tokens.
    """

    chunk_elements: int
    pass_tokens: int
    pass_overhead: int


CPU = Sizes(chunk_elements=2**21, pass_tokens=2**12, pass_overhead=48)
ACCELERATOR = Sizes(chunk_elements=2**27, pass_tokens=2**14, pass_overhead=2**13)


def sizes_of(device: torch.device) -> Sizes:
    """
    :param device: where something is computed.
    :return: what suits it.
    """
    return CPU if device.type == "cpu" else ACCELERATOR


def chunk_positions(device: torch.device, n_tokens: int) -> int:
    """
    :param device: the device of the logits.
    :param n_tokens: V, the number of logits of a position.
    :return: the number of positions of one chunk, at least 1.
    """
    return max(1, sizes_of(device).chunk_elements // n_tokens)
