"""The strings that name rewards: ``"correct(match='math')+0.1*format"``. Arguments are literals, so no code is run."""

from __future__ import annotations

import ast
import re
from typing import Any


def parse_call(text: str) -> tuple[str, list[Any], dict[str, Any]] | None:
    """
    :param text: any string.
    :return: the name, the arguments and the keywords of ``"name(1, key='value')"``; None if the string is no such call.
    :raises ValueError: if an argument is no literal.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        return None
    try:
        arguments = [ast.literal_eval(argument) for argument in call.args]
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"Expected the arguments in {text!r} to be written out: numbers, strings in quotes, True, False, None."
        ) from error
    return call.func.id, arguments, keywords


# A string in quotes, with what is escaped in it; or any character.
_QUOTED_OR_CHARACTER = re.compile(r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|.""", re.DOTALL)


def _terms(text: str) -> list[str]:
    """What stands between the signs + of a sum, other than those between parentheses."""
    terms, depth = [""], 0
    for token in _QUOTED_OR_CHARACTER.findall(text):
        depth += (token == "(") - (token == ")")
        if token == "+" and depth <= 0:
            terms.append("")
        else:
            terms[-1] += token
    return terms


def parse_sum(text: str) -> dict[str, float]:
    """
    :param text: a weighted sum such as ``"builtin+0.5*sentiment"``. A + always begins the next term, so in the address
        of a server it is written %2B.
    :return: the weights by name. A name without a weight has the weight 1.
    :raises ValueError: if a term is not of this form, or a name stands there twice.
    """
    weights: dict[str, float] = {}
    hint = " In an address, write + as %2B and * as %2A." if "://" in text else ""
    for term in _terms(text):
        before, parenthesis, arguments = term.partition("(")
        weight, star, name = before.rpartition("*")
        try:
            number = float(weight) if star else 1.0
        except ValueError as error:
            raise ValueError(
                f"Expected each term of {text!r} to be 'name' or 'weight*name', got {term!r}.{hint}"
            ) from error
        name = (name + parenthesis + arguments).strip()
        if not name or name in weights:
            raise ValueError(f"Expected each term of {text!r} to name another reward, got {term!r}.{hint}")
        weights[name] = number
    return weights
