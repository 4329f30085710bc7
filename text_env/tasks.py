"""A task: prompts with columns, what judges the texts, metrics, and the settings that suit them, under one name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from text_env.generated import Split


@dataclass(frozen=True)
class Task:
    """What an environment needs to know to pose problems and to judge answers.

    :param name: the name, for messages.
    :param prompts: from ``"train"`` or ``"eval"`` to the prompts of that part, anything that the setting ``prompts`` of
        an environment takes, such as :class:`text_env.generated.GeneratedPrompts`. No prompt may be in both parts.
    :param reward: what judges a finished text, anything that the setting ``reward`` takes, such as
        ``"correct(extract='hash')"``, which is a :class:`text_env.answers.Verifier`. It is given the columns of the
        prompts.
    :param metrics: further scores by name, as in the setting ``metrics``.
    :param settings: other settings of the environment that suit the task, such as ``max_new_tokens``.
    :param model: the name of the language model that the task was made for; None: any.
    """

    name: str
    prompts: Callable[[Split], Any]
    reward: Any
    metrics: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
