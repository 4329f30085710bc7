"""Texts that no reward can judge: they are shown all the same, with the reason in place of the score."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from text_env.rewards import RewardError
from text_env.vector_env import TextVectorEnv

WHY = "not_scored"
"""The entry of a final info that says why there is no score."""
MOST_CHARACTERS = 160


class NotScored:
    """A reward that judges nothing: every score is 0, and the final info says why.

    :param why: the reason.
    """

    name = "not scored"

    def __init__(self, why: str) -> None:
        self.why = why

    def __call__(self, completions: Sequence[Any], log_extra: Callable[[str, list[str]], Any], **_: Any) -> list[float]:
        log_extra(WHY, [self.why] * len(completions))
        return [0.0] * len(completions)


def score_where_possible(env: TextVectorEnv) -> None:
    """From now on, texts that the environment's reward fails at are not scored, and end all the same. A prompt that
    somebody types has none of the columns that a reward may read.

    :param env: the environment, in which nothing learns.
    """
    episodes = env.episodes
    finish = episodes.finish

    def finish_anyway(*texts: Any, **named: Any) -> Any:
        try:
            return finish(*texts, **named)
        except RewardError as error:
            judges = episodes.reward, episodes.metrics
            episodes.reward, episodes.metrics = NotScored(_reason(error)), {}
            try:
                return finish(*texts, **named)
            finally:
                episodes.reward, episodes.metrics = judges

    episodes.finish = finish_anyway  # type: ignore[method-assign]


def score_of(info: Mapping[str, Any]) -> str:
    """
    :param info: the final info of a text.
    :return: its score, or why there is none.
    """
    return f"not scored: {info[WHY]}" if WHY in info else f"{info['score']:+.2f}"


def _reason(error: RewardError) -> str:
    """What went wrong, without the text at which it did, which is shown beside it."""
    cause = error.__cause__
    reason = str(error) if cause is None else f"{type(cause).__name__}: {cause}"
    return textwrap.shorten(reason, MOST_CHARACTERS, placeholder=" …")
