"""Which contexts the prefix cache holds, wholly or in part. This half of the cache works on token ids in NumPy; the
keys and values are in ``cache_storage``.

Notation: B contexts of a call, L columns of an observation, S slots.
"""

from __future__ import annotations

import numpy as np

from text_env.constraints import Contexts


class KnownContexts:
    """The contexts whose keys and values a block of the cache holds, one per slot. The slots in use, called live, are
    the first ``live`` ones.

    :param n_slots: the number of slots.
    :param width: the number L of columns of an observation, which is the length of the longest context.
    """

    def __init__(self, n_slots: int, width: int) -> None:
        self.n_slots = n_slots
        self.width = width
        self.live = 0
        self.tokens = np.zeros((n_slots, width), dtype=np.int64)
        self.columns = np.zeros((n_slots, width), dtype=np.int64)
        """The column of the storage in which each token's keys and values are."""
        self.length = np.zeros(n_slots, dtype=np.int64)
        self.latest = np.zeros(0, dtype=np.int64)
        """The slots of the contexts of the latest call, in the order of the contexts."""

    def match(self, contexts: Contexts) -> np.ndarray:
        """For each context, find a slot that holds the context or a beginning of it. No slot is given twice.

        :param contexts: B contexts.
        :return: int64 [B], the slots, −1 where there is none.
        """
        input_ids, length, _ = contexts
        if len(length) == len(self.latest):
            # The usual case: every context is the one of the latest call or extends it, in the same order.
            held = self.length[self.latest]
            columns = np.arange(int(held.max()))
            same = (input_ids[:, columns] == self.tokens[np.ix_(self.latest, columns)]) | (columns >= held[:, None])
            if (length >= held).all() and same.all():
                return self.latest
        # Rows were dropped, restarted or reordered. Several slots may hold the same context: episodes of one prompt.
        slots_of: dict[bytes, list[int]] = {}
        for slot in range(self.live):
            slots_of.setdefault(self.tokens[slot, : self.length[slot]].tobytes(), []).append(slot)
        found = np.full(len(length), -1, dtype=np.int64)
        for i, n in enumerate(length):
            slots = slots_of.get(input_ids[i, : n - 1].tobytes()) or slots_of.get(input_ids[i, :n].tobytes())
            if slots:
                found[i] = slots.pop(0)
        free = np.array(sorted(slot for slots in slots_of.values() for slot in slots), dtype=np.int64)
        for i in np.flatnonzero(found < 0).tolist():
            if len(free) == 0:
                break
            shared = self.shared_prefix(input_ids[i, : length[i]], free)
            whole = np.where(shared == self.length[free], shared, 0)
            if whole.max() > 0:
                best = int(whole.argmax())
                found[i] = free[best]
                free = np.delete(free, best)
        return found

    def shared_prefix(self, tokens: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """
        :param tokens: int64 [n], the token ids of a context.
        :param slots: int64 [S], live slots.
        :return: int64 [S], the number of tokens that the context and the contents of each slot have in common at their
            start.
        """
        n = min(len(tokens), self.width)
        same = (self.tokens[slots, :n] == tokens[:n]) & (np.arange(n) < self.length[slots, None])
        shared: np.ndarray = np.where(same.all(axis=1), n, same.argmin(axis=1))
        return shared

    def keep(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Forget every slot but these, and move the last slots into the gaps.

        :param slots: int64, the slots to keep.
        :return: the slots that move, int64; the slots that they move to, int64; and the new slot of each old one, int64
            [n_slots].
        """
        moved = np.arange(self.n_slots)
        holes = np.setdiff1d(np.arange(self.live), slots)
        kept = self.live - len(holes)
        sources = np.setdiff1d(np.arange(kept, self.live), holes)
        targets = holes[holes < kept]
        for array in (self.tokens, self.length, self.columns):
            array[targets] = array[sources]
        moved[sources] = targets
        self.live = kept
        return sources, targets, moved

    def append(self, slots: np.ndarray, tokens: np.ndarray, column: int) -> None:
        """Append one token to each of these slots, all in the same new column.

        :param slots: int64 [S], different live slots.
        :param tokens: int64 [S], token ids.
        :param column: the column of the storage.
        """
        position = self.length[slots]
        self.tokens[slots, position] = tokens
        self.columns[slots, position] = column
        self.length[slots] += 1

    def put(self, slots: np.ndarray, contexts: Contexts, end: int) -> np.ndarray:
        """Put whole contexts into slots, such that their last tokens stand in the newest column.

        :param slots: int64 [B], live slots, or those right behind them.
        :param contexts: B contexts.
        :param end: the number of columns in use.
        :return: int64 [B], the column of each context's first token.
        """
        first: np.ndarray = end - contexts.length
        self.tokens[slots] = contexts.input_ids
        self.columns[slots] = first[:, None] + np.arange(self.width)
        self.length[slots] = contexts.length
        self.live = max(self.live, int(slots.max()) + 1)
        return first


def distinct(contexts: Contexts) -> tuple[np.ndarray, np.ndarray]:
    """Find the contexts that are the same.

    :param contexts: B contexts.
    :return: the index of the first context of each kind, int64, in the order of the contexts; and the number of each
        context's kind, int64 [B].
    """
    number: dict[bytes, int] = {}
    first, kind = [], np.empty(len(contexts.length), dtype=np.int64)
    for i, n in enumerate(contexts.length):
        key = contexts.input_ids[i, :n].tobytes()
        if key not in number:
            number[key] = len(number)
            first.append(i)
        kind[i] = number[key]
    return np.array(first), kind


def common_prefix(contexts: Contexts) -> int:
    """
    :param contexts: B contexts.
    :return: the number of tokens that all of them have in common at their start, at most one less than the shortest
        has.
    """
    n = int(contexts.length.min()) - 1
    alike = (contexts.input_ids[:, :n] == contexts.input_ids[0, :n]).all(axis=0)
    return n if alike.all() else int(alike.argmin())
