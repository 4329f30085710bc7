"""The distribution that tokens are sampled from: its description, sampling from it, and scoring tokens under it.

Notation: N contexts, V tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from agents.models.pretrained import resolve_dtype
from text_env.constraints import AllOf, Constraint, MinimumLength, all_of, make_constraint, name_of
from text_env.episodes import EpisodesFace


@dataclass(frozen=True)
class TokenDistribution:
    """Everything except the weights that determines the probability of a token after a context.

    The policy samples from this distribution, is trained under it, and is compared with a frozen reference under it.
    All three must use the same one: a reference without the policy's temperature, for example, would give a KL
    divergence other than zero before the policy has changed at all. Therefore the policy and the reference hold one
    description each, and these are checked against one another and against the environment.

    :param n_tokens: V, the number of tokens of the environment. The first V logits of a model are used.
    :param temperature: the number that logits are divided by, greater than 0.
    :param eos_token_ids: the tokens that end a text, in any order; empty if they are not known.
    :param min_new_tokens: the number of response tokens before which the tokens that end a text have probability 0.
    :param constraint: which tokens may follow a context; all others have probability 0. Anything that
        :func:`text_env.constraints.make_constraint` takes.
    :param autocast: the name of the floating-point type of matrix products, such as ``"bfloat16"``, while the weights
        keep their own; None: the type of the weights.
    :raises ValueError: if a value is out of range, or if ``min_new_tokens`` is given without ``eos_token_ids``.
    """

    n_tokens: int
    temperature: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    constraint: Any = None
    autocast: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"Expected a finite temperature > 0, got {self.temperature}. For greedy actions use deterministic=True."
            )
        if self.min_new_tokens > 0 and not self.eos_token_ids:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} needs eos_token_id: the token to forbid until then."
            )
        if wrong := [token for token in self.eos_token_ids if not 0 <= token < self.n_tokens]:
            raise ValueError(
                f"Expected the tokens that end a text to lie in [0, {self.n_tokens}), the environment's tokens, got "
                f"eos_token_id {wrong}."
            )
        dtype = None if self.autocast is None else resolve_dtype(self.autocast)
        if isinstance(dtype, str):
            raise ValueError("Expected autocast to be 'bfloat16', 'float16' or None, got 'auto'.")
        object.__setattr__(self, "autocast", None if dtype is None else str(dtype).removeprefix("torch."))
        object.__setattr__(self, "constraint", make_constraint(self.constraint))
        object.__setattr__(self, "eos_token_ids", tuple(sorted(set(self.eos_token_ids))))

    @cached_property
    def all_constraints(self) -> Constraint | None:
        """The constraint and the minimum length as one constraint; None if every token may follow."""
        minimum = MinimumLength(self.min_new_tokens, self.eos_token_ids) if self.min_new_tokens else None
        return all_of(minimum, self.constraint)

    @property
    def needs_masks(self) -> bool:
        """Whether masks of all V tokens are needed. A minimum length alone concerns only the tokens that end a text."""
        return self.constraint is not None

    def logits(self, raw: torch.Tensor, step: torch.Tensor | None, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """Turn a model's logits into the logits of this distribution.

        :param raw: what the model's head returns, float32 or float64 [N, V]; it may be overwritten.
        :param step: int64 [N], how many tokens of each context belong to the response; None: no fewer than
            ``min_new_tokens``.
        :param allowed: bool [N, V], true for the tokens that may follow, with the minimum length taken into account;
            None if there is no constraint but the minimum length.
        :return: [N, V], divided by the temperature, and minus infinity where a token may not follow.
        :raises ValueError: if there is a constraint and ``allowed`` is None.
        """
        if self.temperature != 1.0:
            raw = raw / self.temperature
        if allowed is not None:
            raw.masked_fill_(~allowed, -torch.inf)
        elif self.needs_masks:
            raise ValueError(
                f"Expected allowed=lm.allowed(contexts), the masks of {name_of(self.constraint)}, got None."
            )
        elif self.min_new_tokens and step is not None:
            too_early = step < self.min_new_tokens
            for token in self.eos_token_ids:
                raw[:, token] = raw[:, token].masked_fill(too_early, -torch.inf)
        return raw

    def check_same(self, other: TokenDistribution, this: str, that: str) -> None:
        """Check that two descriptions are of the same distribution.

        :param other: the other description.
        :param this: what this description belongs to, for the error, for example ``"policy"``.
        :param that: what the other description belongs to.
        :raises ValueError: if they differ; it names the fields in which they do, with both values.
        """
        differing = {field.name for field in dataclasses.fields(self) if not self._agrees(other, field.name)}
        if differing:
            values = "; ".join(
                f"{name} is {getattr(self, name)!r} for the {this} and {getattr(other, name)!r} for the {that}"
                for name in sorted(differing)
            )
            raise ValueError(
                f"Expected the {this} and the {that} to describe the same distribution of tokens: {values}. "
                f"Whatever is computed from both, the KL divergence above all, would be wrong. Give both the same."
            )

    def _agrees(self, other: TokenDistribution, name: str) -> bool:
        if name == "eos_token_ids" and not (self.min_new_tokens or other.min_new_tokens):
            return True  # only a minimum length depends on them
        return alike(getattr(self, name), getattr(other, name))

    def check_environment(self, env: EpisodesFace) -> None:
        """Check that this is the distribution that an environment allows.

        :param env: the text environment that the policy is going to write in.
        :raises ValueError: if they differ; it names the fields in which they do, with both values.
        """
        env_distribution = dataclasses.replace(
            self,
            n_tokens=env.episodes.vocabulary,
            eos_token_ids=env.eos_token_ids,
            min_new_tokens=env.min_new_tokens,
            constraint=env.constraint,
        )
        self.check_same(env_distribution, "policy", "environment")


def alike(one: Any, other: Any) -> bool:
    """Whether two objects are the same function of the same data, as a copy and its original are.

    Constraints are compared by it. They may be copied, or pickled apart from one another, and few of them define
    equality; and where they do, a subclass may have inherited a definition that doesn't look at what it adds.

    :param one: any object.
    :param other: any object.
    :return: True if both are one object, or of one type with the same contents throughout.
    """
    try:
        return _alike(one, other)
    except RecursionError:  # an object that contains itself
        return False


def _alike(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, nn.Module):
        return _alike(dict(one.state_dict()), dict(other.state_dict()))
    if isinstance(one, AllOf):  # in whatever order
        rest = list(other.constraints)
        for part in one.constraints:
            found = next((i for i, candidate in enumerate(rest) if _alike(part, candidate)), None)
            if found is None:
                return False
            del rest[found]
        return not rest
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, FunctionType):  # a lambda that was pickled is another object afterwards
        cells = [[cell.cell_contents for cell in function.__closure__ or ()] for function in (one, other)]
        return one.__code__ == other.__code__ and _alike([one.__defaults__, *cells[0]], [other.__defaults__, *cells[1]])
    if isinstance(one, MethodType):
        return one.__func__ is other.__func__ and _alike(one.__self__, other.__self__)
    if type(one).__module__ == "builtins" or isinstance(one, torch.dtype | torch.device | PurePath | np.generic):
        return bool(one == other)
    try:
        return _alike(one.__reduce_ex__(2), other.__reduce_ex__(2))  # all that a copy would be made from
    except TypeError:  # what can't be copied can't be a copy
        return False


class LogProbAndEntropy(torch.autograd.Function):
    """log π(a) and −Σ π log π of categorical distributions, with one [N, V] tensor kept for the backward pass.

    With ℓ = log π and the entropy H: ∂ log π(a)/∂logit_j = [j = a] − π_j and ∂H/∂logit_j = −π_j (ℓ_j + H).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        :param ctx: PyTorch's context object.
        :param logits: [N, V], minus infinity where a token has probability 0.
        :param actions: int64 [N], token ids.
        :return: log-probabilities [N] and entropies [N], in nats.
        """
        log_probs = torch.log_softmax(logits, dim=-1)
        entropy = -_plogp(log_probs.exp(), log_probs).sum(dim=-1)
        ctx.save_for_backward(log_probs, actions, entropy)
        ctx.set_materialize_grads(False)
        return log_probs.gather(-1, actions[:, None]).squeeze(-1), entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_prob: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None]:
        """
        :param ctx: PyTorch's context object.
        :param grad_log_prob: the gradient of the log-probabilities, [N]; None if it is not needed.
        :param grad_entropy: the gradient of the entropies, [N]; None if it is not needed.
        :return: the gradient of the logits, [N, V], and None for the actions.
        """
        log_probs, actions, entropy = ctx.saved_tensors
        probs = log_probs.exp()
        grad = torch.zeros_like(probs) if grad_log_prob is None else probs * -grad_log_prob[:, None]
        if grad_log_prob is not None:
            grad.scatter_add_(-1, actions[:, None], grad_log_prob[:, None])
        if grad_entropy is not None:
            grad -= (_plogp(probs, log_probs) + probs * entropy[:, None]) * grad_entropy[:, None]
        return grad, None


def _plogp(probs: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """π log π, with 0 log 0 = 0."""
    return probs * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)


def sample(probs: torch.Tensor) -> torch.Tensor:
    """Sample tokens by inverting the cumulative distribution, with one uniform random number per row instead of V.

    A token of probability 0 is never sampled: the search finds the first cumulative sum *above* u · total, and the sum
    at such a token equals the one before it. The last sum is always above: u is at most 1 − 2^−53, so u · total is
    rounded to less than the total.

    :param probs: [N, V], 0 where a token is forbidden. Rows need not sum to exactly 1.
    :return: int64 [N], token ids. Where the probabilities are NaN it is some token, so that a device can go on until
        somebody looks at the log-probability, which is NaN too.
    """
    # In float32 the sums over a large vocabulary would lose the rare tokens at its end.
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    target = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return chosen.clamp(max=probs.shape[1] - 1)
