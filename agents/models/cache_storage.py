"""Where the memo keeps keys and values: the torch half of it, which is told what goes where.

Notation: B contexts, L columns of an observation, H hidden units.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from agents.models.context_matching import KnownContexts
from text_env.constraints import Contexts

SPARE_COLUMNS = 64

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each attention layer, [rows, heads, columns, head_dim]."""


class CacheLayer(CacheLayerMixin):
    """Keys and values of one attention layer: storage made in advance, whose first n rows and t columns are in use.

    :param keys: storage [rows, heads, columns, head_dim].
    :param values: likewise.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self.is_initialized = True
        self.rows = 0
        self.columns = 0

    def resized(self, columns: int, drop: int) -> CacheLayer:
        """
        :param columns: columns that there is to be room for.
        :param drop: columns to leave out, on the left.
        :return: the same keys and values in new storage.
        """
        rows, heads, _, head_dim = self.keys.shape
        value_dim = self.values.shape[-1]
        layer = CacheLayer(
            self.keys.new_zeros(rows, heads, columns, head_dim), self.values.new_zeros(rows, heads, columns, value_dim)
        )
        layer.columns = self.columns - drop
        layer.keys[:, :, : layer.columns] = self.keys[:, :, drop : self.columns]
        layer.values[:, :, : layer.columns] = self.values[:, :, drop : self.columns]
        return layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model: append columns, hand out everything that is in use."""
        new = slice(self.columns, self.columns + key_states.shape[-2])
        self.keys[: self.rows, :, new] = key_states
        self.values[: self.rows, :, new] = value_states
        self.columns = new.stop
        return self.keys[: self.rows, :, : new.stop], self.values[: self.rows, :, : new.stop]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the storage is there."""

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # what transformers calls get_max_length below 5.14
        return self.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0


class Beginning(NamedTuple):
    """Where keys and values of the first tokens of a context are.

    :param layers: the storage.
    :param row: the row in it.
    :param columns: int64 [p], the column of each of these tokens.
    """

    layers: Layers
    row: int
    columns: np.ndarray


class Reading(NamedTuple):
    """Contexts that were read in a forward pass of their own.

    :param layers: keys and values, one row a context.
    :param first: int64 [rows], the column of each context's first token; the others follow without gaps.
    :param hidden: [rows, H], at each context's last token.
    """

    layers: Layers
    first: np.ndarray
    hidden: torch.Tensor


class Block:
    """The cached rows of one stream of calls.

    :param n_rows: how many rows there is room for.
    :param width: L, the longest context.
    :param like: a reading, for shapes, dtype and device.
    """

    def __init__(self, n_rows: int, width: int, like: Reading) -> None:
        self.known = KnownContexts(n_rows, width)
        self.layers = [
            CacheLayer(*(x.new_zeros(n_rows, x.shape[1], SPARE_COLUMNS, x.shape[3]) for x in pair))
            for pair in like.layers
        ]
        self.hidden = like.hidden.new_zeros(n_rows, like.hidden.shape[-1])  # at each row's last token
        self.visible = torch.zeros(n_rows, SPARE_COLUMNS, dtype=torch.bool, device=self.hidden.device)

    @property
    def columns(self) -> int:
        """Columns in use."""
        return self.layers[0].columns

    def beginning(self, slot: int, length: int) -> Beginning:
        """
        :param slot: a live slot.
        :param length: how many of its tokens, from the first.
        :return: where their keys and values are.
        """
        layers = [(layer.keys, layer.values) for layer in self.layers]
        return Beginning(layers, slot, self.known.columns[slot, :length].copy())

    def keep(self, slots: np.ndarray) -> np.ndarray:
        """Forget every row but these.

        :param slots: int64, the rows to keep.
        :return: for each old slot its new one.
        """
        sources, targets, moved = self.known.keep(slots)
        if len(sources):
            source, target = self.to_torch(sources), self.to_torch(targets)
            for layer in self.layers:
                layer.keys[target, :, : layer.columns] = layer.keys[source, :, : layer.columns]
                layer.values[target, :, : layer.columns] = layer.values[source, :, : layer.columns]
            self.hidden[target] = self.hidden[source]
            self.visible[target] = self.visible[source]
        return moved

    def reserve(self, more: int, at_least: int = 0) -> None:
        """Make room for so many more columns, and for so many in all.

        When there is none, columns on the left that no live row sees any more are dropped.

        :param more: columns beyond those in use.
        :param at_least: columns in all.
        """
        if max(self.columns + more, at_least) <= self.visible.shape[1]:
            return
        live = self.known.live
        drop = int(self.known.columns[:live, 0].min()) if live else self.columns
        # At least as many spare columns as used ones: moving what is kept then costs O(1) columns a call.
        needed = max(self.columns - drop + more, at_least)
        capacity = needed + max(SPARE_COLUMNS, needed)
        self.layers = [layer.resized(capacity, drop) for layer in self.layers]
        visible = self.visible.new_zeros(len(self.visible), capacity)
        visible[:, : self.columns] = self.visible[:, drop : drop + self.columns]
        self.visible = visible
        self.known.columns -= drop

    def put(self, slots: np.ndarray, contexts: Contexts, reading: Reading, rows: np.ndarray) -> None:
        """Take over contexts that were read apart. There must be as many columns in use as the longest of them has.

        :param slots: int64 [B], where they go.
        :param contexts: B contexts.
        :param reading: holds them.
        :param rows: int64 [B], the row of the reading that each of them is.
        """
        length = contexts.length
        to_first = self.known.put(slots, contexts, self.columns)
        owner = np.repeat(np.arange(len(length)), length)
        position = np.concatenate([np.arange(n) for n in length])
        from_row, from_column = self.to_torch(rows[owner]), self.to_torch(reading.first[rows][owner] + position)
        to_row, to_column = self.to_torch(slots[owner]), self.to_torch(to_first[owner] + position)
        for layer, (keys, values) in zip(self.layers, reading.layers, strict=True):
            layer.keys.transpose(1, 2)[to_row, to_column] = keys.transpose(1, 2)[from_row, from_column]
            layer.values.transpose(1, 2)[to_row, to_column] = values.transpose(1, 2)[from_row, from_column]
        target = self.to_torch(slots)
        self.visible[target] = False
        self.visible[to_row, to_column] = True
        self.hidden[target] = reading.hidden[self.to_torch(rows)]

    def to_torch(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.hidden.device)
