"""The policy for sb3-contrib's ``TRPO``, which tells the actor from the critic by the names of their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from torch import nn

from agents.policies.causal_lm_policy import CausalLMPolicy, is_actor


class ParameterName(str):
    """The name of a parameter, whose answer to ``"value" in name`` is whether the actor does *not* train the parameter.

    TRPO leaves parameters with "value" in their name out of its step, and differentiates by all others. But language
    models have such names in the actor (``attention.query_key_value``), so these parameters would never be trained; and
    TRPO can't differentiate by frozen parameters, which with an adapter are all but the adapter's.

    :param name: the name.
    :param actor: whether the actor trains the parameter.
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
    """``CausalLMPolicy`` for ``sb3_contrib.TRPO``. The parameters are the same.

    It is needed for models with "value" in the name of an actor's parameter (GPT-NeoX, Bloom, Falcon), and for frozen
    parameters (LoRA).
    """

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """
        :param prefix: what is put before all names.
        :param recurse: whether parameters of submodules are included.
        :param remove_duplicate: whether shared parameters are named only once.
        :return: an iterator over the parameters and their names, which are instances of :class:`ParameterName`.
        """
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            own = name.removeprefix(prefix).removeprefix(".")
            yield ParameterName(name, is_actor(own, parameter)), parameter
