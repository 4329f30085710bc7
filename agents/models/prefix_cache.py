"""The cache of the policy: keys and values of contexts that were read before.

``last_hidden(contexts)`` is a pure function, whatever is cached. A context that extends an earlier one by k tokens
costs a forward pass over those k tokens only, and a beginning that several contexts share is read once. Which context
extends which is found by comparing token ids, not by flags such as the end of an episode. So rows may restart at any
time, and calls of a rollout and of an evaluation may alternate: each of the two continues its own block.

A block stores the contexts of one stream of calls, one per row. Every call adds a column, or several where a row needs
them, and the last token of each row stands in the newest column. Rows that have grown by one token are read in place,
all in one forward pass. A row that is new, or has grown by several tokens, is read separately, on top of a copy of the
keys and values of its known beginning, and is then copied into the columns that end at the newest one. The mask
``visible`` hides from each row the columns that are not its own. Position ids are passed explicitly, so the column of a
token makes no difference to the model. Rows that are missing from a call are forgotten, and the last rows are moved
into their places. So the live rows are always the first n, and finished rows cost nothing.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from agents.models.cache_storage import Beginning, Block, CacheLayer, Reading
from agents.models.causal_lm import Positions
from agents.models.context_matching import common_prefix, distinct
from agents.models.contexts import Contexts, maximal_sequences, share_prefixes
from agents.models.decoding import CACHE_ARGUMENT, CAPTURES, DECODE_MODES, Decoder, Launch, launch_for, sizes_told_apart
from agents.models.transfers import to_device
from agents.models.weights import WeightsWatch

# Reading rows on top of their known beginnings takes a forward pass of its own, which is worth while if it saves this
# many tokens.
WORTH_A_PASS = 8


class PrefixCache:
    """Last hidden states of token contexts, with keys and values cached between calls.

    If the model can't be cached correctly, which is checked on a small example, a warning says why, and every context
    is read as a whole.

    :param backbone: a Hugging Face decoder without a head. Whenever its weights have changed, the cache is emptied.
    :param max_blocks: the number of alternating streams of calls that are cached. The least recently used one is
        dropped.
    :param decode: how rows that have grown by one token are read, which is nearly all that a rollout does: "eager", or
        "compiled" by ``torch.compile`` and, on CUDA, captured into graphs (see :mod:`agents.models.decoding`). "auto"
        is "compiled" on CUDA and "eager" elsewhere. Where "compiled" isn't possible, or doesn't give the same results
        on a small example, a warning says why, and they are read as with "eager".
    :raises ValueError: if ``decode`` is none of these.
    """

    def __init__(self, backbone: nn.Module, max_blocks: int = 3, decode: str = "auto") -> None:
        if decode not in DECODE_MODES:
            raise ValueError(f"Expected decode to be one of {DECODE_MODES}, got {decode!r}.")
        self._backbone = backbone
        self._max_blocks = max_blocks
        self._decode_mode = decode
        self._blocks: list[Block] = []  # most recently used first
        self._unused: list[Block] = []  # whose storage is used again, since graphs of the device are bound to it
        self._weights = WeightsWatch(backbone)
        self._decoder = Decoder(backbone, self._weights)
        self._launches: dict[Any, Launch] = {}  # the one that was found to be right, by device and precision
        self.enabled = self._is_supported()

    def clear(self) -> None:
        """Empty the cache."""
        self._drop(self._blocks)
        self._blocks = []
        self._weights.forget()

    def release(self) -> None:
        """Empty the cache, and free the storage that :meth:`clear` keeps for the next contexts."""
        self.clear()
        self._unused = []

    def _drop(self, blocks: list[Block]) -> None:
        """Let go of blocks, but not of storage that must stay where it is."""
        if self._decoder.launch == "captured":
            self._unused = [*blocks, *self._unused][: self._max_blocks]

    def _new_block(self, n_rows: int, width: int, like: Reading) -> Block:
        columns = self._decoder.storage_columns(width)
        for i, block in enumerate(self._unused):
            if block.suits(n_rows, width, like, columns):
                del self._unused[i]
                block.forget()
                return block
        return Block(n_rows, width, like, columns)

    @torch.inference_mode(False)  # a later call outside inference mode may write to the cached tensors
    @torch.no_grad()
    def last_hidden(self, contexts: Contexts) -> torch.Tensor:
        """
        :param contexts: B contexts.
        :return: the hidden state at the last token of each context, [B, H].
        """
        if not self.enabled:
            return self._plain(contexts)
        if self._weights.changed():
            self._drop(self._blocks)
            self._blocks = []
        try:
            if self._decode_mode == "compiled" or (
                self._decode_mode == "auto" and self._weights.device.type in CAPTURES
            ):
                self._choose_launch()
            else:  # it may have been on another device
                self._decoder.launch = "eager"
            return self._memoised(contexts)
        except BaseException:  # an interrupted call may leave rows half-written
            self.clear()
            raise

    def _memoised(self, contexts: Contexts) -> torch.Tensor:
        block, slots = self._find(contexts)
        if block is None:
            # Either the first step of a rollout, or a batch to learn from. Most contexts of the latter are beginnings
            # of a few texts, and no later call extends them, so they are read without being cached.
            sequences, row = maximal_sequences(contexts)
            longest = np.zeros(len(sequences), dtype=np.int64)
            np.maximum.at(longest, row, contexts.length)
            if 2 * (contexts.length < longest[row]).sum() > len(row):
                return self._plain(contexts)
        held = np.zeros(len(slots), dtype=np.int64)
        in_place = np.zeros(len(slots), dtype=np.bool_)
        if block is not None:
            held = block.known.length[slots]
            # A row that has waited while others grew would have a gap before its next token. Some models measure
            # distances in columns, whatever the position ids say.
            newest = block.known.columns[slots, held - 1] == block.columns - 1
            in_place = (slots >= 0) & (contexts.length <= held + newest)
        apart = np.flatnonzero(~in_place)
        readings: list[tuple[np.ndarray, Reading, np.ndarray]] = []
        if len(apart):  # before any row is moved or forgotten, since these contexts may share its beginning
            readings = self._read_apart(_chosen(contexts, apart), block, slots[apart])
        if block is None:
            block = self._new_block(len(slots), contexts.input_ids.shape[1], readings[0][1])
        else:
            moved = block.keep(slots[slots >= 0])
            slots = np.where(slots >= 0, moved[slots], -1)
            grows = np.flatnonzero(in_place & (contexts.length == held + 1))
            if len(grows):
                self._decode(block, contexts, slots, grows)
        if len(apart):
            slots = slots.copy()
            new = slots < 0
            slots[new] = block.known.live + np.arange(new.sum())
            # The newest column stays the same, unless a new context has more tokens than there are columns.
            longest_new = int(contexts.length[apart].max())
            block.extend_to(longest_new)
            for part, reading, rows in readings:
                chosen = apart[part]
                block.put(slots[chosen], _chosen(contexts, chosen), reading, rows)
        block.known.latest = slots
        blocks = [block, *(other for other in self._blocks if other is not block)]
        self._blocks = blocks[: self._max_blocks]
        self._drop(blocks[self._max_blocks :])
        return block.hidden[block.index(slots)]

    def _find(self, contexts: Contexts) -> tuple[Block | None, np.ndarray]:
        """The block that holds most of these contexts, None if there is none; and the slot of each context in it, −1
        where it is new.
        """
        n, width = contexts.input_ids.shape
        best, best_slots, best_known = None, np.full(n, -1, dtype=np.int64), 0
        for block in self._blocks:
            if block.known.n_slots < n or block.known.width != width:
                continue
            slots = block.known.match(contexts)
            known = int((slots >= 0).sum())
            if known > best_known:
                best, best_slots, best_known = block, slots, known
            if known == n:
                break
        return best, best_slots

    def _decode(self, block: Block, contexts: Contexts, slots: np.ndarray, grows: np.ndarray) -> None:
        """Read the new token of each row that has grown by one, and ignore the output of the other live rows."""
        known, growing = block.known, slots[grows]
        n = known.live
        block.reserve(1)
        column = block.columns
        tokens = np.zeros(n, dtype=np.int64)
        tokens[growing] = contexts.input_ids[grows, contexts.length[grows] - 1]
        positions = known.length[:n] - 1  # rows that don't grow keep their last one, which is sure to exist
        positions[growing] += 1
        known.append(growing, tokens[growing], column)
        if len(growing) == n:
            index: slice | torch.Tensor = slice(0, n)
            block.visible[:n, column].fill_(True)
        else:
            index = block.index(growing)
            block.visible[index, column] = True
        hidden = self._decoder(block, tokens, positions)
        block.hidden[index] = hidden[index]

    def _read_apart(
        self, contexts: Contexts, block: Block | None, slots: np.ndarray
    ) -> list[tuple[np.ndarray, Reading, np.ndarray]]:
        """Read contexts that are new or have grown by several tokens, each different one once.

        :param contexts: B contexts.
        :param block: the block that holds the beginnings of those that have grown; None if all are new.
        :param slots: int64 [B], the slot of each context in the block; −1 for a new context.
        :return: for each forward pass the indices of its contexts, the reading, and the row of each context in the
            reading.
        """
        first, kind = distinct(contexts)
        kinds = _chosen(contexts, first)
        beginnings = [self._beginning(kinds, i, block, int(slots[first[i]])) for i in range(len(first))]
        forked = [beginnings[i] for i in np.flatnonzero(slots[first] < 0) if beginnings[i] is not None]
        if sum(len(beginning.columns) for beginning in forked if beginning is not None) < WORTH_A_PASS:
            beginnings = [b if slots[first[i]] >= 0 else None for i, b in enumerate(beginnings)]
        fresh = np.array([i for i, beginning in enumerate(beginnings) if beginning is None], dtype=np.int64)
        passes: list[tuple[np.ndarray, Reading]] = []
        if len(fresh):
            news = _chosen(kinds, fresh)
            shared = common_prefix(news)
            if 2 * shared >= int(news.length.max()) and (len(fresh) - 1) * shared >= WORTH_A_PASS:
                one = Contexts(news.input_ids[:1], np.array([shared]), news.step[:1])
                prefix = self._read_whole(one)
                for i in fresh:
                    beginnings[i] = Beginning(prefix.layers, 0, np.arange(shared))
            else:
                passes.append((fresh, self._read_whole(news)))
        known = np.array([i for i, beginning in enumerate(beginnings) if beginning is not None], dtype=np.int64)
        if len(known):
            on_top_of = [beginning for beginning in beginnings if beginning is not None]
            passes.append((known, self._read_rest(_chosen(kinds, known), on_top_of)))
        readings = []
        for numbers, reading in passes:
            part = np.flatnonzero(np.isin(kind, numbers))
            readings.append((part, reading, np.searchsorted(numbers, kind[part])))
        return readings

    def _beginning(self, contexts: Contexts, i: int, block: Block | None, slot: int) -> Beginning | None:
        """The known part of a context: the row that it extends or, for a new context, the longest match in any row."""
        if block is not None and slot >= 0:
            return block.beginning(slot, int(block.known.length[slot]))
        n = int(contexts.length[i])
        best, longest = None, 0
        for other in self._blocks:
            shared = other.known.shared_prefix(contexts.input_ids[i, :n], np.arange(other.known.live))
            if len(shared) and (length := min(int(shared.max()), n - 1)) > longest:
                best, longest = (other, int(shared.argmax())), length
        # Copying less than half of a context is not worth while.
        return best[0].beginning(best[1], longest) if best is not None and 2 * longest >= n else None

    def _read_whole(self, contexts: Contexts) -> Reading:
        """One forward pass over whole contexts, right-padded, since causal attention never looks at padding there."""
        input_ids, length = contexts.input_ids, contexts.length
        columns = np.arange(int(length.max()))
        # Padding repeats the first token, since some models search their inputs for the pad token, and warn.
        padded = np.where(columns < length[:, None], input_ids[:, columns], input_ids[:, :1])
        fresh = DynamicCache()
        tokens, row, last = to_device(self._weights.device, padded, np.arange(len(length)), length - 1)
        hidden = self._backbone(input_ids=tokens, use_cache=True, **{CACHE_ARGUMENT: fresh}).last_hidden_state
        layers = [(cast(CacheLayer, layer).keys, cast(CacheLayer, layer).values) for layer in fresh.layers]
        return Reading(layers, np.zeros_like(length), hidden[row, last])

    def _read_rest(self, contexts: Contexts, beginnings: list[Beginning]) -> Reading:
        """One forward pass over what follows known beginnings, on top of a copy of their keys and values."""
        length = contexts.length
        device = self._weights.device
        held = np.array([len(beginning.columns) for beginning in beginnings])
        most, rest = int(held.max()), length - held
        layers = []
        for keys, values in beginnings[0].layers:
            shape = (len(length), keys.shape[1], most + int(rest.max()))
            layers.append(CacheLayer(keys.new_zeros(*shape, keys.shape[3]), values.new_zeros(*shape, values.shape[3])))
        for storage in {id(beginning.layers[0][0]): beginning.layers for beginning in beginnings}.values():
            rows = [i for i, beginning in enumerate(beginnings) if beginning.layers[0][0] is storage[0][0]]
            index = (
                np.repeat([beginnings[i].row for i in rows], held[rows]),
                np.concatenate([beginnings[i].columns for i in rows]),
                np.repeat(rows, held[rows]),
                np.concatenate([np.arange(most - held[i], most) for i in rows]),
            )
            from_row, from_column, to_row, to_column = to_device(device, *index)
            for layer, (keys, values) in zip(layers, storage, strict=True):
                layer.keys.transpose(1, 2)[to_row, to_column] = keys.transpose(1, 2)[from_row, from_column]
                layer.values.transpose(1, 2)[to_row, to_column] = values.transpose(1, 2)[from_row, from_column]
        for layer in layers:
            layer.rows, layer.columns = len(length), most
        # The new tokens are right-padded. Beginnings that are shorter than the longest one are padded on the left.
        position = np.minimum(held[:, None] + np.arange(int(rest.max())), length[:, None] - 1)
        tokens = np.take_along_axis(contexts.input_ids, position, axis=1)
        mask = np.arange(most + int(rest.max())) >= (most - held)[:, None]
        token, place, seen, row, last = to_device(
            device, tokens, position, mask.astype(np.int64), np.arange(len(length)), rest - 1
        )
        hidden = self._backbone(
            input_ids=token,
            position_ids=place,
            attention_mask=seen,
            **{CACHE_ARGUMENT: Cache(layers=[*layers])},
            use_cache=True,
        ).last_hidden_state
        return Reading([(layer.keys, layer.values) for layer in layers], most - held, hidden[row, last])

    def _plain(self, contexts: Contexts) -> torch.Tensor:
        return self._read(*share_prefixes(contexts, self._weights.device))

    def _read(self, input_ids: torch.Tensor, at: Positions) -> torch.Tensor:
        hidden: torch.Tensor = self._backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden[at.row, at.column]

    def _is_supported(self) -> bool:
        """Whether all layers are plain attention with cache and mask, and a small example gives the right result."""
        config = cast(PreTrainedModel, self._backbone).config.get_text_config()
        parameters = inspect.signature(self._backbone.forward).parameters
        reason = ""
        if not {CACHE_ARGUMENT, "attention_mask"} <= set(parameters):
            reason = f"its forward pass takes no {CACHE_ARGUMENT} or attention_mask"
        elif (
            any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers)
            or "local" in (getattr(config, "attention_layers", None) or ())  # GPT-Neo's own way to say it
        ):
            reason = "not all of its layers are full attention"
        else:
            for self._decoder.ready_masks in (True, False):  # some models read positions from a mask of two dimensions
                self.clear()
                if not (reason := self._fault()):
                    break
        self.clear()
        if reason:
            warnings.warn(
                f"{type(self._backbone).__name__} is run without prefix cache: {reason}. Results are the same, "
                "generation is slower.",
                stacklevel=4,
            )
        return not reason

    def _choose_launch(self) -> None:
        """Launch decode steps as suits the device, if that works in this precision and is right."""
        where = (self._weights.device, self._weights.dtype, self._weights.autocast)
        if where not in self._launches:
            blocks, self._blocks = self._blocks, []
            self._decoder.launch = launch = launch_for(self._weights.device)
            with sizes_told_apart(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler warns of its own modules
                reason = self._fault()
            self._blocks, self._unused = blocks, []
            self._launches[where] = "eager" if reason else launch
            if reason:
                warnings.warn(
                    f"{type(self._backbone).__name__} can't decode as decode='compiled' asks for, and does so as with "
                    f"'eager': {reason}. Results are the same, generation is slower.",
                    stacklevel=6,
                )
        self._decoder.launch = self._launches[where]

    def _fault(self) -> str:
        """What is wrong with cached hidden states of a small example; nothing if they are the plain ones."""
        try:
            errors = self._probe()
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # whatever an unknown architecture raises, it can be run without the cache
            return f"the memo's probe failed ({type(problem).__name__}: {problem})"
        rough = self._weights.dtype not in (torch.float32, torch.float64) or self._weights.autocast is not None
        # In 16 bits a context of two rare words may come out anyhow, but not most contexts. (SmolLM2-135M in bfloat16:
        # the median is 0.02 and the largest 0.3; with positions that are off by one, the median is 0.11.)
        typical, worst = errors.median().item(), errors.max().item()
        right = typical <= 0.05 and worst <= 0.5 if rough else worst <= 1e-3
        return "" if right else f"memoised and plain hidden states differ by {typical if rough else worst:.1e}"

    @torch.inference_mode(False)
    @torch.no_grad()
    def _probe(self) -> torch.Tensor:
        """The relative differences between cached and plain hidden states, one for each context of a few calls, among
        them a restart, a row that grows by several tokens, and rows that share the beginning of another one.
        """
        vocabulary: int = self._backbone.config.get_text_config().vocab_size  # type: ignore[operator,union-attr]
        # From the whole vocabulary: texts of special tokens alone make more of rounding than a mistake makes elsewhere.
        tokens = np.random.default_rng(0).integers(vocabulary, size=(3, 8))
        branches = np.repeat(tokens[:1], 3, axis=0)
        branches[1:, 4] = [(tokens[0, 4] + 1) % vocabulary, (tokens[0, 4] + 2) % vocabulary]
        errors = []
        for input_ids, calls in (
            (tokens, ([2, 3, 1], [3, 4, 2], [5, 2, 2], [5, 3, 3])),
            (branches, ([5, 5, 5],)),
        ):
            whole = torch.from_numpy(input_ids[:, :5].copy()).to(self._weights.device)
            expected = self._backbone(input_ids=whole, use_cache=False).last_hidden_state.float()
            for lengths in calls:
                length = np.array(lengths)
                actual = self._memoised(Contexts(input_ids, length, length)).float()
                plain = expected[torch.arange(3), torch.from_numpy(length - 1)]
                errors.append((actual - plain).norm(dim=-1) / plain.norm(dim=-1).clamp(min=1e-6))
        return torch.cat(errors)


def _chosen(contexts: Contexts, index: np.ndarray) -> Contexts:
    return Contexts(*(array[index] for array in contexts))
