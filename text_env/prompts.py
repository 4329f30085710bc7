"""Prompts: where they come from, and each of them tokenised once."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from text_env.names import import_object, is_object_name
from text_env.tokenization import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OverlongPrompts = Literal["error", "truncate_left"]

# The keywords that a reward is called with anyway (and TRL's name for the first of them): no column may shadow them.
RESERVED_COLUMNS = frozenset({"prompts", "completions", "completion_ids", "completion"})


class Prompt(NamedTuple):
    """One prompt, ready to start an episode.

    :param text: as the user gave it, or what is left of it after truncation. This is what rewards get.
    :param token_ids: at least one, at most ``max_prompt_tokens``.
    :param decoded: the ids decoded again, which need not equal ``text`` (a tokenizer may change case or spaces).
    :param columns: whatever else the data set says of this prompt; rewards get it by keyword.
    """

    text: str
    token_ids: list[int]
    decoded: str
    columns: Mapping[str, Any]


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


def _read_lines(file: IO[str]) -> list[str]:
    return [line.rstrip("\r\n") for line in file if line.strip()]


READERS: dict[str, Callable[[IO[str]], Any]] = {
    ".jsonl": lambda file: [json.loads(line) for line in _read_lines(file)],
    ".json": json.load,
    ".csv": lambda file: list(csv.DictReader(file)),
    ".txt": _read_lines,
}


def load_prompts(spec: str | Path | Iterable[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Read a set of prompts.

    :param spec: ``"builtin"`` (the training split), ``"builtin:eval"``; a ``.jsonl``, ``.json``, ``.csv`` or ``.txt``
        file (``.gz`` after it is understood); ``"module:function"``, called without arguments; a list of strings; a
        list of mappings with the key ``"prompt"``, or a ``datasets.Dataset``, which iterates as one.
    :return: mappings with the key ``"prompt"``.
    :raises ValueError: for an unknown name or file, an empty list, or an entry without a prompt.
    """
    entries: Any = spec
    if isinstance(spec, str | Path):
        entries = _load_by_name(spec)
    if isinstance(entries, Mapping) or not isinstance(entries, Iterable):
        raise ValueError(
            f"Expected prompts to be a name, a file, or a list of strings or of mappings with the key 'prompt'; "
            f"{spec!r} gives {type(entries).__name__}."
        )
    prompts: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        row = {"prompt": entry} if isinstance(entry, str) else entry
        if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
            raise ValueError(
                f"Expected prompt {number} to be a string or a mapping with a string 'prompt', got {entry!r}."
            )
        if clash := RESERVED_COLUMNS.intersection(row):
            raise ValueError(
                f"Prompt {number} has the column {min(clash)!r}, which rewards are given already: rename it."
            )
        prompts.append(dict(row))
    if not prompts:
        raise ValueError(f"Expected at least one prompt, got none from {spec!r}.")
    return prompts


def _load_by_name(spec: str | Path) -> Any:
    name, path = str(spec), Path(spec)
    if name in KNOWN_PROMPTS:
        return KNOWN_PROMPTS[name]()
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix in READERS:
        if not path.is_file():
            raise ValueError(
                f"Expected prompts to name a file, but there is no file {name!r} (looked in {Path.cwd()})."
            )
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                return READERS[suffix](file)
        except ValueError as error:  # malformed JSON, or not UTF-8
            raise ValueError(f"Expected {name!r} to be a well-formed {suffix} file: {error}") from error
    if is_object_name(name):
        return import_object(name)()
    raise ValueError(
        f"Unknown prompts {name!r}. Known names: {', '.join(KNOWN_PROMPTS)}. Otherwise give a file "
        f"({', '.join(READERS)}, with or without .gz), 'module:function', or a list of strings."
    )


class Prompts(Sequence[Prompt]):
    """A set of prompts, tokenised.

    :param spec: what :func:`load_prompts` takes.
    :param tokenizer: gives the token ids; called on the text as it stands, so that it adds its own BOS if it has one.
    :param max_prompt_tokens: the longest prompt allowed.
    :param overlong: what happens to a longer one: ``"error"``, or ``"truncate_left"``, which keeps its last
        ``max_prompt_tokens`` tokens (a leading BOS is lost then).
    :raises ValueError: as :func:`load_prompts`, and for an empty or overlong prompt.
    """

    def __init__(
        self,
        spec: str | Path | Iterable[str | Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        overlong: OverlongPrompts = "error",
    ) -> None:
        if overlong not in get_args(OverlongPrompts):
            raise ValueError(f"Expected overlong_prompts to be one of {get_args(OverlongPrompts)}, got {overlong!r}.")
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.overlong = overlong
        rows = load_prompts(spec)
        # Rewards get the same columns whatever the batch holds, so a row that lacks one has None there.
        self.columns = tuple(dict.fromkeys(key for row in rows for key in row if key != "prompt"))
        texts = [row["prompt"] for row in rows]
        fitted = [self._fit_text(text, ids) for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True)]
        decoded = decode(tokenizer, [ids for _, ids in fitted])
        self._prompts = [
            Prompt(text, ids, spelt, {column: row.get(column) for column in self.columns})
            for (text, ids), spelt, row in zip(fitted, decoded, rows, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: Any) -> Any:
        return self._prompts[index]

    def make(self, prompt: str | Sequence[int]) -> Prompt:
        """A prompt from outside the set, held to the same rules; its columns are all None.

        :param prompt: text or token ids.
        :raises ValueError: if it is empty, overlong or outside the vocabulary.
        """
        if isinstance(prompt, str):
            text, ids = self._fit_text(prompt, self.tokenizer(prompt)["input_ids"])
        else:
            ids = checked_ids(prompt, len(self.tokenizer), "prompt")
            text, ids = self._fit(decode(self.tokenizer, [ids])[0], ids)
        return Prompt(text, ids, decode(self.tokenizer, [ids])[0], dict.fromkeys(self.columns))

    def _fit_text(self, text: str, ids: list[int]) -> tuple[str, list[int]]:
        # An empty text is empty even if the tokenizer puts a BOS before it; whoever means the BOS can give its id.
        return self._fit(text, ids if text else [])

    def _fit(self, text: str, ids: list[int]) -> tuple[str, list[int]]:
        if not ids:
            raise ValueError(
                f"Expected a prompt of at least one token, got {text!r}, which has none: drop it or give it text."
            )
        if len(ids) <= self.max_prompt_tokens:
            return text, ids
        if self.overlong == "error":
            raise ValueError(
                f"Expected prompts of at most max_prompt_tokens={self.max_prompt_tokens} tokens, got {len(ids)} in "
                f"{text!r}: raise max_prompt_tokens, shorten it, or pass overlong_prompts='truncate_left'."
            )
        ids = ids[-self.max_prompt_tokens :]
        return decode(self.tokenizer, [ids])[0], ids


def checked_ids(token_ids: Sequence[int], vocabulary: int, what: str) -> list[int]:
    """
    :param token_ids: integers (a list, a tuple, an array).
    :param vocabulary: how many tokens there are.
    :param what: what they are called in an error.
    :return: them as a plain list.
    :raises ValueError: if one of them is no token of the vocabulary.
    """
    ids = [int(token) for token in token_ids]
    if wrong := [token for token in ids if not 0 <= token < vocabulary]:
        raise ValueError(f"Expected the {what}'s token ids to lie in [0, {vocabulary}), got {wrong}.")
    return ids
