"""Detecting that a model has changed, so that what was cached of its output is no longer valid."""

from __future__ import annotations

import operator
import weakref
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_watches: WeakSet[WeightsWatch] = WeakSet()


def _note_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for watch in _watches:
        watch.note_step(stepped)


# Fused optimisers change weights without changing their versions, so the steps are counted. The hook is on all
# optimisers, since a hook on the policy's would be lost whenever the policy is copied.
register_optimizer_step_post_hook(_note_step)


class _Identity(NamedTuple):
    """The state of a model. Two states are the same if all of these entries are.

    :param children: the modules inside each module, compared by identity, since layers may be exchanged.
    :param tensors: parameters and buffers, compared by identity, since they may be exchanged too.
    :param contents: the number of optimiser steps, and the address and the version of each tensor's contents.
    :param adapters: which adapters are switched on, and their scales.
    :param precision: the floating-point types of matrix products.
    """

    children: list[Any]
    tensors: list[torch.Tensor]
    contents: list[Any]
    adapters: list[Any]
    precision: tuple[Any, ...]


class WeightsWatch:
    """Detects changes of what a model computes.

    Detected are optimiser steps, in-place changes, exchanged tensors (``load_state_dict(assign=True)``, resized
    embeddings, ``fully_shard``), exchanged contents (``parameter.data = ...``), adapters that are switched, scaled,
    merged or added, and the autocast around the call. What leaves no trace in modules and tensors is not detected:
    in-place changes of ``parameter.data`` or of a NumPy view, fused optimisers that run without their hooks, forward
    hooks, patched methods, and numbers that a module keeps as plain attributes.

    :param model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: _Identity | None = None
        self._dicts: tuple[list[dict[str, Any]], ...] = ([], [], [])  # children, parameters, buffers of each module
        self._layers: list[BaseTunerLayer] = []
        self._contents: list[torch.Tensor] = []
        self._ids: frozenset[int] = frozenset()  # of the tensors seen
        self._steps = 0  # of optimisers that have one of these tensors
        self._layout: list[Any] = []
        self.places = 0
        """A number that changes whenever, by :meth:`changed`, something has changed other than the contents of tensors
        in place, which is all that code with fixed addresses may miss."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self._model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the weights."""
        return next(self._model.parameters()).dtype

    @property
    def autocast(self) -> torch.dtype | None:
        """The floating-point type of the autocast around the call; None: there is none."""
        device = self.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def changed(self) -> bool:
        """
        :return: whether the model has changed since the last call; True at the first call.
        """
        if self._seen is not None and _same(self._seen, self._identity()):
            return False
        modules = list(self._model.modules())
        # Buffers that aren't saved follow from the config. Some rotary embeddings write theirs anew in every call.
        self._dicts = (
            [module._modules for module in modules],
            [module._parameters for module in modules],
            [module._buffers for module in modules if set(module._buffers) - module._non_persistent_buffers_set],
        )
        self._layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
        self._seen = self._identity()
        self._ids = frozenset(map(id, self._seen.tensors))
        _watches.add(self)  # not before, since a copy is made without calling the constructor
        # As long as the contents are referenced here, no new contents can be allocated at their addresses.
        self._contents = [tensor.data for tensor in self._seen.tensors]
        tensors = [*self._model.parameters(), *self._model.buffers()]
        layout = [
            *map(weakref.ref, modules),  # which is the same as another one as long as both modules live
            *((_address(tensor), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors),
            *(self._seen.adapters, self._seen.precision),
        ]
        if layout != self._layout:
            self._layout = layout
            self.places += 1
        return True

    def note_step(self, stepped: set[int]) -> None:
        """
        :param stepped: ids of the tensors that an optimiser has just changed. A model that is frozen while others are
            trained has none of them.
        """
        self._steps += not self._ids.isdisjoint(stepped)

    def forget(self) -> None:
        """Let go of what was seen, so that replaced weights can be freed. The next :meth:`changed` is then True."""
        self._seen = None
        self._contents = []

    def _identity(self) -> _Identity:
        # It is enough to look at the known modules, since a new one is among the children of a known one.
        children, parameters, buffers = (_values(dicts) for dicts in self._dicts)
        tensors = [tensor for tensor in (*parameters, *buffers) if tensor is not None]
        plain = all(type(tensor) in (nn.Parameter, torch.Tensor) for tensor in tensors)
        device = tensors[0].device.type if tensors else "cpu"
        return _Identity(
            children,
            tensors,
            [
                self._steps,
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
    # The tensors of `fully_shard` have no address as a whole; their contents are in the local shard.
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.data_ptr()
