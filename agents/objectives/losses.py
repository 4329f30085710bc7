"""Losses, as pure functions of tensors with one value per token. The training loop takes the means.

Notation: N tokens of one batch.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The clipped surrogate objective of PPO, negated (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7).

    −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), with ρ = exp(log π − log π_old).

    :param log_prob: log π, the log-probability of each action under the policy that is trained, float [N].
    :param old_log_prob: log π_old, its log-probability under the policy that sampled it, float [N]; a constant.
    :param advantages: the advantages A, float [N]; constants.
    :param clip_range: ε.
    :return: the loss of each token, float [N].
    """
    ratio = torch.exp(log_prob - old_log_prob)
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def policy_gradient(log_prob: Tensor, advantages: Tensor) -> Tensor:
    """The score-function loss −log π · A (Williams 1992, https://doi.org/10.1007/BF00992696).

    :param log_prob: log π, the log-probability of each action under the policy that is trained, float [N].
    :param advantages: the advantages A, float [N]; constants.
    :return: the loss of each token, float [N].
    """
    return -log_prob * advantages


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> Tensor:
    """Half the squared error of the values, optionally with clipping.

    Clipping is that of OpenAI's baselines and of Stiennon et al. 2020 (https://arxiv.org/abs/2009.01325): ½ max((V −
    G)², (V_old + clip(V − V_old, −ε, ε) − G)²).

    :param values: V, the values under the critic that is trained, float [N].
    :param old_values: V_old, the values at the time of sampling, float [N]; constants.
    :param returns: G, the targets of the values, float [N]; constants.
    :param clip_range: ε; None: no clipping.
    :return: the loss of each token, float [N].
    """
    assert values.shape == returns.shape, (values.shape, returns.shape)
    error = (values - returns) ** 2
    if clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * error
