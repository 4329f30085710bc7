"""The list of a checkpoint's files, by which every change of one of them is noticed.

``manifest.json`` holds the number of the format, the size and the SHA-256 of each other file, notes about the
checkpoint, and the SHA-256 of all this. It detects accidents (bits that flip, copies that stop half-way, files of two
checkpoints mixed up). It is no signature: whoever changes a file on purpose can write a new manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"  # written last: a directory without it is no whole checkpoint
FORMAT = 1  # a change of the files that older versions can't read gets the next number


class CheckpointError(ValueError):
    """A checkpoint is damaged, or not in the format of this version."""


def seal(directory: Path, notes: Mapping[str, Any], format_number: int = FORMAT) -> None:
    """Write the manifest of a directory whose other files are complete.

    :param directory: the directory.
    :param notes: JSON values that :func:`notes_of` returns without reading the other files.
    :param format_number: the number of the files' format.
    :raises OSError: if a file can't be read or written.
    """
    files = {path.name: _facts(path) for path in sorted(directory.iterdir())}
    content = {"format": format_number, "files": files, "notes": dict(notes)}
    (directory / MANIFEST).write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1))


def verify(directory: Path) -> None:
    """
    :param directory: a directory with a manifest.
    :raises FileNotFoundError: if there is no directory, or nothing in it.
    :raises CheckpointError: if its files are not those that were written; it names all that is wrong.
    """
    expected: dict[str, Any] = _read(directory)["files"]
    found = {path.name: path for path in directory.iterdir() if path.name != MANIFEST}
    wrong = [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    for name, facts in expected.items():
        if name not in found or not found[name].is_file():
            wrong.append(f"{name} is missing")
        elif (size := found[name].stat().st_size) != facts["size"]:
            wrong.append(f"{name} has {size} bytes in place of {facts['size']}")
        elif _facts(found[name]) != facts:
            wrong.append(f"{name} has another SHA-256, so its contents have changed")
    if wrong:
        raise CheckpointError(
            f"Expected the files of the checkpoint {directory} as they were written, got others: {'; '.join(wrong)}. "
            "Use another checkpoint of the run, or another copy of this one."
        )


def notes_of(directory: Path) -> dict[str, Any]:
    """
    :param directory: a directory with a manifest, which alone is read.
    :return: the notes that were given to :func:`seal`.
    :raises FileNotFoundError: if there is no directory, or nothing in it.
    :raises CheckpointError: if there is no manifest, or it is not as it was written.
    """
    notes: dict[str, Any] = _read(directory)["notes"]
    return notes


def _read(directory: Path) -> dict[str, Any]:
    """The manifest, if it is whole and in the format of this version."""
    if not directory.is_dir() or not any(directory.iterdir()):
        raise FileNotFoundError(f"Expected a checkpoint directory with {MANIFEST}, found none at {directory}.")
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"Expected a checkpoint directory with {MANIFEST}, found none in {directory}: the file was removed, the "
            "directory is no checkpoint, or an earlier version wrote it. Load it with the version that wrote it."
        )
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("sha256")
        intact = digest == _digest(content)
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(
            f"Expected {path} as it was written, but its contents have changed. Use another checkpoint of the run, or "
            "another copy of this one."
        )
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"Expected a checkpoint of format {FORMAT}, got format {content.get('format')!r} in {path}: load it with "
            "the version that wrote it."
        )
    if not _has_all_parts(content):
        raise CheckpointError(f"Expected sizes, hashes and notes in {path}, got something else. It is no manifest.")
    return content


def _has_all_parts(content: dict[str, Any]) -> bool:
    files = content.get("files")
    return (
        isinstance(content.get("notes"), dict)
        and isinstance(files, dict)
        and all(isinstance(facts, dict) and facts.keys() == {"size", "sha256"} for facts in files.values())
    )


def _facts(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
