"""What PPO, VinePPO, GRPO and DAPO share: several steps on one rollout, and how they are corrected for that."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.snapshot import Weights
from agents.algorithms.trust_region import TrustRegion
from agents.objectives.kl import kl_k3
from agents.objectives.losses import cispo, clip_ratio, clipped_surrogate, sequence_log_ratio
from agents.rollouts.episode_buffer import EpisodeSamples

SurrogateName = Literal["clip", "gspo", "cispo"]


class Surrogate(OnPolicyAlgorithm):
    """The base class of algorithms whose loss has the ratio ρ = π / π_old of the policy that is trained to the policy
    that sampled.

    :param policy: the policy, as for ``OnPolicyAlgorithm``.
    :param env: the environment, as for ``OnPolicyAlgorithm``.
    :param surrogate: what is done with the ratio. ``"clip"``: PPO's clipped surrogate, token by token. ``"gspo"``: the
        same with the ratio of the whole text, the geometric mean of those of its tokens (Zheng et al. 2025,
        https://arxiv.org/abs/2507.18071, who take ``clip_range=3e-4, clip_range_high=4e-4, kl_coef=0`` and count every
        text the same). ``"cispo"``: the policy gradient, weighted by the clipped ratio, so that clipped tokens keep a
        gradient (MiniMax 2025, https://arxiv.org/abs/2506.13585, who clip only from above: ``clip_range=1``).
    :param clip_range: ε, how far below 1 a ratio counts, and how far above.
    :param clip_range_high: how far above 1 a ratio counts, if not as far as below (clip-higher, DAPO's 0.28; Yu et al.
        2025, https://arxiv.org/abs/2503.14476); None: ``clip_range``.
    :param dual_clip: c > 1, the ratio from which on a token with a negative advantage has no gradient (Ye et al. 2020,
        https://arxiv.org/abs/1912.09729, who take 3); None: no such bound.
    :param target_kl: an update stops when the KL divergence from the policy that sampled, in nats per token, exceeds
        1.5 times this number; None: never.
    :param trust_region: the largest KL divergence from the policy that sampled, in nats per *episode*, that an update
        may reach; or the entropy of an episode, where that is less. A longer update is shortened, and the learning rate
        of the next ones is lowered as long as they would be too long; None: no limit.
    :param kwargs: the other arguments of ``OnPolicyAlgorithm``.
    :raises ValueError: for another surrogate, or if a number is out of range.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        surrogate: SurrogateName = "clip",
        clip_range: float = 0.2,
        clip_range_high: float | None = None,
        dual_clip: float | None = None,
        target_kl: float | None = None,
        trust_region: float | None = None,
        **kwargs: Any,
    ) -> None:
        if surrogate not in get_args(SurrogateName):
            raise ValueError(f"Expected surrogate to be one of {get_args(SurrogateName)}, got {surrogate!r}.")
        if dual_clip is not None and surrogate == "cispo":
            raise ValueError(f"Expected dual_clip=None with surrogate='cispo', got {dual_clip}.")
        self.surrogate = surrogate
        self.clip_range = clip_range
        self.clip_range_high = clip_range_high
        self.dual_clip = dual_clip
        self.target_kl = target_kl
        self.trust_region = trust_region
        self._rounding = 0.0
        super().__init__(policy, env, **kwargs)

    def surrogate_loss(
        self, samples: EpisodeSamples, log_prob: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of the policy.

        :param samples: a packed batch of N actions.
        :param log_prob: the log-probabilities of the actions under the policy that is trained, [N].
        :return: the losses, [N]; and what to log, by name, [N] each.
        """
        log_ratio = log_prob - samples.old_log_prob
        approx_kl = kl_k3(-log_ratio.detach())  # KL(π_old ‖ π), from samples of π_old
        bounds = self.clip_range, self.clip_range_high
        if self.surrogate == "gspo":
            log_ratio = sequence_log_ratio(log_ratio, samples.lengths)
        if self.surrogate == "cispo":
            loss = cispo(log_prob, log_ratio, samples.advantages, *bounds)
        else:
            loss = clipped_surrogate(log_ratio, samples.advantages, *bounds, self.dual_clip)
        ratio = log_ratio.detach().exp()
        return loss, {"approx_kl": approx_kl, "clip_fraction": (clip_ratio(ratio, *bounds) != ratio).float()}

    def stop_early(self, means: dict[str, float]) -> bool:
        """Whether the KL divergence from the policy that sampled exceeds 1.5 times ``target_kl``."""
        return self.target_kl is not None and means["approx_kl"] > 1.5 * self.target_kl

    def train(self) -> None:
        """Update as the algorithm does, within the trust region."""
        if self.trust_region is None:
            self.step_factor = 1.0  # it may have been switched off
            super().train()
            return
        actor = self.policy.optimizer.param_groups[0]["params"]
        before = Weights(actor) if self.before is None else self.before.weights.of(actor)
        region = TrustRegion(self.policy, before, self.trust_region, self.engine, self.micro_batch_tokens)
        super().train()
        if self._first_ratios is not None:  # no step of the policy was taken, as while the critic warms up
            return
        reached, kept = region.hold(self.buffer, self._rounding)
        # Towards the rate at which this update would have ended at the limit. Of an update that went very far that is
        # badly known, hence the lower bound, and the way back up is taken more slowly.
        self.step_factor = min(1.0, self.step_factor * (max(kept, 0.5) if kept < 1 else 1.2))
        self.logger.record("train/update_kl", reached)
        self.logger.record("train/update_kept", kept)
        self.logger.record("train/step_factor", self.step_factor)

    def _report_first(self, distance: float, means: dict[str, float]) -> None:
        super()._report_first(distance, means)
        self._rounding = means["approx_kl"]  # no step has been taken yet, so it is of rounding alone
