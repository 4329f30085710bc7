"""Another commit of this repository, checked out beside this tree for as long as it is compared with it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commit_of(name: str) -> str:
    """
    :param name: what git calls a commit: a hash, a branch, ``HEAD~1``.
    :return: its full hash.
    """
    return subprocess.check_output(["git", "rev-parse", f"{name}^{{commit}}"], cwd=ROOT, text=True).strip()


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """
    :param commit: a commit's hash.
    :return: a directory with the files of that commit, which is removed afterwards.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(tree), commit], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def run_in(tree: Path, arguments: Sequence[str]) -> None:
    """Run Python on the packages of a tree, whichever are installed.

    :param tree: the directory.
    :param arguments: what follows ``python`` on the command line.
    :raises subprocess.CalledProcessError: if it fails.
    """
    subprocess.run([sys.executable, *arguments], cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=True)
