"""Values as classes: the target of a value as a distribution over points of a fixed grid, the *support*.

A critic that predicts such a distribution, and whose value is its mean, is trained by cross-entropy. Its gradient is
bounded, whatever the size of the target (Farebrother et al. 2024, "Stop regressing", https://arxiv.org/abs/2403.03950).

Notation: N tokens of one batch; M points of the support, float [M], evenly spaced and rising.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def two_hot(targets: Tensor, support: Tensor) -> Tensor:
    """The two points next to the target share the probability so that the mean is the target (Schrittwieser et al.
    2020, https://arxiv.org/abs/1911.08265).

    :param targets: float [N]; what lies beyond the support is moved to its end.
    :param support: float [M].
    :return: probabilities, float [N, M].
    """
    step = support[1] - support[0]
    distance = (targets.clamp(support[0], support[-1])[:, None] - support).abs() / step
    return (1 - distance).clamp(min=0)


def hl_gauss(targets: Tensor, support: Tensor, sigma: float) -> Tensor:
    """The probability of each bin under a normal distribution around the target, without what lies beyond the bins
    (Imani & White 2018, https://arxiv.org/abs/1806.04613). Every point of the support is the middle of a bin.

    The mean is the target, but for the part of the distribution that is cut off where the target is nearer to an end
    than about 3 σ: there the mean lies further inside.

    :param targets: float [N]; what lies beyond the support is moved to its end.
    :param support: float [M].
    :param sigma: σ, the standard deviation, greater than 0.
    :return: probabilities, float [N, M].
    """
    half = (support[1] - support[0]) / 2
    edges = torch.cat([support - half, support[-1:] + half])  # [M + 1]
    below = torch.special.ndtr((edges - targets.clamp(support[0], support[-1])[:, None]) / sigma)
    return below.diff(dim=1) / (below[:, -1:] - below[:, :1])


def cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """−Σ_m p_m log q_m, the cross-entropy of a predicted distribution q to a given one.

    :param logits: the logits of q, float [N, M].
    :param probabilities: p, float [N, M]; constants.
    :return: float [N], nats.
    """
    return -(probabilities * logits.log_softmax(dim=-1)).sum(dim=-1)
