"""Tasks by name: what they say where an environment's arguments say nothing, from files, functions and registered
names; and the environments that pose them.
"""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from tiny import RecordingReward, tiny_tokenizer

import text_env.builtin
from text_env import TextEnv, TextVectorEnv, Verifier
from text_env.arithmetic import Problem, arithmetic_task, working
from text_env.checker import check_text_env, check_text_vector_env
from text_env.generated import split_of
from text_env.rewards import HttpReward, LimitedReward, WeightedSum, reward_name
from text_env.task_names import file_task, make_task, model_of_task, said_by_name
from text_env.tasks import Task

MODULE = "test_tasks"
BUILTIN = str(Path(text_env.builtin.__file__).parent / "language_model")
"""A tokenizer by another name than the default's, which would leave the choice to the task."""

ARITHMETIC: dict[str, Any] = {"task": "arithmetic", "tokenizer": BUILTIN, "max_prompt_tokens": 60}


ADDRESS = "http://127.0.0.1:9/score"


def sums(split: str) -> list[dict[str, Any]]:
    rows = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(1, 9) for b in range(1, 9)]
    return [row for row in rows if split_of(str(row["prompt"])) == split]


def words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text.split())) for text in completions]


SUMS = Task("sums", sums, "correct", {"n_words": words}, {"max_new_tokens": 5, "stop": "."})


def sums_up_to(largest: int, column: str = "answer") -> Task:
    return Task("small sums", lambda split: [row for row in sums(split) if row["answer"] <= largest], "correct")


def no_task() -> str:
    return "text"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def finish(env: TextEnv, text: str, prompt: Any = None) -> dict[str, Any]:
    """Write a text; the final info."""
    ids = env.tokenizer(text, add_special_tokens=False)["input_ids"]
    env.reset(options={"prompt": env.prompts[0] if prompt is None else prompt, "response": ids})
    *_, info = env.step(env.eos_token_id)
    return info


# ---- names


@pytest.mark.parametrize("name", ["SUMS", "sums_up_to"])
def test_a_task_is_an_object_or_a_function_by_name_or_itself(name: str) -> None:
    kwargs = {"largest": 9} if name == "sums_up_to" else {}
    by_name, itself = make_task(f"{MODULE}:{name}", **kwargs), make_task(globals()[name], **kwargs)
    for task in (by_name, itself):
        assert task.name == ("small sums" if kwargs else "sums")
        env = TextEnv(task=f"{MODULE}:{name}", task_kwargs=kwargs)
        assert [prompt.text for prompt in env.prompts] == [row["prompt"] for row in task.prompts("train")]


@pytest.mark.parametrize(
    ("spec", "kwargs", "error", "message"),
    [
        (
            "arithmetics",
            {},
            ValueError,
            "Unknown task 'arithmetics'.*'arithmetic', and 'reasoning_gym:chain_sum'.*jsonl",
        ),
        ("arithmetic", {"steps": 3}, ValueError, "'arithmetic' takes the task_kwargs .*'n_steps'.*'split'.*'steps'"),
        (f"{MODULE}:SUMS", {"size": 3}, ValueError, "'sums' takes no arguments, got .'size'"),
        (f"{MODULE}:sums_up_to", {}, ValueError, "missing a required argument: 'largest'"),
        (f"{MODULE}:no_task", {}, TypeError, "'test_tasks:no_task' to return a text_env.tasks.Task, got 'text'"),
        (f"{MODULE}:BUILTIN", {}, TypeError, "to be a Task, a function that returns one, or a name"),
        (f"{MODULE}:nothing", {}, ValueError, "no 'nothing'"),
        (3, {}, TypeError, "a name, got 3"),
    ],
)
def test_what_is_no_task_is_refused(spec: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TextEnv(task=spec, task_kwargs=kwargs)


def test_arguments_and_a_reward_of_a_task_are_refused_without_one() -> None:
    with pytest.raises(ValueError, match="task_kwargs only together with a task"):
        TextEnv(task_kwargs={"size": 3})
    for reward in ("task", "task+0.1*format", {"task": 1.0}):
        with pytest.raises(ValueError, match="'task' in a reward only together with a task"):
            TextEnv(reward=reward)
    with pytest.raises(ValueError, match="split to be 'train' or 'eval'"):
        TextEnv(task=SUMS, task_kwargs={"split": "test"})


@pytest.mark.parametrize("setting", ["max_tokens", "prompts", "reward", "task"])
def test_a_setting_that_a_task_cannot_make_is_refused(setting: str) -> None:
    task = Task("odd", sums, "correct", settings={setting: "builtin"})
    with pytest.raises(ValueError, match=f"settings of the task 'odd' to be settings .* got ..{setting}"):
        TextEnv(task=task)


# ---- what a task says, and what is said otherwise


def test_a_task_says_what_is_left_at_its_default() -> None:
    env = TextEnv(task=SUMS)
    assert (env.max_new_tokens, env.episodes.stop, env.max_prompt_tokens) == (5, (".",), 16)
    assert isinstance(env.reward, Verifier)
    info = finish(env, str(sums("train")[0]["answer"]))
    assert (info["score"], info["correct"], info["well_formed"], info["n_words"]) == (1.0, 1.0, 1.0, 1.0)


def test_what_is_said_explicitly_wins_over_the_task() -> None:
    reward = RecordingReward()
    prompts = [{"prompt": "Hello", "answer": 1}]
    env = TextEnv(task=SUMS, max_new_tokens=7, stop="!", prompts=prompts, reward=reward, tokenizer=tiny_tokenizer())
    assert (env.max_new_tokens, env.episodes.stop, len(env.prompts)) == (7, ("!",), 1)
    assert env.reward is reward
    assert len(env.tokenizer) == 300
    arithmetic = TextEnv(**ARITHMETIC, task_kwargs={"n_steps": 1})
    assert (arithmetic.max_prompt_tokens, arithmetic.max_new_tokens) == (60, 54)


def test_metrics_are_added_to_those_of_the_task_and_replace_them() -> None:
    env = TextEnv(task=SUMS, metrics={"mood": "sentiment"})
    assert set(env.episodes.metrics) == {"n_words", "mood"}
    assert TextEnv(task=SUMS, metrics={"n_words": "sentiment"}).episodes.metrics["n_words"] is not words


@pytest.mark.parametrize(
    "reward", ["task+0.1*format('<b>.*')", {"task": 1.0, "format('<b>.*')": 0.1}, "0.1*format('<b>.*')+task"]
)
def test_the_reward_of_the_task_may_be_a_part_of_a_sum(reward: Any) -> None:
    env = TextEnv(task=SUMS, reward=reward)
    right = sums("train")[0]["answer"]
    info = finish(env, f"<b>{right}")
    assert info["score"] == pytest.approx(1.1)
    assert (info["reward/correct"], info["reward/format"]) == (1.0, 1.0)
    assert finish(env, f"{right}")["score"] == 1.0
    assert finish(env, "<b>")["score"] == pytest.approx(0.1)


@pytest.mark.parametrize("reward", ["task", "task+0.1*length(8)", {"length(8)": 0.1, "task": 1.0}])
def test_a_reward_that_a_task_names_is_made_with_the_settings_as_if_it_stood_there(reward: Any) -> None:
    """With their arguments for classifiers, and within their limits, which are set once."""

    def part(own: str) -> Any:
        env = TextEnv(task=Task("own", sums, own), reward=reward, reward_kwargs={"max_length": 5}, reward_retries=0)
        parts = env.reward.rewards if isinstance(env.reward, WeightedSum) else {own: env.reward}
        return parts[own]

    assert part("builtin").reward.max_length == 5
    server = part(ADDRESS)
    assert isinstance(server, LimitedReward)
    assert isinstance(server.reward, HttpReward)
    assert (server.retries, reward_name(server)) == (0, ADDRESS)


def test_the_reward_of_a_task_alone_is_no_sum_unless_it_is_one_itself() -> None:
    assert isinstance(TextEnv(task=SUMS, reward="task").reward, Verifier)
    own = Task("own", sums, {"correct": 1.0, "length(8)": 0.1})
    assert set(TextEnv(task=own, reward="task").reward.rewards) == {"correct", "length"}
    assert set(TextEnv(task=own, reward="task+length(9)").reward.rewards) == {"1*correct+0.1*length", "length"}
    with pytest.raises(ValueError, match="got 'correct' twice"):
        TextEnv(task=SUMS, reward="task+0.5*correct")


def test_a_text_without_a_number_is_worth_nothing_and_counted() -> None:
    info = finish(TextEnv(task=SUMS), "nine")
    assert (info["score"], info["correct"], info["well_formed"], info["answer"]) == (0.0, 0.0, 0.0, None)


def test_the_careful_working_is_right_in_the_environment_of_the_task() -> None:
    problem = Problem(47, (("+", 38), ("*", 6), ("+", 125)))
    env = TextEnv(**{**ARITHMETIC, "max_new_tokens": 300})
    prompt = env.prompts.make(problem.expression)._replace(columns={"answer": problem.answer})
    assert finish(env, working(problem), prompt)["score"] == 1.0
    assert finish(env, working(problem, lambda _: True), prompt)["score"] == 0.0
    assert finish(env, "#### none", prompt)["well_formed"] == 0.0


def test_the_held_out_problems_are_not_those_of_the_training() -> None:
    train, held_out = (TextEnv(**ARITHMETIC, task_kwargs={"size": 70, "split": s}) for s in ("train", "eval"))
    assert not {prompt.text for prompt in train.prompts} & {prompt.text for prompt in held_out.prompts}
    assert {split_of(prompt.text) for prompt in held_out.prompts} == {"eval"}


# ---- files


def test_a_file_with_answers_is_a_task_whose_parts_are_told_by_the_prompts(tmp_path: Path) -> None:
    rows = [*sums("train"), *sums("eval")]
    task = make_task(write(tmp_path / "sums.jsonl", rows))
    assert task.prompts("train") == sums("train")
    assert task.prompts("eval") == sums("eval")
    env = TextEnv(task=str(tmp_path / "sums.jsonl"), max_new_tokens=9)
    assert finish(env, f"So it is {sums('train')[0]['answer']}.0")["score"] == 1.0
    assert finish(env, "So it is 1 or 2")["score"] == float(sums("train")[0]["answer"] == 2)


def test_a_column_of_the_file_may_say_which_part_a_row_belongs_to(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "answer": n, "split": "eval" if n % 2 else "train"} for n in range(6)]
    task = file_task(write(tmp_path / "rows.jsonl", rows))
    assert [row["answer"] for row in task.prompts("train")] == [0, 2, 4]
    assert [row["answer"] for row in task.prompts("eval")] == [1, 3, 5]
    assert "split" not in task.prompts("eval")[0]


@pytest.mark.parametrize("split", ["test", "Train", None, ""])
def test_a_row_that_belongs_to_another_part_is_refused_and_not_passed_over(tmp_path: Path, split: Any) -> None:
    rows = [{"prompt": "1", "answer": 1, "split": "train"}, {"prompt": "2", "answer": 2, "split": split}]
    with pytest.raises(ValueError, match=f"column 'split' of .* to hold 'train' or 'eval' .* got {split!r} in row 1"):
        make_task(write(tmp_path / "rows.jsonl", rows))


def test_a_file_says_how_answers_are_found_and_compared(tmp_path: Path) -> None:
    path = write(tmp_path / "words.jsonl", [{"prompt": "Say a", "right": "a b", "split": "train"}])
    env = TextEnv(task=path, task_kwargs={"extract": "answer_tags", "match": "exact", "column": "right"})
    assert finish(env, "<answer>a  b</answer>")["score"] == 1.0
    assert finish(env, "a b")["score"] == 0.0
    assert finish(env, "<answer>b</answer>")["well_formed"] == 1.0
    (tmp_path / "words.csv").write_text("prompt,answer,split\nSay a,a,train\n")
    assert finish(TextEnv(task=tmp_path / "words.csv", task_kwargs={"match": "exact", "extract": "whole"}), "a")[
        "score"
    ]


@pytest.mark.parametrize(
    ("extract", "solution"),
    [("hash", "2+3 = <<2+3=5>>5\n#### 5"), ("boxed", r"So $x=\boxed{5}$."), ("answer_tags", "2+3. <answer>5</answer>")],
)
def test_a_file_may_give_whole_solutions_in_which_the_answer_is_marked(
    tmp_path: Path, extract: str, solution: str
) -> None:
    rows = [{"prompt": "2+3=", "answer": solution, "split": "train"}, {"prompt": "5=", "answer": 5, "split": "train"}]
    task = file_task(write(tmp_path / "rows.jsonl", rows), extract)
    assert [str(row["answer"]) for row in task.prompts("train")] == ["5", "5"]
    env = TextEnv(task=str(tmp_path / "rows.jsonl"), task_kwargs={"extract": extract})
    assert finish(env, solution)["score"] == 1.0


def test_right_answers_that_are_no_numbers_are_noticed_before_a_text_is_written(tmp_path: Path) -> None:
    rows = [{"prompt": "1", "answer": None}, {"prompt": "2+3=", "answer": "We add.\n#### 5"}]
    path = write(tmp_path / "rows.jsonl", [{**row, "split": "train"} for row in rows])
    with pytest.raises(ValueError, match=r"right answer in the column 'answer' of .*, row 1, got .*'extract': 'hash'"):
        file_task(path)
    assert file_task(path, match="exact").prompts("train")[1]["answer"] == "We add.\n#### 5"


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        ([{"prompt": "1"}], {}, "a column 'answer' with the right answer; row 0 has .'prompt'.*task_kwargs="),
        ([{"prompt": "1", "answer": 1}, {"prompt": "2"}], {}, "row 1 has"),
        ([{"prompt": "1", "answer": 1}], {"match": "same"}, "Unknown match 'same'"),
        ([{"prompt": "1", "answer": 1, "split": "train"}], {"split": "eval"}, "belong to 'eval', got none of 1"),
        (
            [{"prompt": "1", "answer": 1}],
            {"answers": 1},
            "takes the task_kwargs .'extract', 'match', 'column', 'split'",
        ),
    ],
)
def test_a_file_that_is_no_task_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], kwargs: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        TextEnv(task=str(path), task_kwargs=kwargs)
    with pytest.raises(ValueError, match=r"nowhere\.jsonl"):
        TextEnv(task="nowhere.jsonl")


# ---- the environments


def test_environments_by_name_play_the_same_episodes_row_by_row() -> None:
    kwargs = {"task_kwargs": {"n_steps": 2}, "tokenizer": BUILTIN, "max_new_tokens": 6, "max_prompt_tokens": 40}
    rows = [gym.make("TextArithmetic-v0", **kwargs) for _ in range(3)]
    vector = gym.make_vec("TextArithmetic-v0", num_envs=3, **kwargs)
    obs, infos = vector.reset(seed=5)
    starts = [env.reset(seed=5 + row) for row, env in enumerate(rows)]
    assert list(infos["prompt"]) == [info["prompt"] for _, info in starts]
    assert len(set(infos["prompt"])) == 3
    for _ in range(6):
        actions = vector.action_space.sample()
        obs, rewards, terminated, _, infos = vector.step(actions)
        for row, env in enumerate(rows):
            one, reward, ended, _, info = env.step(actions[row])
            assert (reward, ended) == (rewards[row], terminated[row])
            if ended:
                assert {key: infos["final_info"][key][row] for key in info} == info
                one, _ = env.reset()
            for key, value in one.items():
                np.testing.assert_array_equal(value, obs[key][row])


def test_the_conformance_suite_passes_with_a_task() -> None:
    kwargs: dict[str, Any] = {**ARITHMETIC, "task_kwargs": {"n_steps": 1, "size": 70}, "max_new_tokens": 5}
    check_text_env(TextEnv(**kwargs))
    check_text_vector_env(TextVectorEnv(2, **kwargs), lambda: TextEnv(**kwargs))
    check_env(TextEnv(**kwargs), skip_render_check=True)


def test_the_specification_of_a_task_by_name_goes_through_json_and_comes_back() -> None:
    env = gym.make(
        "TextArithmetic-v0", task_kwargs={"n_steps": [1, 2], "seed": 3}, tokenizer=BUILTIN, max_prompt_tokens=40
    )
    assert env.spec is not None
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert again.reset(seed=1)[1] == env.reset(seed=1)[1]
    assert again.unwrapped.max_new_tokens == 100  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize("task", ["arithmetic", SUMS, "file"])
def test_an_environment_with_a_task_can_be_copied_and_pickled(how: Any, task: Any, tmp_path: Path) -> None:
    task = write(tmp_path / "sums.jsonl", [*sums("train"), *sums("eval")]) if task == "file" else task
    env = TextEnv(**{**ARITHMETIC, "task": task})
    env.reset(seed=2)
    again = how(env)
    action = env.action_space.sample()
    assert again.step(action)[1:] == env.step(action)[1:]
    assert again.reset()[1] == env.reset()[1]


def test_a_live_task_survives_the_copy_that_a_wrapper_makes_of_its_specification() -> None:
    for task in (SUMS, arithmetic_task(1)):
        env = gym.wrappers.TransformReward(
            gym.make("TextRLHF-v0", task=task, tokenizer=BUILTIN, max_prompt_tokens=40), lambda reward: 2 * reward
        )
        assert env.spec is not None
        assert gym.make(env.spec).reset(seed=4)[1] == env.reset(seed=4)[1]


# ---- what others ask about tasks


def test_a_registered_name_says_its_task_and_an_unknown_one_nothing() -> None:
    assert said_by_name("TextArithmetic-v0") == said_by_name("text_env:TextArithmetic-v0") == {"task": "arithmetic"}
    assert said_by_name("Nothing-v0") == said_by_name("TextRLHF-v0") == {}
    said_by_name("TextArithmetic-v0")["task"] = "another"
    assert said_by_name("TextArithmetic-v0") == {"task": "arithmetic"}


def test_the_model_of_a_task_is_the_one_that_it_was_made_for() -> None:
    assert model_of_task("arithmetic", {"n_steps": 2, "split": "eval"}) == "builtin:arithmetic"
    assert model_of_task(SUMS, None) is None
    assert model_of_task(None, None) is None
