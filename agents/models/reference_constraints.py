"""Constraints that a frozen language model decides: its most probable next tokens, by top-k, top-p or min-p."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from stable_baselines3.common.utils import get_device
from transformers import PretrainedConfig, PreTrainedModel

from agents.models.adapter import unwrapped
from agents.models.causal_lm import CausalLM
from agents.models.distribution import TokenDistribution
from agents.models.finite import not_a_number
from agents.models.prefix_cache import PrefixCache
from agents.models.pretrained import check_positions, load_frozen
from agents.models.sizes import chunk_positions
from text_env.constraints import Constraint, Contexts, all_of, allowed_tokens


class ReferenceConstraint(ABC):
    """Allows the most probable next tokens of a frozen model. A subclass says which ones these are (:meth:`keeps`).

    A mask of NLPO (Ramamurthy et al. 2023, https://arxiv.org/abs/2210.01241) is of this kind, with one difference: the
    model here is never updated to the policy. So the mask does not depend on the weights that are trained, and the KL
    divergence from a reference under the same constraint stays finite.

    Every mask is stored. The update asks for the contexts that the rollout has asked for, and must get the same masks;
    but computed in two ways, the same logits may differ in their last bits, and a token at the edge may be in one mask
    and not in the other. Copies of this object, deep ones included, share the model and the stored masks.

    The parameters of a subclass are its public attributes, which its ``repr`` shows. They must not change: masks that
    are stored would be those of the old ones.

    :param model: ``"builtin"``, a directory, a hub name, a ``PretrainedConfig``, or a live model, which is copied.
    :param dtype: the floating-point type of the weights.
    :param device: the device that the model runs on.
    :param memory_bytes: the memory for stored masks, of which each takes V / 8 + 100 bytes; the oldest are dropped
        first. It must be enough for a rollout. Masks are not part of a checkpoint, so in a resumed run a token at the
        edge may change sides.
    :raises ValueError: if there is no such model.
    """

    def __init__(
        self,
        model: str | Path | PretrainedConfig | PreTrainedModel,
        dtype: str = "float32",
        device: torch.device | str = "auto",
        memory_bytes: int = 2**30,
    ) -> None:
        self._name = str(model) if isinstance(model, str | Path) else type(model).__name__
        self._memory_bytes = memory_bytes
        loaded = unwrapped(load_frozen(model, dtype))
        everything = TokenDistribution(loaded.get_output_embeddings().weight.shape[0])
        self._lm = CausalLM(loaded, everything).requires_grad_(False)
        self._lm.to(get_device(device))
        self._memo = PrefixCache(self._lm.backbone)
        self._within: Constraint | None = None
        self._masks: dict[bytes, np.ndarray] = {}  # packed bits, by hashes of context and `fixed`; oldest first

    @abstractmethod
    def keeps(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Choose the tokens that may follow.

        :param log_probs: the model's log-probabilities after N contexts, [N, V]; minus infinity for the tokens that
            other constraints forbid, which stay forbidden whatever is returned, and NaN where the model has broken.
        :return: bool [N, V], true for the tokens to keep, the most probable one of each row among them.
        """

    def __repr__(self) -> str:
        parameters = [f", {name}={value}" for name, value in vars(self).items() if not name.startswith("_")]
        return f"{type(self).__name__}({self._name!r}{''.join(parameters)})"

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # its masks never change

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": None, "_masks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._memo = PrefixCache(self._lm.backbone)

    def within(self, constraint: Constraint) -> Self:
        """Choose among the tokens that another constraint allows.

        :param constraint: the other constraint.
        :return: the same constraint, of the model's distribution over those tokens that ``constraint`` allows, in
            addition to earlier restrictions. It always allows the most probable one of them.
        """
        other = copy.copy(self)
        other._within = all_of(self._within, constraint)
        return other

    @torch.no_grad()
    def __call__(self, contexts: Contexts, n_tokens: int) -> np.ndarray:
        if n_tokens > self._lm.distribution.n_tokens:
            raise ValueError(
                f"Expected {self} to have a logit for each of the {n_tokens} tokens of the environment, got "
                f"{self._lm.distribution.n_tokens}. Use a reference with the environment's tokenizer."
            )
        check_positions(self._lm.model, int(contexts.length.max()))
        fixed = np.ones((len(contexts.length), n_tokens), np.bool_)
        if self._within is not None:
            fixed = allowed_tokens(self._within, contexts, n_tokens)
        rows = zip(contexts.input_ids, contexts.length, np.packbits(fixed, axis=1), strict=True)
        keys = [blake2b(ids[:n].tobytes() + bits.tobytes(), digest_size=16).digest() for ids, n, bits in rows]
        if any(key not in self._masks for key in keys):
            computed = np.packbits(self._compute(contexts, fixed), axis=1)
            for key, mask in zip(keys, computed, strict=True):
                self._masks.setdefault(key, mask.copy())
        packed = np.stack([self._masks[key] for key in keys])
        while len(self._masks) * (n_tokens // 8 + 100) > self._memory_bytes:
            del self._masks[next(iter(self._masks))]
        return np.unpackbits(packed, axis=1, count=n_tokens).view(np.bool_)

    def _compute(self, contexts: Contexts, fixed: np.ndarray) -> np.ndarray:
        n_tokens = fixed.shape[1]
        states = self._memo.last_hidden(contexts)
        size = chunk_positions(states.device, n_tokens)
        parts = zip(states.split(size), torch.from_numpy(fixed).split(size), strict=True)
        masks = np.concatenate([self._kept(hidden, part.to(hidden.device)) for hidden, part in parts])
        if (empty := ~masks.any(axis=1)).any():  # the most probable token is always kept, if there is one
            row = int(np.flatnonzero(empty)[0])
            ids = contexts.input_ids[row, : contexts.length[row]].tolist()
            raise not_a_number(f"the probabilities of {self} after the tokens {ids}", self._lm)
        return masks

    def _kept(self, hidden: torch.Tensor, fixed: torch.Tensor) -> np.ndarray:
        """
        :param hidden: last hidden states, [N, H].
        :param fixed: bool [N, V], true for the tokens that the other constraints allow.
        :return: bool [N, V], true for the tokens that may follow; none of them where the logits are not numbers.
        """
        step = torch.zeros(len(hidden))  # not used, since this model has no minimum length
        logits = self._lm.logits(hidden, step)[:, : fixed.shape[1]].masked_fill(~fixed, -torch.inf)
        log_probs = torch.log_softmax(logits, dim=-1)
        return (self.keeps(log_probs) & (log_probs > -torch.inf)).cpu().numpy()


class ReferenceTopK(ReferenceConstraint):
    """Allows the k most probable next tokens of a frozen model (Fan et al. 2018, https://arxiv.org/abs/1805.04833), or
    all, if no more than k are left by the other constraints. Of tokens that are equally probable, those with the
    smaller ids are taken first, so that there are never more than k.

    :param model: the frozen model, as for :class:`ReferenceConstraint`.
    :param k: how many tokens may follow, at least 1.
    :param options: ``dtype``, ``device`` and ``memory_bytes`` of :class:`ReferenceConstraint`.
    :raises ValueError: if k is not an integer >= 1, or if there is no such model.
    """

    def __init__(self, model: str | Path | PretrainedConfig | PreTrainedModel, k: int, **options: Any) -> None:
        if not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"Expected an integer k >= 1, got {k!r}. To forbid nothing, leave the constraint out.")
        self.k = int(k)
        super().__init__(model, **options)

    def keeps(self, log_probs: torch.Tensor) -> torch.Tensor:
        best = log_probs.argsort(dim=-1, descending=True, stable=True)[:, : self.k]
        return torch.zeros_like(log_probs, dtype=torch.bool).scatter_(-1, best, True)


class ReferenceTopP(ReferenceConstraint):
    """Allows the nucleus of a frozen model: its most probable next tokens that together have probability p (Holtzman et
    al. 2020, https://arxiv.org/abs/1904.09751).

    :param model: the frozen model, as for :class:`ReferenceConstraint`.
    :param p: the probability of the nucleus, between 0 and 1, both excluded.
    :param options: ``dtype``, ``device`` and ``memory_bytes`` of :class:`ReferenceConstraint`.
    :raises ValueError: if p is out of range, or if there is no such model.
    """

    def __init__(self, model: str | Path | PretrainedConfig | PreTrainedModel, p: float, **options: Any) -> None:
        if not 0 < p < 1:
            raise ValueError(f"Expected 0 < p < 1, got {p}. To forbid nothing, leave the constraint out.")
        self.p = p
        super().__init__(model, **options)

    def keeps(self, log_probs: torch.Tensor) -> torch.Tensor:
        probs, order = log_probs.exp().sort(dim=-1, descending=True, stable=True)
        before = probs.cumsum(dim=-1, dtype=torch.float64) - probs
        return torch.zeros_like(log_probs, dtype=torch.bool).scatter_(-1, order, before < self.p)


class ReferenceMinP(ReferenceConstraint):
    """Allows the next tokens to which a frozen model gives at least min_p times the probability of the most probable
    one (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082): few where the model is sure, many where it is not.

    :param model: the frozen model, as for :class:`ReferenceConstraint`.
    :param min_p: the least share of the largest probability, greater than 0 and at most 1.
    :param options: ``dtype``, ``device`` and ``memory_bytes`` of :class:`ReferenceConstraint`.
    :raises ValueError: if min_p is out of range, or if there is no such model.
    """

    def __init__(self, model: str | Path | PretrainedConfig | PreTrainedModel, min_p: float, **options: Any) -> None:
        if not 0 < min_p <= 1:
            raise ValueError(f"Expected 0 < min_p <= 1, got {min_p}. To forbid nothing, leave the constraint out.")
        self.min_p = min_p
        super().__init__(model, **options)

    def keeps(self, log_probs: torch.Tensor) -> torch.Tensor:
        return log_probs - log_probs.amax(dim=-1, keepdim=True) >= math.log(self.min_p)
