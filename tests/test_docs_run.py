"""Every block of Python and every command of the README and of ``docs/`` runs, in miniature.

Budgets are made small, names of models and files that a reader has are replaced by some that are here, and a page's
blocks and commands run in the order in which they stand, as a reader would type them. Of commands that take minutes
(``make``, benchmarks, installations) it is checked that what they name is there.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from vllm_stand_in import StandIn, served

from agents.cli import main
from text_env.builtin import LANGUAGE_MODEL, REWARD_MODEL

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(textrlhf|python|pip|make|git) ")

# What a reader has, and what stands for it here.
STANDS_FOR = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "builtin",
    "path/to/model": "builtin",
    "path/to/an/instruct/model": "builtin",
    "path/to/classifier": str(REWARD_MODEL),
    "MODEL": "builtin",
}
# Arguments of functions, and the largest value that they have here.
LARGEST = {
    "n_envs": 4,
    "num_envs": 4,
    "n_episodes": 4,
    "total_timesteps": 1,
    "n_eval_episodes": 2,
    "critic_warmup_episodes": 4,
    "n_steps": 16,
}
ALGORITHMS = {"PPO", "A2C", "REINFORCE", "RLOO", "GRPO", "DAPO", "VinePPO", "DrGRPO"}
# Options of commands, and the values that they have here.
OPTIONS = {
    "train": {
        "--total-timesteps": "1",
        "--n-episodes": "8",
        "--batch-size": "4",
        "--n-epochs": "1",
        "--max-new-tokens": "8",
    },
    "evaluate": {"--episodes": "8"},
    "critic": {"--texts": "2", "--positions": "2", "--branches": "2"},
    "reward-model": {"--max-pairs": "32", "--n-normalisation-texts": "8"},
    "sample": {"--max-new-tokens": "4"},
    "doctor": {},
}
# What these do is tested with the runs and answers that they need: tests/runs/test_looking.py, test_push.py.
RUN_ELSEWHERE = {"demo", "report", "watch", "play", "push"}
FLAGS = {"train": ["--no-progress"], "reward-model": ["--no-progress"]}


class Miniature(ast.NodeTransformer):
    """The same program with small budgets."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.copy_location(ast.Constant(STANDS_FOR.get(node.value, node.value)), node)

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        for keyword in node.keywords:
            if keyword.arg in LARGEST and isinstance(keyword.value, ast.Constant):
                keyword.value = ast.Constant(min(keyword.value.value, LARGEST[keyword.arg]))
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name == "learn":
            node.args = [ast.Constant(1) for _ in node.args]
        if name in ALGORITHMS and isinstance(node.func, ast.Name):
            given = {keyword.arg for keyword in node.keywords}
            small = {"n_episodes": 4, "batch_size": 4, "n_epochs": 1}
            node.keywords += [ast.keyword(arg, ast.Constant(value)) for arg, value in small.items() if arg not in given]
        return ast.fix_missing_locations(node)


def commands(block: str) -> list[str]:
    """The commands of a block; lines that end in a backslash go on in the next one."""
    return [line.strip() for line in block.replace("\\\n", " ").splitlines() if COMMAND.match(line.strip())]


def has_parts(page: Path) -> bool:
    return any(language == "python" or commands(block) for language, block in FENCE.findall(page.read_text()))


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the files that the pages speak of."""
    row = {"prompt": "The film", "topic": "film", "word": "music", "answer": "7"}
    rows = [{**row, "split": part} for part in ("train", "eval")]
    for name in ("prompts.jsonl", "gsm8k.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    pairs = [{"prompt": "The film", "chosen": f" was good {i}.", "rejected": f" was bad {i}."} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    function = "def {}(prompts, completions, **columns):\n    return [-len(text) / 100 for text in completions]\n"
    (tmp_path / "my_rewards.py").write_text("".join(map(function.format, ("brevity", "score", "reward"))))
    tasks = [code for _, code in FENCE.findall((ROOT / "docs" / "tasks.md").read_text()) if "def parity" in code]
    (tmp_path / "my_tasks.py").write_text(tasks[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("my_rewards", "my_tasks"):
        sys.modules.pop(name, None)


def run_command(line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    while "=" in words[0]:
        del words[0]
    if words[0] == "textrlhf":
        run_textrlhf(words[1], [STANDS_FOR.get(word, word) for word in words[2:]])
    elif words[0] == "make":
        assert set(words[1:]) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)), line
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {extra for part in re.findall(r"\[([\w,]+)\]", line) for extra in part.split(",")} <= set(extras), line
        assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).exists(), line
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/")), line
    elif words[:2] == ["python", "-m"]:
        check_options(words[2], words[3:])
    else:
        assert words[0] == "git", f"This test doesn't know what to do with {line!r}."


def run_textrlhf(command: str, arguments: list[str]) -> None:
    if command in RUN_ELSEWHERE:
        shown = help_of("agents.cli", [command])
        assert [word for word in arguments if word.startswith("--") and word not in shown] == [], (command, arguments)
        return
    if "--policy" in arguments and command != "reward-model":
        run = Path(arguments[arguments.index("--policy") + 1].removesuffix("/policy"))
        if not run.exists() and run.parent.name == "runs":  # a page may speak of a run that the reader has already
            run_textrlhf("train", ["--run-dir", str(run)])
    if "--resume" not in arguments:
        for option, value in OPTIONS[command].items():
            if option in arguments:
                arguments[arguments.index(option) + 1] = value
            else:
                arguments += [option, value]
        arguments += FLAGS.get(command, [])
    elif "--total-timesteps" in arguments:
        arguments[arguments.index("--total-timesteps") + 1] = "2"
    assert main([command, *arguments]) == 0, (command, arguments)


def check_options(module: str, arguments: list[str]) -> None:
    """Ask a program for its help, and look for the options in it."""
    if not (options := [word for word in arguments if word.startswith("--")]):
        importlib.import_module(module)
        return
    shown = help_of(module, [word for word in arguments[:1] if not word.startswith("-")])
    assert [option for option in options if option not in shown] == [], module


def help_of(module: str, subcommand: list[str]) -> str:
    printed, before = io.StringIO(), sys.argv
    sys.argv = [module, *subcommand, "--help"]
    # A test may have imported it already, of which runpy would warn.
    program = f"{module}.__main__" if hasattr(sys.modules.get(module), "__path__") else module
    imported = {name: sys.modules.pop(name) for name in (program,) if name in sys.modules}
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            runpy.run_module(module, run_name="__main__", alter_sys=True)  # tyro looks for types in it by its name
    finally:
        sys.argv = before
        sys.modules.update(imported)
    assert "usage" in printed.getvalue(), module
    return printed.getvalue()


def test_the_pages_have_code_and_commands() -> None:
    lines = [line for page in PAGES for _, block in FENCE.findall(page.read_text()) for line in commands(block)]
    assert len(lines) >= 50
    assert len([page for page in PAGES if has_parts(page)]) >= 18


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Servers at the addresses that the pages name."""
    model = AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL).eval()
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(served(StandIn(model, max_model_len=256))).url for _ in range(2))
        monkeypatch.setitem(STANDS_FOR, "http://localhost:8000", one)
        monkeypatch.setitem(STANDS_FOR, "http://one:8000,http://two:8000", f"{one},{two}")
        yield


@pytest.mark.filterwarnings("ignore:Module text_env was already imported")
@pytest.mark.parametrize("page", [page for page in PAGES if has_parts(page)], ids=named)
def test_what_a_page_tells_a_reader_to_type_runs(page: Path, desk: Path, request: pytest.FixtureRequest) -> None:
    if "--rollouts" in page.read_text():
        request.getfixturevalue("engines")
    names: dict[str, object] = {"__name__": "page"}
    for language, block in FENCE.findall(page.read_text()):
        if language == "python":
            program = Miniature().visit(ast.parse(block, str(page)))
            exec(compile(ast.fix_missing_locations(program), str(page), "exec"), names)
        for line in commands(block) if not language else []:
            run_command(line)


def test_a_wrong_command_is_noticed(desk: Path) -> None:
    run_command("make demo test")
    with pytest.raises(AssertionError):
        run_command("make nothing")
    with pytest.raises(AssertionError):
        run_command('pip install -e ".[nothing]"')
    with pytest.raises(AssertionError):
        run_command("python -m benchmarks.kl_noise --nothing")
    with pytest.raises(AssertionError):
        run_command("textrlhf sample --policy nothing --prompt A")
