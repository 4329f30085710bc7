"""Importing objects by name: configurations refer to prompts and rewards by strings such as ``"module:function"``.

To import is to run code. Names that somebody types are imported. Names from files that travel, such as the
``config.yaml`` beside a policy, are imported only for those who trust the file: such a file is used inside
:func:`names_from`, and every import by name goes through :func:`check_may_import`. The same holds for addresses of
servers, to which prompts and texts would be sent (:func:`check_may_contact`), and for arguments by which a model's
answers would be run (:func:`check_may_run_answers`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_MODULE_ATTRIBUTE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_ADDRESS = re.compile(r"https?://[^\s+*]+")  # in a sum of rewards


class UntrustedNameError(ValueError):
    """A file that may come from somebody else names code, which has not been imported, or a server, to which nothing
    has been sent, or says that a model's answers may be run, of which none has been.
    """


@dataclass(frozen=True)
class _File:
    """A file whose names are not trusted.

    :param path: where it is.
    :param fields: its fields by name.
    :param given: what somebody has typed instead of some fields, by the names of the fields that can be typed; None:
        nothing.
    """

    path: str
    fields: Mapping[str, Any]
    given: Mapping[str, Any]

    def names_are_given(self, name: str) -> bool:
        return any(name in names_in(value) for value in self.given.values())

    def field_with(self, name: str) -> str | None:
        return next((field for field, value in self.fields.items() if name in names_in(value)), None)


# Not a context variable: what another thread imports, such as one that the environment started, is refused as well.
_files: list[_File] = []


@contextlib.contextmanager
def names_from(path: object, fields: Mapping[str, Any], given: Mapping[str, Any], trust: bool) -> Iterator[None]:
    """While this lasts, no object is imported by name, by any thread, no server is used, and no model's answer is run,
    except by the names that somebody has typed.

    :param path: the file that has been read, for the error.
    :param fields: its fields by name.
    :param given: the options by which fields can be overridden, with what somebody has typed there; None: nothing.
    :param trust: whether the names of the file may be imported as well.
    """
    if trust:
        yield
        return
    _files.append(file := _File(str(path), fields, given))
    try:
        yield
    finally:
        _files.remove(file)


def check_may_import(name: str, module: str) -> None:
    """Refuse to import what only a file names that may come from somebody else.

    :param name: the name, as it stands in a configuration.
    :param module: the module that would be imported.
    :raises UntrustedNameError: if the import is refused.
    """
    _check_may_use(
        name,
        f"would import the module {module!r}, which runs its code, and such a file may come from somebody else: "
        "nothing has been imported. If you know that code, pass --trust (trust=True in Python).",
    )


def check_may_contact(address: str) -> None:
    """Refuse to send prompts and texts to a server that only a file names that may come from somebody else.

    :param address: the address, as it stands in a configuration.
    :raises UntrustedNameError: if that is refused.
    """
    _check_may_use(
        address,
        "would be sent prompts and texts, and such a file may come from somebody else: nothing has been sent. If you "
        "know that server, pass --trust (trust=True in Python).",
    )


def check_may_run_answers(argument: str) -> None:
    """Refuse to run what a model answers where only a file says that it may be, which may come from somebody else.

    :param argument: the name of the argument that says so, as it stands in a configuration.
    :raises UntrustedNameError: if that is refused.
    """
    _check_may_use(
        argument,
        "would have the model's answers run as Python, and such a file may come from somebody else: nothing has been "
        "run. If you know that model, pass --trust (trust=True in Python).",
    )


def _check_may_use(name: str, danger: str) -> None:
    for file in _files:
        if file.names_are_given(name):
            continue
        field = file.field_with(name)
        where, instead = file.path, ""
        if field is not None:
            where += f", {field}"
            if field in file.given:
                instead = f" Otherwise give --{field.replace('_', '-')} on the command line."
        raise UntrustedNameError(f"{where}: {name!r} {danger}{instead}")


def names_in(value: Any) -> set[str]:
    """
    :param value: what a file says.
    :return: the names of objects, environments and servers in it, also inside sums of rewards, lists and mappings.
    """
    names: set[str] = set()
    todo, seen = [value], set()
    while todo:
        part = todo.pop()
        if id(part) in seen:  # YAML may refer to the same list many times
            continue
        seen.add(id(part))
        if isinstance(part, str):
            named = (match[0] for kind in (_MODULE_ATTRIBUTE, _ADDRESS) for match in kind.finditer(part))
            names |= {part, *named}
        elif isinstance(part, Mapping):
            todo += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            todo += part
    return names


def is_object_name(name: str) -> bool:
    """
    :param name: any string.
    :return: whether the string has the form ``"module:attribute"`` (dots are allowed on both sides of the colon).
    """
    return _MODULE_ATTRIBUTE.fullmatch(name) is not None


def is_address(name: str) -> bool:
    """
    :param name: any string.
    :return: whether it begins as the address of a server does.
    """
    return name.startswith(("http://", "https://"))


def import_object(name: str) -> Any:
    """Import the object that ``"module:attribute"`` names.

    :param name: the name, written as in entry points, for example ``"my_rewards:brevity"``.
    :return: the object.
    :raises UntrustedNameError: if only a file names it that is not trusted, see :func:`names_from`.
    :raises ValueError: if the module or the attribute does not exist. An error inside the module is passed on as it is.
    """
    module_name, _, attributes = name.partition(":")
    check_may_import(name, module_name)
    # The user's own `my_rewards.py` lies in the working directory, which a console script does not search for modules.
    added = [directory for directory in [os.getcwd()] if directory not in sys.path]
    sys.path.extend(added)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it imports is not
        raise ValueError(
            f"Expected {name!r} to name an importable module before the colon, but there is no module {error.name!r}. "
            f"Run from its directory or put that on PYTHONPATH."
        ) from error
    finally:
        for directory in added:
            sys.path.remove(directory)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise ValueError(
                f"Expected {name!r} to name an attribute after the colon, but {found!r} has no {attribute!r}."
            )
        found = getattr(found, attribute)
    return found
