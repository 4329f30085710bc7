"""A constraint that a language model decides: the nucleus of a frozen reference."""

from __future__ import annotations

import copy
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.utils import get_device
from transformers import PretrainedConfig, PreTrainedModel

from agents.models.adapter import unwrapped
from agents.models.causal_lm import CHUNK_ELEMENTS, CausalLM
from agents.models.distribution import TokenDistribution
from agents.models.finite import not_a_number
from agents.models.prefix_cache import PrefixCache
from agents.models.pretrained import check_positions, load_causal_lm
from text_env.constraints import Constraint, Contexts, all_of, allowed_tokens


class ReferenceTopP:
    """Allows the nucleus of a frozen model: its most probable tokens that together have probability p (Holtzman et al.
    2020, https://arxiv.org/abs/1904.09751). The most probable token is always allowed.

    This is the mask of NLPO (Ramamurthy et al. 2023, https://arxiv.org/abs/2210.01241), with one difference: the model
    is never updated to the policy. So the mask does not depend on the weights that are trained, and the KL divergence
    from a reference under the same constraint stays finite.

    Every nucleus is stored. The update asks for the contexts that the rollout has asked for, and must get the same
    masks; but computed in two ways, the same logits may differ in their last bits, and a token at the edge of the
    nucleus may be in one mask and not in the other. Copies of this object, deep ones included, share the model and the
    stored nuclei.

    :param model: ``"builtin"``, a directory, a hub name, a ``PretrainedConfig``, or a live model, which is copied.
    :param p: the probability of the nucleus, between 0 and 1, both excluded.
    :param dtype: the floating-point type of the weights.
    :param device: the device that the model runs on.
    :param memory_bytes: the memory for stored nuclei, of which each takes V / 8 + 100 bytes; the oldest are dropped
        first. It must be enough for a rollout. Nuclei are not part of a checkpoint, so in a resumed run a token at the
        edge may change sides.
    :raises ValueError: if p is out of range, or if there is no such model.
    """

    def __init__(
        self,
        model: str | Path | PretrainedConfig | PreTrainedModel,
        p: float,
        dtype: str = "float32",
        device: torch.device | str = "auto",
        memory_bytes: int = 2**30,
    ) -> None:
        if not 0 < p < 1:
            raise ValueError(f"Expected 0 < p < 1, got {p}. To forbid nothing, leave the constraint out.")
        self.p = p
        self._name = str(model) if isinstance(model, str | Path) else type(model).__name__
        self._memory_bytes = memory_bytes
        loaded = unwrapped(load_causal_lm(copy.deepcopy(model) if isinstance(model, PreTrainedModel) else model, dtype))
        everything = TokenDistribution(loaded.get_output_embeddings().weight.shape[0])
        self._lm = CausalLM(loaded, everything).requires_grad_(False)
        self._lm.to(get_device(device))
        self._memo = PrefixCache(self._lm.backbone)
        self._within: Constraint | None = None
        self._nuclei: dict[bytes, np.ndarray] = {}  # packed bits, by hashes of context and `fixed`; oldest first

    def __repr__(self) -> str:
        return f"ReferenceTopP({self._name!r}, p={self.p})"

    def __copy__(self) -> ReferenceTopP:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferenceTopP:
        return self  # its masks never change

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": None, "_nuclei": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._memo = PrefixCache(self._lm.backbone)

    def within(self, constraint: Constraint) -> ReferenceTopP:
        """Restrict the nucleus to the tokens that another constraint allows.

        :param constraint: the other constraint.
        :return: the nucleus of the model's probabilities of those tokens that ``constraint`` allows, in addition to
            earlier restrictions. It always holds the most probable one of them.
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
        if any(key not in self._nuclei for key in keys):
            computed = np.packbits(self._compute(contexts, fixed), axis=1)
            for key, nucleus in zip(keys, computed, strict=True):
                self._nuclei.setdefault(key, nucleus.copy())
        packed = np.stack([self._nuclei[key] for key in keys])
        while len(self._nuclei) * (n_tokens // 8 + 100) > self._memory_bytes:
            del self._nuclei[next(iter(self._nuclei))]
        return np.unpackbits(packed, axis=1, count=n_tokens).view(np.bool_)

    def _compute(self, contexts: Contexts, fixed: np.ndarray) -> np.ndarray:
        n_tokens = fixed.shape[1]
        size = max(1, CHUNK_ELEMENTS // n_tokens)
        parts = zip(self._memo.last_hidden(contexts).split(size), torch.from_numpy(fixed).split(size), strict=True)
        nuclei = np.concatenate([self._nucleus(hidden, part.to(hidden.device)) for hidden, part in parts])
        if (empty := ~nuclei.any(axis=1)).any():  # the most probable token is always in it, if there is one
            row = int(np.flatnonzero(empty)[0])
            ids = contexts.input_ids[row, : contexts.length[row]].tolist()
            raise not_a_number(f"the probabilities of {self} after the tokens {ids}", self._lm)
        return nuclei

    def _nucleus(self, hidden: torch.Tensor, fixed: torch.Tensor) -> np.ndarray:
        """
        :param hidden: last hidden states, [N, H].
        :param fixed: bool [N, V], true for the tokens that the other constraints allow.
        :return: bool [N, V], true for the tokens of the nucleus.
        """
        step = torch.zeros(len(hidden))  # not used, since this model has no minimum length
        logits = self._lm.logits(hidden, step)[:, : fixed.shape[1]].masked_fill(~fixed, -torch.inf)
        probs, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True, stable=True)
        before = probs.cumsum(dim=-1, dtype=torch.float64) - probs
        return torch.zeros_like(fixed).scatter_(-1, order, (before < self.p) & (probs > 0)).cpu().numpy()
