"""What PPO and VinePPO have in common: the clipped surrogate, what is logged of it, and when an update has gone far
enough."""

from __future__ import annotations

import torch

from agents.objectives.kl import kl_k3
from agents.objectives.losses import clipped_surrogate
from agents.rollouts.episode_buffer import EpisodeSamples


def clipped_loss(
    samples: EpisodeSamples, log_prob: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate of each token.

    :param samples: a packed batch of N actions.
    :param log_prob: the log-probabilities of the actions under the policy that is trained, [N].
    :param clip_range: ε of the clipped surrogate.
    :return: the losses, [N]; and of each token its share in KL(π_old ‖ π), and whether its ratio is out of the range.
    """
    loss = clipped_surrogate(log_prob, samples.old_log_prob, samples.advantages, clip_range)
    log_ratio = (log_prob - samples.old_log_prob).detach()
    return loss, {
        "approx_kl": kl_k3(-log_ratio),  # KL(π_old ‖ π), from samples of π_old
        "clip_fraction": ((log_ratio.exp() - 1).abs() > clip_range).float(),
    }


def beyond(target_kl: float | None, means: dict[str, float]) -> bool:
    """
    :param target_kl: a KL divergence from the policy that sampled, in nats per token; None: there is no limit.
    :param means: the mean over a minibatch of what :func:`clipped_loss` logs, by name.
    :return: whether the divergence exceeds 1.5 times the target.
    """
    return target_kl is not None and means["approx_kl"] > 1.5 * target_kl
