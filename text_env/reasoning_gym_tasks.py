"""The data sets of reasoning-gym as tasks (https://github.com/open-thought/reasoning-gym), an optional dependency.

Answers are judged by the ``score_answer`` of the data set. It runs in the process of :mod:`text_env.bounded_calls`,
which ends what would compute for ever.
"""

from __future__ import annotations

import difflib
import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np

from text_env.answers import ExpectedAnswerError, Extractor, Verifier, as_number, exact, last_number
from text_env.bounded_calls import BoundedCallError, call_bounded
from text_env.generated import GeneratedPrompts
from text_env.imports import check_may_run_answers
from text_env.tasks import Task

PREFIX = "reasoning_gym:"

RUNS_ANSWERS = frozenset(
    {
        *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"),
        *("puzzle24", "simple_integration", "spiral_matrix", "string_insertion"),
    }
)
"""Data sets whose ``score_answer`` evaluates the answer as Python (in version 0.1.25): what a model writes is run."""


def _close(answer: str, item: dict[str, Any]) -> bool:
    given, wanted = as_number(answer), as_number(item["answer"])
    return given is not None and wanted is not None and abs(given - wanted) <= wanted / 1000


def _no_nan(answer: str, item: dict[str, Any]) -> bool:
    return "nan" not in answer.lower()


def _same_number(answer: str, item: dict[str, Any]) -> bool:
    found = last_number(answer)
    return found is not None and as_number(found) == as_number(item["answer"])


def _makes_24(answer: str, item: dict[str, Any]) -> bool:
    from reasoning_gym.games.puzzle24 import parse_expr  # SymPy's

    numbers = sorted(map(int, re.findall(r"\d+", answer)))
    return numbers == sorted(item["metadata"]["numbers"]) and bool(parse_expr(answer) == 24)


TOO_LENIENT: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "coin_flip": _close,  # it is enough that one number begins as the other does, as "0" and "0.3125"
    "complex_arithmetic": _no_nan,  # the distance to NaN is NaN, and the smaller of 1 and NaN is 1
    "game_of_life_halting": lambda answer, item: exact(answer, item["answer"]),  # no string that is not empty is false
    "gsm_symbolic": _same_number,  # a minus is overlooked, and so is whatever follows the first number
    "number_sorting": _no_nan,  # NaN is in any order, and not too far from any number
    "puzzle24": _makes_24,  # any four numbers will do, and 24.9 is as good as 24
}
"""Data sets whose ``score_answer`` is 1 for wrong answers too (in 0.1.25), and what must hold of right ones besides."""

ONE_IN = 4
"""One problem of so many is held out. Some take a tenth of a second to make, and there is no end of them."""

# reasoning-gym makes a problem from the sum of seed and number, so that neighbouring seeds would share nearly all.
SEED_STRIDE = 1_000_003

INSTRUCTION = "\n\nEnd with the final answer between <answer> and </answer>."


def reasoning_gym_task(
    name: str,
    size: int | None = None,
    seed: int = 0,
    extract: str | Extractor = "answer_tags",
    instruction: str = INSTRUCTION,
    partial_credit: bool = False,
    max_new_tokens: int = 256,
    runs_answers: bool = False,
    **config: Any,
) -> Task:
    """A data set of reasoning-gym as a task.

    :param name: the name of the data set, such as ``"chain_sum"``.
    :param size: the number of training problems, and of held-out ones; None: without end.
    :param seed: the seed that the problems are made from.
    :param extract: how the answer is found in a text, as :class:`text_env.answers.Verifier` takes it.
    :param instruction: what follows each question.
    :param partial_credit: whether the score is what ``score_answer`` returns, from 0 to 1; otherwise it is 1 where that
        returns 1 and else 0. The final info's ``correct`` is the latter in any case.
    :param max_new_tokens: the response budget.
    :param runs_answers: must be True for the data sets in :data:`RUNS_ANSWERS`, which run the model's answers as
        Python. In a file that may come from somebody else it counts only for those who trust the file, see
        :mod:`text_env.imports`.
    :param config: the configuration of the data set, such as ``max_terms=3``.
    :return: the task.
    :raises ImportError: if reasoning-gym is not installed.
    :raises UntrustedNameError: if only a file that is not trusted says that answers may be run.
    :raises ValueError: if there is no such data set, or it does not take the configuration.
    """
    known = _names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(known)}."
        raise ValueError(f"Unknown data set {name!r} of reasoning-gym; {hint}")
    if name in RUNS_ANSWERS:
        if not runs_answers:
            raise ValueError(
                f"The data set {name!r} judges an answer by running it as Python, so that the model could do anything "
                "on this machine. If it may, say so: task_kwargs={'runs_answers': True}."
            )
        check_may_run_answers("runs_answers")
    try:
        written = json.dumps(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected the configuration of {name!r} to be JSON values, got {config!r}.") from error
    seed = seed * SEED_STRIDE % 2**31
    _dataset(name, seed, written)
    return Task(
        f"{PREFIX}{name}",
        lambda split: GeneratedPrompts(partial(_row, name, seed, written), split, size, instruction, ONE_IN),
        Verifier(extract, partial(_judged, name, seed, written, partial_credit), column="problem"),
        settings={"max_prompt_tokens": None, "max_new_tokens": max_new_tokens},
    )


# Not functions inside another, which could not be pickled with an environment.
def _row(name: str, seed: int, config: str, number: int) -> dict[str, Any]:
    item = _item(name, seed, config, number)
    return {"prompt": item["question"], "problem": number, "answer": item["answer"]}


def _judged(name: str, seed: int, config: str, partly: bool, answer: str, problem: int) -> float:
    try:  # what the answer has no part in must not take the time that judging it may take
        call_bounded(f"{__name__}:prepare", name, seed, config, problem, seconds=120.0)
    except BoundedCallError as error:
        raise ExpectedAnswerError(
            f"Problem {problem} of {name!r} can't be made to judge its answers: {error}"
        ) from error
    found = call_bounded(f"{__name__}:score", name, seed, config, problem, answer)
    return found if partly else float(found >= 1)


def prepare(name: str, seed: int, config: str, number: int) -> None:
    """Import reasoning-gym, and make a problem, so that :func:`score` finds it made.

    :param name: the name of a data set.
    :param seed: its seed.
    :param config: its configuration, as JSON.
    :param number: the number of a problem.
    """
    _item(name, seed, config, number)


def score(name: str, seed: int, config: str, number: int, answer: str) -> float:
    """
    :param name: the name of a data set.
    :param seed: its seed.
    :param config: its configuration, as JSON.
    :param number: the number of a problem.
    :param answer: an answer to it.
    :return: the data set's ``score_answer``, from 0 to 1. It is 0 for an answer that the data set is too lenient with,
        see :data:`TOO_LENIENT`, and where the data set's own number is out of this range.
    """
    item = _item(name, seed, config, number)
    found = float(_dataset(name, seed, config).score_answer(answer, item))
    if found >= 1 and name in TOO_LENIENT and not TOO_LENIENT[name](answer, item):
        return 0.0
    return found if 0 <= found <= 1 else 0.0  # spell_backward: a sum of ninths can be above 1


@cache
def _dataset(name: str, seed: int, config: str) -> Any:
    return _created(name, seed, json.loads(config))


def _created(name: str, seed: int, config: dict[str, Any]) -> Any:
    with _own_randomness():
        import reasoning_gym

        try:
            return reasoning_gym.create_dataset(name, seed=seed, **config)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"The data set {name!r} of reasoning-gym does not take {config}: {error}") from error


@lru_cache(maxsize=4096)  # some take a second to make, and those of a group are asked for many times
def _item(name: str, seed: int, config: str, number: int) -> dict[str, Any]:
    number %= 2**31  # some seed NumPy with a sum of the two, which must be below 2**32
    with _own_randomness():
        try:
            return dict(_dataset(name, seed, config)[number])
        except IndexError:  # some make a list of problems when they are created; another seed makes another list
            return dict(_created(name, seed + number, {**json.loads(config), "size": 1})[0])


@cache
def _names() -> list[str]:
    try:
        with _own_randomness():
            from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise ImportError(
            f'Its tasks need reasoning-gym: pip install "textrlhf[tasks]" (there is no module {error.name!r}).'
        ) from error
    return sorted(set(DATASETS) - {"composite"})


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Importing reasoning-gym, and some of its data sets, move the global random generators."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
