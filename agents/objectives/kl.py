"""The KL divergence between policy and reference: estimators of it, and controllers of its price β.

Notation: N tokens of one batch.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

Tensor = torch.Tensor
KLEstimator = Literal["k1", "k2", "k3"]


def kl_k1(log_ratio: Tensor) -> Tensor:
    """Unbiased estimator of KL(p‖q) from samples of p: log p − log q (http://joschu.net/blog/kl-approx.html).

    Its mean is the KL, but a single value may have either sign, and most of them cancel: high variance near p = q.

    :param log_ratio: [N], log p − log q of the sampled tokens.
    :return: [N], nats.
    """
    return log_ratio


def kl_k2(log_ratio: Tensor) -> Tensor:
    """Biased estimator of low variance, never negative: ½ (log p − log q)². The bias vanishes as p approaches q.

    :param log_ratio: [N], as for :func:`kl_k1`.
    :return: [N], nats.
    """
    return 0.5 * log_ratio**2


def kl_k3(log_ratio: Tensor) -> Tensor:
    """Unbiased and never negative: q/p − 1 − log(q/p). Of low variance near p = q, of high where p ≪ q.

    :param log_ratio: [N], as for :func:`kl_k1`.
    :return: [N], nats.
    """
    return torch.expm1(-log_ratio) + log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


class KLController(Protocol):
    """Decides β after every rollout."""

    coef: float

    def update(self, kl: float) -> None:
        """
        :param kl: mean KL to the reference per episode (nats).
        """


class FixedKL:
    """β stays what it is.

    :param coef: β.
    """

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float) -> None:
        """Nothing to do."""


class AdaptiveKL:
    """β follows a target KL by proportional control of its logarithm.

    e = clip(KL / target − 1, −0.2, 0.2) and β ← β (1 + K e): Ziegler et al. 2019, https://arxiv.org/abs/1909.08593,
    section 2.2, with K = 0.1 there.

    :param coef: β at the start.
    :param target: KL per episode to hold (nats).
    :param gain: K. The paper's trainings have hundreds of rollouts, ours have tens, so it is higher here: β moves by at
        most 10 % a rollout.
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
        error = min(max(kl / self._target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + self._gain * error
