"""Potential-based shaping: a reward for every token that does not change which policy is best.

A score at the end does not say which token earned it. Shaping adds ``F = γ Φ(s') − Φ(s)`` to the reward of every step
from a state s to a state s', where the potential Φ says how promising the beginning of a text is, and is 0 once the
text is finished. In the sum over an episode every potential cancels except that of the first state, which no action
changes. So the returns of all policies shift by the same constant, and the best policy stays the best *whatever* Φ is
(Ng, Harada & Russell 1999, "Policy invariance under reward transformations"). A good potential, close to the expected
score of the finished text, tells each token at once what it is worth; a bad potential makes learning slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from text_env.imports import import_object, is_object_name
from text_env.reward_limits import NO_LIMITS, Limits
from text_env.rewards import FinishedTexts, make_reward, score


@dataclass(frozen=True)
class PotentialShaping:
    """How the rewards of an environment are shaped.

    :param potential: Φ, anything that :func:`text_env.rewards.make_reward` takes. It is called as every reward is, but
        on *prefixes*: completion and ``completion_ids`` as far as they are written, both empty at the start. It must
        depend on nothing but its arguments.
    :param gamma: the discount γ. It must be the discount of the algorithm, or shaping changes which policy is best. The
        default of this package's algorithms is 1, and RLOO and GRPO, whose action is the whole text, have no other.
    :param every: k: of t response tokens Φ is shown the first ⌊t/k⌋·k only. This too is a function of the state, so the
        best policy stays the best; Φ is then called after every k-th token only, which costs k times less.
    :param scale: a factor that Φ is multiplied by.
    :raises ValueError: if a number is outside its range.
    """

    potential: Any
    gamma: float = 1.0
    every: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"Expected gamma to lie in [0, 1], got {self.gamma!r}.")
        if not isinstance(self.every, int | np.integer) or self.every < 1:
            raise ValueError(f"Expected every to be an integer of at least 1, got {self.every!r}.")
        if not math.isfinite(self.scale):
            raise ValueError(f"Expected a finite scale, got {self.scale!r}.")

    def seen(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """
        :param tokens: numbers of response tokens, int64 [B].
        :return: how many of these tokens Φ is shown, counted from the first; int64 [B].
        """
        return tokens - tokens % self.every

    def potentials(self, prefixes: FinishedTexts) -> NDArray[np.float64]:
        """
        :param prefixes: B prefixes of texts, cut to the lengths that :meth:`seen` returns.
        :return: Φ of each prefix, float64 [B].
        :raises text_env.rewards.RewardError: if the potential fails.
        """
        return self.scale * score(self.potential, prefixes)

    def rewards(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
        """The shaped part of the reward, ``F = γ Φ(s') − Φ(s)``.

        :param before: Φ(s), float64 [B].
        :param after: Φ(s'), float64 [B]; 0 where s' is the end of an episode.
        :return: F, float64 [B].
        """
        return self.gamma * after - before


def make_shaping(spec: Any, limits: Limits = NO_LIMITS, /, **reward_kwargs: Any) -> PotentialShaping | None:
    """Resolve the environment's argument ``shaping``.

    :param spec: None; a :class:`PotentialShaping`, or its name as ``"module:object"``; or anything that
        :func:`text_env.rewards.make_reward` takes, which becomes the potential of a ``PotentialShaping``.
    :param limits: how long each call of the potential may take and how often it is tried again.
    :param reward_kwargs: the keyword arguments of :func:`text_env.rewards.make_reward`.
    :return: the shaping, with a callable as its potential; None if ``spec`` is None.
    :raises ValueError: for the reasons of ``make_reward``.
    :raises TypeError: for the reasons of ``make_reward``.
    """
    if spec is None:
        return None
    if isinstance(spec, str) and is_object_name(spec):
        spec = import_object(spec)
    shaping = spec if isinstance(spec, PotentialShaping) else PotentialShaping(spec)
    return replace(shaping, potential=make_reward(shaping.potential, limits, **reward_kwargs))
