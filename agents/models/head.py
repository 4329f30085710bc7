"""From the decoder's last hidden states to a model's logits, as the model itself goes that way.

The head is applied apart from the model, and only at the positions that need it. Between the two lie the output
embeddings and, in some architectures, a scale or a cap. Which of them a model has is not taken from its config alone:
the model is given hidden states of our own, small ones and very large ones, and asked for its logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from agents.models.finite import not_a_number

# Under what names the configs of transformers have them.
SCALES = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# The largest logits of the hidden states that a model is given. A cap of 30 changes logits of 0.01 by less than float32
# can tell, and of logits of 10,000 it leaves nothing but itself.
MAGNITUDES = (1e-2, 1.0, 30.0, 1e3, 1e4)


class LogitMap(NamedTuple):
    """What a model does to its logits besides the output embeddings; by default nothing.

    :param hidden_divisor: divides the hidden states.
    :param scale: multiplies the logits.
    :param divisor: divides the logits.
    :param cap: c in c tanh(logits / c), which keeps logits between −c and c; None for no cap.
    """

    hidden_divisor: float = 1.0
    scale: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, embeddings: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """
        :param embeddings: the model's output embeddings.
        :param hidden: [..., H].
        :return: logits [..., V].
        """
        if self.hidden_divisor != 1.0:
            hidden = hidden / self.hidden_divisor
        logits: torch.Tensor = embeddings(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """
    :param model: a model with a head.
    :return: the decoder below the head: token ids in, last hidden states out.
    :raises ValueError: if there is none apart from the model itself.
    """
    decoder: Any = model.base_model
    if decoder is model:  # Llama-4's text model says that its decoder is called `language_model`, and has a `model`
        decoder = getattr(model, "model", model)
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise ValueError(
            f"Expected a model with a decoder below its head, as its base_model or its attribute `model`; "
            f"{type(model).__name__} has none, so this architecture is not supported."
        )
    found: nn.Module = decoder
    return found


@torch.no_grad()
def find_logit_map(model: PreTrainedModel, n_tokens: int) -> LogitMap:
    """
    :param model: in evaluation mode.
    :param n_tokens: V; only token ids below it are used.
    :return: the map from last hidden states to logits that agrees with the model's own, at all magnitudes of logits.
    :raises ValueError: if there is no such map, because the model does something else to its hidden states or logits.
    :raises FloatingPointError: if the model's logits are not numbers.
    """
    decoder = decoder_of(model)
    embeddings: Any = model.get_output_embeddings()
    device = next(model.parameters()).device
    probe = torch.arange(4, device=device)[None] % n_tokens
    logits = model(input_ids=probe, use_cache=False).logits
    if logits.isnan().any():
        raise not_a_number("the logits of a first context", model)
    output = decoder(input_ids=probe, use_cache=False)
    own = getattr(output, "last_hidden_state", None)
    if own is None:
        raise ValueError(
            f"Expected the decoder of {type(model).__name__} to give a last_hidden_state, got a "
            f"{type(output).__name__} without one: this architecture is not supported."
        )
    width = embeddings.weight.shape[1]
    if own.shape[-1] != width:
        raise ValueError(
            f"Expected the decoder of {type(model).__name__} to give hidden states of {width} units, which its output "
            f"embeddings take, got {own.shape[-1]}: this architecture is not supported."
        )
    hidden = _hidden_states(embeddings, own)
    expected = _logits_of(model, decoder, probe.expand(len(hidden), -1), hidden)
    errors = {candidate: _error(candidate(embeddings, hidden), expected) for candidate in _declared(model.config)}
    best = min(errors, key=lambda candidate: errors[candidate])
    precision = 2 * torch.finfo(expected.dtype).eps if expected.dtype.itemsize == 2 else 1e-5
    if not errors[best] <= precision:
        best = _fitted(embeddings(hidden), expected)
        errors[best] = _error(best(embeddings, hidden), expected)
    # The decoder is run by itself and without a mask, so other kernels may round otherwise.
    apart = _error(best(embeddings, own), logits)
    if not (errors[best] <= precision and apart <= max(1e-4, 8 * precision)):
        raise ValueError(
            f"Expected the logits of {type(model).__name__} to be its output embeddings of the last hidden state, "
            f"scaled or capped (as {', '.join((*SCALES, *DIVISORS, *CAPS))} of its config say) or not; the nearest "
            f"such map, {best}, is off by {max(errors[best], apart):.0e} of the largest logit. This architecture does "
            "something else on the way, and is not supported."
        )
    return best


def _hidden_states(embeddings: nn.Module, like: torch.Tensor) -> torch.Tensor:
    """Random hidden states [M, T, H] whose largest logits are the :data:`MAGNITUDES`.

    :param embeddings: the output embeddings.
    :param like: [1, T, H].
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(like.shape, generator=generator).to(like)
    largest = embeddings(hidden).float().abs().max().clamp(min=1e-3)
    factors = torch.tensor(MAGNITUDES, device=like.device) / largest
    if like.dtype == torch.float16:
        factors = factors.clamp(max=float(3e4 / hidden.float().abs().max()))  # float16 ends at 65,504
    return (factors[:, None, None] * hidden.float()).to(like)


def _logits_of(
    model: PreTrainedModel, decoder: nn.Module, input_ids: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """The logits that a model makes of hidden states that are not its own.

    :param model: the model.
    :param decoder: the part of it whose answer is exchanged.
    :param input_ids: [M, T], anything.
    :param hidden: [M, T, H].
    """

    def exchange(_module: nn.Module, _args: Any, output: Any) -> Any:
        output["last_hidden_state"] = hidden
        return output

    # OPT and Bart have a decoder inside of what says that it is their decoder, and call that.
    inner = getattr(decoder, "decoder", None)
    places = [decoder, inner] if isinstance(inner, nn.Module) else [decoder]
    handles = [place.register_forward_hook(exchange) for place in places]
    try:
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits


def _declared(config: Any) -> Iterator[LogitMap]:
    """The maps that a config may mean by its names, the simplest first."""
    configs = (config, config.get_text_config())

    def values(names: tuple[str, ...]) -> list[float]:
        found = [getattr(one, name, None) for one in configs for name in names]
        return list(dict.fromkeys(float(value) for value in found if value))

    for cap in (None, *values(CAPS)):
        yield LogitMap(cap=cap)
        for scale in values(SCALES):
            yield LogitMap(scale=scale, cap=cap)
        for divisor in values(DIVISORS):
            yield LogitMap(divisor=divisor, cap=cap)
            yield LogitMap(hidden_divisor=divisor, cap=cap)
            yield LogitMap(scale=divisor, cap=cap)  # muP models call a factor so, too


def _fitted(raw: torch.Tensor, expected: torch.Tensor) -> LogitMap:
    """The scale and the cap that fit best, for a model that goes by other names.

    :param raw: [M, T, V], the output embeddings of hidden states of increasing magnitude.
    :param expected: [M, T, V], the model's logits of them.
    """
    x, y = raw.double(), expected.double()
    scale = float((x[0] * y[0]).sum() / (x[0] ** 2).sum())
    largest = float(y[-1].abs().max())
    if largest > 0.99 * abs(scale) * float(x[-1].abs().max()):  # no cap: logits grow as the hidden states do
        return LogitMap(scale=float((x * y).sum() / (x**2).sum()))
    # The cap is where the largest logits end; the scale is measured where it is felt and has not swallowed them yet.
    bent = (y.abs() > 0.05 * largest) & (y.abs() < 0.9 * largest)
    if bent.any():
        before = largest * torch.atanh(y[bent] / largest)
        scale = float((x[bent] * before).sum() / (x[bent] ** 2).sum())
    return LogitMap(scale=scale, cap=largest)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits [M, T, V], as a part of the largest logit of the same magnitude."""
    n = len(expected)
    difference = (actual.double() - expected.double()).abs().reshape(n, -1).max(dim=1).values
    return float((difference / expected.double().abs().reshape(n, -1).max(dim=1).values.clamp(min=1e-9)).max())
