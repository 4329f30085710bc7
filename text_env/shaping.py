"""Potential-based shaping: a reward on every token that leaves the best policy what it was.

A score at the end does not say which token earned it. Shaping adds ``F = γ Φ(s') − Φ(s)`` to every step from s to s',
where the potential Φ says how promising a prefix of a text is, and is 0 once the text is finished. Over an episode all
of it cancels but for Φ of the start, which no action changes. So the returns of all policies shift by the same
constant, and the optimum stays where it was, *whatever* Φ is (Ng, Harada & Russell 1999, "Policy invariance under
reward transformations"). A good Φ, close to the expected score of a prefix, tells each token at once what it is worth;
a bad one costs time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from text_env.imports import import_object, is_object_name
from text_env.rewards import FinishedTexts, make_reward, score


@dataclass(frozen=True)
class PotentialShaping:
    """How prefixes of texts are turned into rewards.

    :param potential: Φ, what :func:`text_env.rewards.make_reward` takes. It is called as every reward is, on
        *prefixes*: completion and ``completion_ids`` as far as they are written, both empty at the start. It must be a
        function of what it is called with.
    :param gamma: the discount. It must be that of the algorithm (1 by default in ours; RLOO and GRPO, whose action is
        the whole text, know no other), or shaping moves the optimum.
    :param every: show Φ only the first ⌊t/k⌋·k of t response tokens. That too is a function of the state, so the
        optimum still stays; Φ is evaluated after every k-th token only, so it costs k times less.
    :param scale: a factor of Φ.
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
        :param tokens: how many response tokens there are, int64 [B].
        :return: how many of them, from the first, Φ is shown.
        """
        return tokens - tokens % self.every

    def potentials(self, prefixes: FinishedTexts) -> NDArray[np.float64]:
        """
        :param prefixes: B of them, as long as :meth:`seen` says.
        :return: Φ, float64 [B].
        :raises text_env.rewards.RewardError: if the potential fails.
        """
        return self.scale * score(self.potential, prefixes)

    def rewards(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
        """``F = γ Φ(s') − Φ(s)``.

        :param before: Φ(s), float64 [B].
        :param after: Φ(s'), float64 [B]; 0 where s' is the end.
        :return: float64 [B].
        """
        return self.gamma * after - before


def make_shaping(spec: Any, **reward_kwargs: Any) -> PotentialShaping | None:
    """Resolve what the environment's argument ``shaping`` is.

    :param spec: None; a :class:`PotentialShaping`, or the name of one as ``"module:object"``; or what
        :func:`text_env.rewards.make_reward` takes, for a ``PotentialShaping`` of that.
    :param reward_kwargs: as for :func:`text_env.rewards.make_reward`.
    :return: the shaping, its potential a callable; None for None.
    :raises ValueError: as ``make_reward``.
    :raises TypeError: likewise.
    """
    if spec is None:
        return None
    if isinstance(spec, str) and is_object_name(spec):
        spec = import_object(spec)
    shaping = spec if isinstance(spec, PotentialShaping) else PotentialShaping(spec)
    return replace(shaping, potential=make_reward(shaping.potential, **reward_kwargs))
