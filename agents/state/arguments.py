"""The arguments of a constructor: finding them, and saving those that can be saved as data."""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from text_env.imports import is_address, is_object_name


def argument_defaults(cls: type[Any]) -> dict[str, Any]:
    """
    :param cls: a class whose constructor may pass ``**kwargs`` on to that of its base class; not if they are annotated
        as ``Never``, with which a constructor refuses them itself.
    :return: the arguments that the constructor takes, those of the base classes included, with their defaults;
        ``inspect.Parameter.empty`` for an argument without a default.
    """
    signatures = [inspect.signature(c.__init__) for c in cls.__mro__ if "__init__" in vars(c)]  # type: ignore[misc]
    # From the class to its base classes, as long as constructors pass keyword arguments on.
    defaults: dict[str, Any] = {}
    for signature in signatures:
        *parameters, last = signature.parameters.values()
        any_more = last.kind is inspect.Parameter.VAR_KEYWORD
        hands_on = any_more and last.annotation != "Never"
        for parameter in parameters if any_more else [*parameters, last]:
            defaults.setdefault(parameter.name, parameter.default)
        if not hands_on:
            break
    del defaults["self"]
    return defaults


def check_argument_names(cls: type[Any], given: Iterable[str], elsewhere: Mapping[str, str]) -> None:
    """
    :param cls: a class, as for :func:`argument_defaults`.
    :param given: the names of keyword arguments.
    :param elsewhere: what to say of names that similar classes know.
    :raises TypeError: for names that its constructor doesn't take; it names the nearest ones that it does.
    """
    known = argument_defaults(cls)
    said = []
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = elsewhere.get(name) or (f"did you mean {near[0]!r}?" if near else "")
            said.append(f"{name!r}" + (f" ({hint})" if hint else ""))
    if said:
        raise TypeError(
            f"{cls.__name__} got an unexpected keyword argument {', '.join(said)}; known are {', '.join(known)}."
        )


def class_name(cls: type[Any]) -> str:
    """
    :param cls: a class.
    :return: ``"module:qualname"``. Such names are only compared; nothing is imported by them.
    """
    return f"{cls.__module__}:{cls.__qualname__}"


def kept_arguments(owner: Any, names: Iterable[str]) -> dict[str, Any]:
    """
    :param owner: an object that keeps the arguments of its constructor as attributes of the same names.
    :param names: the names of arguments.
    :return: the current values of these attributes.
    :raises ValueError: if there is no attribute for some of the arguments; it names them.
    """
    names = sorted(names)
    if lost := [name for name in names if not hasattr(owner, name)]:
        raise ValueError(
            f"Expected {type(owner).__name__} to keep its arguments {lost} as attributes of the same names, which is "
            "what a checkpoint writes down."
        )
    return {name: getattr(owner, name) for name in names}


def written_down(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Separate arguments that can be saved as data from those that can't.

    :param values: arguments by name.
    :return: the arguments that JSON can represent, with paths as strings; and the names of the others, which must be
        given again when they are loaded. The others are live objects, ``"module:function"`` strings and addresses,
        since a file must not name code that is then run, or a server that texts are then sent to.
    """
    values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    live = [name for name, value in values.items() if not is_plain(value) or _names_code_or_server(value)]
    return {name: value for name, value in values.items() if name not in live}, live


def arguments_again(
    saved: Mapping[str, Any], live: Sequence[str], given: Mapping[str, Any], how: str
) -> dict[str, Any]:
    """Put arguments that were saved and arguments that are given again together.

    :param saved: the arguments that :func:`written_down` returned.
    :param live: the names that :func:`written_down` returned.
    :param given: the arguments that are given now. They override saved ones.
    :param how: how an argument is given, for the error, with ``{}`` for its name, for example ``"{}=..."``.
    :return: all arguments.
    :raises ValueError: if an argument that must be given again is missing; it names all of these.
    """
    saved, code = written_down(saved)  # somebody may have edited the file such that it names code
    if missing := [name for name in (*live, *code) if name not in given]:
        raise ValueError(
            f"{missing} can't be written down and must be given again: load(path, env, {how.format(missing[0])})."
        )
    return {**saved, **given}


def is_plain(value: Any) -> bool:
    """
    :param value: any object.
    :return: whether JSON can represent it.
    """
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _names_code_or_server(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_names_code_or_server, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_names_code_or_server, value))
    return isinstance(value, str) and (is_object_name(value) or is_address(value))


def check_number(name: str, value: Any, least: float | None = None, above: float | None = None) -> None:
    """
    :param name: what the number is called in the error.
    :param value: the number.
    :param least: the smallest value allowed.
    :param above: a limit that the value must exceed, instead of ``least``.
    :raises ValueError: if ``value`` is no finite number, or out of range.
    """
    fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    limit = f" >= {least:g}" if least is not None else f" > {above:g}" if above is not None else ""
    if not fits or (least is not None and value < least) or (above is not None and value <= above):
        raise ValueError(f"Expected {name} to be a finite number{limit}, got {value!r}.")
