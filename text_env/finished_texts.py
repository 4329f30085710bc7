"""Finished texts as rewards are given them: batches of prompts and completions, plain or as conversations.

Notation: B texts in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from text_env.tokenization import Message

Messages = list[Message]
"""A conversation."""

ASSISTANT = "assistant"


@dataclass(frozen=True)
class FinishedTexts:
    """A batch of B finished texts (or, for a potential, of prefixes of texts), as rewards are given it.

    :param prompts: B texts; for conversations the contents of their messages.
    :param completions: B texts.
    :param completion_ids: B lists of token ids.
    :param columns: the other columns of the prompts by name, B values each.
    :param messages: B conversations, if the prompts are conversations; rewards are given these instead of ``prompts``.
    """

    prompts: list[str]
    completions: list[str]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    messages: list[Messages] | None = None

    def as_keywords(self) -> dict[str, Any]:
        """
        :return: the keyword arguments of a reward. The lists are fresh, so that a reward that edits its arguments
            changes nothing for other rewards.
        """
        texts: dict[str, Any] = {"prompts": list(self.prompts), "completions": list(self.completions)}
        if self.messages is not None:
            texts["prompts"] = deepcopy(self.messages)
            texts["completions"] = [[{"role": ASSISTANT, "content": text}] for text in self.completions]
        return {
            **texts,
            "completion_ids": [list(ids) for ids in self.completion_ids],
            **{column: list(values) for column, values in self.columns.items()},
        }

    @classmethod
    def from_keywords(
        cls,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: list[list[int]],
        **columns: list[Any],
    ) -> FinishedTexts:
        """The inverse of :meth:`as_keywords`, for rewards that call other rewards with their own arguments.

        :return: the batch of texts.
        """
        messages = [prompt for prompt in prompts if not isinstance(prompt, str)]
        return cls(
            [prompt if isinstance(prompt, str) else "\n".join(_contents(prompt)) for prompt in prompts],
            written(completions),
            completion_ids,
            columns,
            messages or None,
        )

    def show(self, index: int) -> str:
        """
        :param index: the number of a text.
        :return: the text as error messages show it.
        """
        prompt = self.prompts[index] if self.messages is None else self.messages[index]
        return f"prompt {prompt!r}, completion {self.completions[index]!r}"


def assistant_texts(prompts: Sequence[str | Messages], completions: Sequence[str | Messages]) -> list[str]:
    """The texts to judge, for a scorer that takes plain texts and no roles.

    :param prompts: B texts or B conversations, as a reward is given them.
    :param completions: B texts or B lists of messages.
    :return: B texts: prompt and completion together where the prompt is a plain text; the assistant's last turn where
        it is a conversation, with the beginning of the turn if the prompt holds it.
    """
    openings = [prompt if isinstance(prompt, str) else split_opening(prompt)[1] for prompt in prompts]
    return [opening + text for opening, text in zip(openings, written(completions), strict=True)]


def written(completions: Sequence[str | Messages]) -> list[str]:
    return [text if isinstance(text, str) else "".join(_contents(text)) for text in completions]


def _contents(messages: Messages) -> list[str]:
    return [message["content"] for message in messages]


def split_opening(messages: Messages) -> tuple[Messages, str]:
    """
    :param messages: a conversation.
    :return: the messages before the assistant's turn that is still open, and the text that this turn holds already.
    """
    if messages and messages[-1]["role"] == ASSISTANT:
        return messages[:-1], messages[-1]["content"]
    return messages, ""
