"""Rewards: what a finished text is worth.

A reward is any callable that takes a whole batch by keyword and returns one number per text, the signature that TRL's
reward functions have: ``reward(prompts=[str], completions=[str], completion_ids=[list[int]], **columns)``. What it
returns goes through :func:`score`, so that a NaN, a wrong length or an exception never becomes a silent 0.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from text_env.names import import_object, is_object_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Reward(Protocol):
    """The call that every reward understands; a function that names only some of it needs ``**kwargs`` for the rest."""

    def __call__(self, **batch: Any) -> Iterable[float]:
        """
        :param prompts: B texts.
        :param completions: B texts, what the policy wrote after each prompt.
        :param completion_ids: B lists of token ids of the environment's tokenizer, EOS included.
        :param columns: whatever other columns the prompts have, B values each.
        :return: B finite numbers.
        """
        ...


class RewardError(RuntimeError):
    """A reward raised, or returned something other than one finite number per text."""


@dataclass(frozen=True)
class FinishedTexts:
    """A batch of B finished texts, as rewards see it."""

    prompts: list[str]
    completions: list[str]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def as_keywords(self) -> dict[str, Any]:
        """Fresh lists each time, so that a reward which edits its arguments harms nobody else."""
        return {
            "prompts": list(self.prompts),
            "completions": list(self.completions),
            "completion_ids": [list(ids) for ids in self.completion_ids],
            **{column: list(values) for column, values in self.columns.items()},
        }

    def show(self, index: int) -> str:
        return f"prompt {self.prompts[index]!r}, completion {self.completions[index]!r}"


def reward_name(reward: Any) -> str:
    """
    :return: ``reward.name`` if it has one, otherwise the function's ``__name__`` or the name of its class.
    """
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__)


def score(reward: Any, texts: FinishedTexts) -> NDArray[np.float64]:
    """Call a reward and check what it returns. Every reward is called through here.

    :param texts: B finished texts.
    :return: float64 [B], finite.
    :raises RewardError: names the reward, the text and what was wrong.
    """
    name, expected = reward_name(reward), len(texts.prompts)
    try:
        returned = reward(**texts.as_keywords())
    except RewardError:
        raise  # a part of a weighted sum has named itself already
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
    """A reward's scores together with what they are made of.

    :return: ``{"score": float64 [B]}``, and for a weighted sum each part's unweighted ``"reward/<name>"`` as well.
    :raises RewardError: as :func:`score`.
    """
    if not isinstance(reward, WeightedSum):
        return {"score": score(reward, texts)}
    parts = {name: score(part, texts) for name, part in reward.rewards.items()}
    return {"score": reward.combine(parts)} | {f"reward/{name}": values for name, values in parts.items()}


class WeightedSum:
    """Several rewards, weighted.

    :param parts: name → (reward, weight). The names appear in the final info as ``reward/<name>``.
    """

    def __init__(self, parts: Mapping[str, tuple[Any, float]]) -> None:
        if not parts:
            raise ValueError("Expected at least one reward in a weighted sum, got none.")
        self.rewards = {name: reward for name, (reward, _) in parts.items()}
        self.weights = {name: float(weight) for name, (_, weight) in parts.items()}
        if wrong := {name: weight for name, weight in self.weights.items() if not math.isfinite(weight)}:
            raise ValueError(f"Expected finite weights, got {wrong}.")
        self.name = "+".join(f"{weight:g}*{name}" for name, weight in self.weights.items())

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        **columns: list[Any],
    ) -> list[float]:
        texts = FinishedTexts(prompts, completions, completion_ids, columns)
        return self.combine({name: score(part, texts) for name, part in self.rewards.items()}).tolist()

    def combine(self, parts: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """
        :param parts: unweighted scores, float64 [B] each.
        :return: float64 [B].
        """
        return np.sum([self.weights[name] * values for name, values in parts.items()], axis=0)


class Normalized:
    """``(reward − mean) / std``, with a mean and a standard deviation that somebody measured beforehand.

    :param reward: what :func:`make_reward` takes.
    """

    def __init__(self, reward: Any, mean: float, std: float) -> None:
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"Expected a finite mean and a standard deviation above 0, got mean={mean}, std={std}.")
        self.reward = make_reward(reward)
        self.mean, self.std = mean, std
        self.name = f"normalized({reward_name(self.reward)})"

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        **columns: list[Any],
    ) -> list[float]:
        values = score(self.reward, FinishedTexts(prompts, completions, completion_ids, columns))
        return ((values - self.mean) / self.std).tolist()


class Sentiment:
    """How positive a text sounds by the vaderSentiment lexicon: its compound score of prompt and completion together.

    A heuristic, in [−1, 1]. Hutto & Gilbert (2014), https://github.com/cjhutto/vaderSentiment.
    """

    name = "sentiment"

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [
            float(self._analyzer.polarity_scores(prompt + completion)["compound"])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


def reward_normalization(config: Any) -> tuple[float, float]:
    """
    :param config: of a reward model.
    :return: mean and standard deviation that its score is normalised with: ``reward_mean``, ``reward_std``, or 0 and 1.
    """
    return float(getattr(config, "reward_mean", 0.0)), float(getattr(config, "reward_std", 1.0))


class SequenceClassifierReward:
    """A Hugging Face sequence classifier as reward model, with its own tokenizer: texts go to it, not token ids.

    The score of a text is the one logit of a reward model, or the log-odds of a label in a classifier of several. Where
    the model's config has ``reward_mean`` and ``reward_std`` the score is normalised with them.

    :param model: directory, hub name, or live model (which stays on its device and keeps its dtype).
    :param tokenizer: live tokenizer or its name; None means the one saved beside the model.
    :param batch_size: texts per forward.
    :param device: ``"auto"`` is CUDA where there is one.
    :param dtype: ``"float32"``, ``"bfloat16"``, …; ``"auto"`` is what the model was saved in on CUDA and float32 on a
        CPU, which has few kernels for half precision.
    :param max_length: cut texts to so many tokens (on the tokenizer's truncation side); None cuts nothing, so that a
        text which the model cannot hold is an error rather than a score of something else.
    :param label: name or index of the label whose log-odds count; may be left out with two labels (the second).
    :raises ValueError: if there is no such model, the label is missing or unknown, or the tokenizer can't pad.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 16,
        device: str = "auto",
        dtype: str = "auto",
        max_length: int | None = None,
        label: str | int | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if batch_size < 1:
            raise ValueError(f"Expected batch_size of at least 1, got {batch_size}.")
        if isinstance(model, str | Path):
            self.name = Path(model).name
            target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
            if dtype == "auto" and target.type == "cpu":
                dtype = "float32"
            try:
                loaded = AutoModelForSequenceClassification.from_pretrained(str(model), dtype=dtype)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"Expected a directory or hub name of a Hugging Face sequence classifier, got {str(model)!r}, "
                    f"which could not be loaded: {error}"
                ) from error
            self.model: PreTrainedModel = loaded.to(target)
            tokenizer = str(model) if tokenizer is None else tokenizer
        else:
            self.name = type(model).__name__
            self.model = model
            if tokenizer is None:
                raise ValueError("Expected the tokenizer of a live reward model, got None: pass tokenizer=.")
        self.model.eval()
        self.tokenizer: PreTrainedTokenizerBase = (
            AutoTokenizer.from_pretrained(str(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer
        )
        self.batch_size, self.max_length = batch_size, max_length
        config = self.model.config
        self.mean, self.std = reward_normalization(config)
        self._label = self._label_index(label)
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token_id is None:
                raise ValueError(
                    f"Expected the tokenizer of reward {self.name!r} to have a pad or an eos token; it has none."
                )
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if config.pad_token_id is None:
            # Decoder classifiers find a text's last token by it, and refuse batches without.
            config.pad_token_id = self.tokenizer.pad_token_id

    def _label_index(self, label: str | int | None) -> int | None:
        labels = self.model.config.id2label or {}
        if len(labels) == 1:
            return None
        if label is None and len(labels) == 2:
            return 1
        ids: dict[Any, Any] = self.model.config.label2id or {}
        index = ids.get(label, label)
        if not isinstance(index, int) or index not in labels:
            raise ValueError(
                f"Reward {self.name!r} has {len(labels)} labels: expected label= to be one of {list(labels.values())} "
                f"or its index, got {label!r}."
            )
        return index

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import torch

        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        # Neighbours of similar length waste little on padding.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        scores = np.empty(len(texts))
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            inputs = self.tokenizer(
                [texts[index] for index in chosen],
                padding=True,
                padding_side="right",
                truncation=self.max_length is not None,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.model.device)
            with torch.inference_mode():
                logits = self.model(**inputs).logits.double()  # [B, labels]
                values = logits[:, 0] if self._label is None else self._log_odds(logits, self._label)
            scores[chosen] = values.cpu().numpy()
        return ((scores - self.mean) / self.std).tolist()

    @staticmethod
    def _log_odds(logits: Any, label: int) -> Any:
        others = [index for index in range(logits.shape[1]) if index != label]
        return logits[:, label] - logits[:, others].logsumexp(dim=1)  # two labels: the difference of their logits


# Classifiers made by name are shared while somebody holds them: 64 scalar environments need one reward model, not 64.
_shared: WeakValueDictionary[str, SequenceClassifierReward] = WeakValueDictionary()


def _classifier(model: str | Path, name: str | None = None) -> SequenceClassifierReward:
    reward = _shared.get(str(model))
    if reward is None:
        reward = _shared[str(model)] = SequenceClassifierReward(model)
        reward.name = name or reward.name
    return reward


def _builtin() -> SequenceClassifierReward:
    from text_env.builtin import REWARD_MODEL

    return _classifier(REWARD_MODEL, "builtin")


KNOWN_REWARDS: dict[str, Callable[[], Any]] = {"builtin": _builtin, "sentiment": Sentiment}


def make_reward(spec: Any) -> Any:
    """Resolve a reward.

    :param spec: a callable (used as it is); ``"builtin"`` or ``"sentiment"``; a directory or a hub name
        (``"organisation/model"``) of a Hugging Face sequence classifier; ``"module:function"``; a mapping of such names
        to weights; or that mapping as a string, ``"builtin+0.5*sentiment"``. Names win over directories
        of the same name.
    :return: a callable as :class:`Reward` describes it.
    :raises ValueError: for an unknown name (the known ones are listed).
    :raises TypeError: if it is not callable, or is a coroutine function.
    """
    if isinstance(spec, Mapping):
        parts: dict[str, tuple[Any, float]] = {}
        for part, weight in spec.items():
            reward = make_reward(part)
            if (name := reward_name(reward)) in parts:
                raise ValueError(f"Expected the rewards of a weighted sum to have different names, got {name!r} twice.")
            parts[name] = (reward, weight)
        return WeightedSum(parts)
    if isinstance(spec, str | Path):
        return _make_by_name(str(spec))
    if not callable(spec):
        raise TypeError(f"Expected a reward to be a callable, a name or a mapping of names to weights, got {spec!r}.")
    if inspect.iscoroutinefunction(spec) or inspect.iscoroutinefunction(getattr(spec, "__call__", None)):  # noqa: B004
        raise TypeError(f"Expected reward {reward_name(spec)!r} to be an ordinary function, got a coroutine function.")
    return spec


def _make_by_name(name: str) -> Any:
    if name in KNOWN_REWARDS:
        return KNOWN_REWARDS[name]()
    if Path(name).is_dir():
        return _classifier(name)
    if "+" in name or "*" in name:
        return make_reward(_parse_sum(name))
    if is_object_name(name):
        return make_reward(import_object(name))
    if "/" in name:
        return _classifier(name)
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
