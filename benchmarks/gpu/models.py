"""Random Llamas in the shapes of real models.

Nothing here imports our packages: the peers build the very same model in their own environment.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from benchmarks.models import Subject, word_prompts, words

SHAPES: dict[str, dict[str, int]] = {
    "135m": {  # SmolLM2-135M's
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "0.5b": {  # Qwen2.5-0.5B's
        "vocab_size": 151936,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
    },
    "2m": {  # for a processor
        "vocab_size": 4096,
        "hidden_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 512,
    },
    "tiny": {  # for tests
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
}


def config(shape: str, positions: int, **changes: Any) -> LlamaConfig:
    """
    :param shape: a key of ``SHAPES``.
    :param positions: the longest text, in tokens.
    :param changes: further entries.
    """
    vocabulary = SHAPES[shape]["vocab_size"]
    return LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary - 2,
        pad_token_id=vocabulary - 1,
        **changes,
    )


def llama(shape: str, positions: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """A random language model, drawn on its device: on a processor that would take longer than what is measured.

    :param shape: a key of ``SHAPES``.
    :param positions: the longest text, in tokens.
    :param device: where it is made.
    :param dtype: of its weights.
    :param seed: of its weights, which differ from one kind of device to another.
    """
    return _drawn(LlamaForCausalLM, config(shape, positions), device, dtype, seed)


def classifier(
    shape: str, positions: int, device: torch.device, dtype: torch.dtype, seed: int = 1
) -> LlamaForSequenceClassification:
    """A random reward or value model of the same shape; arguments as for :func:`llama`."""
    return _drawn(LlamaForSequenceClassification, config(shape, positions, num_labels=1), device, dtype, seed)


def _drawn(kind: type[PreTrainedModel], of: LlamaConfig, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    torch.manual_seed(seed)
    with torch.device(device):
        return in_type(kind(of).eval(), dtype)


def in_type(model: Any, dtype: torch.dtype) -> Any:
    """Change the type of a model's weights, as loading it in that type does: not of the frequencies of its positions.

    :param model: is changed.
    :param dtype: of its weights.
    :return: the model.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def subject(
    shape: str, rows: int, prompt: int, response: int, device: torch.device, dtype: torch.dtype | None = None
) -> Subject:
    """
    :param shape: a key of ``SHAPES``.
    :param rows: how many texts are written side by side.
    :param prompt: tokens of a prompt.
    :param response: tokens of a response; EOS is forbidden, so each has exactly that many.
    :param device: where the model is made.
    :param dtype: of its weights; None: bfloat16 on CUDA, else float32.
    """
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vocabulary = SHAPES[shape]["vocab_size"]
    return Subject(
        model=llama(shape, prompt + response, device, dtype),
        tokenizer=words(vocabulary=vocabulary),
        prompts=word_prompts(prompt, vocabulary),
        masks_eos=True,
        episodes=rows,
        response=response,
        prompt_tokens=prompt,
    )
