"""The distribution that tokens are sampled from: what describes it, how to sample from it, and how to score with it.

Notation: N contexts, V tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from agents.models.pretrained import resolve_dtype
from text_env.constraints import Constraint, MinimumLength, all_of, make_constraint, name_of, same_constraint
from text_env.episodes import EpisodesFace


@dataclass(frozen=True)
class TokenDistribution:
    """Everything but the weights that decides how probable a token is after a context.

    The policy samples from it, trains with it and is compared with a frozen reference under it. All three must mean the
    same distribution: a reference without the policy's temperature, say, would report a KL divergence that is not zero
    before the policy has changed at all. So policy, reference and buffer hold one of these and are checked against one
    another, and against the environment.

    :param n_tokens: V, the tokens of the environment; a model's first V logits are used.
    :param temperature: divides the logits.
    :param eos_token_ids: the tokens that end a text; empty where nobody knows them.
    :param min_new_tokens: the tokens that end a text have probability 0 before so many response tokens.
    :param constraint: which tokens may follow a context, the others having probability 0; what
        :func:`text_env.constraints.make_constraint` takes.
    :param autocast: name of the type that matrix products run in (``"bfloat16"``), while the weights keep theirs; None
        for the type of the weights.
    :raises ValueError: if a value is out of range, or a minimum length has no end of text to forbid.
    """

    n_tokens: int
    temperature: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    constraint: Any = None
    autocast: str | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"Expected temperature > 0, got {self.temperature}. For greedy actions use deterministic=True."
            )
        if self.min_new_tokens > 0 and not self.eos_token_ids:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} needs eos_token_id: the token to forbid until then."
            )
        dtype = None if self.autocast is None else resolve_dtype(self.autocast)
        if isinstance(dtype, str):
            raise ValueError("Expected autocast to be 'bfloat16', 'float16' or None, got 'auto'.")
        object.__setattr__(self, "autocast", None if dtype is None else str(dtype).removeprefix("torch."))
        object.__setattr__(self, "constraint", make_constraint(self.constraint))

    @cached_property
    def all_constraints(self) -> Constraint | None:
        """The constraint and the minimum length, as one constraint; None where every token may follow."""
        minimum = [MinimumLength(self.min_new_tokens, token) for token in self.eos_token_ids if self.min_new_tokens]
        return all_of(*minimum, self.constraint)

    @property
    def needs_masks(self) -> bool:
        """Whether a mask of all V tokens is needed; a minimum length alone concerns only the tokens that end a text."""
        return self.constraint is not None

    def logits(self, raw: torch.Tensor, step: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """Turn a model's logits into those of this distribution. May write into ``raw``.

        :param raw: float32 or float64 [N, V], as the model's head gives them.
        :param step: int64 [N], response tokens in the context so far.
        :param allowed: bool [N, V], the tokens that may follow, minimum length included; None where only the minimum
            length has to be kept.
        :return: [N, V], divided by the temperature, minus infinity where a token must not follow.
        :raises ValueError: if there is a constraint and no mask.
        """
        if self.temperature != 1.0:
            raw = raw / self.temperature
        if allowed is not None:
            raw.masked_fill_(~allowed, -torch.inf)
        elif self.needs_masks:
            raise ValueError(
                f"Expected allowed=lm.allowed(contexts), the masks of {name_of(self.constraint)}, got None."
            )
        elif self.min_new_tokens:
            too_early = step < self.min_new_tokens
            for token in self.eos_token_ids:
                raw[:, token] = raw[:, token].masked_fill(too_early, -torch.inf)
        return raw

    def check_same(self, other: TokenDistribution, this: str, that: str) -> None:
        """
        :param other: the description of what should be the same distribution.
        :param this: what this one is called in an error, for example ``"policy"``.
        :param that: what the other one is called.
        :raises ValueError: naming every field in which the two differ, and both values.
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
        mine, theirs = getattr(self, name), getattr(other, name)
        if name == "eos_token_ids" and not (mine and theirs):
            return True  # where somebody doesn't know the ends of a text, no minimum length depends on them
        return same_constraint(mine, theirs) if name == "constraint" else bool(mine == theirs)

    def check_environment(self, env: EpisodesFace) -> None:
        """
        :param env: the text environment that the policy is going to write in.
        :raises ValueError: naming every field in which the environment differs, and both values.
        """
        env_distribution = dataclasses.replace(
            self,
            n_tokens=env.episodes.vocabulary,
            eos_token_ids=(env.eos_token_id,),
            min_new_tokens=env.min_new_tokens,
            constraint=env.constraint,
        )
        self.check_same(env_distribution, "policy", "environment")


class LogProbAndEntropy(torch.autograd.Function):
    """log π(a) and −Σ π log π of categorical distributions, keeping one [N, V] tensor for the backward pass.

    With ℓ = log π and H the entropy: ∂ log π(a)/∂logit_j = [j = a] − π_j and ∂H/∂logit_j = −π_j (ℓ_j + H).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        :param ctx: PyTorch's own.
        :param logits: [N, V], minus infinity where a token has probability 0.
        :param actions: int64 [N].
        :return: log-probabilities [N] and entropies [N], nats.
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
        :param ctx: PyTorch's own.
        :param grad_log_prob: [N], or None where nobody asks.
        :param grad_entropy: [N], or None where nobody asks.
        :return: the gradient of the logits [N, V].
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
    """π log π with 0 log 0 = 0."""
    return probs * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)


def sample(probs: torch.Tensor) -> torch.Tensor:
    """Sample tokens by inverting the cumulative distribution: one uniform number a row instead of V.

    A token of probability 0 is never returned: the first cumulative sum *above* u·total is never at one.

    :param probs: [N, V], 0 where forbidden; rows need not sum to exactly 1.
    :return: int64 [N]. Where the probabilities are NaN it is some token, so that a device can go on until somebody
        looks at the log-probability, which is NaN too.
    """
    # Sums in float64: over a large vocabulary, float32 would lose the rare tokens at the far end.
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device) * total
    below_total = torch.nextafter(total, torch.zeros_like(total))
    chosen = torch.searchsorted(cumulative, torch.minimum(target, below_total), right=True).squeeze(-1)
    return chosen.clamp(max=probs.shape[1] - 1)
