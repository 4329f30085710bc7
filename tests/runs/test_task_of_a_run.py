"""The task of a run: its model, its held-out part, and what is measured beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import text_env.builtin
from agents.cli import main
from agents.runs.config import EnvConfig
from text_env import Task, TextEnv, TextVectorEnv

MODULE = "test_task_of_a_run"
BUILTIN = str(Path(text_env.builtin.__file__).parent / "language_model")
"""A tokenizer by another name than the default's, which would leave the choice to the task."""


def one_sum(largest: int = 9) -> Task:
    return Task("one sum", lambda split: [{"prompt": f"1+{largest}=", "answer": 1 + largest}], "correct", {"n": len_of})


def split_sums(largest: int, write: Any) -> Task:
    return Task("split sums", lambda split: [{"prompt": f"{split} {write(largest)}=", "answer": largest}], "correct")


def len_of(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def metrics(**kwargs: Any) -> set[str]:
    return set(EnvConfig(**kwargs).make(1, BUILTIN).episodes.metrics)


def test_a_run_starts_from_the_model_that_its_task_was_made_for() -> None:
    assert EnvConfig(task="arithmetic").model() == EnvConfig(env="TextArithmetic-v0").model() == "builtin:arithmetic"
    assert EnvConfig().model() == EnvConfig(task=f"{MODULE}:one_sum").model() == "builtin"
    assert EnvConfig(env="TextArithmetic-v0", task=f"{MODULE}:one_sum").model() == "builtin"


NAMED = [{"task": "arithmetic"}, {"env": "TextArithmetic-v0"}]


@pytest.mark.parametrize("named", NAMED)
def test_a_run_trains_on_one_part_and_is_measured_on_the_other(named: dict[str, Any]) -> None:
    config = EnvConfig(**named, task_kwargs={"n_steps": "1", "size": "70"}, max_prompt_tokens=40)
    parts = []
    for env_config in (config, config.held_out()):
        env = env_config.make(2, BUILTIN)
        assert len(env.prompts) == 70
        assert env.max_new_tokens == 54  # one step: the arguments reach the task
        assert env.episodes.metrics == {}
        parts.append({prompt.text for prompt in env.prompts})
    assert not parts[0] & parts[1]
    assert config.held_out().held_out() == config.held_out()


def test_the_arguments_that_a_registered_name_stands_for_hold_for_the_held_out_part() -> None:
    """Live objects too, which no configuration can write down."""
    kwargs = {"task": split_sums, "task_kwargs": {"largest": 9, "write": str}}
    gym.register("OneSum-v0", TextEnv, vector_entry_point=TextVectorEnv, kwargs=kwargs)
    try:
        config = EnvConfig(env="OneSum-v0")
        assert [prompt.text for prompt in config.make(1, BUILTIN).prompts] == ["train 9="]
        assert [prompt.text for prompt in config.held_out().make(1, BUILTIN).prompts] == ["eval 9="]
        given = EnvConfig(env="OneSum-v0", task_kwargs={"largest": "5"})
        assert [prompt.text for prompt in given.held_out().make(1, BUILTIN).prompts] == ["eval 5="]
        assert config.held_out().held_out() == config.held_out()
        assert given.made_task().name == "split sums"
    finally:
        del gym.registry["OneSum-v0"]


def test_arguments_of_a_run_without_a_task_are_refused_and_a_score_beside_the_task_must_be_named() -> None:
    with pytest.raises(ValueError, match="task_kwargs only together with a task"):
        EnvConfig(task_kwargs={"n_steps": "1"}).make(1, BUILTIN)
    assert metrics() == {"gold_score"}
    assert metrics(task=f"{MODULE}:one_sum") == {"n"}
    assert metrics(task=f"{MODULE}:one_sum", gold="builtin") == {"n", "gold_score"}
    assert EnvConfig().held_out().prompts == "builtin:eval"
    assert EnvConfig(prompts="mine.jsonl").held_out() == EnvConfig(prompts="mine.jsonl")


def test_a_run_writes_down_what_a_text_answers_and_what_would_have_been_right(tmp_path: Path) -> None:
    options = ["--total-timesteps", "8", "--n-episodes", "2", "--n-samples", "1", "--max-new-tokens", "4"]
    place = ["--run-dir", str(tmp_path / "run"), "--no-progress", "--device", "cpu"]
    assert main(["train", "--task", f"{MODULE}:one_sum", *options, *place]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["columns"] == {"answer": 10} for row in rows)
    assert all(row["correct"] == float(row["answer"] == "10") for row in rows)


def test_texts_are_sampled_at_the_length_of_the_task_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--policy", "builtin:arithmetic", "--prompt", "10*10+11+1=", "--greedy", "--device", "cpu"]
    assert main(["sample", *options, "--task", "arithmetic"]) == 0
    assert "\n#### " in capsys.readouterr().out
    assert main(["sample", *options, "--task", "arithmetic", "--max-new-tokens", "9"]) == 0
    assert "####" not in capsys.readouterr().out


def test_a_prompt_that_the_tokenizer_has_no_tokens_for_is_an_error_on_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--policy", "builtin:arithmetic", "--task", "arithmetic", "--device", "cpu"]
    assert main(["sample", *options, "--prompt", "What is 1+1?"]) == 1
    assert "Expected texts that the tokenizer has tokens for, got ['What is 1+1?']" in capsys.readouterr().out
