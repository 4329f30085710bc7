"""Token contexts as features, for algorithms that take no language model as their policy: SB3's ``MultiInputPolicy``.

    DQN("MultiInputPolicy", env, policy_kwargs={"features_extractor_class": TokenFeatures})

Either everything is learned from scratch, or a frozen language model reads the context and a linear layer is learned on
top of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from transformers import PreTrainedModel

from agents.models.adapter import unwrapped
from agents.models.causal_lm import full_forward
from agents.models.contexts import NAMES, Contexts, check_spaces, contexts_of, share_prefixes
from agents.models.finite import check_numbers
from agents.models.head import decoder_of
from agents.models.prefix_cache import PrefixCache
from agents.models.pretrained import check_positions, load_frozen

# The memory for hidden states of one frozen model, enough for 350,000 contexts of the built-in one.
MEMORY_BYTES = 2**28


class TokenFeatures(BaseFeaturesExtractor):
    """Features of the environment's observations, ``relu(linear(encoding))``.

    The encoding is one of two:

    - ``model=None``: embeddings that are learned from scratch: that of the last token, their mean over the prompt, and
      their mean over the response. It is fast, and independent of the order of all tokens but the last.
    - ``model="builtin"``, …: the last hidden state of a frozen language model at the end of the context, normalised.
      The model is no part of this module: it is neither trained nor saved, and all extractors share it (an off-policy
      algorithm has four). Each context is read once, and its hidden state is stored, so replaying it costs a look-up.

    In both cases the share of the response budget that is spent is appended, since the end of an episode depends on it.

    :param observation_space: the environment's Dict of ``input_ids``, ``attention_mask`` and ``prompt_length``; or its
        form in ``gymnasium.wrappers.FlattenObservation``, for algorithms that take no Dict.
    :param features_dim: the number of features, and the dimension of the learned embeddings.
    :param model: None, ``"builtin"``, a directory, a hub name, or a live model, which is copied.
    :raises ValueError: if the space is not that of a text environment, if there is no such model, or if it has fewer
        tokens or positions than the environment.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        features_dim: int = 128,
        model: str | Path | PreTrainedModel | None = None,
    ) -> None:
        super().__init__(observation_space, features_dim)
        self.columns, n_tokens, longest_prompt = _sizes(observation_space)
        self.budget = self.columns - longest_prompt
        encoder = (
            _LearnedEncoder(n_tokens, features_dim)
            if model is None
            else _FrozenEncoder(_frozen(model, n_tokens, self.columns))
        )
        self.encoder = encoder
        self.linear = nn.Linear(encoder.dimensions + 1, features_dim)

    def forward(self, observations: dict[str, torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """
        :param observations: a batch of B observations, as SB3 preprocesses them. Their float32 is exact for token ids.
        :return: float32 [B, ``features_dim``].
        """
        if isinstance(observations, torch.Tensor):
            parts = observations.split([self.columns, self.columns, 1], dim=1)
            observations = dict(zip(NAMES, parts, strict=True))
        contexts_of(observations)  # raises for what is none: learned embeddings would take whatever comes for tokens
        prompt_length = observations["prompt_length"].float()
        spent = (observations["attention_mask"].float().sum(dim=1, keepdim=True) - prompt_length) / self.budget
        features: torch.Tensor = self.linear(torch.cat([self.encoder(observations), spent], dim=1))
        return torch.relu(features)


def _sizes(observation_space: spaces.Space[Any]) -> tuple[int, int, int]:
    """L, V and the length of the longest prompt, from the text environment's observation space, flattened or not."""
    space: Any = observation_space
    if isinstance(space, spaces.Dict) and set(NAMES) <= set(space.spaces):
        check_spaces(space, reader="TokenFeatures")
        entries: Any = space.spaces
        ids, prompt_length = entries["input_ids"], entries["prompt_length"]
        return ids.shape[0], int(ids.high[0]) + 1, int(prompt_length.high[0])
    whole = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.integer)
    if whole and len(space.shape) == 1 and space.shape[0] >= 3 and space.shape[0] % 2:
        columns = space.shape[0] // 2
        if (space.high[:columns] == 1).all() and (space.low[:-1] == 0).all() and space.low[-1] == 1:
            return columns, int(space.high[columns]) + 1, int(space.high[-1])
    raise ValueError(
        f"TokenFeatures reads token contexts: expected a Dict observation space with {sorted(NAMES)} (as TextRLHF-v0 "
        f"has it), or it in gymnasium.wrappers.FlattenObservation; got {observation_space}."
    )


class _LearnedEncoder(nn.Module):
    """
    :param n_tokens: V.
    :param width: the dimension of the embeddings.
    """

    def __init__(self, n_tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, width)
        self.dimensions = 3 * width

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        embedded = self.embedding(observations["input_ids"].long())  # [B, L, width]
        mask = observations["attention_mask"].bool()
        column = torch.arange(mask.shape[1], device=mask.device)
        prompt = mask & (column < observations["prompt_length"])
        response = mask & ~prompt
        # For an empty context this is the last column. RecurrentPPO pads with such contexts and ignores their features.
        last = embedded[torch.arange(len(mask), device=mask.device), mask.sum(dim=1) - 1]
        return torch.cat([last, _mean(embedded, prompt), _mean(embedded, response)], dim=1)


def _mean(embedded: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the columns where the mask is true, [B, width]; 0 where it is true nowhere."""
    weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.bmm(weights[:, None], embedded)[:, 0]


class _FrozenEncoder(nn.Module):
    """
    :param lm: the language model. It is no module, so neither ``parameters()`` nor ``state_dict()`` includes it.
    """

    def __init__(self, lm: _FrozenLM) -> None:
        super().__init__()
        self.lm = lm
        self.dimensions = lm.dimensions

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        contexts = contexts_of(observations)
        # RecurrentPPO pads sequences with empty contexts and ignores their features.
        contexts = contexts._replace(length=np.maximum(contexts.length, 1))
        return self.lm(contexts, observations["input_ids"].device)


class _FrozenLM:
    """A language model that is not trained, and the hidden states that it has computed so far.

    :param model: a name, or a live model, which is copied.
    :param n_tokens: V.
    :param n_positions: L, the length of the longest context.
    """

    def __init__(self, model: str | Path | PreTrainedModel, n_tokens: int, n_positions: int) -> None:
        self._asked_for = model  # referenced, so that the address by which a live model is found stays its own
        loaded = unwrapped(load_frozen(model))
        self._model = loaded.eval().requires_grad_(False)  # no dropout: features are a function of the context
        config = loaded.config.get_text_config()
        check_positions(loaded, n_positions)
        if config.vocab_size < n_tokens:
            raise ValueError(
                f"Expected a language model with at least {n_tokens} tokens, as the environment has them; "
                f"{type(loaded).__name__} has {config.vocab_size}. Use the model whose tokenizer the environment has."
            )
        self._backbone: nn.Module = loaded if loaded.get_output_embeddings() is None else decoder_of(loaded)
        self._memo = PrefixCache(self._backbone)
        self.dimensions: int = config.hidden_size
        self._row_of: dict[bytes, int] = {}
        # The operating system allocates a page of it only when the page is written to.
        self._answers = torch.empty(max(1, MEMORY_BYTES // (4 * self.dimensions)), self.dimensions)

    def __deepcopy__(self, memo: dict[int, Any]) -> _FrozenLM:
        return self  # algorithms copy what they train into target networks, and this is not trained

    def __call__(self, contexts: Contexts, device: torch.device) -> torch.Tensor:
        """
        :param contexts: B contexts.
        :param device: the device of the returned tensor.
        :return: the hidden states at the end of the contexts, each normalised to mean 0 and variance 1, float32 [B, H].
        """
        if device != self._answers.device:
            self._model.to(device)
            self._memo.clear()
            self._answers = self._answers.to(device)
        keys = [ids[:n].tobytes() for ids, n in zip(contexts.input_ids, contexts.length, strict=True)]
        rows = np.array([self._row_of.get(key, -1) for key in keys])
        answers = self._answers[torch.from_numpy(rows).to(device)]  # a copy, which is overwritten for new contexts
        if len(new := np.flatnonzero(rows < 0)):
            # In a rollout most contexts are new, and they extend those of the call before. In a learner's batch most
            # are known (also for a target network, which has no gradient either), and the others are unrelated.
            acting = not torch.is_grad_enabled() and 2 * len(new) > len(keys)
            answers[torch.from_numpy(new).to(device)] = fresh = self._read(
                Contexts(*(array[new] for array in contexts)), acting
            )
            check_numbers(
                fresh,
                "hidden states",
                lambda i: contexts.input_ids[new[i], : contexts.length[new[i]]],
                self._model,
            )
            if len(self._row_of) + len(new) > len(self._answers):
                self._row_of.clear()
            if len(new) <= len(self._answers):
                at = [self._row_of.setdefault(keys[i], len(self._row_of)) for i in new]
                self._answers[torch.tensor(at, device=device)] = fresh
        return answers

    @torch.no_grad()
    def _read(self, contexts: Contexts, acting: bool) -> torch.Tensor:
        if acting:
            hidden = self._memo.last_hidden(contexts)
        else:
            input_ids, at = share_prefixes(contexts, self._answers.device)
            hidden = full_forward(self._backbone, input_ids)[at.row, at.column]
        return torch.nn.functional.layer_norm(hidden.float(), (self.dimensions,))


_frozen_lms: WeakValueDictionary[tuple[Any, ...], _FrozenLM] = WeakValueDictionary()


def _frozen(model: str | Path | PreTrainedModel, n_tokens: int, n_positions: int) -> _FrozenLM:
    """The frozen model, which all extractors with the same arguments share as long as one of them exists."""
    key = (str(model) if isinstance(model, str | Path) else id(model), n_tokens, n_positions)
    if (found := _frozen_lms.get(key)) is None:
        found = _frozen_lms[key] = _FrozenLM(model, n_tokens, n_positions)
    return found
