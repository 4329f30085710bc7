"""Another package is called ``agents`` too: this module notices when Python finds it, and starts the command line.

PyPI's ``openai-agents`` is imported as ``agents``. Installed into the same environment, the two overwrite each other's
files, and a folder of that name in a project hides ours. What comes of it is an ``ImportError`` somewhere deep inside,
so both are said here, before anything is imported from ``agents``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

MARK = "as an SB3 policy"
"""Words of the docstring of our ``agents``, which stand near its top."""


def complaint() -> str | None:
    """
    :return: what is wrong with the ``agents`` that Python finds, and what to do; None if it is ours, or there is none.
    """
    try:
        spec = importlib.util.find_spec("agents")
    except (ImportError, ValueError):  # its place in sys.modules was taken by something without a spec
        spec = None
    if spec is None:
        return None
    if spec.origin is not None and MARK in _beginning(Path(spec.origin)):
        return None
    found = spec.origin or str(next(iter(spec.submodule_search_locations or ["?"])))
    return (
        f"The package `agents` that Python finds is not textrlhf's: {found}. If it is PyPI's openai-agents, the two "
        "can't share an environment: install textrlhf in another one, or uninstall openai-agents and install textrlhf "
        "again. If it is a folder of yours, rename it, or take the folder that it is in off PYTHONPATH."
    )


def _beginning(path: Path) -> str:
    try:
        return path.read_bytes()[:1000].decode(errors="replace")
    except OSError:  # in an archive, for example
        return ""


def main() -> int:
    """Entry point of the console script ``textrlhf``.

    :return: exit status.
    """
    if (message := complaint()) is not None:
        print(message, file=sys.stderr)
        return 1
    status: int = importlib.import_module("agents.cli").main()
    return status
