"""What to type next about a run: commands that go on with it, with all that they need."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from agents.runs.config import TrainConfig, load_config
from text_env.imports import is_address, is_object_name, names_in
from text_env.reasoning_gym_tasks import PREFIX, RUNS_ANSWERS

# The fields of a run that may name code, or servers.
CODE_FIELDS = (
    *("algo", "rollouts", "task", "task_kwargs", "prompts", "reward", "gold", "metrics", "constraint", "shaping"),
)
# What stands before the colon in names that are none of code: "builtin:eval", "reasoning_gym:chain_sum".
OWN_PREFIXES = ("builtin", "reasoning_gym")


def resume_command(directory: Path) -> str:
    """
    :param directory: of a run.
    :return: the command that goes on with it.
    """
    return f"textrlhf train --resume {shlex.quote(str(directory))}{trust_option(directory)}"


def trust_option(directory: Path) -> str:
    """
    :param directory: of a run.
    :return: what a command needs so that it uses what the run names: ``" --trust"``, or nothing.
    """
    with contextlib.suppress(OSError, ValueError, TypeError):  # what is wrong with the file, the command itself says
        return " --trust" if _names_code(load_config(directory / "config.yaml")) else ""
    return ""


def _names_code(run: TrainConfig) -> bool:
    """Whether :func:`agents.runs.config.names_from_run` would refuse some of a run without ``--trust``."""
    fields = {**vars(run), **vars(run.env)}
    # A list of prompts holds texts, and no names.
    values = [fields[name] for name in CODE_FIELDS if name != "prompts" or isinstance(fields[name], str)]
    module = run.env.env.rpartition(":")[0]
    if run.env.task in {f"{PREFIX}{name}" for name in RUNS_ANSWERS}:
        return True
    return module not in ("", "text_env") or any(
        is_address(name) or (is_object_name(name) and name.partition(":")[0] not in OWN_PREFIXES)
        for value in values
        for name in names_in(value)
    )
