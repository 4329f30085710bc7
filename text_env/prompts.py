"""Prompts: loading them from names, files and lists, and tokenising each of them once."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from text_env.ends_of_text import ends_of_text
from text_env.generated import ENDLESS, GeneratedPrompts
from text_env.imports import import_object, is_object_name
from text_env.tables import FORMATS, read_rows, rows_of, table_format
from text_env.tokenization import (
    Message,
    appended_ids,
    chat_prompt,
    decode,
    encode,
    is_conversation,
    vocabulary_size,
    without_end,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OverlongPrompts = Literal["error", "truncate_left"]

# Rewards are called with these keywords already ("completion" is TRL's name for a column of completions; the last three
# are TRL's too), so no column of the prompts may have one of these names.
RESERVED_COLUMNS = frozenset(
    {"prompts", "completions", "completion_ids", "completion", "trainer_state", "log_extra", "log_metric"}
)
# No keyword of a method can be called so.
METHOD_ARGUMENTS = frozenset({"self", "cls"})


class Prompt(NamedTuple):
    """One prompt, ready to start an episode.

    :param text: the prompt as the user gave it, or what truncation has left of it; for a conversation, the contents of
        its messages. An EOS at its end is no part of it.
    :param token_ids: the prompt's tokens, at least one and at most ``max_prompt_tokens``.
    :param decoded: the token ids decoded again, which need not equal ``text`` (a tokenizer may change case or spaces).
    :param columns: the other columns that the data set has for this prompt; rewards are given them by keyword.
    :param messages: the conversation that ``token_ids`` encode in the chat template, as the template has written it
        (many trim spaces); None if the prompt is a plain text. Rewards are given the messages if there are any, else
        ``text``, so that they judge what the policy has seen.
    """

    text: str
    token_ids: list[int]
    decoded: str
    columns: Mapping[str, Any]
    messages: list[Message] | None = None


def _builtin(split: str) -> Callable[[], list[str]]:
    def load() -> list[str]:
        from text_env.builtin import prompts

        return list(prompts(split))

    return load


KNOWN_PROMPTS: dict[str, Callable[[], list[str]]] = {
    "builtin": _builtin("train"),
    "builtin:train": _builtin("train"),
    "builtin:eval": _builtin("eval"),
}


def load_prompts(spec: str | Path | Iterable[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Read a set of prompts.

    :param spec: ``"builtin"`` (the training split) or ``"builtin:eval"``; a ``.jsonl``, ``.json``, ``.csv`` or
        ``.txt`` file, gzipped (``.gz``) or not, or a ``.parquet`` file; ``"module:function"``, which is called without
        arguments; a list of strings; a list of mappings with the key ``"prompt"``; a ``datasets.Dataset``, a data
        frame, an Arrow table or a mapping from names to columns, with a column ``"prompt"``. A prompt is a string or,
        as in TRL's conversational format, a list of messages ``{"role": ..., "content": ...}``.
    :return: mappings with the key ``"prompt"``.
    :raises TypeError: if ``"module:function"`` names something else than a function.
    :raises ValueError: for an unknown name or file, a list that is empty or has no end, an entry without a prompt, a
        column whose name cannot be a keyword of a reward, a prompt that is not Unicode text, or a list with both plain
        and conversational prompts.
    """
    entries = _named(spec)
    if isinstance(entries, GeneratedPrompts) and len(entries) == ENDLESS:
        raise ValueError(
            f"Expected a list of prompts that has an end, got {spec!r}, which generates them without: give "
            "GeneratedPrompts a size."
        )
    return _rows(entries, spec)


def _named(spec: Any) -> Any:
    """What a name stands for, or the object itself."""
    return _load_by_name(spec) if isinstance(spec, str | Path) else spec


def _rows(entries: Any, spec: Any) -> list[dict[str, Any]]:
    """The prompts among ``entries``, which ``spec`` has given, as :func:`load_prompts` returns them."""
    prompts: list[dict[str, Any]] = []
    try:
        rows = rows_of(entries, "prompts", ["prompt"])
    except ValueError as error:
        raise ValueError(f"{error} ({spec!r} gives {type(entries).__name__}.)") from error
    for number, entry in enumerate(rows):
        row = {"prompt": entry} if isinstance(entry, str) or is_conversation(entry) else entry
        prompt = row.get("prompt") if isinstance(row, Mapping) else None
        if not isinstance(prompt, str) and not is_conversation(prompt):
            raise ValueError(
                f"Expected prompt {number} to be a string or a mapping with a string 'prompt' (or, in place of the "
                f"string, a list of messages {{'role': ..., 'content': ...}}), got {entry!r}."
            )
        _check_columns(number, row)
        check_text(prompt, f"prompt {number}")
        prompts.append(dict(row))
    if not prompts:
        raise ValueError(f"Expected at least one prompt, got none from {spec!r}.")
    if len({isinstance(row["prompt"], str) for row in prompts}) > 1:
        raise ValueError(
            f"Expected prompts to be either all strings or all lists of messages; {spec!r} has both. Write a string as "
            "[{'role': 'user', 'content': string}]."
        )
    return prompts


def _check_columns(number: int, row: Mapping[Any, Any]) -> None:
    for column in row:
        if column is None:
            raise ValueError(
                f"Expected prompt {number} to have a value for each column, got more: {row[None]!r}. In a CSV file, "
                "put texts with commas in quotes."
            )
        if not isinstance(column, str) or column in METHOD_ARGUMENTS:
            raise ValueError(
                f"Prompt {number} has the column {column!r}, but rewards are given columns by keyword, and no keyword "
                "of theirs can be called so: rename it."
            )
        if column in RESERVED_COLUMNS:
            raise ValueError(f"Prompt {number} has the column {column!r}, which rewards are given already: rename it.")


def check_text(prompt: Any, what: str) -> None:
    """
    :param prompt: a text, or messages.
    :param what: what it is, for the error message, for example ``"prompt 3"``.
    :raises ValueError: if the text, or the content of a message, is not Unicode text.
    """
    for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Expected {what} to be Unicode text, got {text!r}, which has half of a surrogate pair at "
                f"{error.start}: mend it where it was decoded, or drop it, text.encode(errors='ignore').decode()."
            ) from error


def _load_by_name(spec: str | Path) -> Any:
    name, path = str(spec), Path(spec)
    if name in KNOWN_PROMPTS:
        return KNOWN_PROMPTS[name]()
    if table_format(path) is not None:
        return read_rows(path, "prompts")
    if is_object_name(name):
        if not callable(found := import_object(name)):
            raise TypeError(
                f"Expected prompts={name!r} to name a function that returns prompts, got {found!r}: write one, or give "
                "the list itself (in Python), or a file."
            )
        return found()
    raise ValueError(
        f"Unknown prompts {name!r}. Known names: {', '.join(KNOWN_PROMPTS)}. Otherwise give a file "
        f"({', '.join(FORMATS)}; all but the last with or without .gz), 'module:function', or a list of strings."
    )


N_INSPECTED = 64
"""The number of generated prompts that are looked at when the environment is made."""


class Prompts(Sequence[Prompt]):
    """A set of prompts, tokenised: all of them at once, or generated ones when they are asked for.

    A prompt never ends in EOS, after which a policy has nothing to write. Whatever tokens the tokenizer itself appends
    to a text (EOS, ``[SEP]``) are dropped, and so are EOS tokens at the end of the text, of the chat template or of
    given token ids. In conversations only the tokenizer's own EOS is dropped: another token that ends a turn may be
    what opens the next one, as ``<|assistant|>`` is in Phi-3.

    :param spec: the set of prompts, as :func:`load_prompts` takes it.
    :param tokenizer: the tokenizer. It is called on the plain text, so that it adds its BOS if it has one.
    :param max_prompt_tokens: the length of the longest prompt allowed, in tokens. None: that of the longest prompt of
        the set; of generated prompts, that of the longest of the first :data:`N_INSPECTED`. A later generated prompt
        that is longer is replaced by another one.
    :param overlong: what happens to a longer prompt: ``"error"``, or ``"truncate_left"``, which keeps the last
        ``max_prompt_tokens`` tokens (a leading BOS is then lost).
    :param chat_template: whether a string becomes the user's turn in a conversation, written in the tokenizer's chat
        template. None means: if the tokenizer has a chat template, as those of instruct models do. Lists of messages
        always use it.
    :param eos_token_ids: the tokens that end a text besides the tokenizer's eos token, as
        :func:`text_env.ends_of_text.ends_of_text` takes them.
    :raises ValueError: for the reasons of :func:`load_prompts`, for an empty or overlong prompt, and if a prompt needs
        a chat template and the tokenizer has none.
    """

    def __init__(
        self,
        spec: str | Path | Iterable[str | Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int | None,
        overlong: OverlongPrompts = "error",
        chat_template: bool | None = None,
        eos_token_ids: Sequence[int] | None = None,
    ) -> None:
        if overlong not in get_args(OverlongPrompts):
            raise ValueError(f"Expected overlong_prompts to be one of {get_args(OverlongPrompts)}, got {overlong!r}.")
        self.tokenizer = tokenizer
        self.max_prompt_tokens = sys.maxsize if max_prompt_tokens is None else max_prompt_tokens
        self.overlong = overlong
        entries = _named(spec)
        self._generated = entries if isinstance(entries, GeneratedPrompts) else None
        rows = _rows(entries if self._generated is None else entries[:N_INSPECTED], spec)
        uses_template = tokenizer.chat_template is not None if chat_template is None else chat_template
        self.conversational = uses_template or not isinstance(rows[0]["prompt"], str)
        if self.conversational and overlong != "error":
            raise ValueError(
                f"Expected overlong_prompts='error' with conversations, got {overlong!r}: a cut would take the chat "
                "template's marks away, and rewards would judge what the policy never saw. Shorten the messages."
            )
        self._eos_token_ids = ends_of_text(tokenizer, () if self.conversational else eos_token_ids)
        # Rewards get the same columns whatever the batch holds, so a row that lacks one has None there.
        self.columns = tuple(dict.fromkeys(key for row in rows for key in row if key != "prompt"))
        prompts = [row["prompt"] for row in rows]
        self._appended: list[int] = []
        if not self.conversational and (text := next(filter(None, prompts), None)) is not None:
            self._appended = appended_ids(tokenizer, text)
        self._prompts = [
            self._made(*encoded, self._columns_of(row))
            for encoded, row in zip(self._encode(prompts), rows, strict=True)
        ]
        if max_prompt_tokens is None:
            self.max_prompt_tokens = max(len(prompt.token_ids) for prompt in self._prompts)

    def __len__(self) -> int:
        return len(self._prompts if self._generated is None else self._generated)

    def __getitem__(self, index: Any) -> Any:
        if self._generated is None:
            return self._prompts[index]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # an IndexError where there is none
        return self._prompts[place] if place < len(self._prompts) else self._generate(self._generated, place)

    def _generate(self, source: GeneratedPrompts, place: int) -> Prompt:
        for row in source.candidates(place):
            encoded = self._encode([row["prompt"]])[0]
            if self.overlong != "error" or len(encoded[1]) <= self.max_prompt_tokens:
                return self._made(*encoded, self._columns_of(row))
        raise ValueError(
            f"Expected generated prompts of at most max_prompt_tokens={self.max_prompt_tokens} tokens, but all that "
            f"may stand in place {place} are longer: raise max_prompt_tokens."
        )

    def _columns_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {column: row.get(column) for column in self.columns}

    def make(self, prompt: str | Sequence[int] | list[Message]) -> Prompt:
        """Make a prompt that is not in the set. The same rules apply to it, and all of its columns are None.

        :param prompt: a text, messages, or token ids. In a set of conversations, the text that token ids spell becomes
            the only message.
        :return: the prompt.
        :raises ValueError: if the prompt is empty, overlong or outside the vocabulary.
        """
        columns = dict.fromkeys(self.columns)
        if isinstance(prompt, str) or is_conversation(prompt):
            check_text(prompt, "the prompt")
            return self._made(*self._encode([prompt])[0], columns)
        ids = self._without_end(checked_ids(prompt, vocabulary_size(self.tokenizer), "prompt"))  # type: ignore[arg-type]
        text = decode(self.tokenizer, [ids])[0]
        return self._made(text, ids, _messages(text) if self.conversational else None, columns)

    def _encode(self, prompts: Sequence[Any]) -> list[tuple[str, list[int], list[Message] | None]]:
        """For each prompt its text, its token ids, and its messages if it is a conversation."""
        if self.conversational:
            return [self._encode_chat(_messages(prompt)) if prompt else ("", [], None) for prompt in prompts]
        if conversations := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise ValueError(
                f"Expected a string or token ids as a prompt, since the others are plain texts; got {conversations[0]}."
            )
        encoded = encode(self.tokenizer, prompts)
        return [self._ended(prompt, ids) for prompt, ids in zip(prompts, encoded, strict=True)]

    def _encode_chat(self, messages: list[Message]) -> tuple[str, list[int], list[Message] | None]:
        ids, seen = chat_prompt(self.tokenizer, messages)
        return _said(seen), self._without_end(ids), seen

    def _without_end(self, ids: list[int]) -> list[int]:
        return without_end(self.tokenizer, ids, self._eos_token_ids)

    def _ended(self, text: str, ids: list[int]) -> tuple[str, list[int], None]:
        """A plain text and its token ids, without what the tokenizer appends and without EOS at the end."""
        if self._appended and ids[-len(self._appended) :] == self._appended:
            ids = ids[: -len(self._appended)]
        kept = self._without_end(ids)
        if len(kept) < len(ids):  # the text itself ends with EOS, which the policy is not shown
            for eos in reversed(ids[len(kept) :]):
                text = text.rstrip().removesuffix(str(self.tokenizer.decode([eos])))
            text = text if text.strip() else ""
        # An empty text is refused even if the tokenizer adds a BOS to it. The BOS alone can be given as a token id.
        return text, kept if text else [], None

    def _made(self, text: str, ids: list[int], messages: list[Message] | None, columns: Mapping[str, Any]) -> Prompt:
        text, ids = self._fit(text, ids)
        return Prompt(text, ids, decode(self.tokenizer, [ids])[0], columns, messages)

    def _fit(self, text: str, ids: list[int]) -> tuple[str, list[int]]:
        if not ids:
            raise ValueError(
                f"Expected a prompt of at least one token, got {text!r}, which has none: drop it or give it text."
            )
        if len(ids) <= self.max_prompt_tokens:
            return text, ids
        if self.overlong == "error":
            template = ", its chat template's included," if self.conversational else ""
            raise ValueError(
                f"Expected prompts of at most max_prompt_tokens={self.max_prompt_tokens} tokens, got {len(ids)}"
                f"{template} in {text!r}: raise max_prompt_tokens, shorten it, or pass "
                "overlong_prompts='truncate_left'."
            )
        ids = ids[-self.max_prompt_tokens :]
        return decode(self.tokenizer, [ids])[0], ids


def _said(messages: Sequence[Message]) -> str:
    """The contents of a conversation's messages as one text, after which the response follows."""
    said = "\n".join(message["content"] for message in messages)
    return said if messages[-1]["role"] == "assistant" else f"{said}\n"


def _messages(prompt: str | Sequence[Mapping[str, str]]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]


def checked_ids(token_ids: Sequence[int], vocabulary: int, what: str) -> list[int]:
    """
    :param token_ids: integers (a list, a tuple, an array).
    :param vocabulary: the number of tokens in the vocabulary.
    :param what: what the token ids belong to, for the error message.
    :return: the token ids as a plain list.
    :raises ValueError: if they are no integers, or one of them is outside the vocabulary.
    """
    # Not int(): it takes 1.5 and "5" too. And not a buffer of bytes: its items are integers, but hardly token ids.
    try:
        if isinstance(token_ids, str | bytes | bytearray | Mapping):
            raise TypeError
        ids = [operator.index(token) for token in token_ids if not isinstance(token, bool | np.bool_)]
        if len(ids) != len(token_ids):
            raise TypeError
    except (TypeError, ValueError) as error:  # ValueError: an array with several numbers in each entry
        raise ValueError(
            f"Expected the {what} to be a text, or token ids, which are a list of integers; got {token_ids!r}."
        ) from error
    if wrong := [token for token in ids if not 0 <= token < vocabulary]:
        raise ValueError(f"Expected the {what}'s token ids to lie in [0, {vocabulary}), got {wrong}.")
    return ids
