"""A Hugging Face causal language model as a scorer of token contexts.

This is the one component that does language-model work. The policy adds a value head to it; the frozen reference of
the KL penalty is another instance of it, so that what is sampled, what is trained and what is compared against are
the same distribution: temperature and masks included.

Notation: B contexts, T columns, N scored positions, H hidden units, V tokens of the environment.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from agents.models.pretrained import resolve_dtype, save_causal_lm, unwrapped
from text_env.constraints import Constraint, Contexts, MinimumLength, all_of, allowed_tokens, make_constraint, name_of

# Logits of one chunk in float32: 2^22 values are 16 MB, large enough for full-speed matrix products.
CHUNK_ELEMENTS = 2**22


class Positions(NamedTuple):
    """Where the next token is asked for, in a batch of sequences.

    :param row: int64 [N], index of the sequence.
    :param column: int64 [N], index of the last token of the context.
    :param step: int64 [N], how many tokens of the response the context holds already.
    """

    row: torch.Tensor
    column: torch.Tensor
    step: torch.Tensor


class CausalLM(nn.Module):
    """Next-token distributions of a causal language model, restricted to the environment's tokens.

    :param model: the Hugging Face model, or PEFT's wrapper around it; dropout is off, always.
    :param n_tokens: V; the model's first V logits are used, so padded embeddings are fine.
    :param temperature: divides the logits, everywhere (sampling, training, reference).
    :param eos_token_id: the token that ends an episode.
    :param min_new_tokens: EOS has probability 0 before so many response tokens.
    :param autocast: dtype of the matrix products (``"bfloat16"``), while the weights keep theirs; None: no autocast.
    :param compile_forward: run whole sequences through ``torch.compile``; needs a C++ compiler on CPUs.
    :param constraint: which tokens may follow a context; what :func:`text_env.constraints.make_constraint` takes. The
        others have probability 0.
    :raises ValueError: if the model has fewer than V logits, or a head that is not a function of the last hidden state.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        n_tokens: int,
        temperature: float = 1.0,
        eos_token_id: int | None = None,
        min_new_tokens: int = 0,
        autocast: str | torch.dtype | None = None,
        compile_forward: bool = False,
        constraint: Any = None,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"Expected temperature > 0, got {temperature}. For greedy actions use deterministic=True.")
        minimum = None
        if min_new_tokens > 0:
            if eos_token_id is None:
                raise ValueError(f"min_new_tokens={min_new_tokens} needs eos_token_id: the token to forbid until then.")
            minimum = MinimumLength(min_new_tokens, eos_token_id)
        # In a tuple, like the constraint below: a wrapper shares its modules with the model, which is registered once.
        self._peft = (model,) if isinstance(model, PeftModel) else None
        model = unwrapped(model)
        head = model.get_output_embeddings()
        if head is None or model.config.is_encoder_decoder:
            raise ValueError(f"Expected a causal language model (a decoder with a head), got {type(model).__name__}.")
        n_logits, self.hidden_size = head.weight.shape
        if n_logits < n_tokens:
            raise ValueError(
                f"Expected a model with at least {n_tokens} logits, one for each token of the environment; "
                f"{type(model).__name__} has {n_logits}. Use the model's own tokenizer in the environment, "
                f"or model.resize_token_embeddings({n_tokens})."
            )
        fuse_activations(model)
        self.model = model.eval()
        self.n_tokens = n_tokens
        self.temperature = temperature
        self.eos_token_id = eos_token_id
        self.min_new_tokens = min_new_tokens
        # In a tuple: a constraint that happens to be a module is none of this one's, and not to be trained.
        self._constraint = (all_of(minimum, make_constraint(constraint)),)
        resolved = None if autocast is None else resolve_dtype(autocast)
        if isinstance(resolved, str):
            raise ValueError("Expected autocast to be 'bfloat16', 'float16' or None, got 'auto'.")
        self.autocast = resolved
        self.compile_forward = compile_forward
        config = model.config.get_text_config()
        self._logit_scale = float(getattr(config, "logit_scale", None) or 1.0)
        self._logit_scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        self._logit_softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._check_head()

    @property
    def peft_model(self) -> PeftModel | None:
        """PEFT's wrapper, where the model has an adapter inside."""
        return None if self._peft is None else self._peft[0]

    def save_pretrained(self, directory: Path) -> None:
        """Write a directory that plain transformers loads: the model, or the adapter that was trained.

        :param directory: exists.
        """
        save_causal_lm(self.peft_model or self.model, directory)

    @property
    def backbone(self) -> nn.Module:
        """The decoder below the language-model head: token ids in, last hidden states out."""
        return self.model.base_model

    @property
    def constraint(self) -> Constraint | None:
        """Which tokens may follow, ``min_new_tokens`` included."""
        return self._constraint[0]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> CausalLM:
        """Dropout stays off: with it, the policy that is trained is not the one that was sampled from."""
        return super().train(False)

    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states of right-padded sequences, one plain forward pass.

        No attention mask is needed: causal attention never looks at what stands to the right.

        :param input_ids: int64 [B, T], right-padded with anything.
        :return: [B, T, H].
        """
        return self.run(self.backbone, input_ids)

    def run(self, backbone: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        """:func:`full_forward` as this model is to be run: autocast and compiled, if it was asked for.

        :param backbone: this model's, or a separate critic's.
        :param input_ids: int64 [B, T].
        :return: [B, T, H].
        """
        forward = _compiled_forward() if self.compile_forward else full_forward
        with self.precision():
            return forward(backbone, input_ids)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast that the model runs under, in rollout, update and reference alike."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def allowed(self, contexts: Contexts, action_masks: np.ndarray | torch.Tensor | None = None) -> torch.Tensor | None:
        """The tokens that may follow.

        :param contexts: N contexts.
        :param action_masks: further masks, true where allowed, N × V values.
        :return: bool [N, V]; None where :meth:`logits` needs none.
        :raises ValueError: if no token is left after some context.
        """
        if action_masks is None and not self._needs_masks:
            return None
        constraint = self.constraint
        if action_masks is not None:
            given = action_masks.cpu().numpy() if isinstance(action_masks, torch.Tensor) else np.asarray(action_masks)
            given = given.astype(np.bool_).reshape(-1, self.n_tokens)
            constraint = all_of(constraint, action_masks_given(given))
        assert constraint is not None
        return torch.from_numpy(allowed_tokens(constraint, contexts, self.n_tokens)).to(self.device)

    @property
    def _needs_masks(self) -> bool:
        # A minimum length concerns one column, which needs no mask of [N, V].
        return not (self.constraint is None or isinstance(self.constraint, MinimumLength))

    def logits(self, hidden: torch.Tensor, step: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the sampled distribution: temperature applied, forbidden tokens at minus infinity.

        :param hidden: [N, H] last hidden states.
        :param step: int64 [N], tokens of the response so far.
        :param allowed: bool [N, V], what :meth:`allowed` returned for these contexts.
        :return: float32 (float64 for float64 models) [N, V].
        """
        with self.precision():
            logits = self._head(hidden)[:, : self.n_tokens]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        # In place: the logits are this call's own, and a full copy would cost as much as the softmax.
        if allowed is not None:
            logits.masked_fill_(~allowed, -torch.inf)
        elif isinstance(self.constraint, MinimumLength):
            eos = logits[:, self.constraint.eos_token_id]
            too_early = step < self.constraint.min_new_tokens
            logits[:, self.constraint.eos_token_id] = eos.masked_fill(too_early, -torch.inf)
        elif self.constraint is not None:
            raise ValueError(
                f"Expected allowed=self.allowed(contexts), the masks of {name_of(self.constraint)}, got None."
            )
        return logits

    def log_prob_and_entropy(
        self,
        hidden: torch.Tensor,
        step: torch.Tensor,
        actions: torch.Tensor,
        allowed: Callable[[slice], torch.Tensor | None] = lambda part: None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each action and entropy of its distribution, in chunks of positions.

        The backward pass computes each chunk's logits again, so that [N, V] never exists at once; where everything fits
        into one chunk, its logits are kept.

        :param hidden: [N, H].
        :param step: int64 [N].
        :param actions: int64 [N].
        :param allowed: what :meth:`allowed` returns for these positions, by slices of them.
        :return: log-probabilities [N] and entropies [N] (nats), float32.
        """

        def chunk(
            part: slice, hidden: torch.Tensor, step: torch.Tensor, actions: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            log_prob, entropy = _LogProbAndEntropy.apply(self.logits(hidden, step, allowed(part)), actions)
            return log_prob, entropy

        size = max(1, CHUNK_ELEMENTS // self.n_tokens)
        if len(actions) <= size:
            return chunk(slice(0, size), hidden, step, actions)
        slices = [slice(start, start + size) for start in range(0, len(actions), size)]
        parts = zip(slices, hidden.split(size), step.split(size), actions.split(size), strict=True)
        if torch.is_grad_enabled():
            done = [checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        else:
            done = [chunk(*part) for part in parts]
        log_probs, entropies = zip(*done, strict=True)
        return torch.cat(log_probs), torch.cat(entropies)

    def evaluate(
        self, input_ids: torch.Tensor, at: Positions, actions: torch.Tensor, action_masks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Score actions inside whole sequences: one forward pass per sequence.

        :param input_ids: int64 [B, T], right-padded.
        :param at: the N positions whose next token is scored.
        :param actions: int64 [N].
        :param action_masks: further masks, true where allowed, [N, V].
        :return: log-probabilities [N], entropies [N], hidden states [N, H].
        """
        hidden = self.hidden_states(input_ids)[at.row, at.column]
        if action_masks is None and not self._needs_masks:
            log_prob, entropy = self.log_prob_and_entropy(hidden, at.step, actions)
            return log_prob, entropy, hidden
        ids, row, column, step = (x.cpu().numpy() for x in (input_ids, *at))

        def allowed(part: slice) -> torch.Tensor | None:
            contexts = Contexts(ids[row[part]], column[part] + 1, step[part])
            return self.allowed(contexts, None if action_masks is None else action_masks[part])

        log_prob, entropy = self.log_prob_and_entropy(hidden, at.step, actions, allowed)
        return log_prob, entropy, hidden

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden)
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        if self._logit_softcap is not None:
            logits = torch.tanh(logits / self._logit_softcap) * self._logit_softcap
        return logits

    @torch.no_grad()
    def _check_head(self) -> None:
        """The head is applied apart from the model, only where it is needed: prove that this is the same."""
        probe = torch.arange(4, device=self.device)[None] % self.n_tokens
        expected = self.model(input_ids=probe, use_cache=False).logits
        actual = self._head(full_forward(self.backbone, probe))
        if not torch.allclose(actual, expected, rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"Expected the logits of {type(self.model).__name__} to be its output embeddings applied to the last "
                "hidden state; they are not, so this architecture is not supported."
            )


def action_masks_given(masks: np.ndarray) -> Constraint:
    """
    :param masks: bool [B, V].
    :return: them as a constraint of the B contexts that they were made for.
    """

    def action_masks(contexts: Contexts, n_tokens: int) -> np.ndarray:
        return masks

    return action_masks


def full_forward(backbone: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """
    :param backbone: a Hugging Face decoder without head.
    :param input_ids: int64 [B, T], right-padded.
    :return: last hidden states [B, T, H].
    """
    hidden: torch.Tensor = backbone(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


@functools.cache
def _compiled_forward() -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    # One function for all models and lengths: it specialises on the model by itself.
    return torch.compile(full_forward, dynamic=True)


class _LogProbAndEntropy(torch.autograd.Function):
    """log π(a) and −Σ π log π of categorical distributions, keeping one [N, V] tensor for the backward pass.

    With ℓ = log π and H the entropy: ∂ log π(a)/∂logit_j = [j = a] − π_j and ∂H/∂logit_j = −π_j (ℓ_j + H).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
    """Sample tokens by inverting the cumulative distribution: one uniform number per row instead of V.

    A token of probability 0 is never returned: the first cumulative sum *above* u·total is never at one.

    :param probs: [N, V], 0 where forbidden; rows need not sum to exactly 1.
    :return: int64 [N].
    """
    # Sums in float64: over a large vocabulary, float32 would lose the rare tokens at the far end.
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device) * total
    below_total = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cumulative, torch.minimum(target, below_total), right=True).squeeze(-1)


def fuse_activations(model: nn.Module) -> None:
    """Replace GPT-2's tanh approximation of GELU, eight operations, by PyTorch's one kernel for the same function."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))
