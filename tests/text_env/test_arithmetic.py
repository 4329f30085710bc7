"""The built-in task: a careful writer is always right, a forgotten carry always shows, and everything fits."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text_env import arithmetic
from text_env.answers import Verifier
from text_env.arithmetic import LARGEST, Problem, arithmetic_task, draw_problem, working
from text_env.generated import ENDLESS, split_of
from text_env.rewards import make_reward

N_STEPS = st.integers(1, 6)
SEEDS = st.integers(0, 2**32)
STEPS = st.tuples(st.just("+"), st.integers(10, 999)) | st.tuples(st.just("*"), st.integers(2, 9))
# More than the task poses: several products, and results of many digits.
PROBLEMS = st.builds(Problem, st.integers(1, 9999), st.lists(STEPS, min_size=1, max_size=6).map(tuple))


def calculated(expression: str) -> int:
    """What Python says that an expression is worth."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            assert isinstance(node.value, int)
            return node.value
        assert isinstance(node, ast.BinOp)
        left, right = value(node.left), value(node.right)
        return left + right if isinstance(node.op, ast.Add) else left * right

    return value(ast.parse(expression, mode="eval").body)


def lines_of(text: str) -> tuple[list[tuple[str, list[str], str]], str]:
    """The operation, the equations and the result of each line, and the answer."""
    *lines, last = text.split("\n")
    parts = [(line.partition(": ")[0], line.partition(": ")[2].split(", ")) for line in lines]
    assert last.startswith("#### ")
    return [(operation, rest[:-1], rest[-1]) for operation, rest in parts], last.removeprefix("#### ")


def n_tokens(text: str) -> int:
    """The built-in tokenizer has a token for each character, and for each of the four marks."""
    return len(re.findall(r": |, |\n|#### |.", text))


@given(PROBLEMS)
def test_an_expression_is_worth_what_its_steps_are(problem: Problem) -> None:
    assert problem.expression[-1] == "="
    assert calculated(problem.expression[:-1]) == problem.answer == problem.results()[-1]


@given(PROBLEMS)
def test_a_careful_writer_is_always_right_in_every_line_and_column(problem: Problem) -> None:
    lines, answer = lines_of(working(problem))
    assert int(answer) == problem.answer
    assert [int(result) for _, _, result in lines] == problem.results()
    assert [calculated(operation) for operation, _, _ in lines] == problem.results()
    for _, equations, _ in lines:
        for equation in equations:
            terms, _, total = equation.partition("=")
            assert calculated(terms) == int(total)
    assert Verifier("hash").judge(working(problem), problem.answer) == (1.0, 1.0, str(problem.answer))


@given(PROBLEMS, st.randoms(use_true_random=False))
def test_a_forgotten_carry_makes_the_answer_too_small_and_shows_in_its_column(problem: Problem, chance: Any) -> None:
    choices: list[bool] = []
    overhangs: list[bool] = []

    def forgets(overhang: bool) -> bool:
        overhangs.append(overhang)
        choices.append(chance.random() < 0.3)
        return choices[-1]

    lines, answer = lines_of(working(problem, forgets))
    missing, reached_by_one = [], []
    for operation, equations, _ in lines:
        numbers = re.split(r"[+*]", operation)
        before = 0
        for place, equation in enumerate(equations):
            terms, _, total = equation.partition("=")
            assert calculated(terms) == int(total)  # the column itself is calculated rightly
            digits = [number[-1 - place] for number in numbers if place < len(number)]
            alone = terms == ("+".join(digits) if "+" in operation else f"{digits[0]}*{numbers[1]}")
            if before:
                missing.append(alone)
                reached_by_one.append("+" in operation and len(digits) == 1)
                assert alone or terms.endswith(f"+{before}")
            else:
                assert alone
            before = int(total) // 10
    assert missing == choices
    assert reached_by_one == overhangs
    assert int(answer) < problem.answer if any(choices) else int(answer) == problem.answer


def test_the_example_of_the_documentation_is_what_the_writer_writes() -> None:
    assert arithmetic.__doc__ is not None
    problem = Problem(47, (("+", 38), ("*", 6), ("+", 125)))
    assert f"``{problem.expression}``" in arithmetic.__doc__
    [example] = re.findall(r"::\n\n((?:    .*\n)+)", arithmetic.__doc__)
    assert example.replace("    ", "").strip() == working(problem)
    assert "``4+3=7``" in arithmetic.__doc__
    assert "7+8=15, 4+3=7, 75\n" in working(problem, lambda overhang: True)


@given(SEEDS, N_STEPS)
def test_a_drawn_problem_is_within_its_bounds(seed: int, n_steps: int) -> None:
    problem = draw_problem(random.Random(seed), n_steps)
    assert len(problem.steps) == n_steps
    assert max(problem.results()) <= LARGEST
    factors = [operand for operator, operand in problem.steps if operator == "*"]
    summands = [problem.start, *(operand for operator, operand in problem.steps if operator == "+")]
    assert len(factors) <= 1
    assert all(2 <= factor <= 9 for factor in factors)
    assert all(10 <= summand <= 999 for summand in summands)
    assert set(problem.expression) <= set(arithmetic.CHARACTERS)
    assert set(re.sub(r": |, |\n|#### ", "", working(problem))) <= set(arithmetic.CHARACTERS)


@settings(max_examples=300)
@given(SEEDS, N_STEPS, st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([0.0, 0.5]))
def test_every_problem_and_its_working_fit_the_budgets(seed: int, n_steps: int, share: float, forgotten: float) -> None:
    budgets = arithmetic_task(n_steps).settings
    chance = random.Random(seed)
    problem = draw_problem(chance, n_steps, share)
    text = working(problem, lambda overhang: chance.random() < forgotten)
    assert n_tokens(problem.expression) <= budgets["max_prompt_tokens"]
    assert n_tokens(text) + 1 <= budgets["max_new_tokens"]  # and EOS


@pytest.mark.parametrize(
    ("value", "step"),
    [(8999, ("+", 999)), (9000, ("+", 999)), (2499, ("*", 4)), (4999, ("*", 2)), (1111, ("*", 9))],
)
def test_the_longest_operations_fit_their_share_of_the_budget(value: int, step: tuple[str, int]) -> None:
    problem = Problem(value, (step,))
    assert problem.answer <= LARGEST
    two, one = (arithmetic_task(n).settings["max_new_tokens"] for n in (2, 1))
    assert n_tokens(working(problem).partition("####")[0]) <= two - one


# ---- the task


@settings(max_examples=30, deadline=None)
@given(SEEDS, SEEDS, st.integers(0, ENDLESS - 1))
def test_no_seed_brings_a_held_out_problem_into_the_training(seed: int, other: int, place: int) -> None:
    for split, task in (("train", arithmetic_task(1, seed=seed)), ("eval", arithmetic_task(1, seed=other))):
        problems = task.prompts(split)  # type: ignore[arg-type]
        row = problems[place]
        assert split_of(row["prompt"]) == split
        assert calculated(row["prompt"][:-1]) == row["answer"]
        assert row == problems[place]


def test_each_number_of_steps_is_as_frequent_as_the_others() -> None:
    rows = arithmetic_task((1, 2, 5)).prompts("train")[:1500]
    lengths = Counter(len(re.findall(r"[+*]", row["prompt"])) for row in rows)
    assert set(lengths) == {1, 2, 5}
    assert all(abs(count - 500) < 5 * (500 * 2 / 3) ** 0.5 for count in lengths.values())
    assert len({row["prompt"] for row in rows}) > 1400


def test_another_seed_makes_other_problems_and_a_size_ends_them() -> None:
    first, second = (arithmetic_task(size=20, seed=seed).prompts("train") for seed in (0, 1))
    assert len(first) == 20
    assert list(first) != list(second)
    assert list(first) == list(arithmetic_task(size=20).prompts("train"))
    assert len(arithmetic_task().prompts("eval")) == ENDLESS


def test_the_task_rewards_the_right_answer_after_the_mark_and_nothing_else() -> None:
    task = arithmetic_task()
    reward = make_reward(task.reward)
    row = task.prompts("train")[0]
    right = row["answer"]
    texts = [f"#### {right}", f"1+1: 1+1=2, 2\n#### {right}", f"#### {right + 1}", str(right), "####", "", "#### )("]
    scores = reward(prompts=[row["prompt"]] * 7, completions=texts, completion_ids=[[]] * 7, answer=[right] * 7)
    assert list(scores) == [1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_steps": 0}, "n_steps to be an integer from 1 to .*, or several, got 0"),
        ({"n_steps": []}, "got \\[\\]"),
        ({"n_steps": (3, 0)}, "got \\(3, 0\\)"),
        ({"n_steps": "3"}, "got '3'"),
        ({"n_steps": 2.5}, "got 2.5"),
        ({"n_steps": True}, "got True"),
        ({"n_steps": None}, "got None"),
        ({"n_steps": 1000}, "got 1000"),  # no results within the bound: it would be drawn for for ever
        ({"seed": -1}, "seed to be an integer of at least 0, got -1"),
        ({"seed": 0.5}, "got 0.5"),
        ({"seed": True}, "got True"),
        ({"size": 0}, "size, the number of problems, to be at least 1 or None"),
        ({"size": "many"}, "got 'many'"),
    ],
)
def test_an_argument_out_of_range_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arithmetic_task(**kwargs).prompts("train")
