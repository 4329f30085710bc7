"""Tasks by their names, and what they say where an environment's arguments say nothing."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import gymnasium as gym

from text_env.answers import ExpectedAnswerError, Extractor, Matcher, Verifier, number
from text_env.arithmetic import arithmetic_task
from text_env.generated import Split, check_split, split_of
from text_env.imports import check_may_import, import_object, is_object_name
from text_env.prompts import load_prompts
from text_env.reasoning_gym_tasks import PREFIX, reasoning_gym_task
from text_env.reward_names import parse_sum
from text_env.rewards import unlimited_reward
from text_env.settings import EpisodeSettings
from text_env.tables import FORMATS, table_format
from text_env.tasks import Task

KNOWN_TASKS: dict[str, Callable[..., Task]] = {"arithmetic": arithmetic_task}

MARKED = ("answer_tags", "boxed", "hash")
"""Ways to find an answer by a mark beside it, so that what has the mark is a whole solution."""


def file_task(
    path: str | Path,
    extract: str | Extractor = "last_number",
    match: str | Matcher = "number",
    column: str = "answer",
) -> Task:
    """A file of prompts with right answers as a task.

    :param path: a file, as the setting ``prompts`` takes it. If its rows have a column ``split``, it says to which part
        they belong, ``"train"`` or ``"eval"``; otherwise :func:`text_env.generated.split_of` does, by the prompt.
    :param extract: how the answer is found in a text, as :class:`text_env.answers.Verifier` takes it.
    :param match: how it is compared with the right one, likewise.
    :param column: the column of the right answers. It may hold whole solutions, as GSM8K's does, if ``extract`` finds
        an answer by a mark (:data:`MARKED`).
    :return: the task.
    :raises ValueError: if there is no such file, its rows have no such column, or belong to another part, or if right
        answers are to be compared as numbers and are none.
    """
    rows = load_prompts(path)
    if missing := [index for index, row in enumerate(rows) if column not in row]:
        raise ValueError(
            f"Expected each row of {str(path)!r} to have a column {column!r} with the right answer; row {missing[0]} "
            f"has {sorted(rows[missing[0]])}. Name another: task_kwargs={{'column': ...}}."
        )

    verifier = Verifier(extract, match, column)
    for index, row in enumerate(rows):
        if row.setdefault("split", split_of(str(row["prompt"]))) not in get_args(Split):
            raise ValueError(
                f"Expected the column 'split' of {str(path)!r} to hold 'train' or 'eval' (the held-out part), got "
                f"{row['split']!r} in row {index}."
            )
        row[column] = _right_answer(
            row[column], extract, verifier, f"in the column {column!r} of {str(path)!r}, row {index}"
        )
    settings = {"max_prompt_tokens": None, "max_new_tokens": 256}
    return Task(str(path), partial(_part, rows, str(path)), verifier, settings=settings)


def _right_answer(written: Any, extract: str | Extractor, verifier: Verifier, where: str) -> Any:
    """What texts are compared with. It is checked here, since a training would come upon it late."""
    answer = written
    if extract in MARKED and isinstance(written, str):
        answer = verifier.extract(written) or written
    if verifier.match is number and answer is not None:
        try:
            number("0", answer)
        except ExpectedAnswerError as error:
            raise ValueError(
                f"Expected a number as the right answer {where}, got {answer!r}. If it is a whole solution, say how "
                f"the answer is marked, task_kwargs={{'extract': 'hash'}} (one of {', '.join(map(repr, MARKED))}); if "
                "it is no number, compare it in another way, {'match': 'exact'}."
            ) from error
    return answer


def _part(rows: list[dict[str, Any]], path: str, split: Split) -> list[dict[str, Any]]:
    part = [{name: value for name, value in row.items() if name != "split"} for row in rows if row["split"] == split]
    if not part:
        raise ValueError(
            f"Expected {path!r} to have rows that belong to {split!r}, got none of {len(rows)}: say which do in a "
            "column 'split', or add some."
        )
    return part


def make_task(spec: Any, **kwargs: Any) -> Task:
    """Resolve the environment's argument ``task``.

    :param spec: one of :data:`KNOWN_TASKS`; ``"reasoning_gym:"`` and the name of a data set, see
        :func:`text_env.reasoning_gym_tasks.reasoning_gym_task`; a file, see :func:`file_task`; ``"module:object"``, the
        name of a :class:`Task` or of a function that returns one; or such an object itself.
    :param kwargs: the arguments of the function that makes the task.
    :return: the task.
    :raises ValueError: for an unknown name, which is answered with the known ones, or an unknown argument.
    :raises TypeError: if the object is no task.
    :raises ImportError: if the task needs a package that is not installed.
    """
    make, arguments = spec, list[Any]()
    if isinstance(spec, str | Path):
        name = str(spec)
        if name in KNOWN_TASKS:
            make = KNOWN_TASKS[name]
        elif name.startswith(PREFIX):
            make, arguments = reasoning_gym_task, [name.removeprefix(PREFIX)]
        elif table_format(Path(name)) is not None:
            make, arguments = file_task, [name]
        elif is_object_name(name):
            make = import_object(name)
        else:
            raise ValueError(
                f"Unknown task {name!r}. Known names: {', '.join(map(repr, KNOWN_TASKS))}, and "
                f"'{PREFIX}chain_sum' for one of reasoning-gym's data sets. Otherwise give a file with a column "
                f"'answer' ({', '.join(FORMATS)}), or 'module:object'."
            )
    if isinstance(make, Task):
        if kwargs:
            raise ValueError(f"The task {make.name!r} takes no arguments, got {sorted(kwargs)}.")
        return make
    if not callable(make):
        raise TypeError(f"Expected a task to be a Task, a function that returns one, or a name, got {make!r}.")
    try:
        inspect.signature(make).bind(*arguments, **kwargs)
    except TypeError as error:
        takes = list(inspect.signature(make).parameters)[len(arguments) :]
        raise ValueError(f"The task {spec!r} takes the task_kwargs {[*takes, 'split']}: {error}.") from error
    task = make(*arguments, **kwargs)
    if not isinstance(task, Task):
        raise TypeError(f"Expected {spec!r} to return a text_env.tasks.Task, got {task!r}.")
    return task


def said_by_name(env: str) -> dict[str, Any]:
    """
    :param env: the registered name of an environment, perhaps with a module in front (``"my_module:MyText-v0"``).
    :return: the arguments that the name stands for; empty for an unknown name.
    :raises UntrustedNameError: if only a file names the module that is not trusted.
    """
    module, _, name = env.rpartition(":")
    if module and module != __package__:
        check_may_import(env, module)  # gymnasium would import it without asking
        importlib.import_module(module)
    spec = gym.envs.registry.get(name)
    return dict(spec.kwargs) if spec is not None else {}


def model_of_task(task: Any, task_kwargs: Mapping[str, Any] | None) -> str | None:
    """
    :param task: the setting ``task`` of an environment.
    :param task_kwargs: its setting ``task_kwargs``.
    :return: the name of the model that the task was made for; None: there is none.
    """
    if task is None:
        return None
    return make_task(task, **{name: value for name, value in (task_kwargs or {}).items() if name != "split"}).model


def settings_of(given: Mapping[str, Any]) -> EpisodeSettings:
    """
    :param given: the settings that an environment was given, by name.
    :return: all of its settings. What is not given a task says, if there is one, and else the default counts.
    :raises ValueError: if ``task_kwargs``, or the reward ``"task"``, are given without a task; and for the reasons of
        :func:`make_task`.
    """
    settings = EpisodeSettings(**given)
    kwargs = dict(settings.task_kwargs or {})
    if settings.task is None:
        if kwargs:
            raise ValueError(f"Expected task_kwargs only together with a task, got {kwargs!r}.")
        if "task" in _weights(settings.reward):
            raise ValueError(f"Expected 'task' in a reward only together with a task, got {settings.reward!r}.")
        return settings
    split = kwargs.pop("split", "train")
    check_split(split)
    task = make_task(settings.task, **kwargs)
    fields = {field.name for field in dataclasses.fields(EpisodeSettings)}
    own = {"task", "task_kwargs", "prompts", "reward", "metrics"}  # which a task says otherwise, or cannot say
    if unknown := sorted(set(task.settings) - (fields - own)):
        raise ValueError(
            f"Expected the settings of the task {task.name!r} to be settings of an environment other than "
            f"{sorted(own)}, got {unknown}."
        )
    said: dict[str, Any] = {**task.settings, "reward": task.reward, **given}
    if "prompts" not in given:
        said["prompts"] = task.prompts(split)
    said["reward"] = _reward(said["reward"], task, said.get("reward_kwargs") or {})
    said["metrics"] = {**task.metrics, **(settings.metrics or {})} or None
    return EpisodeSettings(**{**said, "task": None, "task_kwargs": None})


def _weights(spec: Any) -> Mapping[Any, Any]:
    """The weights by name of a reward that is a weighted sum or may name the task's own; of another none."""
    weights = parse_sum(spec) if isinstance(spec, str) and re.search(r"\btask\b", spec) else spec
    return weights if isinstance(weights, Mapping) else {}


def _reward(spec: Any, task: Task, kwargs: Mapping[str, Any]) -> Any:
    """The reward, where ``"task"``, alone or in a weighted sum, is the task's own as if that stood there."""
    if spec == "task":
        return task.reward
    weights = _weights(spec)
    if "task" not in weights:
        return spec
    # Not a mapping of names alone: the task's reward may be a mapping itself, or stand in the sum already.
    own = unlimited_reward(task.reward, kwargs)
    return {own if name == "task" else name: weight for name, weight in weights.items()}
