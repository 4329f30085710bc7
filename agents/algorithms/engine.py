"""The engine of an update: how gradients are accumulated, reduced, clipped and applied, and what several processes
agree on.

The training loop in ``on_policy`` is written as if it were one of several processes that train the same weights, each
with episodes of its own. Whatever concerns the other processes is asked of the engine: a sum or a mean over all
episodes, the number of micro-batches of a minibatch, and whether a gradient is complete. So all processes take the same
decisions, and the loop needs no special case for a single process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from agents.policies.causal_lm_policy import CausalLMPolicy

T = TypeVar("T")


def launched() -> tuple[int, int]:
    """What ``torchrun`` and ``accelerate launch`` tell each process that they start.

    :return: the rank of this process, and the number of processes; (0, 1) if there is only this one.
    """
    n = int(os.environ.get("WORLD_SIZE", 1))
    return (int(os.environ.get("RANK", 0)), n) if n > 1 else (0, 1)


def sharded() -> bool:
    """
    :return: whether ``accelerate launch --use_fsdp`` has started this process, or somebody who says the same by
        ``ACCELERATE_USE_FSDP=true``.
    """
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class RankLost(ConnectionError):
    """Another process of the training has ended, or does not answer in time."""


class Engine:
    """The engine of a single process. An engine of several processes overrides its methods as they are documented.

    A step of the optimiser consists of ``zero_grad``, one ``backward`` per micro-batch, ``norm``, ``clip`` and
    ``step``, in this order.

    :param policy: the policy that is trained, with its optimiser.
    """

    rank: int = 0  # the number of this process; the one with 0 writes whatever is written

    def __init__(self, policy: CausalLMPolicy) -> None:
        self.policy = policy
        """What gradients are computed with: the policy itself, or a copy of it that is cut up."""
        self._norm = 0.0  # the norm of the gradient that `step` would apply
        self._measured = torch.zeros(())  # the same on the gradient's device

    # ---- who does what --------------------------------------------------------------------------------------------

    @classmethod
    def seed(cls, seed: int | None) -> int | None:
        """
        :param seed: the seed of a training.
        :return: the seed of the random generators of this process. Other processes draw other numbers.
        """
        return seed

    def share(self, n: int, of: int = 1) -> int:
        """
        :param n: a number of episodes.
        :param of: the number of episodes that belong together.
        :return: how many of them are this process's.
        :raises ValueError: if ``n`` can't be divided into equal shares of whole groups.
        """
        return n

    # ---- what all processes agree on ------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """
        :param value: a value of this process, which can be pickled.
        :return: the values of all processes, in the order of their ranks.
        """
        return [value]

    def total(self, value: float) -> float:
        """
        :param value: a number of this process.
        :return: the sum of the numbers of all processes.
        """
        return float(value)

    def mean(self, values: np.ndarray) -> float:
        """
        :param values: numbers of this process, at least one; other processes may have more or fewer.
        :return: the mean of the numbers of all processes, all with the same weight.
        """
        return float(values.mean(dtype=np.float64))

    def largest(self, value: float) -> float:
        """
        :param value: this process's number.
        :return: the largest of everybody's.
        """
        return float(value)

    def names(self, names: Iterable[str]) -> list[str]:
        """
        :param names: names of this process, each once.
        :return: the names of all processes, sorted, each once. So all ask for the same numbers in the same order.
        """
        return sorted(names)

    def micro_batches(self, parts: Sequence[np.ndarray]) -> list[tuple[np.ndarray, float]]:
        """Make the number of micro-batches the same in all processes.

        :param parts: this process's micro-batches of a minibatch, at least one, each the int [E] numbers of its
            episodes.
        :return: the micro-batches, each with a factor for its loss: 1 for those of ``parts``, and 0 for those that are
            added because another process has more.
        """
        return [(part, 1.0) for part in parts]

    # ---- where the weights are ------------------------------------------------------------------------------------

    def shard(self) -> None:
        """Called before an update. Until :meth:`unshard`, only ``policy`` of this engine is used, and nobody needs the
        weights in one piece.
        """

    def unshard(self) -> None:
        """Called after an update, and within one before the policy of the training itself is used: it gets the weights
        as they are then.
        """

    def optimizer_state(self) -> dict[str, Any]:
        """
        :return: the optimiser's ``state_dict``. Of several processes all must call this, and the first gets the state
            of all weights.
        """
        return self.policy.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """
        :param state: what :meth:`optimizer_state` has returned to the first of any number of processes.
        """
        self.policy.optimizer.load_state_dict(state)

    # ---- the gradient ---------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Set the gradient to zero, by letting go of its memory."""
        self.policy.optimizer.zero_grad()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of the loss of a micro-batch to the gradient of the step.

        :param loss: a scalar. The step follows the gradient of the *sum* of all losses, over micro-batches and
            processes; the loop has divided each by the weight of the minibatch over all processes.
        :param last: whether this is the last micro-batch before the step, after which the gradient can be reduced over
            the processes.
        """
        loss.backward()

    def give_up(self, error: BaseException) -> None:
        """Called in place of the ``backward`` calls of a minibatch that are left when one part has failed in this
        process. The gradient will not be used. An engine whose ``backward`` waits for other processes must not let them
        wait.

        :param error: why it failed.
        """

    def norm(self) -> torch.Tensor:
        """Measure the gradient, without waiting for the device.

        :return: its norm, over all parameters and processes, a scalar on its device.
        """
        self._measured = torch.nn.utils.get_total_norm([p.grad for p in self._trained() if p.grad is not None])
        return self._measured

    def clip(self, max_norm: float, norm: float | None = None) -> float:
        """Scale the gradient down if it is too long.

        :param max_norm: the largest norm.
        :param norm: the number that :meth:`norm` has just returned, if somebody has read it; None: it is measured.
        :return: the norm before clipping.
        """
        self._norm = float(self.norm()) if norm is None else norm
        torch.nn.utils.clip_grads_with_norm_(self._trained(), max_norm, self._measured)
        return self._norm

    def step(self) -> None:
        """Apply the clipped gradient.

        :raises FloatingPointError: if its norm is not finite, in which case the weights are not changed.
        """
        if not math.isfinite(self._norm):
            raise FloatingPointError(
                f"The gradient's norm is {self._norm}; the weights are as before this step. Expected a finite one: try "
                "a lower learning rate, or a dtype of higher precision."
            )
        self.policy.optimizer.step()

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for group in self.policy.optimizer.param_groups for p in group["params"]]
