"""The KL divergence of the policy from the reference: its estimators, and controllers of the coefficient β of the KL
penalty.

Notation: N tokens of one batch; p, the policy's distribution; q, the reference's.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

Tensor = torch.Tensor
KLEstimator = Literal["k1", "k2", "k3"]


def kl_k1(log_ratio: Tensor) -> Tensor:
    """Unbiased estimator of KL(p‖q) from samples of p: log p − log q (http://joschu.net/blog/kl-approx.html).

    A single value may have either sign. Near p = q most values cancel, so the variance is high compared with the mean.

    :param log_ratio: log p − log q of tokens that were sampled from p, float [N].
    :return: the estimate for each token, float [N], nats.
    """
    return log_ratio


def kl_k2(log_ratio: Tensor) -> Tensor:
    """Biased estimator of KL(p‖q) from samples of p: ½ (log p − log q)² (same source as :func:`kl_k1`).

    It is never negative and has a low variance. The bias vanishes as p approaches q.

    :param log_ratio: log p − log q of tokens that were sampled from p, float [N].
    :return: the estimate for each token, float [N], nats.
    """
    return 0.5 * log_ratio**2


def kl_k3(log_ratio: Tensor) -> Tensor:
    """Unbiased estimator of KL(p‖q) from samples of p: q/p − 1 − log(q/p) (same source as :func:`kl_k1`).

    It is never negative. Its variance is low near p = q and high where p ≪ q.

    :param log_ratio: log p − log q of tokens that were sampled from p, float [N].
    :return: the estimate for each token, float [N], nats.
    """
    return torch.expm1(-log_ratio) + log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


class KLController(Protocol):
    """Decides the coefficient β of the KL penalty after every rollout. ``coef`` is the current β."""

    coef: float

    def update(self, kl: float) -> None:
        """Adapt β to the latest rollout.

        :param kl: the KL divergence from the reference, in nats per episode, mean over the episodes of the rollout.
        """


class FixedKL:
    """A constant β.

    :param coef: β.
    """

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float) -> None:
        """Leave β as it is.

        :param kl: not used.
        """


class AdaptiveKL:
    """Adapts β by proportional control of its logarithm, so that the KL divergence stays near a target.

    After every rollout β is multiplied by 1 + K e with e = clip(KL / target − 1, −0.2, 0.2), as in section 2.2 of
    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, where K = 0.1.

    :param coef: β at the start, greater than 0.
    :param target: the KL divergence to hold, in nats per episode, greater than 0.
    :param gain: K. It is higher than in the paper, whose trainings have hundreds of rollouts where ours have tens. With
        the default K, β changes by at most 10 % per rollout.
    :raises ValueError: if ``coef`` or ``target`` is not greater than 0.
    """

    def __init__(self, coef: float, target: float, gain: float = 0.5) -> None:
        if target <= 0:
            raise ValueError(f"Expected a target KL > 0 nats per episode, got {target}.")
        if coef <= 0:
            raise ValueError(f"Expected a kl_coef > 0 to start from, got {coef}: β is multiplied, and 0 would stay 0.")
        self.coef = coef
        self._target = target
        self._gain = gain

    def update(self, kl: float) -> None:
        """Adapt β to the latest rollout.

        :param kl: the KL divergence from the reference, in nats per episode, mean over the episodes of the rollout.
        """
        error = min(max(kl / self._target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + self._gain * error
