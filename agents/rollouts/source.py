"""Where the texts of a rollout come from: the policy itself, or another program.

The training loop treats both alike. What it does for texts that the policy has written itself is nothing; what it does
for others is in :mod:`agents.rollouts.remote`, which is imported only then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import Writer
from agents.rollouts.episode_buffer import EpisodeBuffer
from text_env.imports import check_may_contact
from text_env.vector_env import TextVectorEnv

if TYPE_CHECKING:
    from agents.rollouts.backend import RolloutBackend
    from agents.rollouts.vllm_servers import VllmServers

LOCAL = "local"
"""The name of the policy itself as a source."""


class RolloutSource:
    """The policy itself: its texts need no correction.

    :param policy: the policy.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:
        self.writer: Writer = policy

    def prepare(self) -> None:
        """Called before a rollout: see to it that the writer may write."""

    def score(self, buffer: EpisodeBuffer) -> None:
        """Called when a rollout is complete and not finalized: give its actions the values and the log-probabilities
        that the policy has for them.

        :param buffer: the rollout.
        """

    def correct(self, buffer: EpisodeBuffer) -> dict[str, float]:
        """Called when a rollout has advantages: correct them for the difference between the policy and whoever sampled.

        :param buffer: the rollout.
        :return: what to log, by name.
        """
        return {}

    def write_ahead(self) -> None:
        """Called when a rollout is about to be learned from and another will follow: let that be written meanwhile."""

    def state(self) -> dict[str, Any]:
        """
        :return: what is known between two iterations, as a tree for :mod:`agents.state.checkpoint`.
        """
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """
        :param state: what :meth:`state` returned.
        """


def rollout_source(
    rollouts: str | RolloutBackend,
    policy: CausalLMPolicy,
    env: TextVectorEnv,
    n_episodes: int,
    max_lag: int,
    importance_cap: float | None,
    importance_bound: float | None,
) -> RolloutSource:
    """
    :param rollouts: who writes, as ``OnPolicyAlgorithm`` takes it.
    :param policy: the policy that is trained.
    :param env: the environment that the texts are written in.
    :param n_episodes: the number of episodes of a rollout.
    :param max_lag: as for ``OnPolicyAlgorithm``.
    :param importance_cap: as for ``OnPolicyAlgorithm``.
    :param importance_bound: as for ``OnPolicyAlgorithm``.
    :return: the source of the rollouts.
    :raises ValueError: for a string that is no address, for a lag of the policy behind itself, and if another program
        can't be told to sample from the policy's distribution.
    """
    if rollouts == LOCAL:
        if max_lag:
            raise ValueError(
                f"Expected max_lag=0 with rollouts='local', got {max_lag}: the policy can't write while it is being "
                "trained."
            )
        return RolloutSource(policy)
    from agents.rollouts.remote import RemoteRollouts

    backend = vllm_servers(rollouts) if isinstance(rollouts, str) else rollouts
    return RemoteRollouts(backend, policy, env, n_episodes, max_lag, importance_cap, importance_bound)


def vllm_servers(urls: str) -> VllmServers:
    """
    :param urls: the addresses of servers of vLLM, with commas in between.
    :return: the servers.
    :raises ValueError: if an address is none.
    :raises UntrustedNameError: if only a file names them that may come from somebody else.
    """
    from agents.rollouts.vllm_servers import VllmServers

    check_may_contact(urls)
    return VllmServers(urls)
