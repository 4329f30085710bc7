"""Where a number that is none came from: what to say when a model's answers are NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

SHOWN = 8  # tokens of a context in an error


def broken_parameters(model: nn.Module) -> list[str]:
    """
    :param model: a model.
    :return: the names of its parameters that hold NaN or an infinite number.
    """
    return [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]


def not_a_number(what: str, model: nn.Module) -> FloatingPointError:
    """
    :param what: what is not a number, as the subject of a sentence: ``"the logits after ..."``.
    :param model: the model that gave it; its parameters are searched.
    :return: the error, which names the first parameter that is not finite.
    """
    broken = broken_parameters(model)
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


def check_scores(
    log_prob: torch.Tensor, values: torch.Tensor | None, input_ids: torch.Tensor, at: Any, model: nn.Module
) -> None:
    """As :func:`check_numbers`, of what a model says of positions in sequences.

    :param log_prob: the log-probabilities of N actions, [N].
    :param values: the values of their contexts, [N] or [N, M]; None: there are none.
    :param input_ids: int64 [B, T], the sequences.
    :param at: the N positions, a ``Positions``.
    :param model: the model that gave the numbers.
    :raises FloatingPointError: if one of them is NaN, naming the first such context and the first broken parameter.
    """
    for what, answers in (("log-probabilities", log_prob), ("values", values)):
        if answers is not None:
            check_numbers(answers, what, lambda i: input_ids[at.row[i], : at.column[i] + 1].tolist(), model)


def check_numbers(answers: torch.Tensor, what: str, context: Callable[[int], Iterable[int]], model: nn.Module) -> None:
    """One device-to-host copy of one truth value, as long as all is well.

    :param answers: [N] or [N, 1], what the model says after each of N contexts.
    :param what: what they are, in the plural: ``"values"``.
    :param context: the token ids of the context with a number.
    :param model: the model that gave them.
    :raises FloatingPointError: if one of them is NaN, naming the first such context and the first broken parameter.
    """
    broken = answers.detach().isnan().reshape(len(answers), -1).any(dim=1)
    if bool(broken.any()):
        row = int(broken.nonzero()[0])
        ids = [int(token) for token in context(row)]
        shown = f"{ids[-SHOWN:]}" if len(ids) <= SHOWN else f"... {ids[-SHOWN:]}"
        raise not_a_number(
            f"{what} after {int(broken.sum())} of {len(answers)} contexts, the first of which is number {row} with "
            f"{len(ids)} tokens, {shown},",
            model,
        )
