"""Importing objects by name: configurations refer to prompts and rewards by strings such as ``"module:function"``."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

_MODULE_ATTRIBUTE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_object_name(name: str) -> bool:
    """
    :param name: any string.
    :return: whether the string has the form ``"module:attribute"`` (dots are allowed on both sides of the colon).
    """
    return _MODULE_ATTRIBUTE.fullmatch(name) is not None


def import_object(name: str) -> Any:
    """Import the object that ``"module:attribute"`` names.

    :param name: the name, written as in entry points, for example ``"my_rewards:brevity"``.
    :return: the object.
    :raises ValueError: if the module or the attribute does not exist. An error inside the module is passed on as it is.
    """
    module_name, _, attributes = name.partition(":")
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
