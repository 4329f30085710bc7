"""Rewards for form and length, worked out by hand; their names and arguments in strings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text_env.answers import Verifier
from text_env.finished_texts import FinishedTexts
from text_env.rewards import make_reward, score
from text_env.text_rewards import FormatReward, LengthPenalty, OverlongPenalty


def texts(*completions: str, lengths: tuple[int, ...] = ()) -> FinishedTexts:
    n = max(len(completions), len(lengths))
    ids = [[7] * length for length in lengths or [1] * n]
    return FinishedTexts(["?"] * n, list(completions or [""] * n), ids)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>two\nand two</think> <answer>4</answer>", 1.0),
        ("\n<think></think>\n\n<answer></answer>\n", 1.0),
        ("<think>2 < 3</think><answer><b>4</b></answer>", 1.0),
        ("So: <think>a</think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer> done", 0.0),
        ("<think>a</think> so <answer>4</answer>", 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>4", 0.0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<think>a<think>b</think><answer>4</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_thought_then_answer_and_nothing_else_is_the_form(text: str, value: float) -> None:
    assert score(FormatReward(), texts(text)).tolist() == [value]


@pytest.mark.parametrize("repeated", ["<think>", "</think>", "<think></think>", "</think><answer>", " ", "<"])
def test_the_form_is_found_in_time_linear_in_the_text(repeated: str) -> None:
    assert score(FormatReward(), texts("<think>" + repeated * 50_000)).tolist() == [0.0]


def test_a_pattern_of_ones_own_must_match_the_whole_text() -> None:
    assert score(FormatReward(r"[A-D]\.?"), texts("A", "B.", "A or B", "A\n")).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert score(FormatReward("a.b"), texts("a\nb")).tolist() == [0.0]
    assert score(FormatReward("(?s)a.b"), texts("a\nb")).tolist() == [1.0]


def test_a_pattern_that_would_take_for_ever_is_given_up() -> None:
    reward = FormatReward("(a+)+b", seconds=0.2)
    assert score(reward, texts("a" * 60, "aab")).tolist() == [0.0, 1.0]


def test_what_is_no_pattern_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"pattern to be a regular expression, got '\(': missing \)"):
        FormatReward("(")


def test_each_token_costs_the_same_and_the_budget_costs_one() -> None:
    assert score(LengthPenalty(8), texts(lengths=(0, 1, 4, 8, 12))).tolist() == [0.0, -0.125, -0.5, -1.0, -1.5]


def test_dapos_penalty_sets_in_before_the_budget_and_is_linear_there() -> None:
    """L_max = 20 and L_cache = 4: nothing up to 16 tokens, then a quarter for each."""
    lengths = (0, 16, 17, 18, 19, 20, 21, 100)
    expected = [0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0, -1.0]
    assert score(OverlongPenalty(20, 4), texts(lengths=lengths)).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 1500))
def test_dapos_penalty_is_equation_13_of_the_paper(budget: int, buffer: int, length: int) -> None:
    budget += buffer
    if length <= budget - buffer:
        expected = 0.0
    elif length <= budget:
        expected = ((budget - buffer) - length) / buffer
    else:
        expected = -1.0
    assert score(OverlongPenalty(budget, buffer), texts(lengths=(length,))).tolist() == [expected]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthPenalty(0), "budget to be an integer of at least 1, got 0"),
        (lambda: LengthPenalty(True), "budget to be an integer of at least 1, got True"),
        (lambda: OverlongPenalty(8, 0), "buffer to be an integer of at least 1, got 0"),
        (lambda: OverlongPenalty(8, 9), "buffer to be at most max_new_tokens=8, got 9"),
    ],
)
def test_lengths_out_of_range_are_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Names


def test_a_name_takes_arguments_in_parentheses_also_within_a_sum() -> None:
    reward = make_reward(
        "correct(extract='boxed', column=\"solution\") + 0.1*format(r'(a+|\\+\\))*') + 2*overlong(20, buffer=4)"
    )
    assert reward.weights == {"correct": 1.0, "format": 0.1, "overlong": 2.0}
    verify, form, overlong = reward.rewards.values()
    assert isinstance(verify, Verifier)
    assert (verify.column, verify.extract(r"\boxed{3}")) == ("solution", "3")
    assert form.pattern == r"(a+|\+\))*"
    assert (overlong.max_new_tokens, overlong.buffer) == (20, 4)
    assert make_reward("length(budget=3)").budget == 3
    assert make_reward({"length(budget=3)": 0.5, "format": 1}).weights == {"length": 0.5, "format": 1.0}


def test_keywords_for_classifiers_go_to_classifiers_only_and_a_name_may_have_its_own() -> None:
    reward = make_reward("builtin(batch_size=3)", batch_size=2, dtype="float32")
    assert reward.batch_size == 3
    assert make_reward("length(4)", batch_size=2).budget == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "overlong",
            r"Reward 'overlong': missing a required argument: 'max_new_tokens'. It is written overlong\(max_new",
        ),
        ("length(3, 4)", r"Reward 'length': too many positional arguments. It is written length\(budget"),
        ("0.5*length(tokens=3)", "Reward 'length': missing a required argument: 'budget'|unexpected keyword"),
        ("length(open('x'))", r"arguments in \"length\(open\('x'\)\)\" to be written out"),
        ("builtin(batchsize=3)", r"Unknown reward_kwargs \['batchsize'\]"),
        ("lenth(3)", r"Unknown reward 'lenth\(3\)'"),
    ],
)
def test_arguments_that_a_reward_does_not_take_are_errors(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_reward(spec)


def test_a_directory_may_be_called_like_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "length(3)").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"classifier, got 'length\(3\)'"):
        make_reward("length(3)")
