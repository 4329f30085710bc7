r"""Answers: what is found in a text, when two are the same, and what the verifier makes of it.

The expected values are written down by hand.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
import sys
import threading
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from text_env import TextVectorEnv, answers, bounded_calls
from text_env.answers import EXTRACTORS, MATCHERS, ExpectedAnswerError, Verifier, as_number, exact, number
from text_env.bounded_calls import call_bounded
from text_env.finished_texts import FinishedTexts
from text_env.rewards import RewardError, WeightedSum, make_reward, score, score_parts

# ---- extraction


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It costs 1,000.", "1,000"),
        ("1,234,567.89!", "1,234,567.89"),
        ("between -5 and +3.5.", "+3.5"),
        ("x=-5", "-5"),
        ("(-3)", "-3"),
        ("−7", "−7"),
        ("they lost -$5", "-$5"),
        ("$5", "5"),
        ("10-5", "5"),  # a difference, no negative number
        ("5 - 3", "3"),
        ("3/4", "3/4"),
        ("1/2.", "1/2"),
        ("3 / 4 of it", "3 / 4"),
        ("12/05/2024", "2024"),
        ("1,2,3", "3"),
        (".5", ".5"),
        ("1e-3 m", "1e-3"),
        ("50%", "50"),
        ("none at all", None),
        ("", None),
        ("- . , /", None),
    ],
)
def test_the_last_number_of_a_text(text: str, answer: str | None) -> None:
    assert EXTRACTORS["last_number"](text) == answer


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("answer_tags", "<answer>1</answer> or <answer>\n 2 </answer>", "2"),
        ("answer_tags", "<answer>1</answer> or <answer>2", "1"),
        ("answer_tags", "<answer><answer>1</answer></answer>", "1</answer>"),
        ("answer_tags", "</answer> <answer>", None),
        ("answer_tags", "<answer> </answer>", None),
        ("answer_tags", "2", None),
        ("boxed", r"\boxed{1} and \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} and \boxed{2", "1"),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed {3} }", "3"),
        ("boxed", r"{ \boxed{4}", "4"),
        ("boxed", r"\boxed{a \boxed{5}}", "5"),
        ("boxed", r"\boxed{}", None),
        ("boxed", "boxed{1}", None),
        ("hash", "2 + 2 = 4\n#### 4\nThat is it.", "4"),
        ("hash", "#### 1\n#### 2", "2"),
        ("hash", "####\n 3", "3"),
        ("hash", "####", None),
        ("hash", "4", None),
        ("whole", "  a b\n", "a b"),
        ("whole", " \n", None),
    ],
)
def test_what_the_other_extractors_find(name: str, text: str, answer: str | None) -> None:
    assert EXTRACTORS[name](text) == answer


ODD = st.one_of(
    st.text(st.characters()),
    st.text(st.sampled_from("0123456789.,/-+−eE $")),
    st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\", "<answer>", "</answer>", "####", "\n", "1", ","])).map(
        "".join
    ),
)


@settings(max_examples=300, deadline=None)
@example("\ud800")
@given(ODD)
def test_no_text_makes_an_extractor_raise_and_what_it_finds_stands_in_the_text(text: str) -> None:
    for extract in EXTRACTORS.values():
        found = extract(text)
        assert found is None or (found in text and found == found.strip() != "")


@settings(max_examples=300, deadline=None)
@example(".0/1")
@example("1.5/2")
@given(ODD)
def test_what_the_last_number_finds_is_a_number_unless_it_is_divided_by_zero(text: str) -> None:
    found = EXTRACTORS["last_number"](text)
    assert found is None or as_number(found) is not None or int(found.rpartition("/")[2]) == 0


@settings(max_examples=100, deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_every_decimal_is_found_after_words_and_read_exactly(value: Decimal) -> None:
    for written in (f"{value:f}", f"{value:,f}"):
        assert as_number(EXTRACTORS["last_number"](f"I had 3, now I have {written}.")) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["1" * 200_000, "1," * 100_000, "1/" * 100_000, "1" + " " * 200_000, "\\boxed{" * 50_000, "<answer>" * 50_000],
)
def test_a_long_text_takes_no_more_than_its_length(text: str) -> None:
    """Quadratic time would be hours here."""
    for extract in EXTRACTORS.values():
        extract(text)
    assert as_number("1" * 200_000) is None


# ---- comparison


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("1,000", "1000", True),
        ("1000.0", 1000, True),
        ("$1,000.", "1000", True),
        ("-$5", -5, True),
        ("3/4", "0.75", True),
        ("0.1", 0.1, True),
        ("0.30000000000000004", "0.3", False),
        ("0.333333333333333333", "1/3", False),
        ("9007199254740993", "9007199254740992", False),  # the same float
        ("1e3", "1000", True),
        ("−7", "-7", True),
        ("-0", "0", True),
        ("5", Decimal("5.0"), True),
        ("72", np.int64(72), True),
    ],
)
def test_numbers_are_compared_exactly(answer: str, expected: Any, same: bool) -> None:
    assert number(answer, expected) is same


@pytest.mark.parametrize("value", ["", "five", "1 2", "3/0", "1" * 5000, "1e999999", True, float("nan"), None, "1/2/3"])
def test_what_is_no_number(value: Any) -> None:
    assert as_number(value) is None


def test_strings_are_the_same_up_to_white_space() -> None:
    assert exact("the  cat\n", " the cat")
    assert exact("12", 12)
    assert not exact("The cat", "the cat")


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        ("(x+1)^2", "x^2 + 2x + 1", True),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("x = 5", "5", True),
        ("1,000", "1000", True),
        ("The answer is $5$.", r"\boxed{5}", True),
        (r"\sqrt{2}", "1.5", False),
    ],
)
def test_formulas_that_mean_the_same_match(answer: str, expected: str, same: bool) -> None:
    assert MATCHERS["math"](answer, expected) is same


def test_formulas_are_compared_in_any_thread() -> None:
    """math-verify's own time limit raises outside the main thread."""
    verdicts: list[Any] = []
    thread = threading.Thread(target=lambda: verdicts.append(MATCHERS["math"](r"\frac{2}{4}", r"\frac{1}{2}")))
    thread.start()
    thread.join()
    assert verdicts == [True]


def test_a_formula_that_nobody_can_compute_is_wrong_and_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "call_bounded", functools.partial(call_bounded, seconds=2.0))
    verify = Verifier("whole", "math")
    assert verify.judge("$10^{10^{10}}$", "7") == (0.0, 0.0, "$10^{10^{10}}$")
    assert verify.judge("1+" * 1000 + "1", "1001")[:2] == (0.0, 0.0)
    assert verify.judge("7", "7") == (1.0, 1.0, "7")


def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_calls, "_worker", bounded_calls._Worker())


def test_without_a_process_that_can_judge_no_answer_is_called_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = texts(["1/2"], answer=["1/2"])
    fresh_process(monkeypatch)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RewardError, match=r"'correct' raised OtherProcessError: .*did not start \(exit status 1\)"):
        score(Verifier("whole", "math"), right)
    monkeypatch.undo()
    fresh_process(monkeypatch)
    (tmp_path / "math_verify.py").write_text("import nowhere")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(RewardError, match=r"math-verify can't compare formulas.*Error: No module named 'nowhere'"):
        score(Verifier("whole", "math"), right)
    bounded_calls._worker.close()


def test_a_module_that_a_matcher_misses_is_an_error_and_no_wrong_answer() -> None:
    def match(answer: str, expected: str) -> bool:
        import nowhere  # type: ignore[import-not-found]

        return bool(nowhere.same(answer, expected))

    with pytest.raises(RewardError, match="'correct' raised ModuleNotFoundError: No module named 'nowhere'"):
        score(Verifier("whole", match), texts(["a"], answer=["a"]))


def test_importing_math_verify_takes_nothing_of_the_time_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[tuple[str, float]] = []

    def call(function: str, *arguments: Any, seconds: float = 5.0) -> Any:
        allowed.append((function.partition(":")[2], seconds))
        return call_bounded(function, *arguments, seconds=seconds)

    monkeypatch.setattr(answers, "call_bounded", call)
    assert Verifier("whole", "math").judge("1/2", "0.5") == (1.0, 1.0, "1/2")
    assert allowed == [("prepare", 120.0), ("compare_formulas", 5.0)]


def test_a_right_answer_that_cannot_be_read_is_an_error_and_no_zero() -> None:
    with pytest.raises(ExpectedAnswerError, match=r"Expected a number as the right answer, got '2 [+] 2 = 4 #### 4'"):
        Verifier().judge("4", "2 + 2 = 4 #### 4")
    with pytest.raises(ExpectedAnswerError, match="Expected a formula as the right answer, got ' '"):
        Verifier("whole", "math").judge("4", " ")


# ---- the verifier


def texts(completions: list[str], **columns: list[Any]) -> FinishedTexts:
    return FinishedTexts(["?"] * len(completions), completions, [[1]] * len(completions), columns)


def test_right_answers_are_worth_one() -> None:
    found = score(Verifier(), texts(["so 4.", "so 5.", "so what?", "so 3/0"], answer=["4"] * 4))
    assert found.tolist() == [1.0, 0.0, 0.0, 0.0]
    other = Verifier("boxed", "exact", column="solution")
    assert score(other, texts([r"\boxed{a}", "a"], solution=["a", "a"])).tolist() == [1.0, 0.0]


def logged(reward: Any, batch: FinishedTexts) -> dict[str, list[Any]]:
    heard: dict[str, list[Any]] = {}
    columns = {**batch.columns, "log_extra": heard.__setitem__}
    score(reward, FinishedTexts.from_keywords(batch.prompts, batch.completions, batch.completion_ids, **columns))
    return heard


@pytest.mark.parametrize("wrap", [lambda verify: verify, lambda verify: WeightedSum({"correct": (verify, 2.0)})])
def test_answers_and_their_form_are_logged_also_by_a_part_of_a_sum(wrap: Any) -> None:
    heard = logged(wrap(Verifier()), texts(["4", "so 5", "?", "3/0"], answer=["4"] * 4))
    assert heard == {
        "correct": [1.0, 0.0, 0.0, 0.0],
        "well_formed": [1.0, 1.0, 0.0, 0.0],
        "answer": ["4", "5", None, "3/0"],
        "vote": ["4", "5", None, "3/0"],
    }


def test_answers_that_are_the_same_vote_for_the_same() -> None:
    same = ["1,000", "1000.0", "$1e3", "2000/2", "1000 ."]
    heard = logged(Verifier("whole"), texts([*same, "1001", "a  thousand"], answer=["1000"] * 7))
    assert heard["answer"][:5] == same
    assert heard["vote"] == [*["1000"] * 3, "1000", "1000 .", "1001", "a thousand"]
    heard = logged(Verifier("whole", "exact"), texts(["12", "12.0", "a b", "a\n b"], answer=["12"] * 4))
    assert heard["vote"] == ["12", "12.0", "a b", "a b"]


@pytest.mark.parametrize("answer", ["3." + "3" * 4300, "0." + "3" * 4300, "9" * 3400 + "e999"])
def test_a_number_that_a_policy_never_ends_is_wrong_and_votes_as_it_stands(answer: str) -> None:
    heard = logged(Verifier(), texts([answer], answer=["3"]))
    assert heard == {"correct": [0.0], "well_formed": [1.0], "answer": [answer], "vote": [answer]}


def test_what_extractor_and_matcher_raise_on_a_text_is_worth_zero() -> None:
    def extract(text: str) -> str | None:
        if "deep" in text:
            raise RecursionError
        return text

    def match(answer: str, expected: str) -> float:
        return 1 / len(answer.strip("x"))

    heard = logged(Verifier(extract, match), texts(["a", "x", "deep"], answer=["?"] * 3))
    assert heard["correct"] == [1.0, 0.0, 0.0]
    assert heard["well_formed"] == [1.0, 0.0, 0.0]
    assert heard["answer"] == ["a", "x", None]


def test_a_partly_right_answer_is_paid_its_part_and_called_wrong() -> None:
    verify = Verifier("whole", lambda answer, expected: len(answer) / 4)
    batch = texts(["a", "abcd"], answer=["?", "?"])
    assert score(verify, batch).tolist() == [0.25, 1.0]
    assert logged(verify, batch)["correct"] == [0.0, 1.0]


def test_a_conversation_is_read_where_the_assistant_speaks() -> None:
    batch = FinishedTexts(["3?"], ["It is 4."], [[1]], {"answer": [4]}, [[{"role": "user", "content": "3?"}]])
    assert score(Verifier(), batch).tolist() == [1.0]


def test_a_row_without_a_right_answer_is_left_to_the_other_rewards() -> None:
    both = make_reward({Verifier(): 1.0, "length(budget=2)": 1.0})
    assert score(both, texts(["4", "4"], answer=["4", None])).tolist() == [0.5, -0.5]
    with pytest.raises(RewardError, match="'correct' must return numbers, but returned None"):
        score(Verifier(), texts(["4", "4"], answer=["4", None]))


def test_a_missing_column_is_an_error_that_names_those_that_are_there() -> None:
    with pytest.raises(RewardError, match=r"have a column 'answer' .* columns \['level', 'solution'\]: name another"):
        score(Verifier(), texts(["4"], solution=["4"], level=[1]))


def test_unknown_names_and_wrong_functions_are_errors_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"Unknown extract 'last'. Known names: 'last_number', 'answer_tags', 'boxed', "
    ):
        Verifier("last")
    with pytest.raises(ValueError, match=r"Unknown match 'numbers'. Known names: 'exact', 'number', 'math'"):
        Verifier(match="numbers")
    with pytest.raises(TypeError, match=r"match to be a function of an answer and the expected answer, got .*too many"):
        Verifier(match=len)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"extract to be a name or a function of a text, got 3"):
        Verifier(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"extract to return a string or None, got 3 for 'a'"):
        Verifier(lambda text: 3).judge("a", "a")  # type: ignore[arg-type, return-value]
    for verdict in (2, -1, float("nan"), "1", [1]):
        with pytest.raises(TypeError, match="match to return a bool or a number from 0 to 1, got "):
            Verifier("whole", lambda *_, verdict=verdict: verdict).judge("a", "a")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs math-verify: pip install "textrlhf\[tasks\]"'):
        Verifier(match="math")


def test_functions_go_by_name_and_a_verifier_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_answers_module.py").write_text(
        "def first(text): return text[:1] or None\ndef near(answer, expected): return 0.5"
    )
    monkeypatch.chdir(tmp_path)
    verify = Verifier("my_answers_module:first", "my_answers_module:near")
    for same in (verify, copy.deepcopy(verify)):
        assert same.judge("abc", "?") == (0.5, 1.0, "a")
    assert pickle.loads(pickle.dumps(Verifier("boxed", "math"))).extract is EXTRACTORS["boxed"]


@pytest.mark.parametrize(
    ("reward", "metrics"),
    [
        ("correct", None),
        ("correct", {"correct": "correct"}),
        ("correct+0.5*format", {"correct": "correct", "well_formed": "correct(extract='whole', match='exact')"}),
        ("sentiment", {"correct": Verifier()}),
    ],
)
def test_a_verifier_is_reward_and_metric_at_once(reward: str, metrics: dict[str, Any] | None) -> None:
    tokenizer = tiny_tokenizer()
    prompts = [{"prompt": "the movie", "answer": "4"}]
    env = TextVectorEnv(
        1, tokenizer=tokenizer, prompts=prompts, reward=reward, metrics=metrics, max_new_tokens=1, max_prompt_tokens=16
    )
    env.reset(seed=0)
    *_, infos = env.step(np.array([tokenizer.eos_token_id]))
    info = infos["final_info"]
    assert info["correct"].tolist() == [0.0]
    assert info["well_formed"].tolist() == [0.0]
    assert info["answer"].tolist() == [None]
    parts = score_parts(make_reward("correct+0.5*format"), texts(["4"], answer=["4"]))
    assert {name: values.tolist() for name, values in parts.items()} == {
        "score": [1.0],
        "reward/correct": [1.0],
        "reward/format": [0.0],
    }
