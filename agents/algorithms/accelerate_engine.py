"""The engine of several processes, which ``torchrun`` or ``accelerate launch`` has started: every process has all the
weights and its share of the episodes, and the gradients are added up before each step.

Accelerate finds out where the processes are, on which device each computes, and how they speak to each other (NCCL
between GPUs, gloo between CPUs). The gradients are reduced here, when a minibatch is complete, and not by PyTorch's
``DistributedDataParallel``: that wraps a module and reduces in the backward pass of *its* ``forward``, whereas a policy
is called part by part (decoder, head, critic, and the memo during a rollout); it has to be told which parameters a loss
leaves out, as one of the critic alone does; and it can't begin anew when memory was not enough in the middle. The sums
are the same. What is lost is that the reduction does not overlap with the backward pass.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState

from agents.algorithms.engine import Engine, RankLost, launched
from agents.policies.causal_lm_policy import CausalLMPolicy

T = TypeVar("T")

# How long a process waits for the others, in seconds: a rollout of the slowest, or texts and checkpoints of rank 0.
TIMEOUT_VARIABLE, TIMEOUT = "TEXTRLHF_RANK_TIMEOUT", 1800.0
# How long a process takes leave of the others when it ends, in seconds: for ever, if it waits for one that does not.
LEAVING = 5.0
# How many numbers of the gradient are reduced at once.
BUCKET = 2**23
# What errors of the connection speak of.
CONNECTION = ("gloo", "NCCL", "Timed out waiting", "Connection closed", "Connection reset")


class AccelerateEngine(Engine):
    """One of several processes. When it is made, all processes get the weights of rank 0.

    :param policy: the policy that is trained, with its optimiser.
    :raises ValueError: if the processes have policies of different shapes.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:
        super().__init__(policy)
        _connect()
        self.rank, self._n = launched()
        self._reduced = False  # whether the gradient is that of all processes
        tensors = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
        shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()]
        if any(theirs != shapes for theirs in self.gather(shapes)):
            raise ValueError("Expected the same model in all processes, got others: give all the same options.")
        with torch.no_grad(), together():
            for tensor in tensors.values():
                dist.broadcast(tensor.data, src=0)
        policy.clear_cache()
        # Made here, so that no memory is needed when the others are waiting.
        sizes = _sizes(self._trained())
        self._buckets = {
            key: torch.empty(min(size, BUCKET), device=key[0], dtype=key[1]) for key, size in sizes.items()
        }

    # ---- who does what --------------------------------------------------------------------------------------------

    @classmethod
    def seed(cls, seed: int | None) -> int | None:
        _connect()  # from here on "cuda" is the device of this process
        rank, _ = launched()
        if rank == 0:
            return seed
        # PyTorch's generator begins with the same state in every process, so it is seeded in any case.
        return int(np.random.SeedSequence(None if seed is None else (seed, rank)).generate_state(1)[0])

    def share(self, n: int, of: int = 1) -> int:
        if n % (self._n * of):
            groups = f" of whole groups of {of}" if of > 1 else ""
            raise ValueError(
                f"Expected n_episodes and batch_size to be divisible into {self._n} equal shares{groups}, one for each "
                f"process, got {n}: take a multiple of {self._n * of}, or another number of processes."
            )
        return n // self._n

    # ---- what all processes agree on ------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self._n
        with together():
            dist.all_gather_object(values, value)
        return values

    def total(self, value: float) -> float:
        return sum(self._numbers(value))

    def mean(self, values: np.ndarray) -> float:
        return self.total(values.sum(dtype=np.float64)) / self.total(len(values))

    def largest(self, value: float) -> float:
        return max(self._numbers(value))

    def names(self, names: Iterable[str]) -> list[str]:
        return sorted(set().union(*self.gather(list(names))))

    def micro_batches(self, parts: Sequence[np.ndarray]) -> list[tuple[np.ndarray, float]]:
        missing = int(self.largest(len(parts))) - len(parts)
        return [*((part, 1.0) for part in parts), *[(parts[-1][:1], 0.0)] * missing]

    def _numbers(self, value: float) -> list[float]:
        """The numbers of all processes. Added up in the order of the ranks, they are the same in all, bit by bit."""
        own = torch.tensor([float(value)], dtype=torch.float64)
        numbers = [torch.empty_like(own) for _ in range(self._n)]
        with together():
            dist.all_gather(numbers, own)
        return torch.cat(numbers).tolist()

    # ---- the gradient ---------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        super().zero_grad()
        self._reduced = False

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        super().backward(loss, last)
        if last:
            self._reduce()

    def give_up(self, error: BaseException) -> None:
        if not self._reduced:
            self._reduce()

    @torch.no_grad()
    def _reduce(self) -> None:
        """Add up the gradients of all processes."""
        self._reduced = True
        trained = self._trained()
        present = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32)
        with together():
            dist.all_reduce(present)  # a process that has given up may lack gradients that the others have
            for parameter, n in zip(trained, present.tolist(), strict=True):
                if n and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            for key, bucket in self._buckets.items():
                grads = [p.grad for p in trained if p.grad is not None and _kind(p) == key]
                for pieces in _filled((piece for grad in grads for piece in grad.view(-1).split(BUCKET)), len(bucket)):
                    flat = bucket[: sum(map(len, pieces))]
                    torch.cat(pieces, out=flat)
                    dist.all_reduce(flat)
                    torch._foreach_copy_(pieces, list(flat.split([len(piece) for piece in pieces])))


def reduced_in(dtype: torch.dtype) -> torch.dtype:
    """
    :param dtype: of a gradient.
    :return: in which it is added up over processes: not in 16 bits, in which a sum would be rounded.
    """
    return torch.promote_types(dtype, torch.float32)


def _kind(tensor: torch.Tensor) -> tuple[torch.device, torch.dtype]:
    """Where and how a gradient is added up."""
    return tensor.device, reduced_in(tensor.dtype)


def _sizes(tensors: Iterable[torch.Tensor]) -> dict[tuple[torch.device, torch.dtype], int]:
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    for tensor in tensors:
        sizes[_kind(tensor)] = sizes.get(_kind(tensor), 0) + tensor.numel()
    return sizes


def _filled(pieces: Iterable[torch.Tensor], limit: int) -> Iterator[list[torch.Tensor]]:
    """
    :param pieces: tensors of one dimension, none longer than ``limit``.
    :param limit: the largest number of elements of a bundle.
    :return: the pieces in bundles.
    """
    bundle: list[torch.Tensor] = []
    for piece in pieces:
        if bundle and sum(map(len, bundle)) + len(piece) > limit:
            yield bundle
            bundle = []
        bundle.append(piece)
    if bundle:
        yield bundle


def _connect() -> None:
    """Meet the other processes, once."""
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=float(os.environ.get(TIMEOUT_VARIABLE, TIMEOUT)))
    on_gpus = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    with together():
        if on_gpus:
            PartialState(backend="cuda:nccl,cpu:gloo", timeout=timeout)
        else:
            PartialState(cpu=True, timeout=timeout)
    _leave_at_exit()


def _leave_at_exit() -> None:
    """Leave the other processes when this one ends, while there is still an interpreter. PyTorch's own threads let go
    of tensors a little later than whoever has waited for these; one that does so when the interpreter is gone aborts
    the process, whatever it has achieved.
    """
    ends = threading.Event()

    def leave() -> None:
        ends.wait()
        dist.destroy_process_group()

    # A thread, since leaving waits for the others if an error has ended this process in the middle of something that
    # they do together; and started now, since none can be started at exit.
    leaver = threading.Thread(target=leave, name="leave", daemon=True)
    leaver.start()

    @atexit.register
    def leave_at_exit() -> None:
        ends.set()
        leaver.join(LEAVING)


@contextlib.contextmanager
def together(surely: bool = True) -> Iterator[None]:
    """A context manager for what all processes do together. What PyTorch says when another one is gone or late is said
    in words that help.

    :param surely: whether nothing else can go wrong in it. False: errors that don't speak of the connection stay as
        they are.
    :return: the context manager.
    :raises RankLost: if another process is gone or late.
    """
    try:
        yield
    except RuntimeError as error:
        if not (surely or isinstance(error, dist.DistError) or any(word in str(error) for word in CONNECTION)):
            raise
        rank, n = launched()
        waited = float(os.environ.get(TIMEOUT_VARIABLE, TIMEOUT))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RankLost(
            f"Process {rank} of {n} has lost another one: it has ended, or has not answered for {waited:g} s "
            f"({TIMEOUT_VARIABLE} sets how long they wait). Its own message says why it ended. Here: {reason}"
        ) from error
