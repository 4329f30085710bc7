"""Rewards: what a finished text is worth.

A reward is any callable that takes a whole batch by keyword and returns one number per text. This is the signature of
TRL's reward functions: ``reward(prompts=[str], completions=[str], completion_ids=[list[int]], **columns)``. Prompts and
completions of conversations are lists of messages, as in TRL. A reward that takes ``trainer_state``, ``log_metric`` or
``log_extra`` is given these as well, and an ``async def`` is run. Every reward is called through :func:`score`, so that
a NaN, a wrong length or an exception never becomes a silent 0.

Notation: B texts in a batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from text_env.answers import Verifier
from text_env.classifier_reward import (
    REWARD_KWARGS,
    SequenceClassifierReward,
    reward_normalization,
    shared_classifier,
)
from text_env.coroutines import run_coroutine
from text_env.finished_texts import TRL_EXTRAS, FinishedTexts, Messages, TrainerState, assistant_texts
from text_env.http_reward import HttpReward
from text_env.imports import check_may_contact, import_object, is_address, is_object_name
from text_env.reward_limits import NO_LIMITS, LimitedReward, Limits, RewardError, reward_name
from text_env.reward_names import parse_call, parse_sum
from text_env.text_rewards import FormatReward, LengthPenalty, OverlongPenalty

__all__ = [
    "KNOWN_REWARDS",
    "REWARD_KWARGS",
    "FinishedTexts",
    "HttpReward",
    "LimitedReward",
    "Limits",
    "Messages",
    "Normalized",
    "Reward",
    "RewardError",
    "Sentiment",
    "SequenceClassifierReward",
    "WeightedSum",
    "assistant_texts",
    "make_reward",
    "reward_name",
    "reward_normalization",
    "score",
    "score_parts",
    "score_where_it_applies",
]


class Reward(Protocol):
    """The call that every reward takes. A function that names only some of the keywords needs ``**kwargs`` as well."""

    def __call__(self, **batch: Any) -> Iterable[float | None] | Awaitable[Iterable[float | None]]:
        """
        :param prompts: B texts, or B conversations.
        :param completions: what the policy wrote after each prompt: B texts, or for conversations B lists of a single
            assistant's message. If a prompt ends with an assistant's message, the completion continues that message.
        :param completion_ids: B lists of token ids of the environment's tokenizer, EOS included.
        :param columns: the other columns of the prompts, B values each.
        :return: B finite numbers. None in place of one says that the reward does not apply to that text.
        """
        ...


def score(reward: Any, texts: FinishedTexts) -> NDArray[np.float64]:
    """Call a reward and check what it returns. Every call of a reward goes through this function.

    :param reward: any reward.
    :param texts: B finished texts.
    :return: the scores, float64 [B], finite.
    :raises RewardError: if the reward fails. The error names the reward, the text and what was wrong.
    """
    scores = score_where_it_applies(reward, texts)
    if (missing := np.flatnonzero(np.isnan(scores))).size:
        raise RewardError(
            f"Reward {reward_name(reward)!r} must return numbers, but returned None for: "
            f"{texts.show(int(missing[0]))}. None says that a reward does not apply to a text; some reward has to: in "
            f"a weighted sum, another part."
        )
    return scores


def score_where_it_applies(reward: Any, texts: FinishedTexts) -> NDArray[np.float64]:
    """As :func:`score`, but a reward may return None for a text that it does not apply to, as in TRL.

    :param reward: any reward.
    :param texts: B finished texts.
    :return: the scores, float64 [B], finite; NaN for None.
    :raises RewardError: if the reward fails.
    """
    name, expected = reward_name(reward), len(texts.prompts)
    try:
        returned = reward(**texts.as_keywords(), **_extras(reward, texts))
        if inspect.isawaitable(returned):
            returned = run_coroutine(returned)
    except RewardError:
        raise  # the error of a part of a weighted sum names that part already
    except Exception as error:
        hint = _call_hint(reward, texts)
        hint += "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        raise RewardError(
            f"Reward {name!r} raised {type(error).__name__}: {str(error).rstrip('.')}.{hint} It was called with "
            f"{expected} texts, the first being: {texts.show(0)}."
        ) from error
    values = _listed(name, returned, texts)
    if len(values) != expected:
        got = "more" if len(values) > expected else str(len(values))
        raise RewardError(
            f"Reward {name!r} must return one number per text: expected {expected}, got {got}. The first text was: "
            f"{texts.show(0)}."
        )
    return np.array([_number(name, value, texts, index) for index, value in enumerate(values)], np.float64)


def _call_hint(reward: Any, texts: FinishedTexts) -> str:
    """How a reward is called, if it doesn't take that call."""
    try:
        inspect.signature(reward).bind(**texts.as_keywords(), **_extras(reward, texts))
    except TypeError as error:
        more = " Let it accept **kwargs." if "unexpected keyword argument" in str(error) else ""
        columns = f"the columns {sorted(texts.columns)}" if texts.columns else "no further columns"
        call = f"{reward_name(reward)}(prompts=[…], completions=[…], completion_ids=[…], **columns)"
        return f"{more} Rewards are called as {call}, and these prompts have {columns}."
    except ValueError:  # some functions that are not written in Python
        pass
    return ""


def _extras(reward: Any, texts: FinishedTexts) -> dict[str, Any]:
    """Those of TRL's extra keywords that a reward takes, by name or by ``**kwargs``."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # some functions that are not written in Python
        return {}
    names = {parameter.name for parameter in parameters}
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        names |= set(TRL_EXTRAS)
    unheard = {"trainer_state": TrainerState(), "log_metric": lambda *_: None, "log_extra": lambda *_: None}
    return {name: value for name, value in {**unheard, **texts.extras}.items() if name in names}


def _listed(name: str, returned: Any, texts: FinishedTexts) -> list[Any]:
    """What a reward returned, as a list of at most one value more than there are texts."""
    expected, values = len(texts.prompts), list[Any]()
    # These would be read as their keys, in any order, or as their characters.
    if isinstance(returned, Mapping | AbstractSet | str | bytes | bytearray) or not hasattr(returned, "__iter__"):
        raise RewardError(
            f"Reward {name!r} must return a list of {expected} numbers, one per text, but returned {returned!r} for: "
            f"{texts.show(0)}."
        )
    try:
        for value in returned:
            values.append(value)
            if len(values) > expected:
                break
    except RewardError:
        raise
    except Exception as error:
        if not values and isinstance(error, TypeError):  # an array of no dimension has __iter__ all the same
            reason = f"must return a list of {expected} numbers, one per text, but returned {returned!r}"
        else:
            reason = f"raised {type(error).__name__} after {len(values)} of {expected} numbers: {error}"
        raise RewardError(f"Reward {name!r} {reason} for: {texts.show(min(len(values), expected - 1))}.") from error
    return values


def _number(name: str, value: Any, texts: FinishedTexts, index: int) -> float:
    if value is None:
        return math.nan
    try:
        # float() takes the string "1", and some arrays of one number too.
        if isinstance(value, str | bytes | bytearray) or getattr(value, "shape", None):
            raise TypeError("no number")
        number = float(value.detach() if hasattr(value, "detach") else value)
    except OverflowError:
        number = math.inf
    except Exception as error:  # whatever somebody's __float__ raises
        raise RewardError(
            f"Reward {name!r} must return numbers, but returned {value!r} for: {texts.show(index)}."
        ) from error
    if not math.isfinite(number):
        shown = number if isinstance(value, float) or not isinstance(value, int) else "an integer beyond every float"
        raise RewardError(f"Reward {name!r} must return finite numbers, but returned {shown} for: {texts.show(index)}.")
    return number


def score_parts(reward: Any, texts: FinishedTexts) -> dict[str, NDArray[np.float64]]:
    """The scores of a reward, together with those of its parts if it is a weighted sum.

    :param reward: any reward.
    :param texts: B finished texts.
    :return: ``{"score": float64 [B]}``, and for a weighted sum also ``"reward/<name>"``, the unweighted scores of each
        part, NaN where the part does not apply to a text.
    :raises RewardError: if a reward fails, as in :func:`score`.
    """
    if not isinstance(reward, WeightedSum):
        return {"score": score(reward, texts)}
    parts: dict[str, NDArray[np.float64]] = {}

    def add_up(**batch: Any) -> list[float | None]:
        parts.update(reward.scores(batch))
        return reward.combine(parts)

    add_up.name = reward.name  # type: ignore[attr-defined]
    return {"score": score(add_up, texts)} | {f"reward/{name}": values for name, values in parts.items()}


class WeightedSum:
    """The weighted sum of several rewards. A part that returns None for a text is left out of the sum of that text.

    :param parts: each part by its name, as a pair of a reward and its weight. The names appear in the final info as
        ``reward/<name>``.
    :raises ValueError: if there are no parts, or a weight is not finite.
    """

    def __init__(self, parts: Mapping[str, tuple[Any, float]]) -> None:
        if not parts:
            raise ValueError("Expected at least one reward in a weighted sum, got none.")
        self.rewards = {name: reward for name, (reward, _) in parts.items()}
        self.weights = {name: float(weight) for name, (_, weight) in parts.items()}
        if wrong := {name: weight for name, weight in self.weights.items() if not math.isfinite(weight)}:
            raise ValueError(f"Expected finite weights, got {wrong}.")
        self.name = "+".join(f"{weight:g}*{name}" for name, weight in self.weights.items())

    def __call__(self, **batch: Any) -> list[float | None]:
        return self.combine(self.scores(batch))

    def scores(self, batch: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
        """
        :param batch: the keyword arguments of a reward.
        :return: the unweighted scores of each part by its name, float64 [B] each; NaN for None.
        """
        texts = FinishedTexts.from_keywords(**batch)
        return {name: score_where_it_applies(part, texts) for name, part in self.rewards.items()}

    def combine(self, parts: Mapping[str, NDArray[np.float64]]) -> list[float | None]:
        """
        :param parts: what :meth:`scores` returns.
        :return: B weighted sums; None where no part applies.
        """
        weighted = np.array([self.weights[name] * values for name, values in parts.items()])
        sums = np.where(np.isnan(weighted), 0.0, weighted).sum(axis=0)
        nothing = np.isnan(weighted).all(axis=0)
        return [None if none else total for none, total in zip(nothing.tolist(), sums.tolist(), strict=True)]


class Normalized:
    """A normalised reward: ``(reward − mean) / std``, where mean and standard deviation were measured beforehand.

    :param reward: anything that :func:`make_reward` takes.
    :param mean: the mean of the reward's scores.
    :param std: the standard deviation of the reward's scores, above 0.
    :raises ValueError: if one of the two numbers is out of range.
    """

    def __init__(self, reward: Any, mean: float, std: float) -> None:
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"Expected a finite mean and a standard deviation above 0, got mean={mean}, std={std}.")
        self.reward = make_reward(reward)
        self.mean, self.std = mean, std
        self.name = f"normalized({reward_name(self.reward)})"

    def __call__(self, **batch: Any) -> list[float | None]:
        values = score_where_it_applies(self.reward, FinishedTexts.from_keywords(**batch))
        return [None if math.isnan(value) else (value - self.mean) / self.std for value in values.tolist()]


class Sentiment:
    """How positive a text sounds, by a lexicon: vaderSentiment's compound score of prompt and completion together.

    Of a conversation only the assistant's last turn is scored. The score is a heuristic and lies in [−1, 1]. Hutto &
    Gilbert (2014), https://github.com/cjhutto/vaderSentiment.
    """

    name = "sentiment"

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **_: Any
    ) -> list[float]:
        return [
            float(self._analyzer.polarity_scores(text)["compound"]) for text in assistant_texts(prompts, completions)
        ]


def _builtin(**kwargs: Any) -> SequenceClassifierReward:
    from text_env.builtin import REWARD_MODEL

    return shared_classifier(REWARD_MODEL, "builtin", **kwargs)


KNOWN_REWARDS: dict[str, Callable[..., Any]] = {
    "builtin": _builtin,
    "sentiment": Sentiment,
    "correct": Verifier,
    "format": FormatReward,
    "length": LengthPenalty,
    "overlong": OverlongPenalty,
}
"""What makes a reward that has a name. It takes the arguments that stand in parentheses after the name."""


def make_reward(spec: Any, limits: Limits = NO_LIMITS, /, **kwargs: Any) -> Any:
    """Resolve the environment's argument ``reward``, or one of ``metrics``.

    :param spec: a callable, which is used as it is; one of :data:`KNOWN_REWARDS`, with arguments in parentheses where
        it takes some, written as in Python: ``"sentiment"``, ``"overlong(max_new_tokens=256, buffer=64)"``; the
        directory or hub name (``"organisation/model"``) of a Hugging Face sequence classifier; ``"module:function"``;
        the address of a server, ``"http://host:8000/score"`` (see :class:`text_env.http_reward.HttpReward`); a mapping
        of such names to weights; or that mapping as a string, ``"correct+0.1*format"``. A known name takes precedence
        over a directory of the same name.
    :param limits: how long each call may take and how often it is tried again. In a weighted sum they are meant for
        each part by itself.
    :param kwargs: the arguments :data:`REWARD_KWARGS` of :class:`SequenceClassifierReward`, for every classifier that
        is made by name. They mean nothing to other rewards.
    :return: a callable with the signature of :class:`Reward`.
    :raises ValueError: for an unknown name or keyword, the error lists the known ones; or for arguments in parentheses
        that the reward does not take.
    :raises TypeError: if the reward is not callable.
    """
    limits.check()
    return _limited(unlimited_reward(spec, kwargs), limits)


def _limited(reward: Any, limits: Limits) -> Any:
    """The same reward within limits, which go to the parts of a sum: their failures are each their own."""
    if isinstance(reward, WeightedSum):
        parts = {name: _limited(part, limits) for name, part in reward.rewards.items()}
        if all(part is reward.rewards[name] for name, part in parts.items()):
            return reward
        limited = copy(reward)
        limited.rewards = parts
        return limited
    if isinstance(reward, HttpReward):
        reward = replace(reward, timeout=limits.timeout)  # so that an abandoned request ends by itself
    elif limits == NO_LIMITS:
        return reward
    return LimitedReward(reward, limits)


def unlimited_reward(spec: Any, kwargs: Mapping[str, Any]) -> Any:
    """What :func:`make_reward` makes before it sets limits, for whoever gives the result to that function.

    :param spec: as for that function.
    :param kwargs: likewise.
    :return: a callable with the signature of :class:`Reward`.
    :raises ValueError: for the reasons given there.
    :raises TypeError: if the reward is not callable.
    """
    _check_kwargs(kwargs)
    if isinstance(spec, Mapping):
        parts: dict[str, tuple[Any, float]] = {}
        for part, weight in spec.items():
            reward = unlimited_reward(part, kwargs)
            if (name := reward_name(reward)) in parts:
                raise ValueError(f"Expected the rewards of a weighted sum to have different names, got {name!r} twice.")
            parts[name] = (reward, weight)
        return WeightedSum(parts)
    if isinstance(spec, str | Path):
        return _make_by_name(str(spec), kwargs)
    if not callable(spec):
        raise TypeError(f"Expected a reward to be a callable, a name or a mapping of names to weights, got {spec!r}.")
    return spec


def _make_by_name(name: str, kwargs: Mapping[str, Any]) -> Any:
    if name in KNOWN_REWARDS:
        return _make_known(name, [], {}, kwargs)
    if Path(name).is_dir():
        return shared_classifier(name, **kwargs)
    if (called := parse_call(name)) is not None and called[0] in KNOWN_REWARDS:
        return _make_known(*called, kwargs)
    if "+" in name or "*" in name:
        return unlimited_reward(parse_sum(name), kwargs)
    if is_address(name):
        check_may_contact(name)
        return HttpReward(name)
    if is_object_name(name):
        found = import_object(name)
        if not callable(found) and not isinstance(found, str | Path | Mapping):
            raise TypeError(
                f"Expected {name!r} to name a reward, which is a function or another callable, got {found!r}."
            )
        return unlimited_reward(found, kwargs)
    if "/" in name:
        return shared_classifier(name, **kwargs)
    raise ValueError(
        f"Unknown reward {name!r}. Known names: {', '.join(KNOWN_REWARDS)}. Otherwise give a directory or hub name "
        f"('organisation/model') of a Hugging Face sequence classifier, 'module:function', the address of a server "
        f"('http://host:8000/score'), a callable, or a weighted sum such as 'builtin+0.5*sentiment'."
    )


def _make_known(name: str, arguments: list[Any], keywords: dict[str, Any], kwargs: Mapping[str, Any]) -> Any:
    make = KNOWN_REWARDS[name]
    if make is _builtin:  # a classifier, and `kwargs` are for all of these
        _check_kwargs(keywords)
        keywords = {**kwargs, **keywords}
    try:
        inspect.signature(make).bind(*arguments, **keywords)
    except TypeError as error:
        takes = ", ".join(map(str, inspect.signature(make).parameters.values()))
        raise ValueError(f"Reward {name!r}: {error}. It is written {name}({takes}).") from error
    return make(*arguments, **keywords)


def _check_kwargs(kwargs: Mapping[str, Any]) -> None:
    if unknown := sorted(set(kwargs) - set(REWARD_KWARGS)):
        raise ValueError(f"Unknown reward_kwargs {unknown}; known are {', '.join(map(repr, REWARD_KWARGS))}.")
