"""What `pip install` gets: the sdist, the wheel that is built from it, and the demo run from that wheel alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILTIN = ROOT / "text_env" / "builtin"
# pip's way from a source tree to a wheel. A warning of setuptools is an error.
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def built(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-W", "error", "-c", BUILD, f"build_{kind}", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


class Distribution:
    """The sdist of a copy of the repository, and the wheel of the unpacked sdist."""

    def __init__(self, root: Path) -> None:
        copy = root / "copy"
        copy.mkdir()
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, copy)
        for name in ("text_env", "agents", "tests", "benchmarks", "docs", "examples"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        sdist = built("sdist", copy, root)
        with tarfile.open(sdist) as archive:
            archive.extractall(root / "unpacked", filter="data")
        [source] = (root / "unpacked").iterdir()
        self.in_sdist = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
        self.wheel = built("wheel", source, root)
        with zipfile.ZipFile(self.wheel) as archive:
            self.in_wheel = set(archive.namelist())
            [metadata] = [name for name in self.in_wheel if name.endswith("/METADATA")]
            self.metadata: Message = Parser().parsestr(archive.read(metadata).decode())


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    return Distribution(tmp_path_factory.mktemp("distribution"))


def test_sdist_and_wheel_hold_every_file_of_the_two_packages(distribution: Distribution) -> None:
    files = {
        str(path.relative_to(ROOT))
        for package in ("text_env", "agents")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"text_env/builtin/prompts.jsonl", "text_env/builtin/language_model/model.safetensors"} <= files
    assert files - distribution.in_sdist == set()
    assert files - distribution.in_wheel == set()


def test_the_wheel_holds_nothing_but_the_packages_and_its_metadata(distribution: Distribution) -> None:
    assert {name.split("/")[0] for name in distribution.in_wheel} == {
        "text_env",
        "agents",
        f"textrlhf-{distribution.metadata['Version']}.dist-info",
    }


def test_of_tests_and_benchmarks_the_sdist_holds_images_only_among_them_the_readmes(distribution: Distribution) -> None:
    shown = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()))
    assert shown - distribution.in_sdist == set()
    held = {name for name in distribution.in_sdist if name.split("/")[0] in ("tests", "benchmarks")}
    assert {name for name in held if not name.endswith(".png")} == set()


def test_the_metadata_says_what_the_package_is_and_for_whom(distribution: Distribution) -> None:
    metadata = distribution.metadata
    assert metadata["Name"] == "textrlhf"
    assert metadata["Author"] == "textrlhf developers"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Programming Language :: Python :: 3.11" in metadata.get_all("Classifier", [])
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_the_demo_runs_from_the_wheel_outside_the_repository(distribution: Distribution, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*install, "--target", str(target), str(distribution.wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)

    where = run(sys.executable, "-c", "import agents, text_env; print(agents.__file__, text_env.__file__)")
    assert where.stdout.split() == [str(target / package / "__init__.py") for package in ("agents", "text_env")]
    demo = run(
        *(sys.executable, str(target / "bin" / "textrlhf"), "demo", "--run-dir", "demo"),
        *("--total-timesteps", "4000", "--episodes", "16"),
    )
    assert "16 episodes each, prompts: builtin:eval" in demo.stdout, demo.stdout + demo.stderr
    assert (elsewhere / "demo" / "policy" / "model.safetensors").exists()
    # That many tokens teach it little: some of the demo's claims don't hold yet, and its status says so.
    assert "NO " in demo.stdout
    assert demo.returncode == 1
