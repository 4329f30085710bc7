"""Branches: several continuations of the same unfinished text, whose mean return is the value of that state.

A language environment can be reset to any state, since a state is nothing but its tokens. So the value of a state can
be measured, without bias, where a critic has to guess (Kazemnejad et al. 2024, https://arxiv.org/abs/2410.01679).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from agents.objectives.advantages import discounted_returns
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sampling import collect_texts
from text_env.tokenization import decode
from text_env.vector_env import TextVectorEnv

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Branches(NamedTuple):
    """K continuations of each of S states.

    :param buffer: the continuations as episodes: what a state consists of is context, without an action.
    :param episodes: the final info of each continuation, in the order of the buffer.
    :param order: int [S], the numbers of the states in the order in which they were continued, K times each.
    """

    buffer: EpisodeBuffer
    episodes: list[dict[str, Any]]
    order: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """What the environment said of the finished texts, float64 [S, K]."""
        return self._of_states(np.array([episode["score"] for episode in self.episodes]))

    def returns(self, gamma: float) -> np.ndarray:
        """
        :param gamma: the discount γ.
        :return: the discounted sums of the rewards of the continuations, float64 [S, K], once the buffer is finalized;
            after the KL penalty, if the buffer has a reference.
        """
        ended = np.zeros(self.buffer.n_episodes)
        returns = discounted_returns(self.buffer.padded(self.buffer.rewards), ended, self.buffer.mask, gamma)
        return self._of_states(returns[:, 0])

    def _of_states(self, flat: np.ndarray) -> np.ndarray:
        table = flat.reshape(len(self.order), -1)
        sorted_again = np.empty_like(table)
        sorted_again[self.order] = table
        return sorted_again


def branch(
    policy: CausalLMPolicy, env: TextVectorEnv, prompts: Sequence[Any], responses: Sequence[Any], n_branches: int
) -> Branches:
    """Let a policy go on from states, several times from each.

    The environment is left as it was, even with episodes under way. PyTorch's random numbers go on, unless they are
    kept by ``torch.random.fork_rng``.

    The policy's memo reads a state about once, however often it is continued: its continuations start in neighbouring
    rows, and the longest states come first, so that the shorter ones that they begin with are found in their rows.

    :param policy: the policy.
    :param env: the environment, which scores the finished texts.
    :param prompts: the prompt of each of S states, in a form that a reset takes, such as ``EpisodeBuffer.prompts``.
    :param responses: what there is of the response in each state, likewise: ``EpisodeBuffer.response_before``.
    :param n_branches: K, the number of continuations of each state.
    :return: the continuations.
    :raises ValueError: if a response is finished already, or K is below 1.
    """
    if n_branches < 1:
        raise ValueError(f"Expected n_branches >= 1, got {n_branches}.")
    order = np.argsort([0 if response is None else -len(response) for response in responses], kind="stable")
    again = np.repeat(order, n_branches).tolist()
    openings: dict[str, Any] = {"prompts": [prompts[i] for i in again], "responses": [responses[i] for i in again]}
    with env.left_as_it_was():
        buffer, episodes = collect_texts(policy, env, len(again), **openings)
    return Branches(buffer, episodes, order)


def step_starts(tokens: Sequence[int], every: int, split: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Divide a response into steps.

    :param tokens: the token ids of the response, at least one.
    :param every: the number of tokens of a step, without ``split``.
    :param split: a string; the token that completes it is the last of its step. None: steps of ``every`` tokens.
    :param tokenizer: the tokenizer of the token ids.
    :return: the number of the first token of each step.
    """
    if split is None:
        return list(range(0, len(tokens), every))
    first = [0]
    for end in range(1, len(tokens)):
        if split in decode(tokenizer, [tokens[first[-1] : end]])[0]:
            first.append(end)
    return first
