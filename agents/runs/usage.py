"""What ``textrlhf COMMAND --help`` prints: examples, and the options in groups, each with what it means."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from agents.runs.yaml_values import hints_of, options_of

INDENT = 26  # where the explanation of an option begins
WORDS = {str: "TEXT", int: "INT", float: "FLOAT"}


def usage(
    command: str, config_type: type[Any], groups: Mapping[str, Sequence[str]], examples: Sequence[str], width: int = 0
) -> str:
    """
    :param command: the name of the command.
    :param config_type: the dataclass of its options, of which a field may be a dataclass of options itself.
    :param groups: the heading of each group, and the names of its fields.
    :param examples: command lines.
    :param width: of the page, in characters; by default the terminal's, at most 110.
    :return: the page.
    """
    width = width or min(shutil.get_terminal_size().columns, 110)
    fields = fields_of(config_type)
    required = [shown(name, field) for name, field in fields.items() if field.required]
    lines = [" ".join(["usage: textrlhf", command, *required, "[options]"]), ""]
    description = inspect.getdoc(config_type) or ""
    for paragraph in description.split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()).replace("``", "`"), width), ""]
    lines += ["Examples:", *(f"  {example}" for example in examples)]
    for heading, names in groups.items():
        lines += ["", f"{heading}:"]
        for name in names:
            lines += _option(name, fields[name], width)
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of a configuration as an option.

    :param hint: its type.
    :param default: its default, None where there is none.
    :param required: whether it must be given.
    :param positional: whether it is given by its place, without a name.
    :param help: what it means.
    """

    hint: Any
    default: Any
    required: bool
    positional: bool
    help: str


def fields_of(config_type: type[Any]) -> dict[str, Option]:
    """
    :param config_type: a dataclass of options.
    :return: its options by the name of the field, those of a field that is such a dataclass included.
    """
    hints, documented = hints_of(config_type), documentation(config_type)
    marked = get_type_hints(config_type, include_extras=True)
    found: dict[str, Option] = {}
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= fields_of(hints[field.name])
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = None if field.default is dataclasses.MISSING else field.default
        positional = tyro.conf.Positional in get_args(marked[field.name])
        found[field.name] = Option(hints[field.name], default, required, positional, documented.get(field.name, ""))
    return found


def documentation(config_type: type[Any]) -> dict[str, str]:
    """
    :param config_type: a dataclass whose fields are explained by a string below each, or as ``:param name:`` in the
        docstring of the class; a class is asked before the one that it inherits from.
    :return: what its fields mean, by name, each on one line.
    """
    found: dict[str, str] = {}
    for cls in config_type.__mro__[:-1]:
        [body] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                found.setdefault(field.target.id, _plain(str(ast.literal_eval(below.value))))
        for name, text in re.findall(r"^:param (\w+): (.+?)(?=^:|\Z)", inspect.getdoc(cls) or "", re.M | re.S):
            found.setdefault(name, _plain(text))
    return found


def flag(name: str) -> str:
    """
    :param name: of a field.
    :return: the option: ``--total-timesteps`` for ``total_timesteps``.
    """
    return "--" + name.replace("_", "-")


def shown(name: str, option: Option) -> str:
    """
    :param name: of a field.
    :param option: the field.
    :return: how it is written: ``--seed INT``, or ``RUN`` where it has no name but its place.
    """
    values = _values(option.hint)
    if option.positional:
        many = values.endswith("…")
        word = name.upper().removesuffix("S" if many else "")
        return f"{word} …" if many else word
    return f"{flag(name)} {values}".rstrip()


def _option(name: str, option: Option, width: int) -> list[str]:
    head = f"  {shown(name, option)}"
    if option.hint is bool:
        head = f"  {flag(name)}, --no-{flag(name)[2:]}"
    default = "" if option.default is None else f"(default: {option.default})"
    if isinstance(option.default, bool):
        default = f"(default: {'yes' if option.default else 'no'})"
    indent = " " * INDENT
    text = textwrap.wrap(f"{option.help} {default}".strip(), max(width - INDENT, 30), break_on_hyphens=False)
    if len(head) < INDENT - 1 and text:
        return [head.ljust(INDENT) + text[0], *(indent + line for line in text[1:])]
    return [head, *(indent + line for line in text)]


def _values(hint: Any) -> str:
    """What is written after an option of this type."""
    for member in options_of(hint):
        origin = get_origin(member) or member
        if origin is Literal:
            return "|".join(map(str, get_args(member)))
        if origin is bool:
            return "" if hint is bool else "True|False"
        if origin is dict:
            return "NAME VALUE …"
        if origin in (list, Sequence):
            return f"{WORDS.get(get_args(member)[0], 'PATH')} …"
        if origin is not type(None):
            return WORDS.get(origin, "PATH")
    return ""


def _plain(text: str) -> str:
    """A docstring as a line of text."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"\1", text)
    return " ".join(text.replace("``", "`").split())
