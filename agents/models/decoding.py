"""One decode step: the new token of each row of a block, read on top of the keys and values that the block holds.

A step is launched in one of three ways, which compute the same (:data:`Launch`):

- eagerly, as the model's code stands: every operation is launched by itself, and in small models and on GPUs launching
  takes longer than computing;
- compiled by ``torch.compile``, which fuses operations. One compilation serves every number of rows and columns;
- captured into a graph of the device (a CUDA graph). A graph is launched as a whole, but it is bound
  to its shapes and to the addresses of everything that it reads. So numbers of rows and columns are rounded up to few
  sizes, inputs are copied to where the graph expects them, and the block keeps its storage from rollout to rollout.
  Weights may change their contents, but not their places.

A compiled or captured step is a function of tensors only (:func:`decode_step`): the column that is written is an index
in a tensor, and the mask tells which columns exist for a row.

Notation: R rows, C columns, H hidden units, KV heads of keys and values.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from agents.models.cache_storage import AllocatedLayer, Block
from agents.models.weights import WeightsWatch

# What decoders call the keys and values that they are given and give back. From transformers 5.24 on it is "cache".
CACHE_ARGUMENT = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

DECODE_MODES = ("auto", "eager", "compiled")

# The name of `grouped_attention` among the attention functions of transformers.
ATTENTION = "one_query_a_row"

# Graphs of up to so many columns are of multiples of it, and larger ones of steps that grow with the length, so that
# there are a dozen graphs for 4,096 columns, and none reads more than a quarter of its columns in vain.
COLUMNS_STEP = 128

Launch = Literal["eager", "compiled", "captured"]
"""How a step is launched."""

Step = Callable[[], torch.Tensor]


def cuda_graph(step: Step) -> Step:
    """Capture a step into a CUDA graph.

    :param step: a function without arguments that reads and writes tensors which stay where they are, and which may be
        called any number of times without another effect than one call has.
    :return: a function that does the same, and returns the same tensor every time, with new contents.
    """
    current, apart = torch.cuda.current_stream(), torch.cuda.Stream()
    apart.wait_stream(current)
    with torch.cuda.stream(apart):
        for _ in range(2):  # libraries allocate their workspaces in the first calls, which can't be captured
            step()
    current.wait_stream(apart)
    graph = torch.cuda.CUDAGraph()
    # Results are copied before the next replay, so all graphs may use the same memory for what is between.
    with torch.cuda.graph(graph, pool=_memory_pool()):
        result = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


@functools.cache
def _memory_pool() -> Any:
    """A pool of memory for all graphs. PyTorch gives a pool up with the last graph in it, so one is kept that is never
    replayed.
    """
    keeper = torch.cuda.CUDAGraph()
    with torch.cuda.graph(keeper):
        torch.zeros(1, device="cuda")
    _keepers.append(keeper)
    return keeper.pool()


_keepers: list[Any] = []


CAPTURES: dict[str, Callable[[Step], Step]] = {"cuda": cuda_graph}
"""How steps are captured, by the type of the device. On other devices there are no graphs."""


def launch_for(device: torch.device) -> Launch:
    """
    :param device: the device of the model.
    :return: how a step is launched there for ``decode="compiled"``. A GPU waits for launches most of the time, and a
        graph is one launch. To fuse operations as well would take minutes of compiling for a model of 30 layers.
    """
    return "captured" if device.type in CAPTURES else "compiled"


class Decoder:
    """Runs the decode steps of a model.

    :param backbone: a Hugging Face decoder without a head.
    :param weights: the watch that tells whether the weights are where they were.
    """

    def __init__(self, backbone: nn.Module, weights: WeightsWatch) -> None:
        self._backbone = backbone
        self._weights = weights
        self.launch: Launch = "eager"
        self.ready_masks = True  # the model takes masks as the attention needs them

    def storage_columns(self, width: int) -> int:
        """
        :param width: the number of tokens of the longest context.
        :return: the number of columns that a new block must have at least, so that its storage can stay where it is; 0
            if it need not stay.
        """
        return _round_up(width + COLUMNS_STEP // 2, COLUMNS_STEP) if self.launch == "captured" else 0

    def __call__(self, block: Block, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Read one token of each of the first R rows of a block, whose keys and values are written into the next
        column. The block must have that column, and its mask must show it to each row that reads a new token.

        :param block: the block.
        :param tokens: int64 [R], the token ids.
        :param positions: int64 [R], the position of each token in its context.
        :return: last hidden states, [R, H]; valid until the next call.
        """
        if self.launch == "eager":
            return self._eager(block, tokens, positions)
        n, column = len(tokens), block.columns
        # One row would be a special case to the compiler.
        captured, slots = self.launch == "captured", block.known.n_slots
        rows = _rows_of_a_graph(n, slots) if captured else min(max(n, 2), slots)
        # Rows that hold nothing are read too. Each must see a column, or its attention would be a division by zero.
        block.visible[n:rows, column] = True
        inputs = np.zeros(2 * rows + 1, dtype=np.int64)
        inputs[:n], inputs[rows : rows + n], inputs[-1] = tokens, positions, column
        [moved] = block.to_torch(inputs)
        with _own_attention(self._backbone):
            if captured:
                hidden = self._replayed(block, moved, rows, column)
            else:
                hidden = self._step(block, moved, rows, column + 1)
        for layer in block.layers:
            layer.columns = column + 1
        return hidden[:n]

    def _eager(self, block: Block, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        n, end = len(tokens), block.columns + 1
        for layer in block.layers:
            layer.rows = n
        token, position = block.to_torch(tokens[:, None], positions[:, None])
        # Attention is faster without a mask, which is not needed if every row sees every column.
        all_visible = bool((block.known.length[:n] == end).all())
        hidden: torch.Tensor = self._backbone(
            input_ids=token,
            position_ids=position,
            attention_mask=None if all_visible else self._mask(block.visible[:n, :end]),
            **{CACHE_ARGUMENT: Cache(layers=[*block.layers])},
            use_cache=True,
        ).last_hidden_state[:, 0]
        return hidden

    def _mask(self, visible: torch.Tensor) -> torch.Tensor:
        """The mask of a decode step, made for all layers at once where the model takes it as it is. From a mask of two
        dimensions transformers makes one after looking at its contents, for which the host waits, and PyTorch's
        attention then makes another one in each layer.

        :param visible: bool [R, C], the columns that each row sees.
        :return: 0 where a column is seen and −∞ elsewhere, [R, 1, 1, C]; or int64 [R, C].
        """
        if not self.ready_masks:
            return visible.long()
        dtype = self._weights.autocast or self._weights.dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)[
            :, None, None
        ]

    def _step(self, block: Block, inputs: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """
        :param inputs: int64 [2 · rows + 1]: tokens, positions, and the column that is written.
        """
        step = _compiled_step() if self.launch == "compiled" else decode_step
        # As tensors of their own: a compiled function would also be specialised for the tensors that they are views of.
        return step(
            self._backbone,
            inputs[:rows].data,
            inputs[rows : 2 * rows].data,
            inputs[2 * rows :].data,
            block.visible[:rows, :columns].data,
            [layer.keys[:rows, :, :columns].data for layer in block.layers],
            [layer.values[:rows, :, :columns].data for layer in block.layers],
        )

    def _replayed(self, block: Block, inputs: torch.Tensor, rows: int, column: int) -> torch.Tensor:
        columns = _columns_of_a_graph(column + 1, block.capacity)
        graphs: dict[Any, tuple[torch.Tensor, Step]] = block.graphs.of(self._weights.places)
        if (rows, columns) not in graphs:
            static = inputs.clone()
            with _without_cached_casts(static.device.type):
                step = CAPTURES[static.device.type](lambda: self._step(block, static, rows, columns))
            graphs[rows, columns] = static, step
        static, step = graphs[rows, columns]
        static.copy_(inputs)
        return step()


def decode_step(
    backbone: nn.Module,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    column: torch.Tensor,
    visible: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
) -> torch.Tensor:
    """Read one token of each row.

    :param backbone: a Hugging Face decoder without a head, with :func:`grouped_attention`.
    :param tokens: int64 [R], token ids.
    :param positions: int64 [R], the position of each token in its context.
    :param column: int64 [1], the column of the storage that the tokens' keys and values are written to.
    :param visible: bool [R, C], the columns that each row sees, the new one included.
    :param keys: the keys of each layer, [R, KV, C, head_dim]; changed in place.
    :param values: the values of each layer, [R, KV, C, head_dim]; changed in place.
    :return: last hidden states, [R, H].
    """
    layers = [StepLayer(k, v, column) for k, v in zip(keys, values, strict=True)]
    hidden: torch.Tensor = backbone(
        input_ids=tokens[:, None],
        position_ids=positions[:, None],
        attention_mask=visible[:, None, None],  # transformers leaves a mask of four dimensions as it is
        **{CACHE_ARGUMENT: Cache(layers=[*layers])},
        use_cache=True,
    ).last_hidden_state[:, 0]
    return hidden


class StepLayer(AllocatedLayer):
    """The keys and values of one attention layer during a step. All columns exist from the beginning, and the mask of
    the step tells which of them are in use.

    :param keys: [R, KV, C, head_dim].
    :param values: [R, KV, C, head_dim]; its head_dim may differ from that of the keys.
    :param column: int64 [1], the column that is written.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, column: torch.Tensor) -> None:
        super().__init__(keys, values)
        self.column = column

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column. The model calls this in its forward pass.

        :param key_states: the keys of the new tokens, [R, KV, 1, head_dim].
        :param value_states: the values of the new tokens, [R, KV, 1, head_dim].
        :param args: not used.
        :param kwargs: not used.
        :return: all keys and all values.
        """
        self.keys.index_copy_(2, self.column, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """
        :return: 0. Positions and mask are given to the model, which need not work them out.
        """
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """
        :param query_length: the number of new tokens.
        :return: the number of columns that a mask must cover, and the index of the first of them.
        """
        return self.keys.shape[2], 0


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one query a row, as an attention function of transformers. Query heads that share keys and values
    are treated like several queries of one head, so keys and values aren't repeated.

    :param module: the attention layer; not used.
    :param query: [R, heads, 1, head_dim].
    :param key: [R, KV, C, head_dim].
    :param value: [R, KV, C, head_dim].
    :param attention_mask: bool [R, 1, 1, C], true where a column is seen.
    :param dropout: must be 0.
    :param scaling: the factor of the scores; None: 1 / √head_dim.
    :param kwargs: what only some models have, such as ``softcap``; must be empty of numbers and tensors.
    :return: [R, 1, heads, head_dim], and no attention weights.
    :raises ValueError: if a model asks for another kind of attention.
    """
    strange = [name for name in ("softcap", "s_aux", "sliding_window", "position_bias") if kwargs.get(name) is not None]
    if strange or dropout or query.shape[2] != 1:
        raise ValueError(
            f"Expected attention of one query a row, without dropout; {type(module).__name__} asks for "
            f"{strange or dropout or query.shape}."
        )
    rows, heads, _, size = query.shape
    groups = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    # Without autocast nothing is cast here; with it, new queries may be of a lower precision than the stored keys.
    attended = nn.functional.scaled_dot_product_attention(
        groups.to(key.dtype), key, value, attn_mask=attention_mask, scale=scaling
    )
    return attended.reshape(rows, 1, heads, value.shape[3]), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, grouped_attention)


@contextlib.contextmanager
def _own_attention(backbone: nn.Module) -> Iterator[None]:
    """Let a model use :func:`grouped_attention` for the time of a call."""
    config: Any = backbone.config.get_text_config()  # type: ignore[operator,union-attr]
    its_own = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = its_own


def _without_cached_casts(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast as it is around the call, but for its cache: a graph would go on reading the weights that were cast
    while it was captured, which are freed when the autocast ends, and were those before the next update.
    """
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)


def sizes_told_apart() -> contextlib.AbstractContextManager[Any]:
    """To be around the first compiled step. A size that happens to be equal to another one, such as the number of
    columns to the number of heads, is not taken to be always equal to it.
    """
    context: contextlib.AbstractContextManager[Any] = symbolic_shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    return context


@functools.cache
def _compiled_step() -> Callable[..., torch.Tensor]:
    # One compiled function serves all models and shapes, since PyTorch specialises it for each model.
    return torch.compile(decode_step, dynamic=True)


def _rows_of_a_graph(n: int, n_slots: int) -> int:
    """The smallest of all slots, a half of them, a quarter, …, that is large enough for n rows."""
    rows = n_slots
    while (half := -(-rows // 2)) >= max(n, 2):
        rows = half
    return rows


def _columns_of_a_graph(n: int, capacity: int) -> int:
    """A size of at least n columns, of few sizes."""
    step = COLUMNS_STEP << max(0, (n // (4 * COLUMNS_STEP)).bit_length() - 1)
    return min(_round_up(n, step), capacity)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
