"""Rollouts that another program writes, and what is done about its not being the policy.

Three log-probabilities of a token have to be told apart. log μ is that under the distribution which the token was
sampled from: the program's, whose kernels and precision are its own, and whose weights may be older. log π_old is that
of the policy before an update, computed as the update computes it; the ratios of the losses refer to it, so that they
begin at 1 whatever wrote the texts. log π is that of the policy during the update. What μ is from π_old is corrected by
an importance weight min(π_old / μ, C) for each token (truncated importance sampling), by which its advantage is
multiplied. Losses that are not proportional to the advantage are not weighted: the critic's, the KL penalty's, that of
good texts and the entropy's.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from agents.objectives.losses import effective_sample_size, is_near, truncated_importance_weight
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.backend import RolloutBackend, Sampling
from agents.rollouts.collector import first_contexts
from agents.rollouts.continuations import Continuations
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.source import RolloutSource
from text_env.vector_env import TextVectorEnv

# A mean |log π_old − log μ| that no rounding explains: a model in bfloat16 has about a fifth of this.
MISMATCH_BOUND = 0.05


class RemoteRollouts(RolloutSource):
    """Rollouts that a backend writes.

    Weights are counted by the rollouts that were learned from. With ``max_lag`` 0 a backend gets new weights before
    every rollout, and whatever is learned from was sampled from the weights as they are. Otherwise the next rollout is
    written while the latest one is learned from, so it is sampled from weights that are one update old. More than 1
    means that new weights are sent less often, only when texts would else be too old when they are learned from.

    :param backend: the program.
    :param policy: the policy that is trained.
    :param env: the environment that the texts are written in.
    :param n_episodes: the number of episodes of a rollout.
    :param max_lag: how many updates old the weights may be that a text was sampled from, when it is learned from.
    :param importance_cap: C, the largest importance weight; None: all are 1.
    :param importance_bound: b: tokens of which π_old / μ is not between 1/b and b have the weight 0; None: there are no
        such tokens.
    :raises ValueError: if the backend can't be told how to sample.
    """

    def __init__(
        self,
        backend: RolloutBackend,
        policy: CausalLMPolicy,
        env: TextVectorEnv,
        n_episodes: int,
        max_lag: int = 0,
        importance_cap: float | None = 2.0,
        importance_bound: float | None = None,
    ) -> None:
        self.writer: Continuations = Continuations(backend, Sampling.of(policy, env))
        self._backend = backend
        self._policy = policy
        self._env = env
        self._n_episodes = n_episodes
        self._max_lag = max_lag
        self._importance_cap = importance_cap
        self._importance_bound = importance_bound
        self._version = 0  # of the policy: the number of rollouts so far
        self._sent: int | None = None  # the version that the backend has
        self._warned = False

    def prepare(self) -> None:
        """Take in what was written ahead, and send new weights if the backend's are too old.

        :raises ConnectionError: if nobody is there to write.
        """
        self.writer.begin()
        self._version += 1
        # What it writes during the update that follows will be learned from after it.
        oldest = self._version + min(self._max_lag, 1) - self._max_lag
        if self._sent is None or self._sent < oldest:
            self._backend.take_weights(self._policy, self._version)
            self._sent = self._version

    def score(self, buffer: EpisodeBuffer) -> None:
        """As :meth:`agents.rollouts.episode_buffer.EpisodeBuffer.score` says."""
        buffer.score(self._policy)

    def correct(self, buffer: EpisodeBuffer) -> dict[str, float]:
        """Multiply the advantages by the importance weights."""
        old, behaviour = torch.from_numpy(buffer.log_probs), torch.from_numpy(buffer.behaviour_log_probs)
        weights = torch.ones_like(old)
        if self._importance_cap is not None:
            weights = truncated_importance_weight(old, behaviour, self._importance_cap)
        near = torch.ones_like(old, dtype=torch.bool)
        if self._importance_bound is not None:
            near = is_near(old, behaviour, self._importance_bound)
        buffer.advantages = buffer.advantages * (weights * near).numpy()
        difference = (old - behaviour).abs()
        figures = {
            "log_prob_mean": float(difference.mean()),
            "log_prob_max": float(difference.max()),
            "effective_sample_size": float(effective_sample_size(old, behaviour)),
            "masked": float((~near).float().mean()),
            "lag": float(self._version - min(self.writer.versions)),
        }
        if self._importance_cap is not None:
            figures["truncated"] = float((old - behaviour).exp().gt(self._importance_cap).float().mean())
        if figures["lag"] == 0 and figures["log_prob_mean"] > MISMATCH_BOUND and not self._warned:
            self._warned = True
            warnings.warn(
                "Expected log-probabilities of whoever writes the texts to be the policy's, apart from rounding; the "
                f"mean difference is {figures['log_prob_mean']:.2g} nats (more than {MISMATCH_BOUND}). Is it the same "
                "model, does it take the weights that it is sent, and does it say what it sampled with?",
                stacklevel=2,
            )
        return {f"mismatch/{name}": figure for name, figure in figures.items()}

    def write_ahead(self) -> None:
        """Let the next rollout be written, if texts may be older than the weights that learn from them."""
        if self._max_lag:
            self.writer.write_ahead(first_contexts(self._env, self._n_episodes))

    def state(self) -> dict[str, Any]:
        """The number of rollouts, and what was written ahead, for which this waits."""
        return {"version": self._version, "ahead": self.writer.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """The backend gets the weights anew, whatever it had before."""
        self._version, self._sent = state["version"], None
        self.writer.load_state(state["ahead"])
