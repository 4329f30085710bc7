"""What the docstrings of this project need so that the API reference can show them: roles that become links, since the
site is Markdown, and constructors of named tuples, whose parameters are their fields.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|attr|mod|exc):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Turns ``:class:`text_env.tasks.Task``` into a link to its entry in the API reference, where it has one."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Go through a package once it has been read as a whole, since its modules name one another.

        :param pkg: the package.
        :param kwargs: not used.
        """
        self._visit(pkg, pkg)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Give a class without ``__init__`` a signature: that of its fields, or of ``__new__``.

        :param cls: any class.
        :param kwargs: not used.
        """
        if any(str(base) == "NamedTuple" for base in cls.bases):
            fields = [
                griffe.Parameter(
                    name,
                    annotation=field.annotation,
                    kind=griffe.ParameterKind.positional_or_keyword,
                    default=field.value,
                )
                for name, field in cls.attributes.items()
            ]
            receiver = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
            cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(receiver, *fields)))
        elif "__init__" not in cls.members and "__new__" in cls.members:
            parameters = cls.members["__new__"].parameters
            cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))

    def _visit(self, obj: Any, package: griffe.Module) -> None:
        if obj.is_class and "__doc__" in obj.members:  # ``__doc__ = Other.__doc__``, the same with another base class
            other = obj.parent[str(obj.members["__doc__"].value).removesuffix(".__doc__")]
            obj.docstring = griffe.Docstring(other.docstring.value, parent=obj)
            parameters = griffe.Parameters(*other.members["__init__"].parameters)
            obj.set_member("__init__", griffe.Function("__init__", parameters=parameters))
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda found: link(found[1], obj, package), obj.docstring.value)
        for member in obj.members.values():
            if not member.is_alias:
                self._visit(member, package)


def link(name: str, obj: Any, package: griffe.Module) -> str:
    """
    :param name: what a role names.
    :param obj: whose docstring it is in.
    :param package: the package of the object.
    :return: a link to the name's entry; only the name, if it has none.
    """
    scope = obj
    while scope is not None:  # from the object outward, so that a method finds its neighbours
        target = found_in(scope, name)
        if target is not None:
            private = any(part.startswith("_") for part in target.path.split("."))
            return f"`{name}`" if private or target.docstring is None else f"[`{name}`][{target.path}]"
        scope = scope.parent
    if name.split(".")[0] in ("agents", "text_env"):  # of the other package
        return f"[`{name}`][{name}]"
    return f"`{name}`"


def found_in(scope: Any, name: str) -> Any:
    """
    :param scope: a module, a class or a function.
    :param name: a name, with dots or without.
    :return: what bears the name there, None if nothing does.
    """
    if name.startswith(f"{scope.path}."):
        name = name.removeprefix(f"{scope.path}.")
    try:
        target = scope[name]
        return target.final_target if target.is_alias else target
    except (KeyError, griffe.AliasResolutionError, TypeError, AttributeError):
        return None
