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
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from text_env.imports import import_object, is_object_name
from text_env.tokenization import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = list[Message]
"""A conversation."""

ASSISTANT = "assistant"


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

        :param prompts: the prompts, B texts or lists of messages.
        :param completions: the completions, B texts or lists of messages.
        :param completion_ids: the token ids of each completion.
        :param columns: the other columns of the prompts, each a list of B entries.
        :return: the batch of texts.
        """
        messages = [prompt for prompt in prompts if not isinstance(prompt, str)]
        return cls(
            [prompt if isinstance(prompt, str) else "\n".join(_contents(prompt)) for prompt in prompts],
            _written(completions),
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
    openings = [prompt if isinstance(prompt, str) else _split_opening(prompt)[1] for prompt in prompts]
    return [opening + text for opening, text in zip(openings, _written(completions), strict=True)]


def _written(completions: Sequence[str | Messages]) -> list[str]:
    return [text if isinstance(text, str) else "".join(_contents(text)) for text in completions]


def _contents(messages: Messages) -> list[str]:
    return [message["content"] for message in messages]


def _split_opening(messages: Messages) -> tuple[Messages, str]:
    """
    :param messages: a conversation.
    :return: the messages before the assistant's turn that is still open, and the text that this turn holds already.
    """
    if messages and messages[-1]["role"] == ASSISTANT:
        return messages[:-1], messages[-1]["content"]
    return messages, ""


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


def reward_normalization(config: Any) -> tuple[float, float]:
    """
    :param config: the configuration of a reward model.
    :return: the mean and the standard deviation that the model's scores are normalised with: ``reward_mean`` and
        ``reward_std`` of the configuration, or 0 and 1.
    """
    return float(getattr(config, "reward_mean", 0.0)), float(getattr(config, "reward_std", 1.0))


class SequenceClassifierReward:
    """A Hugging Face sequence classifier as a reward. It has its own tokenizer, so it is given texts and not token ids.

    The score of a text is the logit of a reward model with one output, or the log-odds of one label of a classifier
    with several. If the model's configuration has ``reward_mean`` and ``reward_std``, scores are normalised with them.

    :param model: a directory, a hub name, or a live model (which stays on its device and keeps its dtype).
    :param tokenizer: a live tokenizer or its name; None means the tokenizer saved beside the model.
    :param batch_size: the number of texts in a forward pass.
    :param device: the device of the model. ``"auto"`` is CUDA if it is available, else the CPU.
    :param dtype: the type of the weights: ``"float32"``, ``"bfloat16"``, …; ``"auto"`` is the type that the model was
        saved in on CUDA, and float32 on a CPU, which has few kernels for half precision.
    :param max_length: longer texts are cut to this number of tokens (on the tokenizer's truncation side). None cuts
        nothing, so that a text that is too long for the model is an error rather than the score of another text.
    :param label: the name or the index of the label whose log-odds are the score. With two labels the default is the
        second.
    :param chat_template: None: conversations are written in the chat template of the reward model's own tokenizer, or
        if it has none, the assistant's last turn is scored; plain texts are scored as they are. True: plain texts are
        written in the template too, as the turns of a user and an assistant. False: the template is never used. A text
        that the template has written is tokenised without further special tokens, as TRL does.
    :raises ValueError: if there is no such model, the label is missing or unknown, the tokenizer cannot pad, or a chat
        template is asked for and the tokenizer has none.
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
        chat_template: bool | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        for argument, number in (("batch_size", batch_size), ("max_length", 1 if max_length is None else max_length)):
            if not isinstance(number, int | np.integer) or number < 1:
                raise ValueError(f"Expected {argument} to be an integer of at least 1, got {number!r}.")
        if dtype != "auto" and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
            raise ValueError(f"Expected dtype to be 'auto' or one of PyTorch's, such as 'bfloat16', got {dtype!r}.")
        if isinstance(model, str | Path):
            self.name = Path(model).name
            try:
                target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
            except RuntimeError as error:
                raise ValueError(f"Expected device to be 'auto' or one of PyTorch's; {device!r}: {error}") from error
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
        self.batch_size, self.max_length, self.chat_template = batch_size, max_length, chat_template
        if chat_template and not self.tokenizer.chat_template:
            raise ValueError(
                f"Expected the tokenizer of reward {self.name!r} to have a chat template, since chat_template=True "
                f"asks for it; it has none. Leave chat_template out to score texts as they are."
            )
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
            # Classifiers made from decoders find the last token of a text by it, and refuse batches without it.
            config.pad_token_id = self.tokenizer.pad_token_id

    @property
    def _blank(self) -> str:
        """The text that is scored in place of an empty one, such as an empty turn: a model needs at least one token."""
        if self.tokenizer("")["input_ids"]:
            return ""  # this tokenizer adds a token itself
        return str(self.tokenizer.bos_token or self.tokenizer.eos_token or self.tokenizer.pad_token)

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

    @staticmethod
    def _turns(prompt: str | Messages, completion: str) -> Messages:
        """The whole conversation, which ends with the assistant's complete turn."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        before, opening = _split_opening(messages)
        return [*before, {"role": ASSISTANT, "content": opening + completion}]

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **_: Any
    ) -> list[float]:
        import torch

        conversational = any(not isinstance(prompt, str) for prompt in prompts)
        template = bool(self.tokenizer.chat_template) if self.chat_template is None else self.chat_template
        templated = template and (conversational or self.chat_template is True)
        texts: list[str]
        if templated:
            turns = [self._turns(prompt, text) for prompt, text in zip(prompts, _written(completions), strict=True)]
            texts = self.tokenizer.apply_chat_template(turns, tokenize=False)  # type: ignore[assignment]
        else:
            texts = [text or self._blank for text in assistant_texts(prompts, completions)]
        # Texts of similar length in a batch need little padding.
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
                add_special_tokens=not templated,  # the template has written them
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


# A classifier made by name is shared as long as it is in use: 64 scalar environments need one reward model, not 64.
_shared: WeakValueDictionary[tuple[str, str], SequenceClassifierReward] = WeakValueDictionary()

REWARD_KWARGS = ("batch_size", "device", "dtype", "max_length", "label", "chat_template")
"""The arguments of :class:`SequenceClassifierReward` that :func:`make_reward` takes, for classifiers made by name."""


def _classifier(model: str | Path, name: str | None = None, **kwargs: Any) -> SequenceClassifierReward:
    key = (str(model), repr(sorted(kwargs.items())))
    reward = _shared.get(key)
    if reward is None:
        reward = _shared[key] = SequenceClassifierReward(model, **kwargs)
        reward.name = name or reward.name
    return reward


def _builtin(**kwargs: Any) -> SequenceClassifierReward:
    from text_env.builtin import REWARD_MODEL

    return _classifier(REWARD_MODEL, "builtin", **kwargs)


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
        return _classifier(name, **kwargs)
    if "+" in name or "*" in name:
        return make_reward(_parse_sum(name), **kwargs)
    if is_object_name(name):
        return make_reward(import_object(name), **kwargs)
    if "/" in name:
        return _classifier(name, **kwargs)
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
