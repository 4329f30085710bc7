"""The engine of an update: how gradients are accumulated, reduced, clipped and applied, and what everybody agrees on.

The loop in ``on_policy`` is written as if it were one of several processes that train the same weights, each with
episodes of its own. Whatever needs the other processes is asked of the engine: a sum or a mean over all of their
episodes, how many micro-batches a minibatch has, when a gradient is complete. So every process takes the same
decisions, and the loop has no second branch for one process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from agents.policies.causal_lm_policy import CausalLMPolicy


class Engine:
    """One process. An engine for several overrides these methods and keeps what they promise.

    A step of the optimiser is, in this order: ``zero_grad``, one ``backward`` for each micro-batch, ``clip``, ``step``.

    :param policy: the policy that is trained, with its optimiser.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:
        self._policy = policy
        self._norm = 0.0  # of the gradient that `step` would apply

    # ---- what everybody agrees on ---------------------------------------------------------------------------------

    def total(self, value: float) -> float:
        """
        :param value: this process's number.
        :return: the sum of everybody's.
        """
        return float(value)

    def mean(self, values: np.ndarray) -> float:
        """
        :param values: this process's numbers, at least one; other processes may have more or fewer.
        :return: the mean of everybody's numbers, each of which counts the same.
        """
        return float(values.mean())

    def largest(self, value: float) -> float:
        """
        :param value: this process's number.
        :return: the largest of everybody's.
        """
        return float(value)

    def micro_batches(self, parts: Sequence[np.ndarray]) -> list[tuple[np.ndarray, float]]:
        """
        :param parts: this process's micro-batches of a minibatch, int [E] each, at least one.
        :return: as many micro-batches in every process, each with the factor that its loss counts with: 1 for every one
            of ``parts``, 0 for those that only keep step with a process that has more.
        """
        return [(part, 1.0) for part in parts]

    # ---- the gradient ---------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Forget the gradient of the step before."""
        self._policy.optimizer.zero_grad()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch's loss to the step's.

        :param loss: a scalar. The step follows the gradient of the *sum* of all losses, over micro-batches and
            processes alike; the loop has divided each by the weight of everybody's minibatch.
        :param last: no micro-batch follows before the step, so the gradient can be reduced over the processes.
        """
        loss.backward()

    def clip(self, max_norm: float) -> float:
        """
        :param max_norm: longer gradients are scaled down to this norm.
        :return: the norm before that, of the gradient of all processes.
        """
        trained = [p for group in self._policy.optimizer.param_groups for p in group["params"]]
        self._norm = float(torch.nn.utils.clip_grad_norm_(trained, max_norm))
        return self._norm

    def step(self) -> None:
        """Let the optimiser apply the clipped gradient.

        :raises FloatingPointError: if its norm is not finite; the weights stay as they are.
        """
        if not math.isfinite(self._norm):
            raise FloatingPointError(
                f"The gradient's norm is {self._norm}; the weights are as before this step. Expected a finite one: try "
                "a lower learning rate, or a dtype of higher precision."
            )
        self._policy.optimizer.step()
