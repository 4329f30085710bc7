"""Stop strings: whether a text holds one of them, told from its last tokens wherever that is certain.

Decoding the whole text after every token takes longer than all else that a step does, once texts are long. A text that
held no stop string before its last token can hold one now only where that token has changed it, which is at the end.
What the end of a text reads like does not depend on what stands before, from a token on that is *clean*: in every
context it stands for the same whole characters. A token is not clean if it is a part of a character (in a run of single
bytes, whether they make up characters depends on all of them), or a special token, which is no part of the text. A
single byte of a byte-fallback vocabulary is not clean even where it is a whole character: an unfinished character
behind it makes both unreadable.

Most tokens need no look at the text at all: what they add to it can't be the end of a stop string, whatever stands
before. Which tokens may end one is worked out when they are first met.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from text_env.tokenization import decode, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNKNOWN_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_SINGLE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how a byte-fallback vocabulary spells it


class StopStrings:
    """The stop strings of an environment.

    :param strings: the stop strings, not empty.
    :param tokenizer: the tokenizer of the texts.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        self._overlap = max(map(len, self.strings)) - 1  # characters of a stop string that may be older than its last
        self._local = decodes_locally(tokenizer)
        self._texts: dict[int, str] = {}  # what each clean token stands for within a text, "" for those that are not
        vocabulary = vocabulary_size(tokenizer)
        self._met = np.zeros(vocabulary, np.bool_)  # those that are in `_texts`
        self._may_end = np.ones(vocabulary, np.bool_)  # those that may complete a stop string, as far as is known
        # In texts of bytes, what belongs to a character that isn't complete is no part of such strings, nor changes it.
        self._plain = _is_of_bytes(tokenizer) and all(string.isascii() for string in self.strings)
        self.n_tail = 4 * self._overlap + 16
        """The number of tokens to show :meth:`may_be_new`. More are looked for in the whole text."""

    def within(self, text: str) -> bool:
        """
        :param text: any text.
        :return: whether one of the stop strings is in it.
        """
        return any(string in text for string in self.strings)

    def may_end_with(self, tokens: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """
        :param tokens: the last tokens of B responses, before which these held no stop string.
        :return: bool [B], false where the token certainly has not completed one, whatever stands before it.
        """
        if not self._local:
            return np.ones(len(tokens), np.bool_)
        if not (met := self._met[tokens]).all():
            self._learn(set(tokens[~met].tolist()))
        may: NDArray[np.bool_] = self._may_end[tokens]
        return may

    def may_be_new(self, tails: Sequence[Sequence[int]], complete: Sequence[bool]) -> list[bool]:
        """
        :param tails: for each of B responses its last tokens. Before the very last of them, the response held no stop
            string.
        :param complete: for each response whether the tail holds all of it, with one token of the prompt before it.
        :return: for each response False if its last token has certainly not completed a stop string.
        """
        if not self._local:
            return [True] * len(tails)
        # The other tokens were last ones before.
        self._learn({token for tail in tails for token in (tail[0], tail[-1]) if token not in self._texts})
        ends = [self._end(tail, whole) for tail, whole in zip(tails, complete, strict=True)]
        return [end is None or self.within(end) for end in ends]

    def _end(self, tail: Sequence[int], complete: bool) -> str | None:
        """An end of the text, long enough to hold every stop string that is new; None: the tail does not tell."""
        following = [self._texts[tail[-1]]]  # the texts of the tokens behind the place, the last one first
        characters, clean = 0, bool(following[0])
        for place in range(len(tail) - 2, -1, -1):
            text = self._texts.get(tail[place], "")
            if text and (characters >= self._overlap or (complete and place == 0)):
                if clean:
                    return "".join(reversed(following))
                [head, end] = decode(self.tokenizer, [[tail[place]], tail[place:]])
                return end[len(head) :] if end.startswith(head) else None
            following.append(text)
            characters += len(text)
            clean = clean and bool(text)
        return None

    def _learn(self, new: set[int]) -> None:
        # Twice, since some decoders treat the first token of a text in another way.
        spelt = decode(self.tokenizer, [[token] * times for token in new for times in (1, 2)])
        for token, once, twice in zip(new, spelt[::2], spelt[1::2], strict=True):
            piece = str(self.tokenizer.convert_ids_to_tokens(token))
            clean = twice.startswith(once) and _UNKNOWN_CHARACTER not in twice and not _SINGLE_BYTE.fullmatch(piece)
            self._texts[token] = twice[len(once) :] if clean else ""
            self._met[token] = True
            if clean or self._plain:
                # Behind special tokens alone it is the first one of the text.
                self._may_end[token] = self._completes(self._texts[token]) or self._completes(once)

    def _completes(self, added: str) -> bool:
        """Whether a text that ends with these characters may hold a stop string that it did not hold without them."""
        for end in range(1, len(added) + 1):
            for string in self.strings:
                length = min(end, len(string))
                if added[end - length : end] == string[-length:]:
                    return True
        return False


def _is_of_bytes(tokenizer: Any) -> bool:
    """Whether tokens are bytes, one by one, which are put together and then read as UTF-8."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None or backend.decoder is None else json.loads(backend.decoder.__getstate__())
    return decoder is not None and decoder["type"] == "ByteLevel"


def decodes_locally(tokenizer: Any) -> bool:
    """
    :param tokenizer: any tokenizer.
    :return: whether a clean token is decoded alike whatever stands before it, unless it is the first of the text. False
        if that is not certain.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    return decoder is None or _is_local(decoder)


def _is_local(decoder: dict[str, Any]) -> bool:
    kind = decoder["type"]
    if kind == "Sequence":
        return all(map(_is_local, decoder["decoders"]))
    if kind == "Replace":  # a longer pattern might match across the border of two tokens
        return len(decoder["pattern"].get("String", "")) == 1
    if kind == "Strip":
        return bool(decoder["stop"] == 0)
    return kind in {"ByteLevel", "Metaspace", "ByteFallback", "Fuse", "WordPiece"}
