"""Rewards: what a finished text is worth.

A reward is any callable that takes a whole batch by keyword and returns one number per text. This is the signature of
TRL's reward functions: ``reward(prompts=[str], completions=[str], completion_ids=[list[int]], **columns)``. Prompts and
completions of conversations are lists of messages, as in TRL. Every reward is called through :func:`score`, so that a
NaN, a wrong length or an exception never becomes a silent 0.

Notation: B texts in a batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from text_env.classifier_reward import (
    REWARD_KWARGS,
    SequenceClassifierReward,
    reward_normalization,
    shared_classifier,
)
from text_env.finished_texts import FinishedTexts, Messages, assistant_texts
from text_env.imports import import_object, is_object_name

__all__ = [
    "KNOWN_REWARDS",
    "REWARD_KWARGS",
    "FinishedTexts",
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
]


class Reward(Protocol):
    """The call that every reward takes. A function that names only some of the keywords needs ``**kwargs`` as well."""

    def __call__(self, **batch: Any) -> Iterable[float]:
        """
        :param prompts: B texts, or B conversations.
        :param completions: what the policy wrote after each prompt: B texts, or for conversations B lists of a single
            assistant's message. If a prompt ends with an assistant's message, the completion continues that message.
        :param completion_ids: B lists of token ids of the environment's tokenizer, EOS included.
        :param columns: the other columns of the prompts, B values each.
        :return: B finite numbers.
        """
        ...


class RewardError(RuntimeError):
    """A reward raised, or returned something other than one finite number per text."""


def reward_name(reward: Any) -> str:
    """
    :param reward: any reward.
    :return: its attribute ``name`` if it has one, otherwise the name of the function or of the class.
    """
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__)


def score(reward: Any, texts: FinishedTexts) -> NDArray[np.float64]:
    """Call a reward and check what it returns. Every call of a reward goes through this function.

    :param reward: any reward.
    :param texts: B finished texts.
    :return: the scores, float64 [B], finite.
    :raises RewardError: if the reward fails. The error names the reward, the text and what was wrong.
    """
    name, expected = reward_name(reward), len(texts.prompts)
    try:
        returned = reward(**texts.as_keywords())
    except RewardError:
        raise  # the error of a part of a weighted sum names that part already
    except Exception as error:
        hint = " Let it accept **kwargs." if "unexpected keyword argument" in str(error) else ""
        raise RewardError(
            f"Reward {name!r} raised {type(error).__name__}: {error}.{hint} It was called with {expected} texts, "
            f"the first being: {texts.show(0)}."
        ) from error
    try:
        values = list(returned)
    except TypeError as error:
        raise RewardError(
            f"Reward {name!r} must return a list of {expected} numbers, one per text, but returned {returned!r} for: "
            f"{texts.show(0)}."
        ) from error
    if len(values) != expected:
        raise RewardError(
            f"Reward {name!r} must return one number per text: expected {expected}, got {len(values)}. The first text "
            f"was: {texts.show(0)}."
        )
    scores = np.empty(expected)
    for index, value in enumerate(values):
        try:
            scores[index] = number = float(value)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"Reward {name!r} must return numbers, but returned {value!r} for: {texts.show(index)}."
            ) from error
        if not math.isfinite(number):
            raise RewardError(
                f"Reward {name!r} must return finite numbers, but returned {number} for: {texts.show(index)}."
            )
    return scores


def score_parts(reward: Any, texts: FinishedTexts) -> dict[str, NDArray[np.float64]]:
    """The scores of a reward, together with those of its parts if it is a weighted sum.

    :param reward: any reward.
    :param texts: B finished texts.
    :return: ``{"score": float64 [B]}``, and for a weighted sum also ``"reward/<name>"``, the unweighted scores of each
        part.
    :raises RewardError: if a reward fails, as in :func:`score`.
    """
    if not isinstance(reward, WeightedSum):
        return {"score": score(reward, texts)}
    parts = {name: score(part, texts) for name, part in reward.rewards.items()}
    return {"score": reward.combine(parts)} | {f"reward/{name}": values for name, values in parts.items()}


class WeightedSum:
    """The weighted sum of several rewards.

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

    def __call__(self, **batch: Any) -> list[float]:
        texts = FinishedTexts.from_keywords(**batch)
        return self.combine({name: score(part, texts) for name, part in self.rewards.items()}).tolist()

    def combine(self, parts: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """
        :param parts: the unweighted scores of each part by its name, float64 [B] each.
        :return: the weighted sums, float64 [B].
        """
        return np.sum([self.weights[name] * values for name, values in parts.items()], axis=0)


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

    def __call__(self, **batch: Any) -> list[float]:
        values = score(self.reward, FinishedTexts.from_keywords(**batch))
        return ((values - self.mean) / self.std).tolist()


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


def _sentiment(**_: Any) -> Sentiment:
    return Sentiment()


KNOWN_REWARDS: dict[str, Callable[..., Any]] = {"builtin": _builtin, "sentiment": _sentiment}


def make_reward(spec: Any, **kwargs: Any) -> Any:
    """Resolve the environment's argument ``reward``, or one of ``metrics``.

    :param spec: a callable, which is used as it is; ``"builtin"`` or ``"sentiment"``; the directory or hub name
        (``"organisation/model"``) of a Hugging Face sequence classifier; ``"module:function"``; a mapping of such names
        to weights; or that mapping as a string, ``"builtin+0.5*sentiment"``. A known name takes precedence over a
        directory of the same name.
    :param kwargs: the arguments :data:`REWARD_KWARGS` of :class:`SequenceClassifierReward`, for every classifier that
        is made by name. They mean nothing to other rewards.
    :return: a callable with the signature of :class:`Reward`.
    :raises ValueError: for an unknown name or keyword; the error lists the known ones.
    :raises TypeError: if the reward is not callable, or is a coroutine function.
    """
    if unknown := sorted(set(kwargs) - set(REWARD_KWARGS)):
        raise ValueError(f"Unknown reward_kwargs {unknown}; known are {', '.join(map(repr, REWARD_KWARGS))}.")
    if isinstance(spec, Mapping):
        parts: dict[str, tuple[Any, float]] = {}
        for part, weight in spec.items():
            reward = make_reward(part, **kwargs)
            if (name := reward_name(reward)) in parts:
                raise ValueError(f"Expected the rewards of a weighted sum to have different names, got {name!r} twice.")
            parts[name] = (reward, weight)
        return WeightedSum(parts)
    if isinstance(spec, str | Path):
        return _make_by_name(str(spec), kwargs)
    if not callable(spec):
        raise TypeError(f"Expected a reward to be a callable, a name or a mapping of names to weights, got {spec!r}.")
    if inspect.iscoroutinefunction(spec) or inspect.iscoroutinefunction(getattr(spec, "__call__", None)):  # noqa: B004
        raise TypeError(f"Expected reward {reward_name(spec)!r} to be an ordinary function, got a coroutine function.")
    return spec


def _make_by_name(name: str, kwargs: Mapping[str, Any]) -> Any:
    if name in KNOWN_REWARDS:
        return KNOWN_REWARDS[name](**kwargs)
    if Path(name).is_dir():
        return shared_classifier(name, **kwargs)
    if "+" in name or "*" in name:
        return make_reward(_parse_sum(name), **kwargs)
    if is_object_name(name):
        return make_reward(import_object(name), **kwargs)
    if "/" in name:
        return shared_classifier(name, **kwargs)
    raise ValueError(
        f"Unknown reward {name!r}. Known names: {', '.join(KNOWN_REWARDS)}. Otherwise give a directory or hub name "
        f"('organisation/model') of a Hugging Face sequence classifier, 'module:function', a callable, or a weighted "
        f"sum such as 'builtin+0.5*sentiment'."
    )


def _parse_sum(text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for term in text.split("+"):
        weight, star, name = term.rpartition("*")
        try:
            number = float(weight) if star else 1.0
        except ValueError as error:
            raise ValueError(f"Expected each term of {text!r} to be 'name' or 'weight*name', got {term!r}.") from error
        name = name.strip()
        if not name or name in weights:
            raise ValueError(f"Expected each term of {text!r} to name another reward, got {term!r}.")
        weights[name] = number
    return weights
