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
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from agents.contexts import Contexts, share_prefixes

SPARE_COLUMNS = 64


class _Layer(CacheLayerMixin):
    """Keys and values of one attention layer: storage made in advance, of which the first n rows, t columns are in use."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.columns = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("storage is made by the first prefill")

    def write(self, rows: torch.Tensor, columns: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [N, heads, head_dim] of N tokens at the given rows and columns."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.transpose(1, 2)[rows, columns] = keys
        self.values.transpose(1, 2)[rows, columns] = values

    def reserve(self, like_keys: torch.Tensor, like_values: torch.Tensor, rows: int, columns: int, drop: int) -> None:
        """Make room for ``rows`` × ``columns``, leaving behind the first ``drop`` columns."""
        old_keys, old_values, kept = self.keys, self.values, max(0, self.columns - drop)
        self.keys = like_keys.new_zeros(rows, like_keys.shape[1], columns, like_keys.shape[3])
        self.values = like_values.new_zeros(rows, like_values.shape[1], columns, like_values.shape[3])
        if old_keys is not None and old_values is not None and kept:
            self.keys[: len(old_keys), :, :kept] = old_keys[:, :, drop : drop + kept]
            self.values[: len(old_values), :, :kept] = old_values[:, :, drop : drop + kept]
        self.columns = kept

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        new = slice(self.columns, self.columns + key_states.shape[-2])
        self.keys[: self.rows, :, new] = key_states
        self.values[: self.rows, :, new] = value_states
        self.columns = new.stop
        return self.keys[: self.rows, :, : new.stop], self.values[: self.rows, :, : new.stop]

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
    """

    def __init__(self, n_rows: int, width: int) -> None:
        self.n_rows = n_rows
        self.live = 0
        self.tokens = np.zeros((n_rows, width), dtype=np.int64)
        self.length = np.zeros(n_rows, dtype=np.int64)
        self.first_column = np.zeros(n_rows, dtype=np.int64)
        self.slots = np.zeros(0, dtype=np.int64)  # where the rows of the latest call are
        self.layers: list[_Layer] = []
        self.hidden: torch.Tensor | None = None  # [n_rows, H], at each row's last token
        self.visible: torch.Tensor | None = None  # bool [n_rows, columns]

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
            assert self.hidden is not None
            assert self.visible is not None
            source, target = (torch.from_numpy(x).to(self.hidden.device) for x in (sources, targets))
            for layer in self.layers:
                assert layer.keys is not None
                assert layer.values is not None
                layer.keys[target, :, : layer.columns] = layer.keys[source, :, : layer.columns]
                layer.values[target, :, : layer.columns] = layer.values[source, :, : layer.columns]
            self.hidden[target] = self.hidden[source]
            self.visible[target] = self.visible[source]
            for array in (self.tokens, self.length, self.first_column):
                array[targets] = array[sources]
            moved[sources] = targets
        self.live = kept
        return moved

    def reserve(self, like: list[tuple[torch.Tensor, torch.Tensor]], columns: int, drop: int = 0) -> None:
        """Make room for so many columns, counted after leaving behind the first ``drop`` ones.

        :param like: keys and values of each layer, for shapes, dtype and device.
        """
        # At least as many spare columns as used ones: moving what is kept then costs O(1) columns a call.
        capacity = columns + max(SPARE_COLUMNS, columns)
        if not self.layers:
            self.layers = [_Layer() for _ in like]
        for layer, (keys, values) in zip(self.layers, like, strict=True):
            layer.reserve(keys, values, self.n_rows, capacity, drop)
        visible = torch.zeros(self.n_rows, capacity, dtype=torch.bool, device=like[0][0].device)
        if self.visible is not None:
            kept = self.layers[0].columns
            visible[:, :kept] = self.visible[:, drop : drop + kept]
        self.visible = visible
        self.first_column -= drop

    @property
    def columns(self) -> int:
        """Columns in use."""
        return self.layers[0].columns if self.layers else 0

    @property
    def capacity(self) -> int:
        return self.visible.shape[1] if self.visible is not None else 0


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
        self._fingerprint: list[tuple[int, int]] = []
        self.enabled = self._is_supported()

    def clear(self) -> None:
        """Forget everything."""
        self._blocks = []
        self._weights = list(self._backbone.parameters())

    @torch.no_grad()
    def last_hidden(self, contexts: Contexts) -> torch.Tensor:
        """
        :param contexts: B contexts.
        :return: hidden state at the last token of each [B, H].
        """
        if not self.enabled:
            return self._plain(contexts)
        fingerprint = [(p.data_ptr(), p._version) for p in self._weights]
        if fingerprint != self._fingerprint:
            self.clear()
            self._fingerprint = [(p.data_ptr(), p._version) for p in self._weights]
        block, slots = self._find(contexts)
        moved = block.keep(slots[slots >= 0])
        slots = np.where(slots >= 0, moved[slots], -1)
        known = slots >= 0
        grows = np.zeros(len(slots), dtype=bool)
        grows[known] = contexts.length[known] > block.length[slots[known]]
        if grows.any():
            self._decode(block, contexts, slots, grows)
        if not known.all():
            slots = self._prefill(block, contexts, slots)
        block.slots = slots
        assert block.hidden is not None
        if len(slots) == block.live and (slots == np.arange(block.live)).all():
            return block.hidden[: block.live].clone()
        return block.hidden[torch.from_numpy(slots).to(block.hidden.device)]

    def _find(self, contexts: Contexts) -> tuple[_Block, np.ndarray]:
        """The block that knows most of these contexts, or a new one."""
        n, width = contexts.input_ids.shape
        best, best_slots, best_known = None, np.full(n, -1, dtype=np.int64), 0
        for block in self._blocks:
            if block.n_rows < n or block.tokens.shape[1] != width:
                continue
            slots = block.match(contexts)
            known = int((slots >= 0).sum())
            if known > best_known:
                best, best_slots, best_known = block, slots, known
            if known == n:
                break
        if best is None:
            best = _Block(n, width)
            self._blocks = self._blocks[: self._max_blocks - 1]
        else:
            self._blocks.remove(best)
        self._blocks.insert(0, best)
        return best, best_slots

    def _decode(self, block: _Block, contexts: Contexts, slots: np.ndarray, grows: np.ndarray) -> None:
        """One new token for each growing row; the others are carried along and their answer is thrown away."""
        assert block.hidden is not None
        n, growing = block.live, slots[grows]
        if block.columns == block.capacity:
            # Columns on the left that no live row sees any more are dropped.
            dead = int(block.first_column[:n].min())
            like = [(layer.keys, layer.values) for layer in block.layers]
            block.reserve(like, block.columns - dead + 1, dead)  # type: ignore[arg-type]
        assert block.visible is not None
        column = block.columns
        tokens = np.zeros(n, dtype=np.int64)
        tokens[growing] = contexts.input_ids[grows, contexts.length[grows] - 1]
        block.tokens[growing, block.length[growing]] = tokens[growing]
        positions = block.length[:n].copy()
        block.length[growing] += 1
        device = block.hidden.device
        everything = len(growing) == n
        index = slice(0, n) if everything else torch.from_numpy(growing).to(device)
        block.visible[index, column] = True
        for layer in block.layers:
            layer.rows = n
        nothing_hidden = everything and not block.first_column[:n].any() and (block.length[:n] == column + 1).all()
        inputs = torch.from_numpy(np.stack([tokens, positions])).to(device)
        # A row that isn't growing must still see something: a softmax over nothing is NaN.
        mask = None if nothing_hidden else block.visible[:n, : column + 1]
        hidden = self._backbone(
            input_ids=inputs[0, :, None],
            position_ids=inputs[1, :, None],
            attention_mask=None if mask is None else mask.long(),
            past_key_values=Cache(layers=block.layers),
            use_cache=True,
        ).last_hidden_state[:, 0]
        block.hidden[index] = hidden[index]

    def _prefill(self, block: _Block, contexts: Contexts, slots: np.ndarray) -> np.ndarray:
        """Whole contexts for the rows that are new, into the columns that end at the newest one."""
        new = np.flatnonzero(slots < 0)
        length = contexts.length[new]
        tokens = contexts.input_ids[new, : length.max()]
        padded = np.where(np.arange(length.max()) < length[:, None], tokens, tokens[:, :1])
        sequences = torch.from_numpy(padded).to(self._weights[0].device)
        fresh = DynamicCache()
        hidden = self._backbone(input_ids=sequences, past_key_values=fresh, use_cache=True).last_hidden_state
        like = [(layer.keys, layer.values) for layer in fresh.layers]
        if block.live == 0:
            for layer in block.layers:
                layer.columns = 0
        # The newest column stays the newest, unless a new context is longer than all columns so far.
        end = max(block.columns, int(length.max()))
        if end > block.capacity:
            block.reserve(like, end)
        target = block.live + np.arange(len(new))
        row = np.repeat(np.arange(len(new)), length)
        position = np.concatenate([np.arange(n) for n in length])
        column = end - length[row] + position
        at_row, at_column = (torch.from_numpy(x).to(sequences.device) for x in (row, position))
        to_row, to_column = (torch.from_numpy(x).to(sequences.device) for x in (target[row], column))
        for layer, (keys, values) in zip(block.layers, like, strict=True):
            layer.write(
                to_row,
                to_column,
                keys.transpose(1, 2)[at_row, at_column],
                values.transpose(1, 2)[at_row, at_column],
            )
            layer.columns = end
        assert block.visible is not None
        if block.hidden is None:
            block.hidden = hidden.new_zeros(block.n_rows, hidden.shape[-1])
        block.visible[torch.from_numpy(target).to(sequences.device)] = False
        block.visible[to_row, to_column] = True
        ends = torch.from_numpy(length - 1).to(sequences.device)
        block.hidden[torch.from_numpy(target).to(sequences.device)] = hidden[
            torch.arange(len(new), device=ends.device), ends
        ]
        block.tokens[target] = contexts.input_ids[new]
        block.length[target] = length
        block.first_column[target] = end - length
        block.live += len(new)
        slots = slots.copy()
        slots[new] = target
        return slots

    def _plain(self, contexts: Contexts) -> torch.Tensor:
        input_ids, at = share_prefixes(contexts, self._weights[0].device)
        hidden: torch.Tensor = self._backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden[at.row, at.column]

    def _is_supported(self) -> bool:
        """Plain attention in every layer, positions that can be told, and the proof on a small example."""
        config = self._backbone.config.get_text_config()
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
        self._fingerprint = [(p.data_ptr(), p._version) for p in self._weights]
        tokens = (np.arange(3 * 8).reshape(3, 8) * 5 + 1) % 11
        worst = 0.0
        for lengths in ([2, 3, 1], [3, 4, 2], [4, 2, 3], [5, 3, 4]):
            length = np.array(lengths)
            contexts = Contexts(tokens, length, length)
            expected = self._plain(contexts).float()
            actual = self.last_hidden(contexts).float()
            worst = max(worst, float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)))
        return worst
