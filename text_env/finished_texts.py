"""Finished texts as rewards are given them: batches of prompts and completions, plain or as conversations.

Notation: B texts in a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from text_env.tokenization import Message

Messages = list[Message]
"""A conversation."""

ASSISTANT = "assistant"

TRL_EXTRAS = ("trainer_state", "log_metric", "log_extra")
"""Keywords that TRL's trainers pass to reward functions beside the batch: how far training has come; a function
``log_metric(name, number)``, which logs a number of the batch; a function ``log_extra(name, values)``, which logs a
value of each text."""

RESERVED_NAMES: Mapping[str, frozenset[str]] = {
    "the final info has already": frozenset(
        {"score", "prompt", "completion", "finish_reason", "final_obs", "final_info"}
    ),
    "learners add to the final info": frozenset({"length", "episode", "terminal_observation", "TimeLimit.truncated"}),
    "the training logs itself": frozenset(
        {"scores", "scores_std", "sampled_scores", "rlhf_reward", "entropy"}
        | {"kl", "kl_k2", "kl_k3", "kl_exact", "kl_coef"}
    ),
    "the evaluation reports itself": frozenset(
        {"distinct_1", "distinct_2", "mean_length", "terminated_ratio", "perplexity", "score_std"}
    ),
    "samples.jsonl has already": frozenset({"timesteps", "columns"}),
}
"""Names that no metric can have, by why that is so. Whoever reads final infos writes what stands there beside figures
of its own, under the same names: `agents` trains, evaluates and keeps samples with them. They are listed here, so that
a name is refused where it is chosen, and not only once the figures have been mixed up."""


def check_name(name: Any, taken: Collection[str] = ()) -> None:
    """
    :param name: what a metric is to be called in the final info.
    :param taken: the names that other metrics have.
    :raises ValueError: if the name means something else already.
    """
    if not isinstance(name, str):
        why = "is no string"
    elif name.startswith(("_", "reward/")):
        why = "begins as masks of infos and parts of the reward do"
    elif name in taken:
        why = "is a metric of the environment"
    else:
        why = next((why for why, names in RESERVED_NAMES.items() if name in names), "")
    if why:
        raise ValueError(f"Expected another name for what is logged of a text, got {name!r}, which {why}.")


@dataclass
class TrainerState:
    """How far training has come, for rewards that change with it. The names are those of transformers' TrainerState.

    An environment knows nothing of training, so all is 0 unless whoever trains says something else:
    ``env.unwrapped.episodes.trainer_state.global_step = 7``. The algorithms of this project set ``global_step`` to what
    they log as ``train/n_updates``; those of Stable-Baselines3 set nothing.

    :param global_step: the number of updates until now.
    :param max_steps: the number of updates in all.
    :param epoch: the number of passes over the prompts until now.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0


@dataclass(frozen=True)
class FinishedTexts:
    """A batch of B finished texts (or, for a potential, of prefixes of texts), as rewards are given it.

    :param prompts: B texts; for conversations the contents of their messages.
    :param completions: B texts.
    :param completion_ids: B lists of token ids.
    :param columns: the other columns of the prompts by name, B values each.
    :param messages: B conversations, if the prompts are conversations; rewards are given these instead of ``prompts``.
    :param extras: keywords that only those rewards are given that take them, see :data:`TRL_EXTRAS`.
    """

    prompts: list[str]
    completions: list[str]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    messages: list[Messages] | None = None
    extras: Mapping[str, Any] = field(default_factory=dict, compare=False)

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

        :param prompts: the prompts, B texts or lists of messages.
        :param completions: the completions, B texts or lists of messages.
        :param completion_ids: the token ids of each completion.
        :param columns: the other columns of the prompts, each a list of B entries.
        :return: the batch of texts.
        """
        messages = [prompt for prompt in prompts if not isinstance(prompt, str)]
        extras = {name: columns.pop(name) for name in TRL_EXTRAS if name in columns}
        return cls(
            [prompt if isinstance(prompt, str) else "\n".join(_contents(prompt)) for prompt in prompts],
            written(completions),
            completion_ids,
            columns,
            messages or None,
            extras,
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
    """
    :param completions: B texts, or B lists of the assistant's messages.
    :return: B texts.
    """
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


class LoggedByRewards:
    """What rewards log of a batch by TRL's ``log_metric`` and ``log_extra``.

    :param n_texts: the number B of texts in the batch.
    :param taken: the names of the environment's metrics, which may not be logged, as may none of ``RESERVED_NAMES``.
    """

    def __init__(self, n_texts: int, taken: Collection[str]) -> None:
        self.n_texts, self.taken = n_texts, taken
        self._metrics: dict[str, list[float]] = {}
        self._extras: dict[str, list[Any]] = {}

    def metric(self, name: str, value: float) -> None:
        """
        :param name: the name of a number of the whole batch. It is logged of each of the texts; of several numbers of
            one name, their mean.
        :param value: the number.
        :raises ValueError: if the name is taken, or the value is no number.
        """
        check_name(name, self.taken)
        if isinstance(value, str | bytes) or getattr(value, "shape", None):
            raise ValueError(f"Expected log_metric({name!r}, ...) to be given a number, got {value!r}.")
        self._metrics.setdefault(name, []).append(float(value))

    def extra(self, name: str, values: Sequence[Any]) -> None:
        """
        :param name: the name of a column.
        :param values: B values, one for each text.
        :raises ValueError: if the name is taken, or the number of values is wrong.
        """
        check_name(name, self.taken)
        if isinstance(values, str | bytes) or len(values) != self.n_texts:
            raise ValueError(
                f"Expected log_extra({name!r}, ...) to be given one value for each of the {self.n_texts} texts, got "
                f"{values!r}."
            )
        self._extras[name] = list(values)

    def of(self, index: int) -> dict[str, Any]:
        """
        :param index: the number of a text.
        :return: what was logged of it, by name.
        """
        means = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        return {**means, **{name: values[index] for name, values in self._extras.items()}}
