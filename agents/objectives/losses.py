"""Losses, as pure functions of tensors with one value per token. The training loop takes the means.

Notation: N tokens of one batch.
"""

from __future__ import annotations

import math

import torch

Tensor = torch.Tensor


def clipped_surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """The clipped surrogate objective of PPO, negated (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7).

    −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A), with the ratio ρ = π / π_old.

    :param log_ratio: log ρ, the log-probability of each action under the policy that is trained minus that under the
        policy that sampled it, float [N].
    :param advantages: the advantages A, float [N]; constants.
    :param clip_range: ε_low.
    :param clip_range_high: ε_high; None: ε_low. With a greater one, improbable tokens can become more probable faster
        (clip-higher; Yu et al. 2025, https://arxiv.org/abs/2503.14476).
    :param dual_clip: c > 1. Where A is negative, the objective is at least c A, so that a ratio greater than c, which
        nothing else bounds there, has no gradient (Ye et al. 2020, https://arxiv.org/abs/1912.09729); None: no such
        bound.
    :return: the loss of each token, float [N].
    """
    ratio = torch.exp(log_ratio)
    clipped = clip_ratio(ratio, clip_range, clip_range_high)
    objective = torch.min(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.max(objective, dual_clip * advantages), objective)
    return -objective


def cispo(
    log_prob: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> Tensor:
    """The policy gradient with clipped importance weights (MiniMax 2025, https://arxiv.org/abs/2506.13585, eq. 4).

    −sg(clip(ρ, 1 − ε_low, 1 + ε_high)) A log π, where sg(·) is a constant to the gradient. A token whose ratio is
    clipped keeps a gradient, which it has not in :func:`clipped_surrogate`.

    :param log_prob: log π, the log-probability of each action under the policy that is trained, float [N].
    :param log_ratio: log ρ, as for :func:`clipped_surrogate`, float [N].
    :param advantages: the advantages A, float [N]; constants.
    :param clip_range: ε_low. With 1, as in the paper, nothing is clipped from below.
    :param clip_range_high: ε_high; None: ε_low.
    :return: the loss of each token, float [N].
    """
    weight = clip_ratio(torch.exp(log_ratio), clip_range, clip_range_high).detach()
    return policy_gradient(log_prob, weight * advantages)


def clip_ratio(ratio: Tensor, clip_range: float, clip_range_high: float | None = None) -> Tensor:
    """
    :param ratio: ρ, float [N].
    :param clip_range: ε_low.
    :param clip_range_high: ε_high; None: ε_low.
    :return: clip(ρ, 1 − ε_low, 1 + ε_high), float [N].
    """
    return ratio.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))


def sequence_log_ratio(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """The log-ratio of whole texts, token by token (GSPO-token; Zheng et al. 2025, https://arxiv.org/abs/2507.18071,
    eq. 14).

    The ratio of a text is the geometric mean of the ratios of its tokens, s = exp(mean log ρ). Each of its tokens has
    this ratio as its value, and the gradient of its own: log s_t = sg(log s) + log ρ_t − sg(log ρ_t).

    :param log_ratio: log ρ of each token, text by text, float [N].
    :param lengths: the number of tokens of each text, int [E]; N in all.
    :return: log s_t of each token, float [N].
    """
    constant = log_ratio.detach()
    means = torch.cat([text.mean().expand(len(text)) for text in constant.split(lengths.tolist())])
    return means + (log_ratio - constant)


def truncated_importance_weight(old_log_prob: Tensor, behaviour_log_prob: Tensor, cap: float) -> Tensor:
    """min(π_old / μ, C): corrects the loss where μ, which sampled, is not π_old, which the ratio refers to (Yao et al.
    2025, https://fengyao.notion.site/off-policy-rl; truncation: Ionides 2008,
    https://doi.org/10.1198/106186008X320456).

    So it is where another program or another precision writes the texts. The loss of each token is multiplied by its
    weight. Truncation bounds the variance, at the price of a bias where the weight is greater than C.

    :param old_log_prob: log π_old of each action, computed as the update computes log π, float [N]; constants.
    :param behaviour_log_prob: log μ, under the distribution that the action was sampled from, float [N]; constants.
    :param cap: C, greater than 0; as a rule 2 or more.
    :return: the weight of each token, float [N].
    """
    return torch.exp(old_log_prob - behaviour_log_prob).clamp(max=cap)


def is_near(old_log_prob: Tensor, behaviour_log_prob: Tensor, bound: float) -> Tensor:
    """Whether π_old and μ agree about a token, up to a factor: 1/b ≤ π_old / μ ≤ b. Where they don't, a token can
    be left out of the policy's gradient (IcePop, Ling Team 2025, https://arxiv.org/abs/2510.18855, with other bounds).

    :param old_log_prob: log π_old, as for :func:`truncated_importance_weight`, float [N].
    :param behaviour_log_prob: log μ, likewise, float [N].
    :param bound: b, greater than 1.
    :return: bool [N].
    """
    return (old_log_prob - behaviour_log_prob).abs() <= math.log(bound)


def effective_sample_size(old_log_prob: Tensor, behaviour_log_prob: Tensor) -> Tensor:
    """The share of a sample from μ that is left when it must stand for one from π_old, (Σ ρ)² / (N Σ ρ²) with ρ = π_old
    / μ (Kong 1992, University of Chicago, technical report 348).

    :param old_log_prob: log π_old, as for :func:`truncated_importance_weight`, float [N].
    :param behaviour_log_prob: log μ, likewise, float [N].
    :return: a scalar between 1/N and 1, which is 1 where the two agree.
    """
    log_ratio = old_log_prob - behaviour_log_prob
    ratio = torch.exp(log_ratio - log_ratio.max())  # which can't overflow, and a factor makes no difference
    return ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())


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
