"""Problems that are made when they are asked for: the same every time, without end, and never in both parts."""

from __future__ import annotations

import itertools
import random
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from text_env.generated import ATTEMPTS, ENDLESS, GeneratedPrompts, split_of
from text_env.prompts import N_INSPECTED, Prompts, load_prompts


def counting(number: int) -> dict[str, Any]:
    return {"prompt": f"What follows {number}?", "answer": number + 1}


def few(seed: int) -> Any:
    """A program that has so few problems that every seed makes the same ones."""
    return lambda number: {"prompt": f"problem {random.Random(f'{seed}/{number}').randrange(200)}"}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_whatever_the_seeds_no_problem_is_in_both_parts(seed: int, other: int) -> None:
    train = {row["prompt"] for row in GeneratedPrompts(few(seed), "train", 20)}
    held_out = {row["prompt"] for row in GeneratedPrompts(few(other), "eval", 20)}
    assert train
    assert held_out
    assert not train & held_out


@given(st.text(st.characters(exclude_categories=())))
def test_every_text_belongs_to_one_part_which_depends_on_nothing_else(text: str) -> None:
    assert split_of(text) in ("train", "eval")
    assert split_of(text) == split_of("".join(text))


def test_the_parts_stay_what_they_are_and_one_problem_of_sixteen_is_held_out() -> None:
    # Whoever changes this mixes the parts of those who have trained already.
    assert [n for n in range(100) if split_of(f"1+{n}=") == "eval"] == [13, 14, 17, 23, 35, 40, 78, 92]
    held_out = sum(split_of(f"1+{number}=") == "eval" for number in range(16_000))
    assert held_out == pytest.approx(1000, abs=5 * (1000 * 15 / 16) ** 0.5)


@given(st.integers(0, ENDLESS - 1), st.sampled_from(["train", "eval"]))
def test_a_problem_is_the_same_whenever_it_is_asked_for(index: int, split: Any) -> None:
    problems = GeneratedPrompts(counting, split)
    row = problems[index]
    assert row == problems[index] == GeneratedPrompts(counting, split)[np.int64(index)] == problems[index - ENDLESS]
    assert split_of(row["prompt"]) == split
    assert index * ATTEMPTS <= row["answer"] - 1 < (index + 1) * ATTEMPTS  # so no two places share a problem


def test_what_is_done_to_a_problem_does_not_change_it() -> None:
    kept = {"prompt": "always the same", "answer": 1}
    problems = GeneratedPrompts(lambda number: kept, split_of("always the same"))
    problems[0]["answer"] = 2
    assert problems[0]["answer"] == 1


def test_a_sequence_has_the_size_that_is_asked_for_or_no_end() -> None:
    problems = GeneratedPrompts(counting, "train", 5)
    assert len(problems) == len(list(problems)) == 5
    assert problems[1:4] == [problems[1], problems[2], problems[3]]
    assert problems[::-2] == [problems[4], problems[2], problems[0]]
    assert problems[5:] == []
    assert problems[-1] == problems[4]
    for index in (5, -6, np.int64(5)):
        with pytest.raises(IndexError, match=f"below 5, got {index}"):
            problems[index]
    endless = GeneratedPrompts(counting)
    assert len(endless) == ENDLESS
    assert list(itertools.islice(endless, 5)) == list(problems)
    with pytest.raises(IndexError, match=f"below {ENDLESS}"):
        endless[ENDLESS]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "test"}, "split to be 'train' or 'eval' .the held-out part., got 'test'"),
        ({"split": None}, "got None"),
        ({"size": 0}, "at least 1 or None .endless., got 0"),
        ({"size": -1}, "got -1"),
        ({"size": 2.0}, "got 2.0"),
        ({"size": True}, "got True"),
    ],
)
def test_another_split_or_size_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratedPrompts(counting, **kwargs)


def test_a_program_with_too_few_problems_for_a_part_is_told_so() -> None:
    split: Any = "eval" if split_of("the only one") == "train" else "train"
    problems = GeneratedPrompts(lambda number: {"prompt": "the only one"}, split)
    with pytest.raises(ValueError, match=f"None of {ATTEMPTS} problems belongs to the split '{split}'.*more varied"):
        problems[0]


# ---- tokenised


def longer(number: int) -> dict[str, Any]:
    """The first problems are short; of the later ones, each second is long."""
    late = number >= N_INSPECTED * ATTEMPTS
    return {"prompt": f"{number:09}" + ("?" * 9 if late and number % 2 else ""), "answer": number}


def test_generated_prompts_are_made_and_tokenised_when_they_are_asked_for() -> None:
    asked: list[int] = []

    def make(number: int) -> dict[str, Any]:
        asked.append(number // ATTEMPTS)
        return counting(number)

    tokenizer = tiny_tokenizer()
    prompts = Prompts(GeneratedPrompts(make), tokenizer, 30)
    assert set(asked) == set(range(N_INSPECTED))
    assert len(prompts) == ENDLESS
    row = GeneratedPrompts(counting)[12_345_678]
    prompt = prompts[12_345_678]
    assert (prompt.text, prompt.token_ids) == (row["prompt"], tokenizer(row["prompt"])["input_ids"])
    assert prompt.columns == {"answer": row["answer"]}
    assert prompts[12_345_678] == prompt == prompts[12_345_678 - ENDLESS]
    assert [prompt.text for prompt in prompts[62:66]] == [row["prompt"] for row in GeneratedPrompts(counting)[62:66]]
    with pytest.raises(IndexError):
        prompts[ENDLESS]


made = 0


def endless() -> GeneratedPrompts:
    def make(number: int) -> dict[str, Any]:
        global made
        made += 1
        if made > 10_000:
            raise AssertionError("a list is made of prompts without end")
        return counting(number)

    return GeneratedPrompts(make)


def test_prompts_without_end_may_be_named_by_the_function_that_returns_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "made", 0)
    prompts = Prompts(f"{__name__}:endless", tiny_tokenizer(), 30)
    assert len(prompts) == ENDLESS
    assert prompts[12_345_678] == Prompts(endless(), tiny_tokenizer(), 30)[12_345_678]


def test_without_a_limit_the_first_prompts_set_it_and_longer_ones_are_replaced() -> None:
    prompts = Prompts(GeneratedPrompts(longer), tiny_tokenizer(), None)
    assert prompts.max_prompt_tokens == 9
    later = prompts[N_INSPECTED : N_INSPECTED + 40]
    assert {len(prompt.token_ids) for prompt in later} == {9}
    assert all(split_of(prompt.text) == "train" for prompt in later)
    untouched = GeneratedPrompts(longer)
    assert any(len(untouched[N_INSPECTED + place]["prompt"]) > 9 for place in range(40))  # else nothing was replaced


def test_prompts_none_of_which_fit_are_refused_with_the_remedy() -> None:
    def make(number: int) -> dict[str, Any]:
        return {"prompt": f"{number:09}" + "?" * (number >= N_INSPECTED * ATTEMPTS)}

    prompts = Prompts(GeneratedPrompts(make), tiny_tokenizer(), None)
    with pytest.raises(ValueError, match=f"max_prompt_tokens=9 tokens.*place {N_INSPECTED} are longer: raise"):
        prompts[N_INSPECTED]
    with pytest.raises(ValueError, match="at most max_prompt_tokens=8 tokens, got 9"):
        Prompts(GeneratedPrompts(make), tiny_tokenizer(), 8)
    assert len(Prompts(GeneratedPrompts(make), tiny_tokenizer(), 8, "truncate_left")[N_INSPECTED].token_ids) == 8


def test_a_fixed_number_of_generated_prompts_can_be_loaded_as_any_list() -> None:
    problems = GeneratedPrompts(counting, "eval", 3)
    assert load_prompts(problems) == list(problems)


@pytest.mark.parametrize("spec", [GeneratedPrompts(counting), f"{__name__}:endless"])
def test_prompts_without_end_are_refused_as_a_list(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "made", 0)
    with pytest.raises(ValueError, match=r"a list of prompts that has an end, got .*: give GeneratedPrompts a size"):
        load_prompts(spec)
