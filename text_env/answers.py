r"""Tasks with a right answer: what a text gives as its answer, and whether it is the expected one.

The names are those of common data sets: GSM8K ends with ``#### 72``, MATH with ``\boxed{72}``, reasoning-gym asks for
``<answer>72</answer>``.

Notation: B texts in a batch.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any

from text_env.bounded_calls import BoundedCallError, OtherProcessError, call_bounded
from text_env.finished_texts import TRL_EXTRAS, Messages, written
from text_env.imports import import_object, is_object_name

Extractor = Callable[[str], str | None]
"""From a text to the answer that it gives; None if it gives none."""

Matcher = Callable[[str, Any], bool | float]
"""From an answer and the expected one to how right it is: a bool, or a number from 0 to 1."""


class ExpectedAnswerError(ValueError):
    """The data set's own answer cannot be read: a mistake in the data or in the choice of the matcher."""


# ---- extraction ----------------------------------------------------------------------------------------------------

# No part can be left again once it has matched (`+` and `?` with a second `+`), so the time is linear in the text.
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?+|\.[0-9]++"
_NUMBER = rf"(?:[-+−][$€£]?)?+(?:{_DECIMAL})(?:[eE][-+]?[0-9]{{1,3}}(?!\w)|\s*+/\s*+[0-9]++(?![.,]?[0-9]))?+"
_IN_TEXT = re.compile(rf"(?:(?<![\w.)\]}}])(?=[-+−])|(?<![0-9])(?<![0-9][.])(?=[.0-9])){_NUMBER}")


def last_number(text: str) -> str | None:
    """
    :param text: any text.
    :return: the last number: ``-3``, ``1,000.5``, ``.5``, ``1e-3``, or a fraction such as ``3/4``. A full stop after it
        is none of its digits, and a minus after a word or another number is no sign.
    """
    found = None
    for match in _IN_TEXT.finditer(text):
        found = match[0]
    return found


def answer_tags(text: str) -> str | None:
    """
    :param text: any text.
    :return: what stands in the last ``<answer>…</answer>``.
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end].strip() or None


_BRACES = re.compile(r"\\boxed\s*+\{|\\.|[{}]", re.DOTALL)


def boxed(text: str) -> str | None:
    r"""
    :param text: any text.
    :return: what stands in the last ``\boxed{…}`` that is closed. Braces inside it are balanced; ``\{`` and ``\}`` are
        none of them.
    """
    open_braces: list[tuple[int, bool]] = []
    last_start, last = -1, ""
    for token in _BRACES.finditer(text):
        if token[0].endswith("{") and token[0] != r"\{":
            open_braces.append((token.end(), len(token[0]) > 1))
        elif token[0] == "}" and open_braces:
            start, is_boxed = open_braces.pop()
            if is_boxed and start > last_start:
                last_start, last = start, text[start : token.start()]
    return last.strip() or None


def after_hash(text: str) -> str | None:
    """
    :param text: any text.
    :return: the line after the last ``####``, as in GSM8K.
    """
    _, mark, rest = text.rpartition("####")
    return rest.strip().split("\n")[0].strip() or None if mark else None


def whole(text: str) -> str | None:
    """
    :param text: any text.
    :return: all of it, without the white space around it.
    """
    return text.strip() or None


EXTRACTORS: dict[str, Extractor] = {
    "last_number": last_number,
    "answer_tags": answer_tags,
    "boxed": boxed,
    "hash": after_hash,
    "whole": whole,
}


# ---- comparison ----------------------------------------------------------------------------------------------------


def exact(answer: str, expected: Any) -> bool:
    """
    :param answer: an answer.
    :param expected: the expected answer, read as a string.
    :return: whether both are the same string, where any white space is as good as one space.
    """
    return answer.split() == str(expected).split()


_WHOLE_NUMBER = re.compile(rf"[$€£]?\s*+(?P<number>{_NUMBER})\.?")


def as_number(value: Any) -> Fraction | None:
    """
    :param value: a number, or a string of one as :func:`last_number` finds it, with a currency sign before it or a full
        stop after it.
    :return: the number, exactly: 0.1 is a tenth. None: it is no number.
    """
    if isinstance(value, bool):
        return None
    try:
        if isinstance(value, int | Decimal | Fraction):
            return Fraction(value)
        match = _WHOLE_NUMBER.fullmatch(str(value).strip())
        if match is None:
            return None
        over, _, under = re.sub(r"[,\s$€£]", "", match["number"]).replace("−", "-").partition("/")
        # int() refuses more than 4300 digits, so that even an odd text costs little.
        return Fraction(over) / int(under or 1)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def number(answer: str, expected: Any) -> bool:
    """
    :param answer: an answer.
    :param expected: the expected number, or a string of it.
    :return: whether both are the same number, exactly: ``"1,000"`` is ``"1000.0"``, and ``"0.333"`` is not ``"1/3"``.
    :raises ExpectedAnswerError: if what is expected is no number.
    :raises ValueError: if the answer is none.
    """
    wanted = as_number(expected)
    if wanted is None:
        raise ExpectedAnswerError(f"Expected a number as the right answer, got {expected!r}.")
    given = as_number(answer)
    if given is None:
        raise ValueError(f"Expected a number, got {answer!r}.")
    return given == wanted


LONGEST_FORMULA = 1000
"""Characters. A longer answer is no formula to the matcher "math"."""


def formula(answer: str, expected: Any) -> bool:
    r"""By math-verify, https://github.com/huggingface/Math-Verify, in :func:`text_env.bounded_calls.call_bounded`.

    math-verify's own time limit works in the main thread only, and not within a power such as ``9^9^9^9``.

    :param answer: an answer: a formula, or a text with formulas in ``$…$``, ``\(…\)``, ``\[…\]`` or ``\boxed{…}``.
    :param expected: the expected answer, likewise.
    :return: whether both mean the same: ``\frac{1}{2}`` is ``0.5``.
    :raises ExpectedAnswerError: if there is no formula in what is expected.
    :raises ValueError: if there is none in the answer, or it is longer than :data:`LONGEST_FORMULA`.
    :raises text_env.bounded_calls.BoundedCallError: if comparing them takes too long.
    :raises text_env.bounded_calls.OtherProcessError: if no formulas can be compared, whatever they are.
    """
    if len(answer) > LONGEST_FORMULA:
        raise ValueError(f"Expected a formula of at most {LONGEST_FORMULA} characters, got {len(answer)}.")
    try:  # what the answer has no part in must not take the time that comparing it may take
        call_bounded(f"{__name__}:prepare", seconds=120.0)
    except BoundedCallError as error:
        raise OtherProcessError(f"math-verify can't compare formulas, so no answer can be judged: {error}") from error
    verdict = call_bounded(f"{__name__}:compare_formulas", answer, str(expected))
    if verdict is None:
        raise ExpectedAnswerError(f"Expected a formula as the right answer, got {expected!r}.")
    return bool(verdict)


@cache
def prepare() -> None:
    """Import math-verify and let it build its parser, so that :func:`compare_formulas` finds both."""
    compare_formulas(r"\frac{1}{2}", "0.5")


_MATHS = re.compile(r"\$|\\\(|\\\[|\\boxed")


def compare_formulas(answer: str, expected: str) -> bool | None:
    """What :func:`formula` does, without bounds.

    :param answer: an answer.
    :param expected: the expected answer.
    :return: whether both mean the same; None if there is no formula in what is expected.
    :raises ValueError: if there is none in the answer.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limit is off

    def parsed(text: str) -> list[Any]:
        # math-verify looks for formulas in a text, and takes an answer for a text unless it is marked as a formula.
        return parse(text if _MATHS.search(text) else f"${text}$", parsing_timeout=None)

    wanted = parsed(expected) if expected.strip() else []
    if not wanted:
        return None
    given = parsed(answer)
    if not given:
        raise ValueError(f"Expected a formula, got {answer!r}.")
    return bool(verify(wanted, given, timeout_seconds=None))


MATCHERS: dict[str, Matcher] = {"exact": exact, "number": number, "math": formula}


# ---- the reward ----------------------------------------------------------------------------------------------------


def _resolved(spec: Any, known: Mapping[str, Any], what: str, *arguments: str) -> Any:
    """A function by one of the known names or as ``"module:function"``; or the function itself."""
    call = f"of {' and '.join(arguments)}"
    found = spec
    if isinstance(spec, str):
        if spec not in known and not is_object_name(spec):
            raise ValueError(
                f"Unknown {what} {spec!r}. Known names: {', '.join(map(repr, known))}. Otherwise give "
                f"'module:function', or a function {call}."
            )
        found = known[spec] if spec in known else import_object(spec)
    if not callable(found):
        raise TypeError(f"Expected {what} to be a name or a function {call}, got {found!r}.")
    try:
        inspect.signature(found).bind(*arguments)
    except TypeError as error:
        raise TypeError(f"Expected {what} to be a function {call}, got {found!r}: {error}.") from error
    except ValueError:  # some functions that are not written in Python have no signature
        pass
    return found


class Verifier:
    """1 for a text that gives the right answer, 0 for one that does not: a reward, and a metric.

    Whatever a policy writes is scored: a text without an answer, one whose answer cannot be read, and one that an
    extractor or a matcher raises on are worth 0. What no text has a part in is an error: a matcher that finds a module
    missing, or whose process does not start, judges no text at all. A row whose column holds None (in a mixture of
    tasks) has no right answer, and the score None: the reward does not apply to it.

    Of each text these are logged, and stand in the final info: ``correct``, 1.0 if the score is 1, else 0.0 (None where
    the score is); ``well_formed``, 1.0 if an answer could be extracted and compared, else 0.0; ``answer``, the
    extracted answer, or None; ``vote``, the same string for answers that are the same (see :meth:`vote`), or None.
    Where a metric of the environment has one of these names, that metric stands there.

    :param extract: how the answer is found: ``"last_number"``, ``"answer_tags"``, ``"boxed"``, ``"hash"`` or
        ``"whole"``; ``"module:function"``; or a function from a text to a string or None.
    :param match: how it is compared: ``"exact"``, ``"number"`` or ``"math"``; ``"module:function"``; or a function of
        the answer and the expected one that returns a bool or a number from 0 to 1.
    :param column: the column of the prompts that holds the expected answers.
    :raises ValueError: for an unknown name.
    :raises TypeError: if one of the two is no function of that many arguments.
    :raises ImportError: if ``"math"`` is asked for, and math-verify is not installed.
    """

    name = "correct"

    def __init__(
        self, extract: str | Extractor = "last_number", match: str | Matcher = "number", column: str = "answer"
    ) -> None:
        self.extract: Extractor = _resolved(extract, EXTRACTORS, "extract", "a text")
        self.match: Matcher = _resolved(match, MATCHERS, "match", "an answer", "the expected answer")
        self.column = column
        if self.match is formula and importlib.util.find_spec("math_verify") is None:
            raise ImportError('match="math" needs math-verify: pip install "textrlhf[tasks]"')

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if self.column not in columns:
            there = sorted(set(columns) - {*TRL_EXTRAS, "completion_ids"})
            raise ValueError(
                f"Expected the prompts to have a column {self.column!r} with the right answers, got the columns "
                f"{there}: name another by Verifier(column=...)."
            )
        texts = zip(written(completions), columns[self.column], strict=True)
        judged = [self.judge(text, expected) for text, expected in texts]
        if log_extra is not None:
            logged: dict[str, list[Any]] = {
                "correct": [None if score is None else float(score == 1) for score, _, _ in judged],
                "well_formed": [well_formed for _, well_formed, _ in judged],
                "answer": [answer for _, _, answer in judged],
                "vote": [None if answer is None else self.vote(answer) for _, _, answer in judged],
            }
            for name, values in logged.items():
                with suppress(ValueError):  # a metric of the environment has this name
                    log_extra(name, values)
        return [score for score, _, _ in judged]

    def vote(self, answer: str) -> str:
        """
        :param answer: an answer.
        :return: what it counts as in a vote. If numbers are compared, the number: ``"1,000"`` votes for ``"1000.0"``.
            Otherwise, and for numbers of thousands of digits, the answer, where any white space is as good as one
            space.
        """
        value = as_number(answer) if self.match is number else None
        if value is not None:
            with suppress(ValueError):  # str() refuses more than 4300 digits, which a decimal may have as a fraction
                return str(value)
        return " ".join(answer.split())

    def judge(self, text: str, expected: Any) -> tuple[float | None, float, str | None]:
        """
        :param text: what was written.
        :param expected: the right answer; None: there is none.
        :return: the score (None if there is no right answer), whether the text is well-formed (1.0 or 0.0), and the
            answer that it gives.
        :raises ExpectedAnswerError: if the matcher cannot read the right answer.
        :raises ImportError: if the extractor or the matcher cannot import what it needs.
        :raises text_env.bounded_calls.OtherProcessError: if the process that the matcher needs cannot work.
        :raises TypeError: if the extractor or the matcher returns a value of another type than it must.
        """
        answer = _attempt(self.extract, text)
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"Expected extract to return a string or None, got {answer!r} for {text!r}.")
        if expected is None:
            return None, float(answer is not None), answer
        verdict = None if answer is None else _attempt(self.match, answer, expected)
        if verdict is None:
            return 0.0, 0.0, answer
        try:
            score = float(verdict)
        except (TypeError, ValueError):
            score = math.nan
        if isinstance(verdict, str) or not 0 <= score <= 1:
            raise TypeError(f"Expected match to return a bool or a number from 0 to 1, got {verdict!r} for {answer!r}.")
        return score, 1.0, answer


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns; None if it raises. A policy writes what it likes, and no text may stop the training."""
    try:
        return function(*arguments)
    except (ExpectedAnswerError, OtherProcessError, ImportError):  # no text has a part in these
        raise
    except Exception:
        return None
