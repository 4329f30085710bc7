"""Losses and estimators: pure functions of tensors, one value a token; the loop takes the means.

Notation: N tokens of one batch.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's clipped surrogate, negated (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7).

    −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) with ρ = exp(log π − log π_old).

    :param log_prob: [N], of the policy being trained.
    :param old_log_prob: [N], of the one that sampled.
    :param advantages: [N].
    :param clip_range: ε.
    :return: [N].
    """
    ratio = torch.exp(log_prob - old_log_prob)
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def policy_gradient(log_prob: Tensor, advantages: Tensor) -> Tensor:
    """The score-function loss −log π · A (Williams 1992, https://doi.org/10.1007/BF00992696).

    :param log_prob: [N].
    :param advantages: [N], constants.
    :return: [N].
    """
    return -log_prob * advantages


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> Tensor:
    """Half the squared error, optionally of the worse of the new and the clipped value.

    Clipping as in OpenAI's baselines and in Stiennon et al. 2020 (https://arxiv.org/abs/2009.01325):
    ½ max((V − G)², (V_old + clip(V − V_old, −ε, ε) − G)²).

    :param values: [N].
    :param old_values: [N], while sampling.
    :param returns: [N].
    :param clip_range: ε, or None.
    :return: [N].
    """
    error = (values - returns) ** 2
    if clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * error
