"""VinePPO (Kazemnejad et al. 2024, https://arxiv.org/abs/2410.01679): PPO whose values are measured, not learned."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from stable_baselines3.common.type_aliases import Schedule

from agents.algorithms.surrogate import Surrogate
from agents.objectives.advantages import step_advantages
from agents.rollouts.branching import branch, step_starts
from agents.rollouts.episode_buffer import EpisodeBuffer, EpisodeSamples


class VinePPO(Surrogate):
    """PPO's clipped surrogate without a critic. A response is divided into steps, and the value of the state before
    each of them is the mean return of ``n_branches`` continuations, which are not trained on.

    All tokens of a step have its advantage: what the step was paid, plus the value after it, minus the value before.
    The continuations are tokens that the policy generates, so they count in ``total_timesteps`` and
    ``num_timesteps``; ``time/branch_tokens`` says how many of a rollout's they are.

    :param policy: the policy, as for ``OnPolicyAlgorithm``.
    :param env: the environment, as for ``OnPolicyAlgorithm``.
    :param learning_rate: the learning rate, as for ``PPO``.
    :param n_episodes: the number of episodes of a rollout.
    :param batch_size: the number of episodes of a minibatch; None: all of the rollout.
    :param n_epochs: the number of passes over a rollout.
    :param n_branches: K, the number of continuations of a state. The paper has 9.
    :param branch_every: the number of tokens of a step, without ``split``. In a response budget of that many tokens or
        fewer there is one step: REINFORCE with the mean return of K other texts of the prompt as its baseline.
    :param split: a string at whose every occurrence a step ends, such as a line break between steps of reasoning; None:
        a step ends after ``branch_every`` tokens.
    :param normalize_advantage: as for ``OnPolicyAlgorithm``.
    :param kwargs: the other arguments of ``Surrogate`` and ``OnPolicyAlgorithm``.
    :raises ValueError: if a number is out of range, or ``split`` is empty.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        learning_rate: float | Schedule = 1e-4,
        n_episodes: int = 64,
        batch_size: int | None = 16,
        n_epochs: int = 4,
        n_branches: int = 4,
        branch_every: int = 16,
        split: str | None = None,
        normalize_advantage: bool | Literal["group"] = True,
        **kwargs: Any,
    ) -> None:
        if split == "":
            raise ValueError("Expected split to be a string that ends a step, such as '\\n', or None, got ''.")
        self.n_branches, self.branch_every, self.split = n_branches, branch_every, split
        own: dict[str, Any] = {"n_episodes": n_episodes, "batch_size": batch_size, "n_epochs": n_epochs}
        own |= {"learning_rate": learning_rate, "normalize_advantage": normalize_advantage}
        super().__init__(policy, env, **own, **kwargs)

    def estimate(self, buffer: EpisodeBuffer) -> None:
        """Measure the value of the state before each step, and take the advantages of the steps from these."""
        tokenizer, responses = self.vector_env.tokenizer, np.split(buffer.actions, buffer.starts[1:-1])
        firsts = [step_starts(ids.tolist(), self.branch_every, self.split, tokenizer) for ids in responses]
        states = [(episode, first) for episode, own in enumerate(firsts) for first in own]
        prompts = [buffer.prompts[episode] for episode, _ in states]
        begun = [buffer.response_before(*state) for state in states]
        branches = branch(self.policy, self.vector_env, prompts, begun, self.n_branches)
        self.pay_penalties(branches.buffer, branches.episodes)
        values = branches.returns(self.gamma).mean(axis=1)
        starts = np.array([buffer.starts[episode] + first for episode, first in states])
        ends = np.append(starts[1:], buffer.n_tokens)
        last = np.isin(ends, buffer.starts)
        advantages = step_advantages(buffer.rewards, values, ends - starts, last, self.gamma)
        buffer.advantages = advantages.astype(np.float32)
        spent = int(self.engine.total(branches.buffer.n_tokens))
        self.num_timesteps += spent
        self.logger.record("time/branch_tokens", spent)

    def loss(
        self, samples: EpisodeSamples, values: torch.Tensor, log_prob: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The surrogate."""
        loss, logged = self.surrogate_loss(samples, log_prob)
        return loss, {"policy_gradient_loss": loss, "entropy_loss": -entropy, **logged}
