"""Values from a YAML file, held against the types of the fields that they are for."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

MOST_VALUES = 100_000
"""The number of values that a file may stand for. A few lines can stand for billions, which nobody could print."""


def read_mapping(path: Path) -> dict[str, Any]:
    """
    :param path: a YAML file.
    :return: its options by name; none for an empty file.
    :raises ValueError: if the file is not YAML, or holds something other than names and values.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        size = _size(values, {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: a value is nested too deeply, or inside itself.") from error
    if size > MOST_VALUES:
        raise ValueError(
            f"{path} stands for {size:.3g} values, by repeating what it names with & and *; at most "
            f"{MOST_VALUES:,} are read."
        )
    return mapping(str(path), values)


def _size(value: Any, known: dict[int, int]) -> int:
    """The number of values in a value. A list that is referred to many times counts as often, and is counted once."""
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    if parts and id(value) not in known:
        known[id(value)] = sum(_size(part, known) for part in parts)
    return 1 + known.get(id(value), 0)


def mapping(name: str, value: Any) -> dict[str, Any]:
    """
    :param name: what the value is called in the error.
    :param value: what YAML read.
    :return: the value, {} for None, its keys as strings.
    :raises ValueError: if it is no mapping.
    """
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"Expected {name} to hold names and values, such as `seed: 1`, got {_shown(value)}.")
    return {str(key): item for key, item in (value or {}).items()}


def typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its field wants it. YAML 1.1 reads ``1e-4`` as a string; where a number is wanted, it is one.

    :param name: what the field is called in the error.
    :param value: what YAML read.
    :param hint: the type of the field.
    :return: the value, as an int, float or Path where the field is one.
    :raises ValueError: if it is of another type.
    """
    options = options_of(hint)
    for option in options:
        with contextlib.suppress(_Misfit):
            return _as(value, option)
    wanted = " or ".join(dict.fromkeys(_name(option) for option in options))
    quotes = ""
    if isinstance(value, int | float) and {str, Path} & set(options):
        quotes = ". If this is a name, put it in quotes"
    raise ValueError(f"Expected {name} to be {wanted}, got {_shown(value)}{quotes}.")


def hints_of(cls: type[Any]) -> dict[str, Any]:
    """
    :param cls: a dataclass.
    :return: the type of each field.
    """
    return get_type_hints(cls, include_extras=False)


class _Misfit(Exception):
    """The value is not of this type."""


def options_of(hint: Any) -> list[Any]:
    """
    :param hint: a type.
    :return: the members of a union, and of the unions inside it; of another type the type itself.
    """
    origin = get_origin(hint)
    if origin is Annotated:
        return options_of(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return [option for member in get_args(hint) for option in options_of(member)]
    return [hint]


def _as(value: Any, option: Any) -> Any:
    origin = get_origin(option) or option
    if option is Any:
        return value
    if origin is Literal:
        fits = value in get_args(option)
    elif origin in (int, float):
        return _number(value, origin)
    elif origin is Path:
        if not isinstance(value, str):
            raise _Misfit
        return Path(value)
    else:
        fits = isinstance(value, Mapping if origin is dict else origin)
    if not fits:
        raise _Misfit
    return value


def _number(value: Any, kind: type[int] | type[float]) -> float:
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError as error:
            raise _Misfit from error
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _Misfit
    if kind is float:
        return float(number)
    if isinstance(number, float) and not number.is_integer():
        raise _Misfit
    return int(number)


def _name(option: Any) -> str:
    origin = get_origin(option) or option
    if origin is Literal:
        return " or ".join(map(repr, get_args(option)))
    names = {str: "a string", Path: "a path", int: "an integer", float: "a number", bool: "true or false"}
    names |= {dict: "names and values", Mapping: "names and values", Sequence: "a list", type(None): "null"}
    return names.get(origin, str(option))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} …"
