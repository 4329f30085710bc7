"""One episode as a ``gymnasium.Env``: a token is a step, and the last one is paid the score of the text."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from text_env.episodes import Episodes, EpisodesFace, Observation
from text_env.rendering import METADATA, check_render_mode, render
from text_env.settings import EpisodeSettings, takes_settings


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

    :param render_mode: ``"ansi"``, ``"human"`` (``render()`` prints the text; nothing is printed unasked, since a copy
        of the text per token would drown it), ``"rgb_array"`` or None.
    :param settings: the fields of :class:`text_env.settings.EpisodeSettings`, whose documentation
        ``help(TextEnv.__init__)`` shows.
    :raises TypeError: for an argument that does not exist; the known ones are named.
    :raises ValueError: if an argument is out of range or names something that is not there; it says what is.
    """

    metadata: dict[str, Any] = METADATA

    @takes_settings
    def __init__(self, *, render_mode: str | None = None, **settings: Any) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self.episodes = Episodes(1, EpisodeSettings(**settings))
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
