"""What a memo of a model's answers belongs to: the weights, and whatever else decides what the model computes."""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimisers change weights and not their versions. The hook is on all of them, whoever made them: one on the
# policy's own would be lost whenever that is copied.
register_optimizer_step_post_hook(_count_step)


class _Identity(NamedTuple):
    """One state of a model. Two are the same if everything in them is.

    :param children: the modules inside each module, compared by identity: layers may be exchanged.
    :param tensors: parameters and buffers, compared by identity: they may be exchanged too.
    :param contents: address and version of each tensor's contents, and the number of optimiser steps.
    :param adapters: which adapters are on, and how much they count.
    :param precision: the types in which matrix products run.
    """

    children: list[Any]
    tensors: list[torch.Tensor]
    contents: list[Any]
    adapters: list[Any]
    precision: tuple[Any, ...]


class WeightsWatch:
    """Notices every change of what a model computes.

    It sees optimiser steps, in-place changes, tensors that are exchanged (``load_state_dict(assign=True)``, resized
    embeddings, ``fully_shard``), contents that are exchanged (``parameter.data = ...``), adapters that are switched,
    scaled, merged or added, and the autocast around the call. It does not see writes behind PyTorch's back: in-place
    changes of ``parameter.data``, and fused optimisers that run without their hooks.

    :param model: the model, in any state.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: _Identity | None = None
        self._dicts: tuple[list[dict[str, Any]], ...] = ([], [], [])  # children, parameters, buffers of each module
        self._layers: list[BaseTunerLayer] = []
        self._contents: list[torch.Tensor] = []

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self._model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self._model.parameters()).dtype

    def changed(self) -> bool:
        """
        :return: whether anything has changed since the last call; true at the first.
        """
        if self._seen is not None and _same(self._seen, self._identity()):
            return False
        modules = list(self._model.modules())
        self._dicts = (
            [module._modules for module in modules],
            [module._parameters for module in modules],
            [module._buffers for module in modules],
        )
        self._layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
        self._seen = self._identity()
        # Holding on to the contents keeps their addresses taken, so no new contents can come to lie at an old address.
        self._contents = [tensor.data for tensor in self._seen.tensors]
        return True

    def _identity(self) -> _Identity:
        # The modules known are enough: a new one is among the children of a known one.
        children, parameters, buffers = (_values(dicts) for dicts in self._dicts)
        tensors = [tensor for tensor in (*parameters, *buffers) if tensor is not None]
        plain = all(type(tensor) in (nn.Parameter, torch.Tensor) for tensor in tensors)
        # No optimiser moves a weight without gradient: a frozen model is the same while others are trained.
        trainable = any(parameter.requires_grad for parameter in parameters if parameter is not None)
        device = tensors[0].device.type if tensors else "cpu"
        return _Identity(
            children,
            tensors,
            [
                _optimizer_steps if trainable else 0,
                *map(torch.Tensor.data_ptr if plain else _address, tensors),
                *map(_version, tensors),
            ],
            [
                (
                    layer.disable_adapters,
                    tuple(layer.active_adapters),
                    tuple(layer.merged_adapters),
                    dict(getattr(layer, "scaling", None) or {}),
                )
                for layer in self._layers
            ],
            (
                torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
                torch.get_float32_matmul_precision(),
            ),
        )


def _values(dicts: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dicts)))


_version = operator.attrgetter("_version")


def _same(one: _Identity, other: _Identity) -> bool:
    return (
        _identical(one.children, other.children)
        and _identical(one.tensors, other.tensors)
        and one.contents == other.contents
        and one.adapters == other.adapters
        and one.precision == other.precision
    )


def _identical(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _address(tensor: torch.Tensor) -> int:
    # The sharded tensors of `fully_shard` have contents of their own; nothing lies at the address of the whole.
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.data_ptr()
