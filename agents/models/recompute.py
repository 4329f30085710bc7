"""Gradient checkpointing: layers keep their inputs alone, and are computed once more in the backward pass.

transformers' own layers do that in training mode only, in which dropout is on. Here the model stays in evaluation mode,
and it is a forward pass with gradient in which layers are checkpointed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from agents.models.attention import without_cudnn_attention


def layers_to_recompute(backbone: nn.Module, every: bool) -> list[GradientCheckpointingLayer]:
    """
    :param backbone: a Hugging Face decoder.
    :param every: all of its layers; False: those for which the user has switched it on, by transformers'
        ``gradient_checkpointing_enable()``.
    :return: the layers, none of which is inside another one.
    """
    found: list[GradientCheckpointingLayer] = []
    inside: set[nn.Module] = set()
    for module in backbone.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            inside.update(module.modules())
            if every or module.gradient_checkpointing:
                found.append(module)
    return found


def check_recomputable(model: nn.Module, backbone: nn.Module, asked_for: bool, compiled: bool) -> None:
    """
    :param model: the whole model.
    :param backbone: the decoder in it.
    :param asked_for: whether all layers are to be checkpointed, by an argument of ours.
    :param compiled: whether the decoder is going to run through ``torch.compile``.
    :raises ValueError: if gradient checkpointing is asked for, here or at the model, and can't be had.
    """
    # Not the model's own property of that, which goes by another name in every other release.
    if not (asked_for or any(getattr(module, "gradient_checkpointing", False) for module in model.modules())):
        return
    if not layers_to_recompute(backbone, asked_for):
        raise ValueError(
            f"Expected a model whose layers transformers can checkpoint, got {type(model).__name__}, which has no "
            "GradientCheckpointingLayer: use gradient_checkpointing=False, and less memory by a smaller "
            "micro_batch_tokens."
        )
    if compiled:
        raise ValueError(
            "Expected gradient checkpointing or compile_forward=True, got both: torch.compile decides by itself what "
            "it computes again. Use one of the two."
        )


@contextlib.contextmanager
def recomputed(layers: list[GradientCheckpointingLayer]) -> Iterator[None]:
    """Within it, these layers are checkpointed, whatever mode they are in.

    :param layers: what :func:`layers_to_recompute` returned.
    """
    before = [vars(layer).get("forward") for layer in layers]  # offloading hooks, too, are put there
    for layer in layers:
        # A user's own function may move what is kept to another device.
        own: Any = layer._gradient_checkpointing_func if layer.gradient_checkpointing else _checkpoint
        layer.forward = partial(_called, own, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _called(function: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    def layer(*args: Any) -> Any:
        # The backward pass comes after the context of the forward pass, and must find the kernels that this had.
        device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        with without_cudnn_attention(device):
            return forward(*args, **kwargs)

    return function(layer, *args)


def _checkpoint(forward: Callable[..., Any], *args: Any) -> Any:
    # Dropout is off, so no random numbers are drawn.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)
