"""The gradient of a minibatch, part by part, and what all processes do when one of them fails at a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from agents.algorithms.engine import Engine

# What to log of a part, to be added up over parts and processes: scalars, which stay on the device until all are there.
Sums = dict[str, torch.Tensor]

# Computes the gradient of one part: the numbers of its episodes, a factor for its loss, and whether it is the last one.
AddPart = Callable[[np.ndarray, float, bool], Sums]

# How far a process has come. The largest number of all processes decides what all of them do.
DONE, NOT_FINITE, OUT_OF_MEMORY = 0, 1, 2


def add_up(engine: Engine, parts: Sequence[np.ndarray], add: AddPart) -> list[Sums] | None:
    """Accumulate the gradient of a minibatch.

    :param engine: the engine.
    :param parts: this process's micro-batches of the minibatch, each the int [E] numbers of its episodes.
    :param add: computes the gradient of one of them.
    :return: what ``add`` has returned of each part; None if a process ran out of memory, in which case there is no
        gradient in any of them.
    :raises FloatingPointError: if ``add`` raised it, in this process or in another.
    :raises MemoryError: if a process ran out of memory with parts of single episodes.
    """
    engine.zero_grad()
    done: list[Sums] = []
    outcome, said = DONE, "another process has met numbers that are not finite"
    shared = engine.micro_batches(parts)
    for number, (part, factor) in enumerate(shared, 1):
        try:
            done.append(add(part, factor, number == len(shared)))
        except (FloatingPointError, RuntimeError, MemoryError) as error:
            if not isinstance(error, FloatingPointError) and not is_out_of_memory(error):
                raise
            # The error itself would keep the tensors of the frames that it came through.
            outcome = NOT_FINITE if isinstance(error, FloatingPointError) else OUT_OF_MEMORY
            said = str(error)
            engine.give_up(error)
            break
    outcome = int(engine.largest(outcome))
    if outcome == DONE:
        return done
    engine.zero_grad()
    if outcome == NOT_FINITE:
        raise FloatingPointError(said)
    if engine.largest(max(map(len, parts))) <= 1:
        raise MemoryError(
            f"The update runs out of memory even with one text at a time: {said} Use "
            "policy_kwargs={'gradient_checkpointing': True}, LoRA (policy_kwargs={'lora': {...}}), a smaller model or "
            "shorter texts."
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def to_host(*scalars: Sums) -> list[dict[str, float]]:
    """
    :param scalars: scalars by name, on one device.
    :return: the same as numbers, by one copy, for which the host waits.
    """
    numbers = iter(torch.stack([value for values in scalars for value in values.values()]).tolist())
    return [{name: next(numbers) for name in values} for values in scalars]


def is_out_of_memory(error: BaseException) -> bool:
    """
    :param error: an error.
    :return: whether it says that memory could not be allocated, on a GPU or on the host.
    """
    said = str(error).lower()
    by_name = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return by_name or "out of memory" in said or "defaultcpuallocator" in said
