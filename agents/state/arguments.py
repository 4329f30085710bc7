"""The arguments of a constructor, read off its signature."""

from __future__ import annotations

import inspect
from typing import Any


def argument_defaults(cls: type[Any]) -> dict[str, Any]:
    """
    :param cls: a class whose constructor may hand on ``**kwargs`` to that of its base class.
    :return: the arguments that its constructor takes, those of its base classes included, and their defaults
        (``inspect.Parameter.empty`` where there is none).
    """
    signatures = [inspect.signature(c.__init__) for c in cls.__mro__ if "__init__" in vars(c)]  # type: ignore[misc]
    # From the algorithm upwards, as long as further keyword arguments are handed on.
    defaults: dict[str, Any] = {}
    for signature in signatures:
        *parameters, last = signature.parameters.values()
        hands_on = last.kind is inspect.Parameter.VAR_KEYWORD
        for parameter in parameters if hands_on else [*parameters, last]:
            defaults.setdefault(parameter.name, parameter.default)
        if not hands_on:
            break
    del defaults["self"]
    return defaults
