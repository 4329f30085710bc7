"""The command line as one types it: help, version, mistakes, and starts that fail."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tyro
from test_cli import Run, failed

import agents
from agents.cli import FUNCTIONS, main
from agents.runs.commands import COMMANDS, ResumeConfig
from agents.runs.config import EnvConfig, TrainConfig, dump_config, load_config
from agents.runs.usage import fields_of, flag, shown, usage

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("command_line"))


def page(command: str, width: int = 100) -> str:
    return usage(command, *COMMANDS[command], width=width)


# ---- help ----------------------------------------------------------------------------------------------------------


def test_help_version_and_typing_errors_are_answered_without_the_slow_imports() -> None:
    script = """
import contextlib, sys
from agents.cli import main
for line in ("--help", "--version", "nosuch", "train --help", "evaluate --help", "train --total-timesteps -5"):
    with contextlib.suppress(SystemExit):
        main(line.split())
print("loaded:", {"torch", "transformers.modeling_utils", "stable_baselines3", "peft"} & set(sys.modules))
"""
    # The last of these lines is refused by its value, for which transformers' progress bars are already switched off.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "loaded: set()"
    assert "Expected total_timesteps to be an integer of at least 1, got -5." in done.stdout


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_stands_in_one_group_and_says_what_it_means(command: str) -> None:
    options, groups, _ = COMMANDS[command]
    fields = fields_of(options)
    grouped = Counter(name for names in groups.values() for name in names)
    assert set(grouped.values()) == {1}
    assert set(grouped) == set(fields) - {"metrics"}  # only from Python and YAML
    assert [name for name in grouped if len(fields[name].help) < 5] == []
    text = page(command)
    heads = {name: shown(name, fields[name]) if fields[name].positional else flag(name) for name in grouped}
    assert [name for name, head in heads.items() if not re.search(rf"^  {head}(?!\w)", text, re.M)] == []
    assert [heading for heading in groups if f"\n{heading}:\n" not in text] == []


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_options_of_the_help_are_those_that_are_read(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        tyro.cli(COMMANDS[command].options, args=["--help"])
    read = set(re.findall(r"^[│| ]? *(--[a-z][\w-]*)", capsys.readouterr().out, re.M))
    named = {flag(name) for name, field in fields_of(COMMANDS[command].options).items() if not field.positional}
    assert read >= named - {"--metrics"}
    assert set(re.findall(r"^  (--[\w-]+)", page(command), re.M)) == read


@pytest.mark.parametrize("example", [example for command in COMMANDS.values() for example in command.examples])
def test_the_examples_of_the_help_can_be_typed(example: str) -> None:
    name, command, *rest = shlex.split(example)
    assert name == "textrlhf"
    if "--config" in rest:
        rest = rest[2:]
    options = ResumeConfig if "--resume" in rest else COMMANDS[command].options
    assert isinstance(tyro.cli(options, args=rest), options)


def test_the_help_keeps_to_the_width_of_the_page() -> None:
    examples = {f"  {example}" for example in COMMANDS["train"].examples}
    for width in (80, 100):
        assert [line for line in page("train", width).splitlines() if len(line) > width and line not in examples] == []
    assert "(default: 60000)" in page("train")
    assert "--kl-estimator k1|k2|k3" in page("train")
    assert "usage: textrlhf evaluate --policy TEXT [options]" in page("evaluate")
    assert "--pass-at-k INT …" in page("evaluate")


def test_every_command_has_its_function() -> None:
    assert set(FUNCTIONS) == set(COMMANDS)


def test_an_unknown_command_is_called_that_and_a_near_one_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "--seed", "1"]) == 2
    shown = capsys.readouterr().out
    assert "There is no command 'trian'. Did you mean 'train'?" in shown
    assert main(["[bold]"]) == 2
    shown = capsys.readouterr().out
    assert "There is no command '[bold]'. The commands are:" in shown


def test_version_says_which_release_this_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"textrlhf (\d+\.\d+\.\d+|\(not installed: run from a clone\))\n", capsys.readouterr().out)


def test_a_public_name_is_imported_when_it_is_asked_for() -> None:
    [checked] = [node for node in ast.parse(inspect.getsource(agents)).body if isinstance(node, ast.If)]
    for_editors = {
        alias.name: node.module for node in checked.body for alias in node.names if isinstance(node, ast.ImportFrom)
    }
    assert for_editors == agents._HOMES
    assert set(agents.__all__) == set(agents._HOMES) <= set(dir(agents))
    for name, module in agents._HOMES.items():
        assert getattr(agents, name) is getattr(sys.modules[module], name)
    with pytest.raises(AttributeError, match="module 'agents' has no attribute 'PP0'"):
        agents.PP0  # noqa: B018


# ---- what is refused before anything is loaded ---------------------------------------------------------------------

NOTHING = ["--model", "/nosuch/model"]  # which would be the error, if it were loaded first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--total-timesteps -5", "Expected total_timesteps to be an integer of at least 1, got -5."),
        ("--kl-coef -0.1", "Expected kl_coef to be a finite number >= 0, got -0.1."),
        ("--kl-coef nan", "Expected kl_coef to be a finite number >= 0, got nan."),
        ("--kl-target 0", "Expected kl_target to be a finite number > 0, got 0.0."),
        ("--missing-eos-penalty -1", "Expected missing_eos_penalty to be a finite number >= 0, got -1.0."),
        (
            "--n-episodes 4 --batch-size 8",
            "Expected batch_size, the episodes of a minibatch, to be at most n_episodes=4",
        ),
        ("--batch-size 1000", "Expected batch_size, the episodes of a minibatch, to be at most n_episodes=64"),
        ("--n-epochs 0", "Expected n_epochs to be an integer of at least 1, got 0."),
        ("--lr-warmup 2", "Expected a warm-up of 0 <= warmup < 1"),
        ("--learning-rate -1", "Expected a finite learning rate >= 0, got a peak of -1.0."),
        ("--sample-every 0", "Expected sample_every to be an integer of at least 1, got 0."),
        ("--n-samples 0", "Expected n_samples to be an integer of at least 1, got 0."),
        ("--checkpoint-every -1", "Expected checkpoint_every to be an integer of at least 0, got -1."),
        ("--keep 0", "Expected keep to be an integer of at least 1, got 0."),
        ("--group-size 0", "Expected group_size to be an integer of at least 1, got 0."),
        ("--shaping-every 0", "Expected shaping_every to be an integer of at least 1, got 0."),
        ("--max-new-tokens 0", "Expected max_new_tokens to be an integer of at least 1, got 0."),
        ("--temperature 0", "Expected temperature to be a finite number > 0, got 0.0."),
        ("--lora-r 0", "Expected lora_r to be an integer of at least 1, got 0."),
        ("--device nosuch", "such as 'cuda'; got 'nosuch': "),
        ("--device cuda:99", "got 'cuda:99': "),  # no machine has as many
        ("--dtype int8", "Expected dtype 'auto', 'float32'"),
        ("--algo-kwargs clip_range [", "Expected clip_range to be YAML, as `0.1`, `null` or `[1, 2]` are; got '['."),
    ],
)
def test_a_training_that_cannot_be_is_refused_in_a_line_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    run_dir = tmp_path / "run"
    shown = failed(capsys, main(["train", *NOTHING, "--run-dir", str(run_dir), *options.split()]))
    assert f"ValueError: {message}" in shown or message in shown
    assert not run_dir.exists()


def test_a_cuda_device_that_is_not_there_is_called_that(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no NVIDIA driver")

    monkeypatch.setattr("torch.zeros", refuse)
    shown = failed(capsys, main(["train", *NOTHING, "--device", "cuda"]))
    assert "there is no CUDA device here, or this PyTorch is made without CUDA; got 'cuda': no NVIDIA driver" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluate --policy /nosuch --episodes 0", "Expected episodes to be an integer of at least 1, got 0."),
        ("evaluate --policy /nosuch --samples-per-prompt 500", "at least as many episodes as samples_per_prompt=500"),
        ("evaluate --policy /nosuch --pass-at-k 1 8", "so ask for samples_per_prompt=8."),
        ("evaluate --policy /nosuch --temperature -1", "Expected temperature to be a finite number > 0, got -1.0."),
        ("evaluate --policy /nosuch --json /nosuch/x", "There is no directory /nosuch to write x in."),
        ("evaluate --policy /nosuch --json /", "/ can't be written; choose another --json."),
        ("evaluate --policy builtin --reference builtin --device nosuch", "got 'nosuch': "),
        ("critic --policy . --branches 1", "Expected branches to be an integer of at least 2, got 1."),
        (
            "critic --policy /nosuch",
            "There is no directory '/nosuch'. A critic is looked for in the directory of a run",
        ),
        (
            "critic --policy builtin",
            "There is no directory 'builtin'. A critic is looked for in the directory of a run",
        ),
        ("critic --policy /nosuch --plot /nosuch/x", "There is no directory /nosuch to write x in."),
        ("critic --policy . --plot /", "/ can't be written; choose another --plot."),
        ("sample --policy /nosuch --prompt a --n 0", "Expected n to be an integer of at least 1, got 0."),
        ("sample --policy /nosuch --prompt a --device nosuch", "got 'nosuch': "),
        (
            "sample --policy tiny-lama --prompt a",
            "model where no other tokenizer is named, to be 'builtin', a directory",
        ),
        (
            "sample --policy tiny-lama --prompt a",
            "got 'tiny-lama', which is no directory here, and could not be loaded",
        ),
        ("train --run-dir /nosuch/a --prompts os:O_APPEND", "Expected prompts='os:O_APPEND' to name a function that"),
        (
            "train --run-dir /nosuch/a --reward os:O_APPEND",
            "Expected 'os:O_APPEND' to name a reward, which is a function",
        ),
        ("demo --run-dir /nosuch/demo --total-timesteps 0", "Expected total_timesteps to be an integer of at least 1"),
        ("demo --run-dir /nosuch/demo --episodes 0", "Expected episodes to be an integer of at least 1, got 0."),
        ("reward-model --out /nosuch/rm --base /nosuch --epochs 0", "Expected epochs to be a finite number > 0"),
        ("reward-model --out /nosuch/rm --base /nosuch --max-length 0", "Expected max_length to be an integer of at"),
        ("reward-model --out /nosuch/rm --base /nosuch --device nosuch", "got 'nosuch': "),
        ("train --model /nosuch --run-dir /dev/null/run", "/dev/null is a file; choose another --run-dir"),
    ],
)
def test_the_other_commands_refuse_likewise(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert message in failed(capsys, main(line.split()))
    assert not Path("/nosuch").exists()


# ---- config.yaml ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "to hold names and values, such as `seed: 1`, got [1, 2]."),
        ("just a text", "to hold names and values, such as `seed: 1`, got 'just a text'."),
        ("env: builtin", "env to hold names and values, such as `seed: 1`, got 'builtin'."),
        ("seed: [1]", "seed to be an integer, got [1]."),
        ("seed: 1.5", "seed to be an integer, got 1.5."),
        ("n_episodes: many", "n_episodes to be an integer or null, got 'many'."),
        ("learning_rate: {peak: 1}", "learning_rate to be a number or null, got {'peak': 1}."),
        ("progress: 3", "progress to be true or false, got 3."),
        ("total_timesteps: true", "total_timesteps to be an integer, got True."),
        ("lr_schedule: step", "lr_schedule to be 'constant' or 'linear' or 'cosine', got 'step'."),
        ("run_dir: 007", "run_dir to be a path or null, got 7. If this is a name, put it in quotes."),
        ("model: 1", "model to be a string or null, got 1. If this is a name, put it in quotes."),
        ("algo_kwargs: [clip_range, 0.1]", "algo_kwargs to be names and values, got ['clip_range', 0.1]."),
        ("env: {max_new_tokens: long}", "max_new_tokens to be an integer, got 'long'."),
        ("env: {reward_kwargs: 3}", "reward_kwargs to be names and values, got 3."),
        ("1: 2\na: 3", "unknown ['1', 'a']; TrainConfig has"),
        ("a: [", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
    ],
)
def test_yaml_of_the_wrong_shape_is_refused_in_a_line_that_names_the_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | bytes, message: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    shown = failed(capsys, main(["train", "--config", str(path)]))
    assert message in shown
    assert str(path) in shown


@pytest.mark.parametrize("name", ["7", "007", "1e3", "0x1f", "true", "null", "2026-01-01", "runs/a b: c"])
def test_a_run_directory_of_any_name_can_be_read_back(tmp_path: Path, name: str) -> None:
    config = TrainConfig(run_dir=Path(name), model=name, env=EnvConfig(gold=name, stop=name), algo_kwargs={"x": name})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_numbers_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("total_timesteps: 1e5\nkl_coef: 0\nlearning_rate: 1e-4\nenv: {max_new_tokens: 6.0}\n")
    config = load_config(path)
    assert (config.total_timesteps, config.kl_coef, config.learning_rate) == (100_000, 0.0, 1e-4)
    assert isinstance(config.total_timesteps, int)
    assert isinstance(config.env.max_new_tokens, int)


# ---- starts that fail ----------------------------------------------------------------------------------------------


class Judge:
    """A reward that raises at its n-th call, if it is told to."""

    error: BaseException | None = None
    calls_before = 0
    calls = 0

    def __call__(self, prompts: list[str], **_: Any) -> list[float]:
        self.calls += 1
        if self.error is not None and self.calls > self.calls_before:
            raise self.error
        return [0.5 for _ in prompts]


judge = Judge()


@pytest.fixture
def train(run: Run, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(judge, "calls", 0)
    return lambda directory, *more: run.train(directory, "--reward", "test_command_line:judge", "--no-progress", *more)


def test_a_start_that_failed_is_tried_again_in_the_same_directory(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge, "error", RuntimeError("the judge is asleep"))
    assert "the judge is asleep" in failed(capsys, train(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(judge, "error", None)
    assert train(tmp_path / "run") == 0
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1


def test_a_start_that_failed_leaves_the_files_of_others_alone(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"notes.txt", "events.out.tfevents.1700000000.elsewhere.7.0"}
    for name in others:
        (tmp_path / name).write_text("mine")
    for error, status in ((RuntimeError("the judge is asleep"), 1), (KeyboardInterrupt(), 130)):
        monkeypatch.setattr(judge, "error", error)
        assert train(tmp_path) == status
        assert {path.name for path in tmp_path.iterdir()} == others


def test_ctrl_c_ends_with_130_and_keeps_what_was_learned(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge, "error", KeyboardInterrupt())
    assert train(tmp_path / "early") == 130
    assert capsys.readouterr().out.endswith("Interrupted.\n")
    assert not (tmp_path / "early").exists()  # nothing had been learned
    monkeypatch.setattr(judge, "calls", 0)
    monkeypatch.setattr(judge, "calls_before", 12)
    assert train(tmp_path / "late", "--total-timesteps", "5000") == 130
    assert (tmp_path / "late" / "policy" / "model.safetensors").exists()
    assert (tmp_path / "late" / "config.yaml").exists()


def test_the_progress_bar_never_shows_more_tokens_than_there_are(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.train(tmp_path / "run", "--total-timesteps", "20") == 0
    counts = [(int(done), int(total)) for done, total in re.findall(r"(\d+)/(\d+)", capsys.readouterr().out)]
    assert counts[-1][0] > 20  # the last rollout is finished
    assert all(done <= total for done, total in counts)


def test_a_smaller_rollout_takes_its_minibatch_with_it(run: Run, tmp_path: Path) -> None:
    options = ["--model", run.model, "--prompts", run.prompts, "--reward", "learners:even_tokens", "--device", "cpu"]
    options += ["--max-new-tokens", "4", "--total-timesteps", "10", "--no-progress"]
    assert main(["train", *options, "--n-episodes", "4", "--run-dir", str(tmp_path / "run")]) == 0
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.n_episodes, config.batch_size) == (4, 4)
