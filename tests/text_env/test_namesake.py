"""Another package called `agents` is noticed, and the message says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from text_env.namesake import complaint

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; from text_env.namesake import main; sys.argv = ['textrlhf', '--version']; sys.exit(main())"


def run(script: str, *first: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with these folders before ours on the path."""
    path = os.pathsep.join(map(str, [*first, ROOT]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT.parent
    )


@pytest.fixture(params=["a package", "a package with our other files"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    package = tmp_path / "agents"
    package.mkdir()
    (package / "__init__.py").write_text('"""Agents that call tools."""\nclass Agent: ...\n')
    if request.param == "a package with our other files":  # as pip leaves it, where both are installed
        (package / "cli.py").write_text((ROOT / "agents" / "cli.py").read_text())
    return tmp_path


def test_importing_the_environment_warns_of_another_agents_and_works(other: Path) -> None:
    done = run("import text_env, sys; print(text_env.TextEnv.__name__, 'agents' in sys.modules)", other)
    assert done.stdout.split() == ["TextEnv", "False"]
    assert f"UserWarning: The package `agents` that Python finds is not textrlhf's: {other}" in done.stderr
    assert "uninstall openai-agents and install textrlhf again" in done.stderr


def test_the_command_line_says_it_instead_of_failing_deep_inside(other: Path) -> None:
    done = run(COMMAND, other)
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"The package `agents` that Python finds is not textrlhf's: {other}" in done.stderr
    assert "rename it, or take the folder that it is in off PYTHONPATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_ours_is_recognised() -> None:
    assert complaint() is None
    done = run(COMMAND)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("textrlhf ")
