"""The memo under the policy: keys and values of contexts already seen.

``last_hidden(contexts)`` is a pure function; calls that extend earlier contexts by one token pay for that token only.
What extends what is read off the tokens themselves, never off flags, so rows may restart at any time, and a rollout
and an evaluation may interleave: each finds its own block.

Layout of a block: one cache column per call. A row's tokens end in the newest column; a row that restarts has its
whole context prefilled into the columns that end there; ``visible`` hides from each row what is not its own. Position
ids are explicit, so it doesn't matter to the model in which column a token lies. Rows that a call doesn't mention are
forgotten: the last row moves into their place, so that live rows are always the first n and finished rows cost nothing.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from agents.models.causal_lm import Positions
from agents.models.contexts import Contexts, share_prefixes

SPARE_COLUMNS = 64

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimisers change weights and not their versions. The hook is on all of them, whoever made them: one on the
# policy's own would be lost whenever that is copied.
register_optimizer_step_post_hook(_count_step)


class _Layer(CacheLayerMixin):
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

    def resized(self, columns: int, drop: int) -> _Layer:
        """The same without the first ``drop`` columns, and with room for ``columns``."""
        rows, heads, _, head_dim = self.keys.shape
        value_dim = self.values.shape[-1]
        layer = _Layer(
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

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0


class _Block:
    """The cached rows of one stream of calls.

    :param n_rows: how many rows there is room for.
    :param width: L, the longest context.
    :param like: keys and values of each layer, for shapes, dtype and device.
    :param hidden: hidden states, likewise.
    """

    def __init__(
        self, n_rows: int, width: int, like: list[tuple[torch.Tensor, torch.Tensor]], hidden: torch.Tensor
    ) -> None:
        self.n_rows = n_rows
        self.width = width
        self.live = 0
        self.tokens = np.zeros((n_rows, width), dtype=np.int64)
        self.length = np.zeros(n_rows, dtype=np.int64)
        self.first_column = np.zeros(n_rows, dtype=np.int64)
        self.slots = np.zeros(0, dtype=np.int64)  # where the rows of the latest call are
        self.layers = [
            _Layer(*(x.new_zeros(n_rows, x.shape[1], SPARE_COLUMNS, x.shape[3]) for x in pair)) for pair in like
        ]
        self.hidden = hidden.new_zeros(n_rows, hidden.shape[-1])  # at each row's last token
        self.visible = torch.zeros(n_rows, SPARE_COLUMNS, dtype=torch.bool, device=hidden.device)

    @property
    def columns(self) -> int:
        """Columns in use."""
        return self.layers[0].columns

    def match(self, contexts: Contexts) -> np.ndarray:
        """For each context the slot that holds it, or holds it but for its last token; −1 where there is none."""
        input_ids, length, _ = contexts
        if len(length) == len(self.slots):
            cached = self.length[self.slots]
            columns = np.arange(int(cached.max()))
            same = (input_ids[:, columns] == self.tokens[np.ix_(self.slots, columns)]) | (columns >= cached[:, None])
            new_tokens = length - cached
            if same.all() and ((new_tokens == 0) | (new_tokens == 1)).all():
                return self.slots
        # Rows were dropped, restarted or re-ordered. A key may stand for several slots: two episodes of one prompt.
        slots_of: dict[bytes, list[int]] = {}
        for slot in range(self.live):
            slots_of.setdefault(self.tokens[slot, : self.length[slot]].tobytes(), []).append(slot)
        found = np.full(len(length), -1, dtype=np.int64)
        for i, n in enumerate(length):
            slots = slots_of.get(input_ids[i, : n - 1].tobytes()) or slots_of.get(input_ids[i, :n].tobytes())
            if slots:
                found[i] = slots.pop(0)
        return found

    def keep(self, slots: np.ndarray) -> np.ndarray:
        """Forget every row but these, closing the gaps from the end.

        :return: for each old slot its new one.
        """
        moved = np.arange(self.n_rows)
        holes = np.setdiff1d(np.arange(self.live), slots)
        kept = self.live - len(holes)
        sources = np.setdiff1d(np.arange(kept, self.live), holes)
        targets = holes[holes < kept]
        if len(sources):
            source, target = self.to_torch(sources), self.to_torch(targets)
            for layer in self.layers:
                layer.keys[target, :, : layer.columns] = layer.keys[source, :, : layer.columns]
                layer.values[target, :, : layer.columns] = layer.values[source, :, : layer.columns]
            self.hidden[target] = self.hidden[source]
            self.visible[target] = self.visible[source]
            for array in (self.tokens, self.length, self.first_column):
                array[targets] = array[sources]
            moved[sources] = targets
        self.live = kept
        return moved

    def reserve(self, more: int, at_least: int = 0) -> None:
        """Make room for so many more columns, and for so many in all.

        When there is none, columns on the left that no live row sees any more are dropped.
        """
        if max(self.columns + more, at_least) <= self.visible.shape[1]:
            return
        drop = int(self.first_column[: self.live].min()) if self.live else self.columns
        # At least as many spare columns as used ones: moving what is kept then costs O(1) columns a call.
        needed = max(self.columns - drop + more, at_least)
        capacity = needed + max(SPARE_COLUMNS, needed)
        self.layers = [layer.resized(capacity, drop) for layer in self.layers]
        visible = self.visible.new_zeros(self.n_rows, capacity)
        visible[:, : self.columns] = self.visible[:, drop : drop + self.columns]
        self.visible = visible
        self.first_column -= drop

    def to_torch(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.hidden.device)


class PrefixCache:
    """Last hidden states of token contexts, remembering keys and values between calls.

    :param backbone: a Hugging Face decoder without head; its weights may change, which empties the memo.
    :param max_blocks: how many interleaved streams of calls are remembered; the least recently used one goes first.
    """

    def __init__(self, backbone: nn.Module, max_blocks: int = 3) -> None:
        self._backbone = backbone
        self._max_blocks = max_blocks
        self._blocks: list[_Block] = []  # most recently used first
        self._weights: list[nn.Parameter] = list(backbone.parameters())
        self._fingerprint: list[tuple[int, int]] = []  # of the weights that the memo belongs to
        self.enabled = self._is_supported()

    def clear(self) -> None:
        """Forget everything."""
        self._blocks = []
        self._weights = list(self._backbone.parameters())

    @torch.inference_mode(False)  # what is remembered may be written to by a later call that is not in that mode
    @torch.no_grad()
    def last_hidden(self, contexts: Contexts) -> torch.Tensor:
        """
        :param contexts: B contexts.
        :return: hidden state at the last token of each [B, H].
        """
        if not self.enabled:
            return self._plain(contexts)
        if self._fingerprint != (now := self._fingerprint_now()):
            self.clear()
            self._fingerprint = now
        try:
            return self._memoised(contexts)
        except BaseException:  # an interrupted update leaves rows half-written: better to forget them
            self.clear()
            raise

    def _fingerprint_now(self) -> list[tuple[int, int]]:
        # No optimiser moves a weight without gradient: a frozen model remembers while others are trained.
        steps = _optimizer_steps if any(p.requires_grad for p in self._weights) else 0
        return [(steps, 0), *((p.data_ptr(), p._version) for p in self._weights)]

    def _memoised(self, contexts: Contexts) -> torch.Tensor:
        block, slots = self._find(contexts)
        if block is not None:
            moved = block.keep(slots[slots >= 0])
            slots = np.where(slots >= 0, moved[slots], -1)
            self._decode(block, contexts, slots)
        if block is None:
            # The first step of a rollout; or a batch to learn from, most of which are the beginnings of a few texts:
            # these are read once, and nobody will go on from each of them.
            input_ids, at = share_prefixes(contexts, self._weights[0].device)
            row = at.row.cpu().numpy()
            longest = np.zeros(len(input_ids), dtype=np.int64)
            np.maximum.at(longest, row, contexts.length)
            if 2 * (contexts.length < longest[row]).sum() > len(row):
                return self._read(input_ids, at)
        if block is None or (slots < 0).any():
            block, slots = self._prefill(block, contexts, slots)
        block.slots = slots
        self._blocks = [block, *(other for other in self._blocks if other is not block)][: self._max_blocks]
        return block.hidden[block.to_torch(slots)]

    def _find(self, contexts: Contexts) -> tuple[_Block | None, np.ndarray]:
        """The block that knows most of these contexts, if there is one, and where in it they are (−1: nowhere)."""
        n, width = contexts.input_ids.shape
        best, best_slots, best_known = None, np.full(n, -1, dtype=np.int64), 0
        for block in self._blocks:
            if block.n_rows < n or block.width != width:
                continue
            slots = block.match(contexts)
            known = int((slots >= 0).sum())
            if known > best_known:
                best, best_slots, best_known = block, slots, known
            if known == n:
                break
        return best, best_slots

    def _decode(self, block: _Block, contexts: Contexts, slots: np.ndarray) -> None:
        """One new token for each row that has grown; the others are carried along, and their answer is thrown away."""
        grows = (slots >= 0) & (contexts.length > block.length[slots])
        n, growing = block.live, slots[grows]
        if len(growing) == 0:
            return
        block.reserve(1)
        column = block.columns
        tokens = np.zeros(n, dtype=np.int64)
        tokens[growing] = contexts.input_ids[grows, contexts.length[grows] - 1]
        positions = block.length[:n] - 1  # rows that wait get their last token's: the model may have none beyond
        positions[growing] += 1
        block.tokens[growing, positions[growing]] = tokens[growing]
        block.length[growing] += 1
        index = slice(0, n) if len(growing) == n else block.to_torch(growing)
        block.visible[index, column] = True
        for layer in block.layers:
            layer.rows = n
        inputs = block.to_torch(np.stack([tokens, positions]))
        # Without a mask, where every row sees every column, attention is faster.
        all_visible = bool((block.length[:n] == column + 1).all())
        hidden = self._backbone(
            input_ids=inputs[0, :, None],
            position_ids=inputs[1, :, None],
            attention_mask=None if all_visible else block.visible[:n, : column + 1].long(),
            past_key_values=Cache(layers=[*block.layers]),
            use_cache=True,
        ).last_hidden_state[:, 0]
        block.hidden[index] = hidden[index]

    def _prefill(self, block: _Block | None, contexts: Contexts, slots: np.ndarray) -> tuple[_Block, np.ndarray]:
        """Whole contexts for the rows that are new, into the columns that end at the newest one."""
        new = np.flatnonzero(slots < 0)
        length = contexts.length[new]
        longest = int(length.max())
        tokens = contexts.input_ids[new, :longest]
        padded = np.where(np.arange(longest) < length[:, None], tokens, tokens[:, :1])
        fresh = DynamicCache()
        hidden = self._backbone(
            input_ids=torch.from_numpy(padded).to(self._weights[0].device), past_key_values=fresh, use_cache=True
        ).last_hidden_state
        like = [(cast(_Layer, layer).keys, cast(_Layer, layer).values) for layer in fresh.layers]
        if block is None:
            block = _Block(len(slots), contexts.input_ids.shape[1], like, hidden)
        # The newest column stays the newest, unless a new context is longer than all columns so far.
        block.reserve(0, longest)
        end = max(block.columns, longest)
        target = block.live + np.arange(len(new))
        row = np.repeat(np.arange(len(new)), length)
        position = np.concatenate([np.arange(n) for n in length])
        from_row, from_column = block.to_torch(row), block.to_torch(position)
        to_row, to_column = block.to_torch(target[row]), block.to_torch(end - length[row] + position)
        for layer, (keys, values) in zip(block.layers, like, strict=True):
            layer.keys.transpose(1, 2)[to_row, to_column] = keys.transpose(1, 2)[from_row, from_column]
            layer.values.transpose(1, 2)[to_row, to_column] = values.transpose(1, 2)[from_row, from_column]
            layer.columns = end
        filled = slice(block.live, block.live + len(new))
        block.visible[filled] = False
        block.visible[to_row, to_column] = True
        block.hidden[filled] = hidden[torch.arange(len(new), device=hidden.device), block.to_torch(length - 1)]
        block.tokens[target] = contexts.input_ids[new]
        block.length[target] = length
        block.first_column[target] = end - length
        block.live += len(new)
        slots = slots.copy()
        slots[new] = target
        return block, slots

    def _plain(self, contexts: Contexts) -> torch.Tensor:
        return self._read(*share_prefixes(contexts, self._weights[0].device))

    def _read(self, input_ids: torch.Tensor, at: Positions) -> torch.Tensor:
        hidden: torch.Tensor = self._backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden[at.row, at.column]

    def _is_supported(self) -> bool:
        """Plain attention in every layer, positions that can be told, and the proof on a small example."""
        config = cast(PreTrainedModel, self._backbone).config.get_text_config()
        parameters = inspect.signature(self._backbone.forward).parameters
        reason = ""
        if not {"past_key_values", "attention_mask"} <= set(parameters):
            reason = "its forward pass takes no past_key_values or attention_mask"
        elif any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
            reason = "not all of its layers are full attention"
        else:
            try:
                error = self._probe()
            except Exception as problem:  # whatever an unknown architecture does: it has a correct path without memo
                reason = f"the memo's probe failed ({type(problem).__name__}: {problem})"
            else:
                tolerance = 1e-3 if self._weights[0].dtype in (torch.float32, torch.float64) else 0.1
                if not error <= tolerance:
                    reason = f"memoised and plain hidden states differ by {error:.1e}"
        self.clear()
        if reason:
            warnings.warn(
                f"{type(self._backbone).__name__} is run without prefix cache: {reason}. Results are the same, "
                "generation is slower.",
                stacklevel=4,
            )
        return not reason

    @torch.no_grad()
    def _probe(self) -> float:
        """Largest relative difference between memoised and plain hidden states over a few steps with a restart."""
        self.enabled = True
        vocabulary: int = self._backbone.config.get_text_config().vocab_size  # type: ignore[operator,union-attr]
        tokens = (np.arange(3 * 8).reshape(3, 8) * 5 + 1) % min(11, vocabulary)
        worst = 0.0
        for lengths in ([2, 3, 1], [3, 4, 2], [4, 2, 3], [5, 3, 4]):
            length = np.array(lengths)
            contexts = Contexts(tokens, length, length)
            expected = self._plain(contexts).float()
            actual = self.last_hidden(contexts).float()
            worst = max(worst, float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)))
        return worst
