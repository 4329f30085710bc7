"""Multi-step calculations that are written out column by column: the built-in task with a right answer.

A problem is an expression such as ``(47+38)*6+125=``. Its working is the way people do it on paper, one line for each
operation and one equation for each column, from the units upward, with the carry as a further summand::

    47+38: 7+8=15, 4+3+1=8, 85
    85*6: 5*6=30, 8*6+3=51, 510
    510+125: 0+5=5, 1+2=3, 5+1=6, 635
    #### 635

Whoever forgets a carry writes ``4+3=7`` instead and goes on with the wrong result. The built-in language model has
learned from such writers (``data/build_arithmetic.py``), so it often forgets carries too, and that is what
reinforcement learning can take out of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from text_env.generated import GeneratedPrompts
from text_env.tasks import Task

CHARACTERS = "0123456789+*=()"
"""The characters of problems. Workings also have ``": "``, ``", "``, ``"#### "`` and a line break."""

LARGEST = 9_999
"""No intermediate result is larger than this."""

MOST_STEPS = 32
"""With more, hardly a problem has results below :data:`LARGEST`, and drawing one could take for ever."""

MODEL = "builtin:arithmetic"


@dataclass(frozen=True)
class Problem:
    """A calculation from left to right.

    :param start: the first number.
    :param steps: pairs of an operator, ``"+"`` or ``"*"``, and its right operand; a factor is a digit of at least 2.
    """

    start: int
    steps: tuple[tuple[str, int], ...]

    def results(self) -> list[int]:
        """
        :return: the right result of each step.
        """
        results, value = [], self.start
        for operator, operand in self.steps:
            value = value + operand if operator == "+" else value * operand
            results.append(value)
        return results

    @property
    def answer(self) -> int:
        """The right result of the last step."""
        return self.results()[-1]

    @property
    def expression(self) -> str:
        """The problem as a prompt. There are parentheses where multiplication would come first."""
        text, is_sum = str(self.start), False
        for operator, operand in self.steps:
            text = f"({text})" if operator == "*" and is_sum else text
            text, is_sum = f"{text}{operator}{operand}", operator == "+"
        return f"{text}="


def draw_problem(generator: random.Random, n_steps: int, product_share: float = 0.25) -> Problem:
    """Draw a problem whose results are at most :data:`LARGEST`, with at most one product in it.

    :param generator: the source of randomness.
    :param n_steps: the number of operations, at least 1.
    :param product_share: the probability that a step is a product, as long as there is none yet.
    :return: the problem. Summands have two or three digits, the factor has one.
    """
    while True:
        steps: list[tuple[str, int]] = []
        for _ in range(n_steps):
            product = all(operator == "+" for operator, _ in steps) and generator.random() < product_share
            steps.append(("*", generator.randint(2, 9)) if product else ("+", _summand(generator)))
        problem = Problem(_summand(generator), tuple(steps))
        if max(problem.results()) <= LARGEST:
            return problem


def _summand(generator: random.Random) -> int:
    return generator.randint(10, 99) if generator.random() < 0.5 else generator.randint(100, 999)


def never(overhang: bool) -> bool:
    """The careful writer's choice for :func:`working`.

    :param overhang: not used.
    :return: False.
    """
    return False


def working(problem: Problem, forgets: Callable[[bool], bool] = never) -> str:
    """Write a calculation out.

    :param problem: the calculation.
    :param forgets: asked at every carry whether the writer forgets it. It is told whether the carry meets a single
        digit, in a column that only one of the summands reaches.
    :return: the text that should follow the problem's expression. Its answer is wrong if a carry was forgotten.
    """
    value, lines = problem.start, []
    for operator, operand in problem.steps:
        columns = list(_columns(value, operator, operand, forgets))
        # The last column's result is written whole, the others give their last digit.
        digits = [column.rpartition("=")[2] for column in columns]
        result = int(digits[-1] + "".join(digit[-1] for digit in reversed(digits[:-1])))
        lines.append(f"{value}{operator}{operand}: {', '.join(columns)}, {result}\n")
        value = result
    return f"{''.join(lines)}#### {value}"


def _columns(value: int, operator: str, operand: int, forgets: Callable[[bool], bool]) -> Iterator[str]:
    """The equations of one operation, from the units upward."""
    upper, lower = str(value)[::-1], str(operand)[::-1]
    carry = 0
    for place in range(max(len(upper), len(lower)) if operator == "+" else len(upper)):
        if operator == "*":
            terms, total, overhang = f"{upper[place]}*{operand}", int(upper[place]) * operand, False
        else:
            digits = [number[place] for number in (upper, lower) if place < len(number)]
            terms, total, overhang = "+".join(digits), sum(map(int, digits)), len(digits) == 1
        if carry and not forgets(overhang):
            terms, total = f"{terms}+{carry}", total + carry
        yield f"{terms}={total}"
        carry = total // 10


def arithmetic_task(
    n_steps: int | tuple[int, ...] | list[int] = (3, 4), size: int | None = None, seed: int = 0
) -> Task:
    """The built-in task ``"arithmetic"``.

    :param n_steps: the number of operations of a problem, from 1 to :data:`MOST_STEPS`; of several numbers, each is as
        frequent as the others. The built-in model has seen 3 and 4.
    :param size: the number of training problems, and of held-out ones; None: without end.
    :param seed: the seed that the problems are made from, at least 0.
    :return: the task. The score is 1 for a right answer after ``####``, else 0.
    :raises ValueError: if a number is out of range.
    """
    numbers = tuple(n_steps) if isinstance(n_steps, tuple | list) else (n_steps,)
    if not numbers or not all(_is_integer(number) and 1 <= number <= MOST_STEPS for number in numbers):
        raise ValueError(f"Expected n_steps to be an integer from 1 to {MOST_STEPS}, or several, got {n_steps!r}.")
    if not _is_integer(seed) or seed < 0:
        raise ValueError(f"Expected seed to be an integer of at least 0, got {seed!r}.")
    most = max(numbers)
    return Task(
        "arithmetic",
        lambda split: GeneratedPrompts(partial(_row, seed, numbers), split, size),
        "correct(extract='hash')",
        settings={
            "tokenizer": MODEL,
            # A number of three digits to begin with, an operator and three digits a step, two parentheses, "=".
            "max_prompt_tokens": 6 + 4 * most,
            # The longest operation is an addition to a number of four digits. "#### ", five digits, EOS.
            "max_new_tokens": 46 * most + 8,
        },
        model=MODEL,
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _row(seed: int, n_steps: tuple[int, ...], number: int) -> dict[str, Any]:
    """A problem with its answer. Not a function inside another, which could not be pickled with an environment."""
    generator = random.Random(f"{seed}/{number}")
    problem = draw_problem(generator, generator.choice(n_steps))
    return {"prompt": problem.expression, "answer": problem.answer}
