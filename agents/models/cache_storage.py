"""The storage of the prefix cache: tensors of keys and values, without any decision about what is stored where.

Notation: B contexts, L columns of an observation, H hidden units.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from agents.models.context_matching import KnownContexts
from agents.models.transfers import to_device
from text_env.constraints import Contexts

SPARE_COLUMNS = 64

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""The keys and values of each attention layer, [rows, heads, columns, head_dim] each."""


class AllocatedLayer(CacheLayerMixin):
    """The keys and values of one attention layer, in storage that is there before the model is called.

    :param keys: storage for keys, [rows, heads, columns, head_dim].
    :param values: storage for values, [rows, heads, columns, head_dim]; its head_dim may differ from that of the keys.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the storage is allocated already.

        :param key_states: not used.
        :param value_states: not used.
        """

    def get_max_length(self) -> int:
        """
        :return: −1: there is no maximum.
        """
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of :meth:`get_max_length` before transformers 5.14.

        :return: −1: there is no maximum.
        """
        return self.get_max_length()


class CacheLayer(AllocatedLayer):
    """The keys and values of one attention layer, in storage that is allocated in advance. Its first ``rows`` rows and
    ``columns`` columns are in use.

    :param keys: storage for keys, [rows, heads, columns, head_dim].
    :param values: storage for values, [rows, heads, columns, head_dim]; its head_dim may differ from that of the keys.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(keys, values)
        self.rows = 0
        self.columns = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append columns. The model calls this in its forward pass.

        :param key_states: the keys of the new tokens, [rows, heads, new columns, head_dim].
        :param value_states: the values of the new tokens, [rows, heads, new columns, head_dim].
        :param args: not used.
        :param kwargs: not used.
        :return: all keys and all values in use.
        """
        new = slice(self.columns, self.columns + key_states.shape[-2])
        self.keys[: self.rows, :, new] = key_states
        self.values[: self.rows, :, new] = value_states
        self.columns = new.stop
        return self.keys[: self.rows, :, : new.stop], self.values[: self.rows, :, : new.stop]

    def get_seq_length(self) -> int:
        """
        :return: the number of columns in use.
        """
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """
        :param query_length: the number of new tokens.
        :return: the number of columns that a mask must cover, and the index of the first of them.
        """
        return self.columns + query_length, 0


class Beginning(NamedTuple):
    """Where the keys and values of the first p tokens of a context are stored.

    :param layers: the storage.
    :param row: the row of the storage.
    :param columns: int64 [p], the column of each token.
    """

    layers: Layers
    row: int
    columns: np.ndarray


class Reading(NamedTuple):
    """The result of a forward pass over contexts, before it is copied into a :class:`Block`.

    :param layers: keys and values, one row per context.
    :param first: int64 [rows], the column of each context's first token. The others follow without gaps.
    :param hidden: the hidden state at each context's last token, [rows, H].
    """

    layers: Layers
    first: np.ndarray
    hidden: torch.Tensor


class Graphs:
    """Graphs of the device that read and write one block's storage. A copy of them is empty, since they would write to
    the original's.
    """

    def __init__(self) -> None:
        self._bound_to: Any = None
        self._graphs: dict[Any, Any] = {}

    def of(self, bound_to: Any) -> dict[Any, Any]:
        """
        :param bound_to: what the graphs depend on besides the storage.
        :return: the graphs that were captured under the same. All others are dropped.
        """
        if self._bound_to != bound_to:
            self._bound_to, self._graphs = bound_to, {}
        return self._graphs

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return Graphs()


class Block:
    """The stored contexts of one stream of calls, such as a rollout: one row, also called a slot, per context.

    A token takes 2 × layers × heads of keys and values × head_dim numbers. There are columns for the longest context
    that is stored and for a quarter more, or ``SPARE_COLUMNS`` more. When they are used up, the live rows are laid out
    anew without gaps, which takes no new storage as long as they fit.

    :param n_rows: the number of rows.
    :param width: the number L of columns of an observation, which is the length of the longest context.
    :param like: a reading, from which shapes, dtype and device are taken.
    :param columns: the number of columns that there are at least. If it is larger than L by ``SPARE_COLUMNS`` or more,
        the storage stays where it is.
    """

    def __init__(self, n_rows: int, width: int, like: Reading, columns: int = 0) -> None:
        self._least = max(columns, SPARE_COLUMNS)
        self.known = KnownContexts(n_rows, width)
        self.layers = [
            CacheLayer(*(x.new_zeros(n_rows, x.shape[1], self._least, x.shape[3]) for x in pair))
            for pair in like.layers
        ]
        self.hidden = like.hidden.new_zeros(n_rows, like.hidden.shape[-1])  # the states at each row's last token
        self.visible = torch.zeros(n_rows, self._least, dtype=torch.bool, device=self.hidden.device)
        self.graphs = Graphs()
        self._indexed: tuple[np.ndarray, torch.Tensor] = (np.zeros(0, dtype=np.int64), torch.zeros(0))

    @property
    def columns(self) -> int:
        """The number of columns in use."""
        return self.layers[0].columns

    @property
    def capacity(self) -> int:
        """The number of columns that there are."""
        return self.visible.shape[1]

    def suits(self, n_rows: int, width: int, like: Reading, columns: int) -> bool:
        """
        :param n_rows: as for the constructor.
        :param width: as for the constructor.
        :param like: as for the constructor.
        :param columns: as for the constructor.
        :return: whether this block's storage can serve as that of a new block of these arguments.
        """
        alike = len(self.layers) == len(like.layers) and all(
            x.shape[1::2] == y.shape[1::2] and x.dtype == y.dtype and x.device == y.device
            for layer, pair in zip(self.layers, like.layers, strict=True)
            for x, y in zip((layer.keys, layer.values), pair, strict=True)
        )
        same_rows = (self.known.n_slots, self.known.width) == (n_rows, width)
        return alike and same_rows and self.capacity >= columns and self.hidden.dtype == like.hidden.dtype

    def forget(self) -> None:
        """Forget all contexts, and keep the storage, as if the block were new."""
        self.known = KnownContexts(self.known.n_slots, self.known.width)
        for layer in self.layers:
            layer.columns = 0

    def beginning(self, slot: int, length: int) -> Beginning:
        """
        :param slot: a live slot.
        :param length: a number of tokens, counted from the first.
        :return: where the keys and values of these tokens are stored.
        """
        layers = [(layer.keys, layer.values) for layer in self.layers]
        return Beginning(layers, slot, self.known.columns[slot, :length].copy())

    def keep(self, slots: np.ndarray) -> np.ndarray:
        """Forget every row but these, and move the last rows into the gaps.

        :param slots: int64, the rows to keep.
        :return: int64 [n_rows], the new slot of each old one.
        """
        sources, targets, moved = self.known.keep(slots)
        if len(sources):
            source, target = self.to_torch(sources, targets)
            for layer in self.layers:
                layer.keys[target, :, : layer.columns] = layer.keys[source, :, : layer.columns]
                layer.values[target, :, : layer.columns] = layer.values[source, :, : layer.columns]
            self.hidden[target] = self.hidden[source]
            self.visible[target] = self.visible[source]
        return moved

    def reserve(self, more: int) -> None:
        """Make room for more columns.

        :param more: the number of columns that are needed beyond those in use.
        """
        if self.columns + more > self.capacity:
            self._lay_out(int(self.known.length[: self.known.live].max(initial=0)), more)

    def extend_to(self, columns: int) -> None:
        """Have at least so many columns in use, with the last token of each row in the newest one.

        :param columns: the number of columns.
        """
        if (self.known.live and self.columns < columns) or columns > self.capacity:
            self._lay_out(columns, 0)
        for layer in self.layers:
            layer.columns = max(layer.columns, columns)

    def _lay_out(self, end: int, more: int) -> None:
        """Move the live rows together, without gaps, so that each ends in the same column. However long a row has
        waited, the storage is then as large as the longest context asks for, and no larger.

        :param end: the number of columns in use afterwards.
        :param more: the number of columns that are needed beyond those.
        """
        known = self.known
        owner, position = _tokens_of(known.length[: known.live])
        to = end - known.length[owner] + position
        row, from_column, to_column = self.to_torch(owner, known.columns[owner, position], to)
        capacity = self._capacity_for(end + more)
        for layer in self.layers:
            for name in ("keys", "values"):
                old: torch.Tensor = getattr(layer, name)
                live = old.transpose(1, 2)[row, from_column]  # a copy, so it may be written over its origin
                if capacity != self.capacity:
                    old = old.new_zeros(old.shape[0], old.shape[1], capacity, old.shape[3])
                    setattr(layer, name, old)
                old.transpose(1, 2)[row, to_column] = live
            layer.columns = end
        if capacity == self.capacity:
            self.visible.zero_()
        else:
            self.graphs = Graphs()
            self.visible = self.visible.new_zeros(len(self.visible), capacity)
        self.visible[row, to_column] = True
        known.columns[owner, position] = to

    def _capacity_for(self, columns: int) -> int:
        """Columns in use, and spare ones: the more, the less often rows are copied. A row is read in every call, so
        copying it in every 64th costs little. Rows that don't restart never need more columns than the longest context.
        """
        few, many = SPARE_COLUMNS // 2, max(SPARE_COLUMNS, columns // 4)
        wanted = max(min(columns + many, max(self.known.width, columns + few)), self._least)
        return self.capacity if columns + few <= self.capacity <= 2 * wanted else wanted

    def put(self, slots: np.ndarray, contexts: Contexts, reading: Reading, rows: np.ndarray) -> None:
        """Copy contexts from a reading. At least as many columns must be in use as the longest of them has tokens.

        :param slots: int64 [B], the slots that they are copied to.
        :param contexts: B contexts.
        :param reading: the forward pass that read them.
        :param rows: int64 [B], the row of each of them in the reading.
        """
        length = contexts.length
        to_first = self.known.put(slots, contexts, self.columns)
        owner, position = _tokens_of(length)
        origin = rows[owner], reading.first[rows][owner] + position
        place = slots[owner], to_first[owner] + position
        from_row, from_column, to_row, to_column, source, target = self.to_torch(*origin, *place, rows, slots)
        for layer, (keys, values) in zip(self.layers, reading.layers, strict=True):
            layer.keys.transpose(1, 2)[to_row, to_column] = keys.transpose(1, 2)[from_row, from_column]
            layer.values.transpose(1, 2)[to_row, to_column] = values.transpose(1, 2)[from_row, from_column]
        self.visible[target] = False
        self.visible[to_row, to_column] = True
        self.hidden[target] = reading.hidden[source]

    def index(self, slots: np.ndarray) -> torch.Tensor:
        """
        :param slots: int64, slots.
        :return: the slots on the device of the storage. They are copied there only if they are others than in the
            latest call, which they are when a row has ended or restarted.
        """
        if not np.array_equal(slots, self._indexed[0]):
            [index] = self.to_torch(slots.copy())
            self._indexed = slots.copy(), index
        return self._indexed[1]

    def to_torch(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """
        :param arrays: arrays.
        :return: tensors of the same contents, on the device of the storage, copied there in one transfer.
        """
        return to_device(self.hidden.device, *arrays)


def _tokens_of(length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    :param length: int64 [B].
    :return: for each token of B contexts the number of its context, and its position in it.
    """
    owner = np.repeat(np.arange(len(length)), length)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(length) - length, length)
