"""The policy for sb3-contrib's ``TRPO``, which tells actor from critic by the names of their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from torch import nn

from agents.policies.causal_lm_policy import CausalLMPolicy, is_actor


class ParameterName(str):
    """A parameter's name, with another answer to the one question that TRPO asks of it: is ``"value"`` in it?

    TRPO leaves out of its step what has "value" in its name, and differentiates by everything else. Language models
    have such names in their actor (``attention.query_key_value``), which would never be trained; and parameters that
    are frozen, as all but an adapter's are, can't be differentiated by. So here "value" is in the name of whatever is
    not the actor's to train, and in no other.

    :param name: the name.
    :param actor: whether the parameter is the actor's to train.
    """

    actor: bool

    def __new__(cls, name: str, actor: bool) -> Self:
        self = super().__new__(cls, name)
        self.actor = actor
        return self

    def __getnewargs__(self) -> tuple[str, bool]:  # type: ignore[override]
        return str(self), self.actor

    def __contains__(self, part: str) -> bool:  # type: ignore[override]
        return not self.actor if part == "value" else super().__contains__(part)


class TRPOCausalLMPolicy(CausalLMPolicy):
    """``CausalLMPolicy`` for ``sb3_contrib.TRPO``; the parameters are the same.

    It is needed where a model has "value" in the name of an actor's parameter (GPT-NeoX, Bloom, Falcon), and where
    parameters are frozen (LoRA).
    """

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            own = name.removeprefix(prefix).removeprefix(".")
            yield ParameterName(name, is_actor(own, parameter)), parameter
