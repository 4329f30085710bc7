"""The tokens at which a text ends. A tokenizer knows one of them; the files beside it may name more.

An instruct model ends its turn by another token than a base model ends a text: Llama 3 by any of 128001, 128008 and
128009, Gemma by 1 or 106. The model's ``generation_config.json`` lists them, and transformers' ``generate`` ends a text
at each; so does the environment.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from text_env.tokenization import pretrained_name, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def ends_of_text(tokenizer: PreTrainedTokenizerBase, besides: Iterable[int] | None = None) -> tuple[int, ...]:
    """
    :param tokenizer: a tokenizer that has an eos token.
    :param besides: the token ids that end a text besides this one; None: those that the files of the model say, which
        are looked for where the tokenizer was loaded from, in its directory or on the hub. That there are none, or that
        the hub cannot be reached, is no error. Of these, ids that the tokenizer has no token for are left out, since
        nothing ever writes them.
    :return: the token ids, the tokenizer's own first and the others in ascending order.
    :raises ValueError: if ``besides`` holds anything else than token ids of the tokenizer, or if such a file is no JSON
        object.
    """
    vocabulary = vocabulary_size(tokenizer)
    if besides is None:
        found = _said_at(str(tokenizer.name_or_path or ""))
        others = [token for token in found if 0 <= token < vocabulary]
    else:
        others = _checked(besides, vocabulary)
    return tuple(dict.fromkeys([int(tokenizer.eos_token_id), *sorted(others)]))


def as_ids(eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """
    :param eos_token_id: one token id, several, or None, as in transformers' ``GenerationConfig``.
    :return: the token ids, none for None.
    """
    if eos_token_id is None:
        return ()
    return (int(eos_token_id),) if isinstance(eos_token_id, SupportsIndex) else tuple(map(int, eos_token_id))


def _checked(token_ids: Iterable[int], vocabulary: int) -> list[int]:
    try:
        ids = [operator.index(token) for token in token_ids]
    except TypeError as error:
        raise ValueError(f"Expected eos_token_ids to be a list of token ids, got {token_ids!r}.") from error
    if wrong := [token for token in ids if not 0 <= token < vocabulary]:
        raise ValueError(
            f"Expected eos_token_ids to lie in [0, {vocabulary}), the tokens of the tokenizer, got {wrong}."
        )
    return ids


def _said_at(place: str) -> tuple[int, ...]:
    """What the files in a directory or on the hub say; as in transformers, the first of them that says something."""
    if not place:  # the tokenizer was made in memory
        return ()
    for name in ("generation_config.json", "config.json"):
        said = _read(place, name)
        for part in (said, said.get("text_config") or {}):  # a model of texts and images has the ids in there
            if part.get("eos_token_id") is not None:
                return as_ids(part["eos_token_id"])
    base = _read(place, "adapter_config.json").get("base_model_name_or_path")
    return _said_at(pretrained_name(base)[0]) if base else ()


def _read(place: str, name: str) -> dict[str, Any]:
    # It doesn't import torch, as transformers' own classes of these files do.
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(place, name)
    except Exception:  # no such file, no such place, no network, no right to read it: there is nothing to learn then
        path = None
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected {path} to be a JSON file, but it cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected {path} to be a JSON object, got a {type(content).__name__}.")
    return content
