"""A trust region that is held: what an update has changed too much is taken back in part.

Clipping alone does not hold one. It removes the gradient of a token whose ratio has left the clip range, but not the
momentum, nor what other tokens do to it, and nothing at all of the first step (Engstrom et al. 2020,
https://arxiv.org/abs/2005.12729). How far a step goes is decided by the learning rate, and which is too high depends on
the task: where rewards are rare, most of a gradient is noise, and steps in its direction still have the full length,
since Adam divides by the gradient's size.

The distance is the KL divergence of an *episode*, since it is the episode that is scored: by Pinsker's inequality the
mean of a score between 0 and 1 changes by at most √(KL / 2).

It is the number of nats by which the policy's own texts have become more surprising. How surprising they were is their
entropy, and no update goes further than that, whatever the limit: what a policy of short texts, or one that is nearly
sure, can't have learned from its rollout is held back as well, where a number of nats alone would be no limit.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from agents.algorithms.engine import Engine
from agents.algorithms.snapshot import Weights
from agents.objectives.kl import kl_k3
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeBuffer

# The number of episodes that the distance is measured on, at most: those of all processes, spread evenly over the
# rollout, so that they are the same however many processes share it, and of more prompts.
MEASURED_EPISODES = 32
# How often an update is shortened before it is taken back. Once is enough for all but very long ones.
MAX_CUTS = 8
# What a distance may exceed the limit by before another cut.
TOLERANCE = 1.1
# The smallest limit that the entropy leads to, in nats per episode: it is known from a rollout's texts only, and of a
# policy that is sure of nearly all it writes, they may show none at all. By Pinsker's inequality, 0.02 nats change the
# mean of a score between 0 and 1 by at most 0.1.
LEAST_BY_ENTROPY = 0.02


class TrustRegion:
    """The weights of the actor before an update, and the distance from them that the update may reach.

    :param policy: the policy.
    :param before: the weights of its actor before the update.
    :param limit: the largest KL(π_old ‖ π), in nats per episode; where the policy's texts have less entropy, that is.
    :param engine: the engine, which knows of other processes.
    :param micro_batch_tokens: the largest number of tokens of one forward pass; None: what suits the device.
    """

    def __init__(
        self,
        policy: CausalLMPolicy,
        before: Weights,
        limit: float,
        engine: Engine,
        micro_batch_tokens: int | None,
    ) -> None:
        self._policy = policy
        self._before = before
        self._limit = limit
        self._engine = engine
        self._micro_batch_tokens = micro_batch_tokens

    def hold(self, buffer: EpisodeBuffer, rounding: float = 0.0) -> tuple[float, float]:
        """Shorten the update until it is within the limit and the entropy.

        :param buffer: the rollout, sampled by the policy before the update.
        :param rounding: the KL divergence that was measured before the first step, in nats per token. It comes on top
            of the limit, since no update is short enough to be without it.
        :return: the KL divergence that the whole update would have reached, in nats per episode; and the share of the
            update that is kept: 1 where it is within the limit, 0 where no part of it is found that is.
        """
        limit = min(self._limit, max(self.entropy(buffer), LEAST_BY_ENTROPY))
        limit += rounding * self._engine.total(buffer.n_tokens) / self._engine.total(buffer.n_episodes)
        reached = kl = self.distance(buffer)
        kept, cuts = 1.0, 0
        while kl > TOLERANCE * limit and cuts < MAX_CUTS:
            # KL grows with the square of a short step. With a very long one it hardly grows, so each further cut takes
            # more away, however near the limit is.
            cut = min(math.sqrt(limit / kl), 4 / (4 + cuts)) if math.isfinite(kl) else 0.1
            self._before.go_back(kept=cut)
            kept *= cut
            cuts += 1
            kl = self.distance(buffer)
        if kl > TOLERANCE * limit:
            self._before.go_back()
            kept = 0.0
        return reached, kept

    def entropy(self, buffer: EpisodeBuffer) -> float:
        """
        :param buffer: the rollout.
        :return: the entropy of the texts of the policy that sampled, in nats per episode: the mean of −log π_old(text).
        """
        total = -float(buffer.log_probs.sum(dtype=np.float64))
        return self._engine.total(total) / self._engine.total(buffer.n_episodes)

    @torch.no_grad()
    def distance(self, buffer: EpisodeBuffer) -> float:
        """
        :param buffer: the rollout.
        :return: KL(π_old ‖ π) in nats per episode, of episodes spread over the rollout; infinite where the update has
            gone so far that the policy's numbers are not finite.
        """
        self._engine.unshard()
        every = math.ceil(self._engine.total(buffer.n_episodes) / MEASURED_EPISODES)
        episodes = np.arange(0, buffer.n_episodes, every)
        sums = []
        for part in buffer.batches(episodes, self._micro_batch_tokens):
            samples = buffer.pack(part)
            log_prob = self._policy.evaluate_log_probs(samples.observations, samples.actions)
            sums.append(kl_k3((samples.old_log_prob - log_prob).double()).sum())
        total = float(torch.stack(sums).sum())
        return self._engine.total(total if math.isfinite(total) else math.inf) / self._engine.total(len(episodes))
