"""Trees of tensors and JSON values in a directory of safetensors and JSON files, independent of what they belong to.

A tree is a dict whose keys are strings and whose values are trees, tensors, or values that JSON can represent. Its
directory holds ``state.json``, for each top-level entry of the tree that has tensors ``<entry>.safetensors``, and
``manifest.json``, by which damage is noticed. Reading a directory runs no code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from agents.state.arguments import is_plain
from agents.state.manifest import MANIFEST, CheckpointError, seal, verify
from agents.state.replacing import present, replacing

Tree = dict[str, Any]


STATE = "state.json"


def save(
    path: str | Path, tree: Mapping[str, Any], notes: Mapping[str, Any] | None = None, finite: bool = False
) -> None:
    """Write a tree to a directory.

    :param path: the directory; an ending ``.zip``, which SB3's callbacks add, is dropped. It is replaced as a whole, so
        that a process that is killed at any moment leaves either the old one or the new one. When this function
        returns, the new one is on the disk.
    :param tree: the tree. A tensor that has several names within a top-level entry (tied weights) is written once.
    :param notes: JSON values for :func:`agents.state.manifest.notes_of`.
    :param finite: refuse NaN and infinite numbers, so that the state of a training never replaces a better one.
    :raises TypeError: for a key that is no string, or a value that is no tree, no tensor and no JSON value.
    :raises ValueError: for a top-level key that can't be the name of a file.
    :raises FloatingPointError: if ``finite``, and a tensor holds NaN or an infinite number; it names the tensor.
    :raises FileExistsError: if there is something else than a checkpoint, which is left as it is.
    :raises OSError: if the files can't be written (a full disk). The old checkpoint is as it was.
    """
    directory = _replaceable(path)
    files: dict[str, _Tensors] = defaultdict(_Tensors)
    values, names = _taken_apart(tree, (), files)
    if finite:
        _check_finite(files)
    with replacing(directory) as partial:
        for entry, tensors in files.items():
            _write(tensors.by_name, partial / f"{entry}.safetensors")
        (partial / STATE).write_text(json.dumps({"values": values, "tensors": names}, indent=1))
        seal(partial, notes or {})


def load(path: str | Path) -> Tree:
    """Read a tree from a directory, after its files have been checked against its manifest.

    :param path: the directory that :func:`save` wrote.
    :return: the tree, with tensors on the CPU. Tuples have become lists. Names that stood for the same tensor do so
        again.
    :raises FileNotFoundError: if there is no checkpoint.
    :raises CheckpointError: if a file is missing, unknown or not as it was written, or if the directory was written by
        another program, or by another version of this one.
    """
    directory = present(_directory(path))
    verify(directory)
    try:
        state = json.loads((directory / STATE).read_bytes())
        tree: Tree = state["values"]
        for entry, names in state["tensors"].items():
            if not entry.isidentifier():
                raise ValueError(f"{entry!r} is not the name of a file of tensors")
            _put_together(tree, {entry: names}, load_file(directory / f"{entry}.safetensors"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        # The files are as they were written, but this function's counterpart has not written them.
        raise CheckpointError(
            f"Expected a checkpoint as agents writes it, got something else in {directory}: {type(error).__name__}: "
            f"{error}. Load it with the program that wrote it."
        ) from error
    return tree


def copy(source: str | Path, target: str | Path) -> None:
    """Write a second checkpoint with the contents of another, which takes no room where there are hard links.

    :param source: the directory of the checkpoint.
    :param target: the directory of its copy, which is replaced as a whole.
    :raises FileNotFoundError: if there is no checkpoint.
    :raises CheckpointError: if it is damaged.
    :raises FileExistsError: if there is something else than a checkpoint at ``target``, which is left as it is.
    :raises OSError: if the copy can't be written.
    """
    directory = present(_directory(source))
    verify(directory)
    with replacing(_replaceable(target)) as partial:
        for path in directory.iterdir():
            try:
                os.link(path, partial / path.name)  # no file of a checkpoint is ever changed
            except OSError:  # a file system without hard links
                shutil.copyfile(path, partial / path.name)


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """
    :raises OSError: as other functions that write do, where safetensors has an exception of its own.
    """
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


class _Tensors:
    """The tensors of one file."""

    def __init__(self) -> None:
        self.by_name: dict[str, torch.Tensor] = {}
        self._names: dict[Any, str] = {}
        self._memory: set[tuple[torch.device, int]] = set()

    def add(self, tensor: torch.Tensor, name: str) -> str:
        """
        :param tensor: the tensor. It is not copied, unless another tensor of the file shares a part of its memory.
        :param name: the preferred name.
        :return: the tensor's name in the file, which differs from ``name`` if that is taken, or if the tensor is in the
            file already.
        """
        tensor = tensor.detach()
        memory = (tensor.device, tensor.untyped_storage().data_ptr())
        itself = (*memory, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and itself in self._names:
            return self._names[itself]
        while name in self.by_name:
            name += "_"
        self._names[itself] = name
        self.by_name[name] = (tensor.clone() if memory in self._memory else tensor).contiguous()
        self._memory.add(memory)
        return name


def _taken_apart(tree: Mapping[str, Any], path: tuple[str, ...], files: Mapping[str, _Tensors]) -> tuple[Tree, Tree]:
    """
    :param tree: a tree.
    :param path: the keys that lead to the tree.
    :param files: the tensors of each top-level entry, to which those of the tree are added.
    :return: the tree without its tensors, and a tree that holds nothing but the names of the tensors.
    """
    values: Tree = {}
    names: Tree = {}
    for key, value in tree.items():
        here = (*path, key)
        if not isinstance(key, str):
            raise TypeError(f"Expected the keys of a checkpoint to be strings, got {key!r} in {path}.")
        if not path and not key.isidentifier():
            raise ValueError(f"Expected the entries of a checkpoint to be identifiers (they name files), got {key!r}.")
        if isinstance(value, torch.Tensor):
            names[key] = files[here[0]].add(value, ".".join(here[1:]) or key)
        elif isinstance(value, Mapping):
            values[key], below = _taken_apart(value, here, files)
            if below:
                names[key] = below
        elif is_plain(value):
            values[key] = value
        else:
            raise TypeError(f"Expected a tensor or a JSON value at {'/'.join(here)}, got {type(value).__name__}.")
    return values, names


def _put_together(values: Tree, names: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Insert tensors into the tree that they were taken from, at the places that their names have in ``names``."""
    for key, name in names.items():
        if isinstance(name, dict):
            _put_together(values[key], name, tensors)
        else:
            values[key] = tensors[name]


def _directory(path: str | Path) -> Path:
    path = Path(path)
    path = path if path.name else path.resolve()  # "."
    return path.with_suffix("") if path.suffix == ".zip" else path


def _replaceable(path: str | Path) -> Path:
    """The directory of a checkpoint that is to be written: nobody's other files are taken for an older one."""
    directory = _directory(path)
    if directory.is_dir():
        names = sorted(file.name for file in directory.iterdir())
        if not names or {MANIFEST, STATE} & set(names):  # a damaged checkpoint may have lost one of the two
            return directory
        found = f"a directory that holds {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
    elif directory.exists():
        found = "a file"
    else:
        return directory
    raise FileExistsError(
        f"Expected a path for a checkpoint at which there is nothing yet, or an older checkpoint, which is replaced; "
        f"{directory} is {found}. Nothing was written: choose another path."
    )


def _check_finite(files: Mapping[str, _Tensors]) -> None:
    for entry, tensors in files.items():
        for name, tensor in tensors.by_name.items():
            if not bool(torch.isfinite(tensor).all()):
                raise FloatingPointError(
                    f"Expected finite numbers in a checkpoint, got NaN or an infinite one in {entry}/{name}: nothing "
                    "was written, so the checkpoint before it is still there. Go on from that, at a lower learning "
                    "rate, say."
                )
