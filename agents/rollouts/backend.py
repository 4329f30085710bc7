"""What a program must do that writes the texts of a rollout in the policy's place, and what it is told for that.

Such a program, a *backend*, is given contexts and returns continuations: token ids, the log-probability that each had
when it was sampled, and the version of the weights that it was sampled from. It judges nothing. The environment takes
the tokens one after the other as if the policy had chosen them, and says where a text ends and what it is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from agents.models.distribution import TokenDistribution
from agents.policies.causal_lm_policy import CausalLMPolicy
from text_env.constraints import (
    AllOf,
    AllowedTokens,
    Constraint,
    Contexts,
    ForbiddenTokens,
    allowed_tokens,
    name_of,
)
from text_env.episodes import EpisodesFace


class Request(NamedTuple):
    """A context that is to be continued.

    :param token_ids: the context: prompt, and response so far.
    :param step: how many of these tokens belong to the response.
    :param seed: the seed of the random numbers. A backend that is deterministic answers the same request under the same
        weights with the same tokens.
    """

    token_ids: list[int]
    step: int
    seed: int


class Continuation(NamedTuple):
    """What follows a context.

    :param token_ids: int64 [T], the tokens, at least one.
    :param log_probs: float64 [T], nats: log μ, the log-probability of each under the distribution that it was sampled
        from.
    :param version: the version of the weights.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray
    version: int


class Sampling(NamedTuple):
    """How a backend must sample: all of ``TokenDistribution`` but the weights, and where it may stop.

    :param temperature: the number that logits are divided by.
    :param eos_token_ids: the tokens that end a text.
    :param min_new_tokens: the number of response tokens before which these have probability 0.
    :param max_new_tokens: the response budget, in tokens.
    :param stop: strings that end a text. A backend that goes on behind one of them only does more than is needed.
    :param n_tokens: V, the number of tokens of the environment; those from V on have probability 0.
    :param n_logits: the number of logits of the model, at least V.
    :param allowed: the tokens that may be sampled; None: all V.
    :param max_length: the number of tokens of the longest context and its continuation.
    """

    temperature: float
    eos_token_ids: tuple[int, ...]
    min_new_tokens: int
    max_new_tokens: int
    stop: tuple[str, ...]
    n_tokens: int
    n_logits: int
    allowed: tuple[int, ...] | None
    max_length: int

    @classmethod
    def of(cls, policy: CausalLMPolicy, env: EpisodesFace) -> Sampling:
        """
        :param policy: the policy, for which a backend is to write.
        :param env: the environment that the texts are written in.
        :return: how to sample.
        :raises ValueError: if the policy's distribution has a constraint that is more than a set of tokens.
        """
        distribution, episodes = policy.distribution, env.episodes
        return cls(
            distribution.temperature,
            env.eos_token_ids,
            distribution.min_new_tokens,
            env.max_new_tokens,
            episodes.stop,
            distribution.n_tokens,
            policy.lm.model.get_output_embeddings().weight.shape[0],
            _set_of_tokens(distribution),
            env.max_prompt_tokens + env.max_new_tokens,
        )


class RolloutBackend(Protocol):
    """A program that writes texts. Another than :class:`agents.rollouts.vllm_servers.VllmServers` is a class with these
    two methods; ``OnPolicyAlgorithm`` takes an object of it for ``rollouts``.
    """

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Continuation]:
        """Continue contexts. This may be called in another thread than the main one, but not by two at a time.

        :param requests: the contexts, of which several may be the same.
        :param sampling: how to sample.
        :return: the continuations, in the order of the requests. Each goes on to a token that ends a text, to one of
            the stop strings, or to the response budget; one that stops before is continued by another request.
        :raises ConnectionError: if nobody is there to write.
        """
        ...

    def take_weights(self, policy: CausalLMPolicy, version: int) -> None:
        """Take the policy's weights as they are now. Nothing is being written meanwhile.

        :param policy: the policy. It must not be changed, and it may change after this call has returned.
        :param version: their number, which the continuations bear that are sampled from them.
        :raises ConnectionError: if nobody is there to take them.
        """
        ...


def _set_of_tokens(distribution: TokenDistribution) -> tuple[int, ...] | None:
    """The tokens that a constraint allows, which must be the same after every context; None if there is none."""
    constraint = distribution.constraint
    if constraint is None:
        return None
    parts: Sequence[Constraint] = constraint.constraints if isinstance(constraint, AllOf) else (constraint,)
    for part in parts:
        if not isinstance(part, AllowedTokens | ForbiddenTokens):
            raise ValueError(
                "Expected no constraint, AllowedTokens or ForbiddenTokens where another program writes the texts: it "
                f"can be told which tokens may follow but not when; got {name_of(part)}. Use rollouts='local'."
            )
    anywhere = Contexts(np.zeros((1, 1), np.int64), np.ones(1, np.int64), np.zeros(1, np.int64))
    mask = allowed_tokens(constraint, anywhere, distribution.n_tokens)[0]
    return tuple(np.flatnonzero(mask).tolist())
