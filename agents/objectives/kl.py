"""The KL divergence of the policy from the reference: its estimators, the exact sum, and controllers of the
coefficient β of the KL penalty.

Notation: N tokens of one batch; V, the vocabulary; p, the policy's distribution; q, the reference's.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

Tensor = torch.Tensor
SampledKL = Literal["k1", "k2", "k3"]
"""The estimators that look at the token that was sampled."""
KLEstimator = Literal["k1", "k2", "k3", "exact"]


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


def kl_exact(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """KL(p‖q) itself, Σ_v p(v) (log p(v) − log q(v)): the mean of :func:`kl_k1` over all tokens that p may choose.

    Its gradient is that of the divergence at the context of a token, where the sampled token gives one that is right in
    the mean only (Rao–Blackwellisation; Amini et al. 2025, https://arxiv.org/abs/2504.10637).

    :param log_probs: log p, float [N, V]; minus infinity where a token has probability 0, which adds nothing.
    :param ref_log_probs: log q, float [N, V].
    :return: the divergence at each context, float [N], nats.
    """
    log_ratio = (log_probs - ref_log_probs).masked_fill(log_probs == -torch.inf, 0.0)
    return (log_probs.exp() * log_ratio).sum(dim=-1)


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

    :param coef: β, at least 0.
    :raises ValueError: if ``coef``, now or when it is set later, is negative or not finite.
    """

    def __init__(self, coef: float) -> None:
        self.coef = coef

    @property
    def coef(self) -> float:
        """β."""
        return self._coef

    @coef.setter
    def coef(self, coef: float) -> None:
        if not 0 <= coef < float("inf"):
            raise ValueError(f"Expected a kl_coef of at least 0, got {coef}: a negative one pays for divergence.")
        self._coef = coef

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
    :raises ValueError: if ``target`` or ``coef``, now or when it is set later, is not greater than 0 and finite.
    """

    def __init__(self, coef: float, target: float, gain: float = 0.5) -> None:
        if not 0 < target < float("inf"):
            raise ValueError(f"Expected a target KL > 0 nats per episode, got {target}.")
        self.coef = coef
        self.target = target
        self._gain = gain

    @property
    def coef(self) -> float:
        """β."""
        return self._coef

    @coef.setter
    def coef(self, coef: float) -> None:
        if not 0 < coef < float("inf"):
            raise ValueError(f"Expected a kl_coef > 0 to start from, got {coef}: β is multiplied, and 0 would stay 0.")
        self._coef = coef

    def update(self, kl: float) -> None:
        """Adapt β to the latest rollout.

        :param kl: the KL divergence from the reference, in nats per episode, mean over the episodes of the rollout.
        """
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + self._gain * error


def kl_controller(coef: float, target: float | None) -> KLController:
    """
    :param coef: β, at the start.
    :param target: the KL divergence to hold, in nats per episode; None for a constant β.
    :return: the controller that the two describe.
    :raises ValueError: as :class:`FixedKL` and :class:`AdaptiveKL`.
    """
    return FixedKL(coef) if target is None else AdaptiveKL(coef, target)
