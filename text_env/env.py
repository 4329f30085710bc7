"""The scalar environment, a ``gymnasium.Env``: each step writes one token, and the last step is paid the score."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray

from text_env.episodes import Episodes, EpisodesFace, Observation, checked_options, checked_seed, unpaid
from text_env.rendering import METADATA, check_render_mode, render
from text_env.settings import takes_settings
from text_env.task_names import settings_of


class TextEnv(EpisodesFace, gym.Env[Observation, np.int64]):
    """Write a text, token by token.

    **Observation**: a ``Dict`` of ``input_ids`` int64 [L] (prompt, response so far, padding), ``attention_mask`` int8
    [L] and ``prompt_length`` int64 [1], with L = ``max_prompt_tokens + max_new_tokens``.
    **Action**: ``Discrete(V)``, the next token, with V = the largest token id + 1.
    **Reward**: the score of the text at the last step, 0 before it; ``shaping`` pays the earlier steps too.
    **End**: EOS (any of ``eos_token_ids``), a stop string and a spent budget all *terminate* the episode, since the
    budget is part of the task.
    The environment never truncates. A ``TimeLimit`` around it, which is what ``gym.make(..., max_episode_steps=)``
    puts there, cuts episodes whose score is then never paid; the first time this happens, the environment warns.
    **Info**: after a reset ``prompt``; after the last step ``score``, ``prompt``, ``completion``, ``finish_reason``
    (``"eos"``, ``"stop"`` or ``"length"``), the ``metrics``, and ``reward/<name>`` for each part of a weighted sum.

    :param render_mode: ``"ansi"``, ``"human"`` (``render()`` prints the text; nothing is printed unasked, since a copy
        of the text per token would drown it), ``"rgb_array"`` or None.
    :param settings: the fields of :class:`text_env.settings.EpisodeSettings`, whose documentation
        ``help(TextEnv.__init__)`` shows.
    :raises TypeError: for an argument that does not exist; the error names those that do.
    :raises ValueError: if an argument is out of range, or names something that does not exist.
    """

    metadata: dict[str, Any] = METADATA

    @takes_settings
    def __init__(self, *, render_mode: str | None = None, **settings: Any) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self.metadata = dict(self.metadata)  # SyncVectorEnv of Gymnasium 1.1 writes its autoreset mode into it
        self.episodes = Episodes(1, settings_of(settings))
        self.observation_space = self.episodes.observation_space()
        self.action_space = self.episodes.action_space()
        self._time_limit: int | None = None  # of the wrappers around this environment
        self._steps = 0
        self._warned = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode.

        :param seed: seed of the prompt order. With a seed, a new group of episodes begins as well.
        :param options: ``"prompt"`` (text or token ids) is used instead of a drawn prompt. ``"response"`` (text or
            token ids) is the beginning of the response: it counts against the budget and belongs to the completion.
        :return: observation, and info with ``prompt``.
        :raises ValueError: if the seed or an option cannot be used, or if a generated prompt cannot be made; whatever
            else the program raises that makes it is passed on. The running episode is then as it was.
        """
        asked = {name: None if value is None else [value] for name, value in checked_options(options).items()}
        openings = self.episodes.openings(1, asked)
        seed = checked_seed(seed)
        generator = self.np_random if seed is None else seeding.np_random(seed)[0]
        openings = self.episodes.drawn(openings, [generator], new_group=seed is not None)
        super().reset(seed=seed)
        self._np_random = generator  # from which the prompt is drawn already
        self._steps = 0
        if not self._warned:
            self._time_limit = self._outer_time_limit()
        [info] = self.episodes.start([0], openings)
        return self.episodes.observe(0), info

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append a token.

        :param action: the token.
        :return: observation, reward, terminated, False, info.
        :raises ValueError: if the action is no token of the vocabulary.
        :raises gymnasium.error.ResetNeeded: if the episode has ended.
        :raises text_env.rewards.RewardError: if the reward fails. The step has then not happened and can be repeated.
        """
        outcome = self.episodes.outcome(np.zeros(1, np.int64), self.episodes.tokens([action]))
        self.episodes.append(outcome)
        [reward], [terminated] = outcome.rewards.tolist(), outcome.terminated.tolist()
        self._steps += 1
        if self._time_limit is not None and self._steps >= self._time_limit and not (terminated or self._warned):
            self._warned = True
            warnings.warn(unpaid(self._time_limit, self.max_new_tokens), stacklevel=2)
        return (
            self.episodes.observe(0),
            reward,
            terminated,
            False,
            outcome.infos[0] if outcome.infos else {},
        )

    def _outer_time_limit(self) -> int | None:
        """The number of steps after which a wrapper cuts the episode that is being reset; None: no wrapper does.

        An environment does not know its wrappers, but at a reset each of them is somewhere above on the call stack.
        """
        limits = []
        frame = sys._getframe(1)
        while (caller := frame.f_back) is not None:
            frame = caller
            wrapper = frame.f_locals.get("self")
            if isinstance(wrapper, TimeLimit) and wrapper.unwrapped is self:
                limits.append(int(wrapper._max_episode_steps))
        return min(limits, default=None)

    def action_masks(self) -> NDArray[np.bool_]:
        """The tokens that may come next. The name of the method is the one that sb3-contrib's ``MaskablePPO`` calls.

        :return: bool [V], true for the tokens that the constraint allows; false for EOS before ``min_new_tokens``.
        :raises ValueError: if the constraint forbids every token, or returns something else than such a mask.
        """
        return self.episodes.action_masks()[0]

    def render(self) -> str | NDArray[np.uint8] | None:
        """
        :return: the prompt and the response so far, as a string (``"ansi"``) or as an image (``"rgb_array"``). The mode
            ``"human"`` prints them and returns None.
        """
        return render(self.render_mode, *self.episodes.text(0))
