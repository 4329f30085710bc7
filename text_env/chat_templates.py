"""Conversations written in a tokenizer's chat template.

A template is a program that comes with a model. Jinja's sandbox keeps it from everything but the messages, yet a loop
may never end, so a template is run in the process of :mod:`text_env.bounded_calls`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from text_env.bounded_calls import BoundedCallError, call_bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0
"""How long a template may take for one batch of conversations, in seconds of processor time."""

MOST_CHARACTERS = 10**7
"""How much a template may write for one batch of conversations."""


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> list[str]:
    """As the tokenizer's method of that name does, with an end.

    The first call of a process starts the other process, which takes a second or two; after that, a call costs a tenth
    of a millisecond more than the method.

    :param tokenizer: a tokenizer with a chat template.
    :param conversations: messages with a ``role`` and a ``content``, for each conversation.
    :param add_generation_prompt: whether the template opens the assistant's turn at the end.
    :param continue_final_message: whether the last message is left open.
    :return: the text of each conversation.
    :raises ValueError: if the template refuses the messages, or does not end.
    """
    texts: list[str]
    try:
        texts, _ = call_bounded(
            "transformers.utils.chat_template_utils:render_jinja_template",
            seconds=SECONDS,
            conversations=[
                [{key: value for key, value in message.items() if value is not None} for message in messages]
                for messages in conversations
            ],
            chat_template=tokenizer.get_chat_template(),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **tokenizer.special_tokens_map,
        )
    except BoundedCallError as error:
        raise ValueError(f"The chat template of {tokenizer.name_or_path!r} fails: {error}") from error
    if (length := sum(map(len, texts))) > MOST_CHARACTERS:
        raise ValueError(f"The chat template of {tokenizer.name_or_path!r} writes {length} characters.")
    return texts
