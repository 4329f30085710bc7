"""The options of the commands for what is trained already: ``report``, ``watch``, ``play`` and ``push``."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from agents.state.arguments import check_number
from text_env.settings import check_integer


def check_writable(option: str, path: Path) -> None:
    """
    :param option: the option that names the file.
    :param path: a file that is to be written.
    :raises OSError: if there is no such file to be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no directory {path.parent} to write {path.name} in.")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{path} can't be written; choose another {option}.")


def policy_of(name: str) -> str:
    """
    :param name: the directory of a run or of a policy, or the name of any model.
    :return: the policy; for the directory of a run its own.
    """
    directory = Path(name)
    of_run = (directory / "config.yaml").is_file() and (directory / "policy").is_dir()
    return str(directory / "policy") if of_run else name


@dataclass
class ReportConfig:
    """Write a report of one or more runs: a single file of HTML that needs no network.

    It shows curves, texts over time, and episodes token by token with what the critic thought. Runs that differ in
    nothing but the seed become one line with a band. Nothing that the runs name is imported.
    """

    runs: tyro.conf.Positional[list[Path]]
    """The directories of the runs."""
    out: Path | None = None
    """The file; by default report.html in the directory of the first run."""
    title: str | None = None
    """The title of the page; by default the names of the runs."""

    def check(self) -> None:
        """
        :raises ValueError: if there is no run.
        :raises OSError: if the file can't be written.
        """
        if not self.runs:
            raise ValueError("Expected the directories of one or more runs, got none.")
        if self.runs[0].is_dir() or self.out is not None:  # else there is no run, which is the better message
            check_writable("--out", self.file())

    def file(self) -> Path:
        """
        :return: the file that is written.
        """
        return self.runs[0] / "report.html" if self.out is None else self.out


@dataclass
class WatchConfig:
    """Follow a run in the terminal: its curves and its latest texts, until it ends or at Ctrl-C.

    Nothing that the run names is imported.
    """

    run: tyro.conf.Positional[Path]
    """The directory of the run."""
    once: bool = False
    """Print what there is now, and end."""
    every: float = 2.0
    """The number of seconds between two looks."""
    texts: int = 3
    """The number of texts that are shown."""

    def check(self) -> None:
        """
        :raises ValueError: if a number is out of range.
        """
        check_number("every", self.every, above=0)
        check_integer("texts", self.texts, 0)


@dataclass
class PlayConfig:
    """Write a text together with a model, token by token.

    Before each token you see the most probable ones, how undecided the model is, what its critic expects, and which
    tokens are forbidden. You choose one of them, type one of your own, go back, or let the model go on. At the end
    there is the score. Commands are read line by line from the standard input.
    """

    model: tyro.conf.Positional[str]
    """The directory of a run or of a policy, or the name of any model."""
    prompt: str | None = None
    """The prompt; by default one of the prompts of the policy's run or of `--task`, as `--seed` has it."""
    top: int = 8
    """The number of tokens to choose from."""
    reward: str | None = None
    """The reward that scores the text; by default that of the policy's run."""
    task: str | None = None
    """The task that the prompt is a problem of; by default that of the policy's run. What is written for a prompt of
    your own is not judged, since its right answer is unknown."""
    task_kwargs: dict[str, str] = dataclasses.field(default_factory=dict)
    """Arguments of the task in place of those of the run, for example `--task-kwargs n_steps 5`."""
    temperature: float = 1.0
    """The temperature of the model's distribution."""
    max_new_tokens: int | None = None
    """The response budget, in tokens; by default that of the policy's run."""
    seed: int = 0
    """The seed of the prompt and of the tokens that the model samples."""
    trust: bool = False
    """Import what the run's config.yaml names as 'module:object', which runs code, and let its task run answers.
    Without it texts are not scored by such a reward, and anything else of the kind is refused, since a run may come
    from somebody else. What is named on the command line is always used."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', …"""
    dtype: str = "float32"
    """The floating-point type of the weights."""

    @property
    def policy(self) -> str:
        """The model, for the directory of a run its policy."""
        return policy_of(self.model)

    def check(self) -> None:
        """
        :raises ValueError: if a number is out of range.
        """
        check_integer("top", self.top, 1)
        check_number("temperature", self.temperature, above=0)
        if self.max_new_tokens is not None:
            check_integer("max_new_tokens", self.max_new_tokens, 1)


@dataclass
class PushConfig:
    """Send a policy with its model card to the Hugging Face Hub.

    Of a run, only the directory `policy` is sent. Its README.md, the card, is written anew before that: with an
    evaluation, if `textrlhf evaluate --json` has written one to evaluation.json in the run's directory.
    """

    run: tyro.conf.Positional[Path]
    """The directory of a run, or of a policy."""
    repo: tyro.conf.Positional[str]
    """The repository, as owner/name. It is made if there is none."""
    private: bool = False
    """Make a private repository."""
    message: str | None = None
    """The message of the commit."""

    def check(self) -> None:
        """
        :raises ValueError: if the repository has no such name.
        """
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.repo):
            raise ValueError(f"Expected the repository as owner/name, got {self.repo!r}.")
