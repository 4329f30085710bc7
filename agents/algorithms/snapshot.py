"""What an update changes, as it was before: the trained weights and the state of their optimiser."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from agents.policies.causal_lm_policy import CausalLMPolicy


class Weights:
    """Copies of weights, to go back to. Of weights that several processes share, each copies its own part.

    :param parameters: the weights.
    :param before: the copies, if there are some already.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], before: Sequence[torch.Tensor] | None = None) -> None:
        self._parameters = parameters
        self._before = copies([local(parameter) for parameter in parameters]) if before is None else before

    def of(self, parameters: Sequence[nn.Parameter]) -> Weights:
        """
        :param parameters: some of the weights.
        :return: these alone, with the same copies.
        """
        copied = {id(parameter): before for parameter, before in zip(self._parameters, self._before, strict=True)}
        return Weights(parameters, [copied[id(parameter)] for parameter in parameters])

    @torch.no_grad()
    def go_back(self, kept: float = 0.0) -> None:
        """
        :param kept: the share of the change that is kept; 0: the weights are again as they were, bit by bit.
        """
        for parameter, before in zip(map(local, self._parameters), self._before, strict=True):
            # What is not finite would still not be when it is multiplied by 0.
            parameter.copy_(torch.lerp(before, parameter, kept) if kept else before)


class Snapshot:
    """All trained weights of a policy and the state of its optimiser. With Adam it takes three times the memory of the
    trained weights.

    :param policy: the policy.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:
        self._optimizer = policy.optimizer
        self.weights = Weights(trained(policy))
        state = self._optimizer.state_dict()
        moments = [x for one in state["state"].values() for x in one.values() if isinstance(x, torch.Tensor)]
        self._state = copy.deepcopy(state, dict(zip(map(id, moments), copies(moments), strict=True)))

    def restore(self) -> None:
        """Set weights and optimiser as they were. This can be done once."""
        self.weights.go_back()
        self._optimizer.load_state_dict(self._state)


@torch.no_grad()
def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy tensors by a few launches, where one for each would take an accelerator longer than a step of the optimiser.

    :param tensors: of any devices and kinds.
    :return: a copy of each, without gradient.
    """
    copied = [torch.empty_like(tensor, requires_grad=False) for tensor in tensors]
    alike: defaultdict[Any, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        alike[type(tensor.detach()), tensor.device, tensor.dtype].append(i)
    for numbers in alike.values():
        torch._foreach_copy_([local(copied[i]) for i in numbers], [local(tensors[i]) for i in numbers])
    return copied


@torch.no_grad()
def local(tensor: torch.Tensor) -> torch.Tensor:
    """
    :param tensor: a tensor that may be shared by several processes (a ``DTensor``).
    :return: this process's part of it, in the same memory; the tensor itself if nobody shares it.
    """
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def trained(policy: CausalLMPolicy) -> list[nn.Parameter]:
    """
    :param policy: a policy.
    :return: the parameters that its optimiser changes.
    """
    return [parameter for group in policy.optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def is_finite(policy: CausalLMPolicy) -> bool:
    """
    :param policy: a policy.
    :return: whether all trained weights and all moments of its optimiser are finite: one pass over them, and one copy
        of a number to the host. Of what several processes share, each looks at its own part.
    """
    moments = [x for state in policy.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    parts = [local(x) for x in (*trained(policy), *moments) if x.is_floating_point()]
    tensors = [part for part in parts if part.numel()]  # an empty one has no largest number
    return math.isfinite(float(torch.nn.utils.get_total_norm(tensors, norm_type=math.inf)))
