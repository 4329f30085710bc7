"""Group relative policy optimisation (Shao et al. 2024, https://arxiv.org/abs/2402.03300)."""

from __future__ import annotations

from typing import Any

from agents.algorithms.group_relative import GroupRelative
from agents.algorithms.on_policy import LossWeighting


class GRPO(GroupRelative):
    """PPO's clipped surrogate without a critic. A text's score is compared with those of the prompt's other texts.

    As in the paper, the KL penalty is a term of the loss, and every *text* has the same weight, whatever its length.
    With ``loss_weighting="constant", scale_rewards=False`` this is Dr. GRPO (Liu et al. 2025,
    https://arxiv.org/abs/2503.20783).

    :param policy: the policy, as for ``OnPolicyAlgorithm``.
    :param env: the environment, as for ``OnPolicyAlgorithm``.
    :param loss_weighting: what counts the same in the loss, as for ``OnPolicyAlgorithm``.
    :param kwargs: the other arguments of ``GroupRelative``, ``Surrogate`` and ``OnPolicyAlgorithm``.
    """

    def __init__(self, policy: Any, env: Any, loss_weighting: LossWeighting = "sequence", **kwargs: Any) -> None:
        super().__init__(policy, env, loss_weighting=loss_weighting, **kwargs)
