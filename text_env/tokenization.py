"""Loading a tokenizer by name, and turning token ids back into the text of a prompt and of its completion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(tokenizer: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    :param tokenizer: ``"builtin"``, a directory, a hub name, or a live Hugging Face tokenizer.
    :return: the tokenizer, which is known to have an eos token.
    :raises ValueError: if there is no such tokenizer, or it has no eos token.
    """
    loaded = tokenizer
    if isinstance(tokenizer, str | Path):
        from transformers import (
            AutoTokenizer,
        )  # imports torch, so not before a tokenizer is asked for by name

        from text_env.builtin import LANGUAGE_MODEL

        try:
            loaded = AutoTokenizer.from_pretrained(str(LANGUAGE_MODEL if tokenizer == "builtin" else tokenizer))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Expected tokenizer to be 'builtin', a directory with tokenizer files, a hub name or a Hugging Face "
                f"tokenizer; got {tokenizer!r}, which could not be loaded: {error}"
            ) from error
    if getattr(loaded, "eos_token_id", None) is None:
        name = repr(tokenizer) if isinstance(tokenizer, str | Path) else type(tokenizer).__name__
        raise ValueError(
            f"Expected a tokenizer with an eos token, since EOS is how a response ends; {name} has none. "
            f"Set one: tokenizer.eos_token = '<one of its tokens>'."
        )
    return loaded  # type: ignore[return-value]


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[Sequence[int]]) -> list[str]:
    """
    :param token_ids: one sequence of ids per text.
    :return: the texts, without special tokens and otherwise exactly as the tokens spell them: "cleaning up" spaces
        would move the border between prompt and completion.
    """
    if not token_ids:
        return []  # `batch_decode` would take an empty batch for one empty text
    return tokenizer.batch_decode(
        [list(ids) for ids in token_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def decode_completions(
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    prompt_texts: Sequence[str],
) -> list[str]:
    """The text that each response adds to its prompt.

    A completion is what the whole text has beyond the prompt's, not its own tokens decoded alone: tokenizers in the
    SentencePiece tradition drop the space before the first word of whatever they decode.

    :param contexts: ids of prompt and response together, one sequence per text.
    :param prompt_lengths: how many of them are the prompt's.
    :param prompt_texts: each prompt's ids as :func:`decode` spells them.
    :return: the completions.
    """
    texts = decode(tokenizer, contexts)
    completions = []
    for text, ids, length, prompt in zip(texts, contexts, prompt_lengths, prompt_texts, strict=True):
        # Not a prefix: the border splits a character or a merged special token. The response alone is the best answer.
        completions.append(text[len(prompt) :] if text.startswith(prompt) else decode(tokenizer, [ids[length:]])[0])
    return completions
