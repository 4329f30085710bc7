"""Tokenizers and models so small that a test makes its own: byte-level, random, offline."""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable
from typing import Any

import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2PreTrainedModel

# Enough for byte-level BPE to learn some forty merges, so that tokens are of different lengths.
_CORPUS = [
    "The movie was good and the music was good.",
    "The film was bad, the story was bad and the acting was worse.",
    "I loved this film. I hated that movie.",
] * 4

# Until 5.15, transformers passes over the projections into the residual stream, whose weights GPT-2 draws smaller. Here
# a seed stands for the same weights whatever the version is.
if Version(transformers.__version__) < Version("5.15"):
    _draw = GPT2PreTrainedModel._init_weights

    def _draw_with_small_projections(self: GPT2PreTrainedModel, module: torch.nn.Module) -> None:
        _draw(self, module)
        if isinstance(module, GPT2Attention | GPT2MLP):
            std = self.config.initializer_range / (2 * self.config.n_layer) ** 0.5
            torch.nn.init.normal_(module.c_proj.weight, std=std)

    GPT2PreTrainedModel._init_weights = _draw_with_small_projections

KINDS = ("gpt2", "llama", "qwen2", "gpt_neox", "opt")


def tiny_tokenizer(pad: bool = True, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """
    :param pad: with a pad token of its own; otherwise it has none.
    :param vocab_size: entries, special tokens included; at least 258.
    :return: a byte-level BPE tokenizer, the same one every time, but the caller's own.
    """
    return copy.deepcopy(_tokenizer(pad, vocab_size))


@functools.cache
def _tokenizer(pad: bool, vocab_size: int) -> PreTrainedTokenizerFast:
    special = ["<eos>", "<pad>"] if pad else ["<eos>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>" if pad else None)


def _config(kind: str, vocab_size: int, **kwargs: Any) -> PretrainedConfig:
    small: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 0,
        **kwargs,
    }
    if kind == "gpt2":
        return GPT2Config(**small)
    if kind == "llama":
        return LlamaConfig(intermediate_size=64, num_key_value_heads=2, **small)
    if kind == "qwen2":
        return Qwen2Config(intermediate_size=64, num_key_value_heads=2, **small)
    if kind == "gpt_neox":
        return GPTNeoXConfig(intermediate_size=64, **small)
    if kind == "opt":
        return OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **{"pad_token_id": 1, **small})
    raise ValueError(f"Expected kind to be one of {KINDS}, got {kind!r}.")


def _vocabulary(tokenizer: Any) -> int:
    return tokenizer if isinstance(tokenizer, int) else len(tokenizer)


def tiny_model(kind: str, tokenizer: Any = 300, seed: int = 0, **kwargs: Any) -> PreTrainedModel:
    """
    :param kind: one of :data:`KINDS`.
    :param tokenizer: a tokenizer, or the number of entries of one.
    :param seed: of the random weights; PyTorch's global generator is left as it was.
    :param kwargs: further entries of its config.
    :return: a random causal language model of two layers, in evaluation mode, float32; the caller's own.
    """
    make = _model if all(isinstance(value, Hashable) for value in kwargs.values()) else _model.__wrapped__
    return copy.deepcopy(make(kind, _vocabulary(tokenizer), seed, **kwargs))


@functools.lru_cache(maxsize=64)  # a copy costs a third of a model
def _model(kind: str, vocab_size: int, seed: int, **kwargs: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(_config(kind, vocab_size, **kwargs)).float().eval()


def tiny_classifier(
    kind: str = "llama", tokenizer: Any = 300, seed: int = 0, num_labels: int = 1, **kwargs: Any
) -> PreTrainedModel:
    """As :func:`tiny_model`, a sequence classifier with ``num_labels`` logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = _config(kind, _vocabulary(tokenizer), num_labels=num_labels, **kwargs)
        model = AutoModelForSequenceClassification.from_config(config).float().eval()
        # Random heads start tiny; scores should differ visibly from text to text.
        torch.nn.init.normal_(model.score.weight, std=1.0)
        return model


class RecordingReward:
    """A cheap reward in which every token of a response counts, and which remembers how it was called."""

    name = "recording"

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **batch: Any) -> list[float]:
        self.calls.append(batch)
        return [ids_score(ids) for ids in batch["completion_ids"]]


def ids_score(ids: list[int]) -> float:
    """What :class:`RecordingReward` says of a response: another number if any token is changed, moved or left out."""
    return sum((position + 1) * (token + 1) for position, token in enumerate(ids)) / 1000
