"""Preferences: pairs of responses to the same prompt, one chosen and one rejected. Reward models learn from them.

The format is TRL's (https://huggingface.co/docs/trl/dataset_formats#preference): the columns ``chosen`` and
``rejected``, and perhaps ``prompt``, hold plain texts or lists of messages.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from text_env.builtin import PREFERENCES
from text_env.tables import FORMATS, BrokenRow, NumberedRow, read_table, rows_of, table_format
from text_env.tokenization import Message

ROLES = ("system", "user", "assistant")
Part = Literal["train", "held_out"]
SplitBy = Literal["given", "prompt", "pair"]
SPLITS: dict[str, Part] = {
    "train": "train",
    **dict.fromkeys(("eval", "test", "validation", "valid", "val", "dev", "held_out"), "held_out"),
}
"""The names that a split may have, and the part of the data that it becomes."""
PREFERENCE_FORMATS = tuple(suffix for suffix in FORMATS if suffix != ".txt")
SHOWN = 3
"""The number of malformed rows that a message shows."""


class Preference(NamedTuple):
    """A prompt, and two responses to it.

    :param prompt: a text, which may be empty, or the messages of a conversation whose next turn is the assistant's.
    :param chosen: the preferred response; in a conversation, the content of the assistant's message.
    :param rejected: the other response, which always differs from ``chosen``.
    """

    prompt: str | list[Message]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Preferences:
    """A set of preferences, in two parts.

    :param train: the pairs to learn from, at least one.
    :param held_out: the pairs to measure with, at least one.
    :param split_by: how the two parts were made: ``"given"`` by the data set itself; ``"prompt"`` at random, such that
        no prompt is in both parts; ``"pair"`` at random, because there are too few prompts to split by prompt.
    :param n_malformed: the number of malformed rows, which were left out.
    :param malformed: the first three malformed rows: where each stands, and what is wrong with it.
    """

    train: list[Preference]
    held_out: list[Preference]
    split_by: SplitBy
    n_malformed: int
    malformed: list[str]

    @property
    def conversational(self) -> bool:
        """Whether the prompts are lists of messages; if not, all are plain texts."""
        return not isinstance(self.train[0].prompt, str)


def load_preferences(spec: Any, max_malformed: float = 0.01, *, held_out: float = 0.05, seed: int = 0) -> Preferences:
    """Read a set of preferences.

    A row is malformed if a column is missing or of the wrong type, a response is empty, both responses are the same, a
    role is unknown, plain texts and messages are mixed, or the row's line is not JSON. The rows of a set are either all
    plain texts or all conversations; rows of the rarer kind are malformed too.

    :param spec: ``"builtin"``; a ``.jsonl``, ``.json`` or ``.csv`` file, gzipped (``.gz``) or not, or a ``.parquet``
        file; a directory written by ``datasets``' ``save_to_disk``, or any name that ``datasets.load_dataset`` takes,
        with the name of a single split after a colon (``"owner/name:train_prefs"``); a list of mappings; a
        ``datasets.Dataset``, a data frame, an Arrow table or a mapping from names to columns; or a mapping from split
        names to any of these tables, such as a ``DatasetDict``.
    :param max_malformed: the share of rows that may be malformed. Malformed rows are left out.
    :param held_out: the share of pairs to hold out, if the data has no splits (a column ``split``, or the keys of a
        mapping).
    :param seed: seed of the random choice of the held-out pairs.
    :return: the pairs.
    :raises ValueError: for an unknown name, an unreadable file, a table without rows, or too many malformed rows.
    :raises ImportError: if reading the data needs the ``reward`` extra.
    """
    if not (0 <= max_malformed < 1 and 0 < held_out < 1):
        raise ValueError(
            f"Expected max_malformed and held_out to be shares, less than 1, held_out more than 0; got {max_malformed} "
            f"and {held_out}."
        )
    label = repr(str(spec)) if isinstance(spec, str | Path) else f"a {type(spec).__name__}"
    entries: list[tuple[str, Part | None, Preference | str]] = []  # where, part, pair or what is wrong with the row
    for where, split, row in _rows(spec):
        try:
            pair = parse_preference(row)
            entries.append((where, _part(row, split), pair))
        except ValueError as error:
            entries.append((where, None, str(error)))
    if not entries:
        raise ValueError(f"Expected preferences to have at least one row, got none from {label}.")
    kinds = Counter(isinstance(pair.prompt, str) for _, _, pair in entries if isinstance(pair, Preference))
    plain = kinds[True] >= kinds[False]
    parts: dict[Part | None, list[Preference]] = {None: [], "train": [], "held_out": []}
    faults: list[str] = []
    for where, part, pair_or_fault in entries:
        if isinstance(pair_or_fault, str):
            faults.append(f"{where}: {pair_or_fault}")
        elif isinstance(pair_or_fault.prompt, str) is not plain:
            faults.append(f"{where}: {'messages, where most rows are texts' if plain else 'a text among messages'}")
        else:
            parts[part].append(pair_or_fault)
    shown = faults[:SHOWN]
    if len(faults) > max_malformed * len(entries):
        raise ValueError(
            f"Expected at most {100 * max_malformed:g} % of the rows of {label} to be malformed (max_malformed), got "
            f"{len(faults)} of {len(entries)}: {'; '.join(shown)}{'; …' * (len(faults) > SHOWN)}. Each row needs two "
            "different responses, 'chosen' and 'rejected', and may have a 'prompt'; all are texts or all are lists of "
            "messages. Mend the rows, or raise max_malformed to leave them out."
        )
    train, given = [*parts[None], *parts["train"]], parts["held_out"]
    if not train or (not given and len(train) < 2):
        raise ValueError(
            f"Expected {label} to hold pairs to train with and at least one to hold out, got {len(train)} and "
            f"{len(given)}. Splits may be called {', '.join(SPLITS)}."
        )
    if given:
        return Preferences(train, given, "given", len(faults), shown)
    return Preferences(*_hold_out(train, held_out, seed), len(faults), shown)


def parse_preference(row: Any) -> Preference:
    """
    :param row: a mapping with ``chosen``, ``rejected`` and perhaps ``prompt``; other columns are ignored.
    :return: the pair. In a row without a prompt, the prompt is the messages that both conversations begin with, or for
        plain texts the empty text.
    :raises ValueError: if the row is malformed. The message says what is wrong, and not which row it is.
    """
    if isinstance(row, BrokenRow):
        raise ValueError(row.reason)
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a mapping of columns, got {type(row).__name__}")
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise ValueError(f"no {column!r} among its columns {list(row)}")
        if not isinstance(row[column], str | list):
            raise ValueError(f"expected {column!r} to be a text or a list of messages, got {row[column]!r:.80}")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if not isinstance(prompt, str | list | None):
        raise ValueError(f"expected 'prompt' to be a text or a list of messages, got {prompt!r:.80}")
    if type(chosen) is not type(rejected):
        raise ValueError("one of 'chosen' and 'rejected' is a text, the other a list of messages")
    if isinstance(chosen, list):
        prompt, chosen, rejected = _conversation(prompt, chosen, rejected)
    elif prompt and not isinstance(prompt, str):
        raise ValueError("'prompt' is a list of messages, but the responses are texts")
    for column, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise ValueError(f"{column!r} is empty")
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are the same")
    return Preference(prompt or "", chosen, rejected)


def _conversation(
    prompt: str | list[Any] | None, chosen: list[Any], rejected: list[Any]
) -> tuple[list[Message], str, str]:
    """The prompt, and the contents of the two messages that continue it: the chosen one and the rejected one."""
    chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are the same")
    n_shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if n_shared is None:  # one conversation is the beginning of the other
        n_shared = min(len(chosen), len(rejected))
    shared = chosen[:n_shared]
    # In many data sets both conversations begin with the prompt, and its own column repeats it, as messages or as text.
    if isinstance(prompt, list) and prompt:
        messages = _messages(prompt, "prompt")
        repeated = shared == messages
    else:
        messages = shared
        repeated = bool(shared) and (not prompt or shared[-1]["content"].strip() == str(prompt).strip())
        if prompt and not repeated:
            raise ValueError("'prompt' is a text, but the responses are messages that don't begin with it")
    if not repeated and shared:
        raise ValueError("'chosen' and 'rejected' begin with messages that are not the prompt's")
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError("expected a prompt of messages, the last of them not the assistant's, before the responses")
    responses = []
    for column, rest in (("chosen", chosen[n_shared:]), ("rejected", rejected[n_shared:])):
        if [message["role"] for message in rest] != ["assistant"]:
            roles = [message["role"] for message in rest]
            raise ValueError(f"expected {column!r} to add one message of the assistant to the prompt, got {roles}")
        responses.append(rest[0]["content"])
    return messages, responses[0], responses[1]


def _messages(value: list[Any], column: str) -> list[Message]:
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"expected the messages of {column!r} to have a role and a content, got {message!r:.80}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"expected the roles of {column!r} to be among {', '.join(ROLES)}, got {role!r}")
        if not isinstance(content, str):
            raise ValueError(f"expected the contents of {column!r} to be texts, got {content!r:.80}")
        messages.append({"role": role, "content": content})
    if not messages:
        raise ValueError(f"{column!r} is empty")
    return messages


def _part(row: Mapping[str, Any], split: str | None) -> Part | None:
    name = row.get("split") if split is None else split
    if name is None:
        return None
    if not isinstance(name, str) or name not in SPLITS:
        raise ValueError(f"expected its split to be one of {', '.join(SPLITS)}, got {name!r}")
    return SPLITS[name]


def _hold_out(pairs: list[Preference], share: float, seed: int) -> tuple[list[Preference], list[Preference], SplitBy]:
    """Split the pairs at random: by prompt if there are enough prompts to come near the share, else by pair."""
    rng = np.random.default_rng(seed)
    wanted = min(max(1, round(share * len(pairs))), len(pairs) - 1)
    keys = [json.dumps(pair.prompt) for pair in pairs]
    counts = Counter(keys)
    prompts = list(counts)
    chosen: set[str] = set()
    n = 0
    for index in rng.permutation(len(prompts)).tolist():
        # A prompt with more pairs than are still wanted is passed over.
        if n + counts[prompts[index]] <= wanted:
            chosen.add(prompts[index])
            n += counts[prompts[index]]
    by_prompt = n >= wanted / 2
    numbers = set(rng.permutation(len(pairs))[:wanted].tolist())
    out = [key in chosen if by_prompt else number in numbers for number, key in enumerate(keys)]
    parts = [[pair for pair, is_out in zip(pairs, out, strict=True) if is_out is side] for side in (False, True)]
    return parts[0], parts[1], "prompt" if by_prompt else "pair"


def _rows(spec: Any) -> Iterator[tuple[str, str | None, Any]]:
    """The place of each row, the split that it was found in (None: the row itself may name it), and the row."""
    tables = _by_name(spec) if isinstance(spec, str | Path) else spec
    if isinstance(tables, Mapping) and not {"chosen", "rejected"} <= set(tables):
        if unknown := [name for name in tables if name not in SPLITS]:
            hint = f"; name the one to use after a colon: '{spec}:{unknown[0]}'" if isinstance(spec, str) else ""
            raise ValueError(f"Expected splits called {', '.join(SPLITS)}, got {list(tables)}{hint}.")
        for split, table in tables.items():
            for where, row in _numbered(table):
                yield f"{split} {where}", split, row
    else:
        for where, row in _numbered(tables):
            yield where, None, row


def _numbered(table: Any) -> Iterator[NumberedRow]:
    for index, row in enumerate(rows_of(table, "preferences", ["chosen", "rejected"])):
        yield row if isinstance(row, NumberedRow) else NumberedRow(f"row {index}", row)


def _by_name(spec: str | Path) -> Any:
    name, path = str(spec), Path(spec)
    if name == "builtin":
        path = PREFERENCES
    if table_format(path) in PREFERENCE_FORMATS:
        return read_table(path, "preferences")
    expected = (
        f"Expected preferences to be 'builtin', a file ({', '.join(PREFERENCE_FORMATS)}; all but the last with or "
        f"without .gz), a directory of datasets' save_to_disk, or a name that datasets.load_dataset takes; got {name!r}"
    )
    if path.is_file():
        raise ValueError(f"{expected}, a file of another kind.")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'Reading {name!r} needs datasets: pip install "textrlhf[reward]"') from error
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        name, _, split = name.partition(":")
        return datasets.load_dataset(name, split=split or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{expected}, which could not be loaded: {error}") from error
