"""The pages as a site: `make docs`. Without the extra `docs` only what needs no MkDocs is tested."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import yaml

import agents
import text_env
from text_env.env import TextEnv

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
needs_mkdocs = pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra `docs`")


def leaves(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in leaves(part)]  # type: ignore


def home_of(package: object, name: str) -> str:
    """The full name of what a package exports, where it is defined."""
    value = getattr(package, name)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    constants = {"NO_ACTION": "text_env.episodes.NO_ACTION", "NO_POINT": "text_env.wrappers.NO_POINT"}
    return constants[name]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does: a warning is an error."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert leaves(nav)[0] == "index.md"
    assert PAGES - set(leaves(nav)) == set()
    assert len(PAGES) >= 20


def test_every_algorithm_has_a_page_with_equation_code_example_metrics_and_command() -> None:
    for name in ("a2c", "reinforce", "rloo", "grpo", "dapo", "vineppo"):
        text = (ROOT / "docs" / f"{name}.md").read_text()
        headings = re.findall(r"^## (.*)$", text, re.M)
        assert headings == ["What it is", "Code", "An example, and the defaults", "Metrics", "Command and curve"], name
        assert "<!-- code: agents/" in text
        assert f"({name}.md)" in (ROOT / "docs" / "algorithms.md").read_text()


@needs_mkdocs
def test_the_site_is_built_without_a_warning_and_holds_every_page(site: Path) -> None:
    for page in PAGES:
        directory = page.removesuffix(".md").removesuffix("index")
        assert (site / directory / "index.html").exists(), page
    front = (site / "index.html").read_text()
    assert "Token generation is a Gymnasium environment" in front
    assert 'href="tutorials/"' in front
    assert "https://fonts.g" not in front  # nothing is fetched from elsewhere


@needs_mkdocs
def test_the_api_reference_has_every_public_name(site: Path) -> None:
    compressed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split(" ")[0] for line in zlib.decompress(compressed).decode().splitlines()}
    exported = {home_of(package, name) for package in (agents, text_env) for name in package.__all__}
    assert exported - documented == set()
    assert f"{TextEnv.__module__}.{TextEnv.__qualname__}.reset" in documented
    assert not [name for name in documented if re.search(r"\._[a-z]", name)]


@needs_mkdocs
def test_code_on_a_page_is_that_of_the_file(site: Path) -> None:
    page = re.sub(r"<[^>]*>", "", (site / "rloo" / "index.html").read_text())
    assert "advantages = leave_one_out(returns, self.vector_env.group_size)" in page
    assert "The return of a text minus the mean return of the others" not in page  # docstrings are left out
    assert "<!-- code" not in (site / "tutorials" / "own_task" / "index.html").read_text()
