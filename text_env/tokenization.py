"""Loading tokenizers by name, and decoding token ids to the texts of prompts and completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from text_env.builtin import ARITHMETIC_MODEL, LANGUAGE_MODEL
from text_env.chat_templates import apply_chat_template
from text_env.pretrained_files import load_pretrained, not_loaded, read_json
from text_env.streams import TokenStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN_MODELS = {"builtin": LANGUAGE_MODEL, "builtin:arithmetic": ARITHMETIC_MODEL}
"""The language models that ship with the package, by their names."""

Message = dict[str, str]
"""One turn of a conversation: ``{"role": "system" | "user" | "assistant", "content": text}``."""


def pretrained_name(name: str | Path) -> tuple[str, dict[str, Any]]:
    """
    :param name: ``"builtin"``, ``"builtin:arithmetic"``, a directory, a hub name, or a GGUF file.
    :return: the name that transformers' ``from_pretrained`` takes, and its further arguments (``gguf_file``).
    :raises ValueError: if there is no such GGUF file.
    """
    if str(name) in BUILTIN_MODELS:
        return str(BUILTIN_MODELS[str(name)]), {}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"Expected a GGUF file, but there is none at {str(name)!r} (looked in {Path.cwd()}).")
        return str(path.parent), {"gguf_file": path.name}
    return str(name), {}


def base_of_adapter(name: str | Path) -> str | None:
    """
    :param name: the name of a model, as :func:`pretrained_name` takes it.
    :return: the name of the model that the PEFT adapter in this directory was made for; None if there is no adapter.
    :raises ValueError: if the adapter does not name the model, or if it is its own base, directly or by way of others.
    """
    base = _named_base(name)
    seen, following = {Path(name).resolve()}, base
    while following is not None:
        if (place := Path(following).resolve()) in seen:
            raise ValueError(
                f"The adapter in {str(name)!r} is its own base: base_model_name_or_path in the adapter_config.json of "
                f"{following!r} leads back to it. Write the model there that the adapter was trained on."
            )
        seen.add(place)
        following = _named_base(following)
    return base


def _named_base(name: str | Path) -> str | None:
    path = Path(name) / "adapter_config.json"
    if not path.is_file():
        return None
    base = read_json(path).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(
            f"Expected {path} to name the base of the adapter as base_model_name_or_path, got {base!r}: write there "
            "the directory or hub name of the model that it was trained on."
        )
    return base


def pretrained_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """
    :param name: ``"builtin"``, ``"builtin:arithmetic"``, a directory (which may be a PEFT adapter's), a hub name, or a
        GGUF file.
    :return: the tokenizer of that name; for an adapter without a tokenizer, the tokenizer of its base model.
    :raises ValueError: if there is no such tokenizer.
    """
    # This imports torch, so it waits until a tokenizer is asked for by name.
    from transformers import AutoTokenizer

    if (base := base_of_adapter(name)) is not None and not (Path(name) / "tokenizer_config.json").exists():
        return pretrained_tokenizer(base)
    place, options = pretrained_name(name)
    try:
        loaded: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, place, **options)
        if not loaded.vocab_size:  # transformers makes one up for a model without a tokenizer
            raise ValueError("there are no tokenizer files.")
        return loaded
    except Exception as error:
        # A broken GGUF file may raise anything. For other names only these errors mean that there is no tokenizer.
        if not (options or isinstance(error, OSError | ValueError | ImportError)):
            raise
        raise ValueError(
            f"Expected tokenizer, or model where no other tokenizer is named, to be 'builtin', a directory with "
            f"tokenizer files, a hub name, a GGUF file or a Hugging Face tokenizer; got {str(name)!r}, "
            f"{not_loaded(name, str(error))}"
        ) from error


def load_tokenizer(tokenizer: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    :param tokenizer: as for :func:`pretrained_tokenizer`, or a live Hugging Face tokenizer.
    :return: the tokenizer, which has an eos token.
    :raises ValueError: if there is no such tokenizer, or it has no eos token.
    """
    loaded = pretrained_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    if getattr(loaded, "eos_token_id", None) is None:
        name = repr(tokenizer) if isinstance(tokenizer, str | Path) else type(tokenizer).__name__
        raise ValueError(
            f"Expected a tokenizer with an eos token, since EOS is how a response ends; {name} has none. "
            f"Set one: tokenizer.eos_token = '<one of its tokens>'."
        )
    return loaded


def is_conversation(prompt: Any) -> bool:
    """
    :param prompt: any value.
    :return: whether it is a list of messages, as in chat templates and in TRL's conversational data sets.
    """
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in prompt
        )
    )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """
    :param tokenizer: any tokenizer.
    :return: V, the largest token id + 1. That is ``len(tokenizer)`` unless some ids below it belong to no token.
    """
    return max([*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder], default=-1) + 1


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool = True
) -> list[list[int]]:
    """
    :param tokenizer: any tokenizer.
    :param texts: the texts.
    :param add_special_tokens: whether the tokenizer adds its own, such as BOS.
    :return: the token ids of each text.
    :raises ValueError: if there is a text that the tokenizer has no tokens for.
    """
    try:
        return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]]
    except Exception as error:  # the tokenizers package raises nothing more precise
        shown = f"{list(texts[:3])!r}{' and more' if len(texts) > 3 else ''}"
        raise ValueError(f"Expected texts that the tokenizer has tokens for, got {shown}: {error}.") from error


def appended_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """
    :param tokenizer: any tokenizer.
    :param text: a text that it can encode, not empty.
    :return: the special tokens that it writes behind a text, such as EOS or ``[SEP]``.
    """
    [bare], [whole] = (encode(tokenizer, [text], special) for special in (False, True))
    for end in range(len(whole), len(bare) - 1, -1):
        if bare and whole[end - len(bare) : end] == bare:
            return whole[end:]
    return []


def without_end(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], eos_token_ids: Sequence[int]
) -> list[int]:
    """
    :param tokenizer: the tokenizer of the token ids.
    :param token_ids: the tokens of a prompt.
    :param eos_token_ids: the tokens that end a text.
    :return: the tokens without the EOS tokens at their end: a policy has learnt that nothing follows these. A single
        token that is the tokenizer's BOS as well, as in GPT-2, is left: it is the beginning of a text.
    """
    ids = list(token_ids)
    while ids and ids[-1] in eos_token_ids and not (len(ids) == 1 and ids[0] == tokenizer.bos_token_id):
        ids.pop()
    return ids


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[Message]]:
    """
    :param tokenizer: a tokenizer with a chat template.
    :param messages: a conversation. If the last message is the assistant's, its content is the beginning of the
        response; otherwise the template opens the assistant's turn.
    :return: the token ids of the conversation in the tokenizer's chat template, and the messages as the template has
        written them: where it trims spaces, the contents are trimmed.
    :raises ValueError: if the tokenizer has no chat template, or the template refuses these messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"Expected a tokenizer with a chat template for the conversation {messages!r}; {tokenizer.name_or_path!r} "
            "has none: use an instruct model's, set tokenizer.chat_template, or give plain strings."
        )
    begun = messages[-1]["role"] == "assistant"
    try:
        [written] = apply_chat_template(tokenizer, [messages], not begun, begun)
    except Exception as error:  # a template is a program and may raise what it likes
        raise ValueError(f"The chat template of {tokenizer.name_or_path!r} refuses {messages!r}: {error}") from error
    seen = []
    for number, message in enumerate(messages, 1):
        last = begun and number == len(messages)
        content = _as_written(message["content"], written, last)
        if content is None and last:
            raise ValueError(
                f"Expected the chat template of {tokenizer.name_or_path!r} to end with the beginning of the response, "
                f"{message['content']!r}, but it writes {written!r}: leave the assistant's last message out."
            )
        seen.append({**message, "content": message["content"] if content is None else content})
    # The template has written all special tokens.
    return list(tokenizer(written, add_special_tokens=False)["input_ids"]), seen


def _as_written(content: str, written: str, at_the_end: bool) -> str | None:
    """The content, or what trimming has left of it, whichever is in the text; None: neither is."""
    for variant in (content, content.rstrip(), content.lstrip(), content.strip()):
        if written.endswith(variant) if at_the_end else variant in written:
            return variant
    return None


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[Sequence[int]]) -> list[str]:
    """
    :param tokenizer: the tokenizer of the token ids.
    :param token_ids: one sequence of token ids per text.
    :return: the texts, without special tokens and otherwise exactly as the tokens spell them. ("Cleaning up" spaces
        would move the border between prompt and completion.)
    """
    if not token_ids:
        return []  # `batch_decode` would take an empty batch for one empty text
    return tokenizer.batch_decode(
        [list(ids) for ids in token_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def decode_completions(
    tokenizer: PreTrainedTokenizerBase, streams: Sequence[TokenStream], prompt_texts: Sequence[str]
) -> list[str]:
    """The text that each completion adds to its prompt.

    A completion is the part of the whole text that follows the text of the prompt. It is not the completion's tokens
    decoded alone, since tokenizers in the SentencePiece tradition drop the space before the first word of a text.

    :param tokenizer: the tokenizer of the streams.
    :param streams: one stream of tokens per text.
    :param prompt_texts: for each stream the text that :func:`decode` makes of its prompt.
    :return: the completions.
    """
    texts = decode(tokenizer, [stream.token_ids for stream in streams])
    completions = []
    for text, stream, prompt in zip(texts, streams, prompt_texts, strict=True):
        # If the prompt's text is no prefix, the border splits a character or a merged special token. The completion's
        # tokens decoded alone are then the best answer.
        alone = not text.startswith(prompt)
        completions.append(decode(tokenizer, [stream.completion_ids])[0] if alone else text[len(prompt) :])
    return completions
