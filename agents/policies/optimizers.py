"""Optimisers by the names that transformers has for them: ``TrainingArguments(optim=...)``."""

from __future__ import annotations

import inspect
from typing import Any

import torch

EPS = 1e-5
"""Adam's. PyTorch's default of 1e-8 is too aggressive in the first updates (SB3 and OpenAI's baselines use 1e-5)."""


def optimizer_named(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """
    :param name: ``"adamw_torch"``, ``"adafactor"``, ``"sgd"``, …; with moments of 8 bits ``"adamw_8bit"``
        (bitsandbytes) or ``"adamw_torch_8bit"`` (torchao); with moments that move to the host where the device's memory
        is short ``"paged_adamw_8bit"`` or ``"paged_adamw_32bit"`` (bitsandbytes).
    :return: the class, and arguments besides the learning rate. Weights don't decay.
    :raises ValueError: for a name that transformers doesn't know, or whose package is not installed.
    """
    from transformers import Trainer, TrainingArguments  # seconds, which few trainings need

    try:
        arguments = TrainingArguments(output_dir="unused", optim=name, adam_epsilon=EPS, report_to=[])
        found, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, ImportError) as error:
        raise ValueError(
            "Expected the optimiser to be one of PyTorch's classes or a name of transformers' optimisers whose package "
            f"is installed, got {name!r}: {error}"
        ) from error
    decays = "weight_decay" in inspect.signature(found).parameters
    return found, {**({"weight_decay": 0.0} if decays else {}), **{k: v for k, v in kwargs.items() if k != "lr"}}
