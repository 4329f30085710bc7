"""Rewards for the form and the length of a text, which know nothing of its task: parts of weighted sums."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from text_env.bounded_calls import BoundedCallError, call_bounded
from text_env.finished_texts import Messages, written

# No tag inside another, and nothing that has matched is left again (`*+`): the time is linear in the text.
_ANYTHING = r"(?:(?!</?(?:think|answer)>).)*+"
THINK_THEN_ANSWER = rf"(?s)\s*+<think>{_ANYTHING}</think>\s*+<answer>{_ANYTHING}</answer>\s*+"
"""The form of DeepSeek-R1's texts (arXiv 2501.12948, table 1): ``<think>…</think> <answer>…</answer>`` and no more."""


def matches(pattern: str, text: str) -> bool:
    """
    :param pattern: a regular expression.
    :param text: any text.
    :return: whether the whole text matches.
    """
    return re.fullmatch(pattern, text) is not None


class FormatReward:
    """1 for a text that matches a regular expression as a whole, 0 for any other.

    Some expressions take for ever on some texts. One of one's own is therefore tried within bounds, see
    :func:`text_env.bounded_calls.call_bounded`; a text on which it takes longer is worth 0.

    :param pattern: the regular expression, of Python's ``re``. ``.`` is no line break unless it begins with ``(?s)``.
    :param seconds: how long one text may take, in seconds of processor time.
    :raises ValueError: if it is no regular expression.
    """

    name = "format"

    def __init__(self, pattern: str = THINK_THEN_ANSWER, seconds: float = 1.0) -> None:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"Expected pattern to be a regular expression, got {pattern!r}: {error}.") from error
        self.pattern, self.seconds = pattern, seconds

    def __call__(self, completions: Sequence[str | Messages], **_: Any) -> list[float]:
        return [float(self._matches(text)) for text in written(completions)]

    def _matches(self, text: str) -> bool:
        if self.pattern == THINK_THEN_ANSWER:
            return matches(self.pattern, text)
        try:
            return bool(call_bounded(f"{__name__}:matches", self.pattern, text, seconds=self.seconds))
        except BoundedCallError:
            return False


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Expected {name} to be an integer of at least 1, got {value!r}.")
    return value


class LengthPenalty:
    """−|y|/budget: linear in the number of tokens |y| of a text, EOS included, and −1 at the budget.

    :param budget: tokens.
    :raises ValueError: if the budget is no positive integer.
    """

    name = "length"

    def __init__(self, budget: int) -> None:
        self.budget = _positive("budget", budget)

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [-len(ids) / self.budget for ids in completion_ids]


class OverlongPenalty:
    """DAPO's soft overlong punishment of the |y| tokens of a text, EOS included.

    0 up to L_max − L_cache tokens; then (L_max − L_cache − |y|)/L_cache, down to −1 at L_max; −1 beyond. Yu et al.
    (2025), arXiv 2503.14476, eq. 13.

    :param max_new_tokens: L_max, the response budget of the environment.
    :param buffer: L_cache, the number of tokens before it in which the penalty sets in.
    :raises ValueError: if the two are no positive integers, or the buffer is longer than the budget.
    """

    name = "overlong"

    def __init__(self, max_new_tokens: int, buffer: int) -> None:
        self.max_new_tokens, self.buffer = _positive("max_new_tokens", max_new_tokens), _positive("buffer", buffer)
        if buffer > max_new_tokens:
            raise ValueError(f"Expected buffer to be at most max_new_tokens={max_new_tokens}, got {buffer}.")

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        free = self.max_new_tokens - self.buffer
        return [-min(max(len(ids) - free, 0) / self.buffer, 1.0) for ids in completion_ids]
