"""A reward that a server computes: a batch goes there as JSON, and scores come back."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from text_env.finished_texts import TRL_EXTRAS, Messages
from text_env.imports import is_address
from text_env.reward_limits import RewardError

QUOTED = 500
"""The number of characters of a server's answer that an error message quotes."""


@dataclass(frozen=True)
class HttpReward:
    """A reward over HTTP. One call is one request, ``POST url``, with a JSON object::

        {"prompts": [...], "completions": [...], "completion_ids": [[...], ...], "columns": {"answer": [...], ...}}

    The answer is ``{"scores": [...]}``: B numbers, null where the reward does not apply to a text. Conversations are
    sent as lists of messages. ``completion_ids`` are those of the environment's tokenizer.

    A server that cannot be reached, breaks a connection or answers with a status of 500 or more is an ordinary
    exception, upon which :class:`text_env.reward_limits.LimitedReward` tries again; so it may die and come back. A
    status of 400 to 499 says that the request itself is wrong, and an answer without scores is no better the next time:
    both are a :class:`text_env.reward_limits.RewardError` at once.

    :param url: the address, http or https.
    :param timeout: seconds without a byte from the server after which a request ends; None: it may take any time.
    :raises ValueError: if the address has no host, a port that is none, a user's name or spaces.
    """

    url: str
    timeout: float | None = None

    retries: ClassVar[int] = 8  # waits of 0.5, 1, 2, 4, 8, 16, 30 and 30 seconds: a server has 90 to come back
    """How often a call is tried again if ``reward_retries`` says nothing."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            right = bool(is_address(self.url) and parts.hostname and parts.port != 0 and parts.username is None)
        except ValueError:  # what only `port` or the parentheses of an IPv6 address raise
            right = False
        if not right or not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise ValueError(
                f"Expected the address of a reward to be written as 'http://host:8000/score' (https too; no user's "
                f"name, no spaces, other than ASCII characters as %XX), got {self.url!r}."
            )

    @property
    def name(self) -> str:
        """The address, which is what errors and infos call the reward."""
        return self.url

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[Any]:
        columns = {name: values for name, values in columns.items() if name not in TRL_EXTRAS}
        batch = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            "columns": columns,
        }
        try:
            body = json.dumps(batch, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"Reward {self.url!r} can only be sent columns that JSON can express; of {sorted(columns)} one cannot "
                f"be sent: {error}."
            ) from error
        return self._scores(self._answer(body))

    def _answer(self, body: bytes) -> str:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return str(response.read().decode("utf-8", "replace"))
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(QUOTED).decode("utf-8", "replace")
            message = f"{self.url!r} answered with status {error.code}: {said!r}"
            if error.code >= 500:
                raise ConnectionError(message) from error
            raise RewardError(f"Reward {message}. The request is not repeated, since it would fail again.") from error

    def _scores(self, answer: str) -> list[Any]:
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, TypeError, KeyError) as error:
            raise RewardError(
                f'Reward {self.url!r} must answer {{"scores": [...]}}, but answered {answer[:QUOTED]!r}.'
            ) from error
        if not isinstance(scores, list):
            raise RewardError(f"Reward {self.url!r} must answer with a list of scores, but answered {scores!r}.")
        return scores
