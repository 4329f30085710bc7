"""Every command of the page on looking at runs, typed as it stands there, on miniature runs."""

from __future__ import annotations

import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from learners import PROMPTS, save_model

from agents.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "report.md"
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"^```\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by the names that the page has: one that was trained, and copies of it."""
    root = tmp_path_factory.mktemp("looking")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    names = ["--model", save_model(root / "model"), "--prompts", str(root / "prompts.txt"), "--reward", "sentiment"]
    sizes = ["--max-new-tokens", "6", "--n-episodes", "8", "--batch-size", "4", "--total-timesteps", "60"]
    mine = root / "runs" / "mine"
    assert main(["train", *names, *sizes, "--device", "cpu", "--no-progress", "--run-dir", str(mine)]) == 0
    for name, seed in (("ppo-0", 0), ("ppo-1", 1), ("grpo", 0)):
        copy = shutil.copytree(mine, root / "runs" / name)
        config = yaml.safe_load((copy / "config.yaml").read_text())
        (copy / "config.yaml").write_text(yaml.safe_dump({**config, "seed": seed, "algo": name.split("-")[0]}))
    return root


def test_the_page_has_commands() -> None:
    assert {command.split()[1] for command in COMMANDS} == {"report", "watch", "play"}
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_does_what_it_says(
    command: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    monkeypatch.setattr("sys.stdin", io.StringIO("2\nb\ng\nq\n"))
    name, *arguments = shlex.split(command)
    assert name == "textrlhf"
    assert main(arguments) == 0
    said = {"report": "Wrote ", "watch": "Score (trained on)", "play": "ended by"}
    assert said[arguments[0]] in " ".join(capsys.readouterr().out.split())
    if arguments[0] == "report":
        out = arguments[arguments.index("--out") + 1] if "--out" in arguments else "runs/mine/report.html"
        assert (runs / out).read_text().endswith("</html>")
    if "--out" in arguments:
        assert "ppo (2 seeds)" in (runs / "compared.html").read_text()
