"""The constructor arguments that the scalar and the vector environment share, each with its default and its meaning."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from text_env.prompts import OverlongPrompts
from text_env.reward_limits import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    # The command line reads these annotations at run time, and transformers is slow to import for one name.
    PreTrainedTokenizerBase = Any

Constructor = TypeVar("Constructor", bound=Callable[..., None])


@dataclass(frozen=True)
class EpisodeSettings:
    """How the episodes of an environment go: where texts start, what ends them and what they are worth.

    Names are the better form wherever a live object is accepted too: Gymnasium deep-copies live objects when the
    ``spec`` of a wrapper is read.

    :param task: a task with a right answer: ``"arithmetic"``; ``"reasoning_gym:chain_sum"`` or another data set of
        reasoning-gym; a file of prompts with a column ``answer``; ``"module:object"``; or a
        :class:`text_env.tasks.Task` (see :func:`text_env.task_names.make_task`). It says what every argument is that is
        not given: prompts and reward above all. ``metrics`` are added to its own. None: there is none.
    :param task_kwargs: the arguments of the task, such as ``size`` and ``seed`` of its problems, and ``split``:
        ``"train"``, the default, or ``"eval"``, the problems that are held out.
    :param tokenizer: ``"builtin"``, ``"builtin:arithmetic"``, a directory, a hub name, or a live Hugging Face
        tokenizer with an eos token.
    :param prompts: ``"builtin"``, ``"builtin:eval"``, a file (.jsonl, .json, .csv, .txt), ``"module:function"``, a list
        of strings, a list of mappings with the key ``"prompt"``, a table with such a column (``datasets.Dataset``, data
        frame, Arrow table, mapping from names to columns), or :class:`text_env.generated.GeneratedPrompts`. The reward
        is given the other columns. A prompt may be a conversation, which is a list of messages ``{"role": ...,
        "content": ...}``: it is written in the tokenizer's chat template, and rewards are given prompts and completions
        as lists of messages, as TRL gives them. A prompt never ends in EOS: EOS tokens at its end, and whatever the
        tokenizer appends to a text, are dropped.
    :param reward: ``"builtin"``, ``"sentiment"``, the directory or hub name of a sequence classifier,
        ``"module:function"``, a callable ``(prompts, completions, completion_ids, **columns) -> list[float]``, or a
        weighted sum of these, as ``{"builtin": 1.0, "sentiment": 0.5}`` or ``"builtin+0.5*sentiment"``. An address such
        as ``"http://host:8000/score"`` names a server (:class:`text_env.http_reward.HttpReward`). Further names
        are ``"correct"``, ``"format"``, ``"length"`` and ``"overlong"``, which take arguments: ``"overlong(256, 64)"``
        (see :func:`text_env.rewards.make_reward`). ``"task"`` is the reward of ``task``.
    :param max_prompt_tokens: the length of the longest prompt, in tokens. None: as long as the longest one is (of
        generated prompts, the longest of the first 64).
    :param max_new_tokens: the response budget, in tokens. An EOS counts.
    :param min_new_tokens: an EOS ends the text only if at least this many response tokens stand before it, and the
        policies of this package never sample an earlier one. Stop strings and the budget end a text regardless.
    :param stop: a string, or several, that end the text. The completion keeps the string. A special token may be a stop
        string; it ends the text too, but is no part of the decoded completion.
    :param eos_token_ids: the token ids that end a text besides the tokenizer's eos token; ``()``: none do. None means:
        those that the model's ``generation_config.json`` or else its ``config.json`` lists, where the tokenizer was
        loaded from. Texts then end where transformers' ``generate`` ends them.
    :param group_size: the number of consecutive episodes that share a prompt.
    :param metrics: further rewards by name, for example ``{"gold_score": "sentiment"}``. Their scores are reported in
        the final info and never paid. None of them may have a name that the final info, a training or an evaluation
        uses itself (:data:`text_env.finished_texts.RESERVED_NAMES`).
    :param overlong_prompts: what happens to a prompt of more than max_prompt_tokens: "error", or "truncate_left", which
        keeps the end of the prompt.
    :param constraint: which tokens may follow a context: a callable ``(contexts, n_tokens) -> bool [B, n_tokens]`` (see
        :mod:`text_env.constraints`), its name as ``"module:function"``, or a list of these, all of which must hold. The
        environment reports it by ``action_masks()`` and accepts every token all the same, so that algorithms without
        masks can run; it is the policy that never samples a forbidden token.
    :param chat_template: whether a prompt that is a string becomes the user's turn in a conversation, written in the
        tokenizer's chat template. None means: if the tokenizer has a chat template, as those of instruct models do.
        Prompts that are lists of messages always use it.
    :param shaping: rewards for the tokens before the last one: a :class:`text_env.shaping.PotentialShaping`, its name
        as ``"module:object"``, or anything that ``reward`` may be, which is then the potential. The best policy stays
        the same. ``info["score"]`` is still the score, and the rewards of an episode sum to the score minus the
        potential of the episode's start (if γ = 1).
    :param reward_kwargs: the arguments ``batch_size``, ``device``, ``dtype``, ``max_length``, ``label`` and
        ``chat_template`` of :class:`text_env.rewards.SequenceClassifierReward`, for every classifier that ``reward``,
        ``metrics`` and ``shaping`` name.
    :param reward_timeout: the number of seconds that one call of ``reward``, ``metrics`` or ``shaping`` may take. One
        that takes longer is a :class:`text_env.rewards.RewardError` that names the reward and the time. None: any time.
        A plain function cannot be ended from outside: it goes on in a thread that nobody waits for.
    :param reward_retries: how often a call that raised or took too long is tried again, after waits of 0.5 seconds, 1,
        2, and so on up to 30. What a reward returns is no reason to try again, even if it is wrong. None: 8 times over
        HTTP, so that a server may come back within a minute and a half; otherwise never.
    """

    task: Any = None
    task_kwargs: Mapping[str, Any] | None = None
    tokenizer: str | Path | PreTrainedTokenizerBase = "builtin"
    prompts: str | Path | Iterable[str | Mapping[str, Any]] = "builtin"
    reward: Any = "builtin"
    max_prompt_tokens: int | None = 16
    max_new_tokens: int = 48
    min_new_tokens: int = 0
    stop: str | Sequence[str] | None = None
    eos_token_ids: Sequence[int] | None = None
    group_size: int = 1
    metrics: Mapping[str, Any] | None = None
    overlong_prompts: OverlongPrompts = "error"
    constraint: Any = None
    chat_template: bool | None = None
    shaping: Any = None
    reward_kwargs: Mapping[str, Any] | None = None
    reward_timeout: float | None = None
    reward_retries: int | None = None

    @property
    def reward_limits(self) -> Limits:
        """``reward_timeout`` and ``reward_retries``."""
        return Limits(self.reward_timeout, self.reward_retries)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple, empty where there is none."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self) -> None:
        """Check the numbers and the stop strings. What the other arguments name is checked where it is looked up.

        :raises ValueError: if one of them is out of range.
        """
        if self.max_prompt_tokens is not None:
            check_integer("max_prompt_tokens", self.max_prompt_tokens, 1)
        check_integer("max_new_tokens", self.max_new_tokens, 1)
        check_integer("min_new_tokens", self.min_new_tokens, 0)
        check_integer("group_size", self.group_size, 1)
        self.reward_limits.check()
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"Expected min_new_tokens to be at most max_new_tokens={self.max_new_tokens}, got "
                f"{self.min_new_tokens}."
            )
        if not all(isinstance(string, str) and string for string in self.stop_strings):
            raise ValueError(f"Expected stop to be a non-empty string or a list of them, got {self.stop!r}.")


def check_integer(name: str, value: Any, least: int) -> None:
    """
    :param name: what the number is called in the error.
    :param value: the number.
    :param least: the smallest value allowed.
    :raises ValueError: if ``value`` is no integer, or smaller.
    """
    if not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"Expected {name} to be an integer of at least {least}, got {value!r}.")


def takes_settings(init: Constructor) -> Constructor:
    """Decorate an ``__init__`` whose last parameter is ``**settings``, the fields of :class:`EpisodeSettings`.

    ``inspect.signature`` and ``help`` then show every field with its default and its documentation, as if the
    constructor listed them itself, and a misspelt argument is answered with the right one.

    :param init: the constructor.
    :return: the constructor, which raises a TypeError that names the known arguments if it is given an unknown one.
    """
    signature = inspect.signature(init)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
    fields = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in dataclasses.fields(EpisodeSettings)
    ]
    names = [parameter.name for parameter in (*own[1:], *fields)]

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                # Python's own words, which libraries look for that try whether an environment takes an argument.
                raise TypeError(
                    f"{type(self).__name__} got an unexpected keyword argument {name!r}{hint}; known are "
                    f"{', '.join(names)}."
                )
        init(self, *args, **kwargs)

    # On the function and not on the class, where subclasses with a constructor of their own would inherit it.
    checked.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
    checked.__doc__ = inspect.getdoc(EpisodeSettings)
    return cast(Constructor, checked)
