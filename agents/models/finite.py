"""Where a number that is none came from: what to say when a model's answers are NaN."""

from __future__ import annotations

import torch
from torch import nn


def not_a_number(what: str, model: nn.Module) -> FloatingPointError:
    """
    :param what: what is not a number, as the subject of a sentence: ``"the logits after ..."``.
    :param model: the model that gave it; its parameters are searched.
    :return: the error, which names the first parameter that is not finite.
    """
    broken = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        cause = (
            f"{len(broken)} of the parameters of {type(model).__name__} are not finite, the first of which is "
            f"{broken[0]!r}. Load weights that are finite: the last checkpoint before a lower learning rate, say"
        )
    else:
        cause = (
            f"all parameters of {type(model).__name__} are finite, so numbers have overflowed on the way through it. "
            "Use a dtype of a wider range: 'bfloat16' or 'float32' in place of 'float16'"
        )
    return FloatingPointError(f"Expected finite numbers, but {what} are NaN: {cause}.")
