"""One episode as a ``gymnasium.Env``: a token is a step, and the last one is paid the score of the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from text_env.episodes import Episodes, EpisodesFace, Observation
from text_env.prompts import OverlongPrompts
from text_env.rendering import METADATA, check_render_mode, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextEnv(EpisodesFace, gym.Env[Observation, np.int64]):
    """Write a text, token by token.

    **Observation**: ``Dict`` of ``input_ids`` int64 [L] (prompt, response so far, padding), ``attention_mask`` int8 [L]
    and ``prompt_length`` int64 [1], with L = ``max_prompt_tokens + max_new_tokens``.
    **Action**: ``Discrete(V)``, the next token, with V = ``len(tokenizer)``.
    **Reward**: 0 until the last step, then the score of the text; ``shaping`` pays the steps before it too.
    **End**: EOS, a stop string and a spent budget all *terminate*, since the budget is part of the task; nothing here
    truncates. The info of the last step holds ``score``, ``prompt``, ``completion``, ``finish_reason`` (``"eos"``,
    ``"stop"`` or ``"length"``), the ``metrics``, and ``reward/<name>`` for each part of a weighted sum. The info of a
    reset holds ``prompt``.

    :param tokenizer: ``"builtin"``, a directory, a hub name, or a live Hugging Face tokenizer with an eos token. Here
        and below, names are the better form: Gymnasium deep-copies live objects when a wrapper's ``spec`` is read.
    :param prompts: ``"builtin"``, ``"builtin:eval"``, a file (.jsonl, .json, .csv, .txt), ``"module:function"``, a list
        of strings, a list of mappings with the key ``"prompt"``, or a ``datasets.Dataset``. Columns go to the reward. A
        prompt may be a conversation, a list of messages ``{"role": ..., "content": ...}``: it is written in the
        tokenizer's chat template, and rewards get prompts and completions as messages too, as TRL gives them.
    :param reward: ``"builtin"``, ``"sentiment"``, directory or hub name of a sequence classifier,
        ``"module:function"``, a callable ``(prompts, completions, completion_ids, **columns) -> list[float]``, or a
        weighted sum of these, as ``{"builtin": 1.0, "sentiment": 0.5}`` or ``"builtin+0.5*sentiment"``.
    :param max_prompt_tokens: the longest prompt, in tokens.
    :param max_new_tokens: the response budget, in tokens, EOS included.
    :param min_new_tokens: an EOS with fewer response tokens than this before it is an ordinary token.
    :param stop: string or strings that end the text; the completion keeps them. A special token may be one: that by
        which an instruct model ends its turn, where it isn't the tokenizer's eos.
    :param group_size: so many episodes that start one after another share a prompt.
    :param metrics: name → reward: further scores for the final info, never paid, e.g. ``{"gold_score": "sentiment"}``.
    :param overlong_prompts: what happens to a prompt longer than ``max_prompt_tokens``: ``"error"``, or
        ``"truncate_left"``, which keeps its end.
    :param render_mode: ``"ansi"``, ``"human"`` (``render()`` prints the text; nothing is printed unasked, as a copy of
        the text per token would drown it), ``"rgb_array"`` or None.
    :param constraint: which tokens may follow a context: a callable ``(contexts, n_tokens) -> bool [B, n_tokens]`` (see
        :mod:`text_env.constraints`), its name as ``"module:function"``, or a list of these, all of which hold.
        :meth:`action_masks` tells it to whoever asks. The environment itself takes every token, so that algorithms
        without masks run as well; it is the policy that never samples a forbidden one.
    :param chat_template: whether a string prompt is the user's turn in a conversation, written in the tokenizer's chat
        template; None: if the tokenizer has one, as those of instruct models do. Lists of messages always are.
    :param shaping: what pays the tokens before the last as well: a :class:`text_env.shaping.PotentialShaping`, its name
        as ``"module:object"``, or whatever ``reward`` may be, for the potential of one. The best policy stays the same.
        ``info["score"]`` is the score as ever; an episode's rewards sum to it minus the potential of its start (γ = 1).
    :param reward_kwargs: ``batch_size``, ``device``, ``dtype``, ``max_length``, ``label`` and ``chat_template`` of
        :class:`text_env.rewards.SequenceClassifierReward`, for every classifier that ``reward``, ``metrics`` and
        ``shaping`` name.
    :raises ValueError: if an argument is out of range or names something that is not there; it says what is.
    """

    metadata: dict[str, Any] = METADATA

    def __init__(
        self,
        tokenizer: str | Path | PreTrainedTokenizerBase = "builtin",
        prompts: str | Path | Iterable[str | Mapping[str, Any]] = "builtin",
        reward: Any = "builtin",
        max_prompt_tokens: int = 16,
        max_new_tokens: int = 48,
        min_new_tokens: int = 0,
        stop: str | Sequence[str] | None = None,
        group_size: int = 1,
        metrics: Mapping[str, Any] | None = None,
        overlong_prompts: OverlongPrompts = "error",
        render_mode: str | None = None,
        constraint: Any = None,
        chat_template: bool | None = None,
        shaping: Any = None,
        reward_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self.episodes = Episodes(
            1,
            tokenizer=tokenizer,
            prompts=prompts,
            reward=reward,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            constraint=constraint,
            stop=stop,
            group_size=group_size,
            metrics=metrics,
            overlong_prompts=overlong_prompts,
            chat_template=chat_template,
            shaping=shaping,
            reward_kwargs=reward_kwargs,
        )
        self.observation_space = self.episodes.observation_space()
        self.action_space = self.episodes.action_space()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        :param seed: begin the sequence of prompts (and the group of them) anew.
        :param options: ``"prompt"`` (text or token ids) instead of a drawn one; ``"response"`` (text or token ids):
            start in the middle of it. It counts against the budget and belongs to the completion.
        :return: observation, and info with ``prompt``.
        :raises ValueError: if a prompt or a response cannot be used. The running episode goes on then.
        """
        asked = {name: None if value is None else [value] for name, value in (options or {}).items()}
        openings = self.episodes.openings(1, asked)
        super().reset(seed=seed)
        [info] = self.episodes.start([0], [self.np_random], openings, new_group=seed is not None)
        return self.episodes.observe(0), info

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append a token.

        :param action: the token.
        :return: observation, reward, terminated, False, info.
        :raises ValueError: if it is no token of the vocabulary.
        :raises gymnasium.error.ResetNeeded: if the episode has ended.
        :raises text_env.rewards.RewardError: if the reward fails. The step has not happened then and can be repeated.
        """
        rewards, terminated, infos = self.episodes.append(np.zeros(1, np.int64), self.episodes.tokens([action]))
        return (
            self.episodes.observe(0),
            float(rewards[0]),
            bool(terminated[0]),
            False,
            infos[0] if infos else {},
        )

    def action_masks(self) -> NDArray[np.bool_]:
        """
        :return: bool [V], true where the next token may be; EOS is not before ``min_new_tokens``. The name is the one
            that sb3-contrib's ``MaskablePPO`` asks for.
        :raises ValueError: if the constraint forbids every token here, or answers with something else.
        """
        return self.episodes.action_masks()[0]

    def render(self) -> str | NDArray[np.uint8] | None:
        """
        :return: prompt and response so far as text (``"ansi"``) or image (``"rgb_array"``); ``"human"`` prints them.
        """
        return render(self.render_mode, *self.episodes.text(0))
