"""Trees of tensors and JSON values in a directory of safetensors and JSON files, independent of what they belong to.

A tree is a dict whose keys are strings and whose values are trees, tensors, or values that JSON can represent. Its
directory holds ``state.json`` and, for each top-level entry of the tree that has tensors, ``<entry>.safetensors``.
Reading a directory runs no code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from agents.state.arguments import is_plain

Tree = dict[str, Any]


def save(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Write a tree to a directory.

    :param path: the directory; an ending ``.zip``, which SB3's callbacks add, is dropped. It is replaced as a whole, so
        that a process that is killed at any moment leaves either the old one or the new one.
    :param tree: the tree. A tensor that has several names within a top-level entry (tied weights) is written once.
    :raises TypeError: for a key that is no string, or a value that is no tree, no tensor and no JSON value.
    :raises ValueError: for a top-level key that can't be the name of a file.
    """
    files: dict[str, _Tensors] = defaultdict(_Tensors)
    values, names = _taken_apart(tree, (), files)
    directory = _directory(path)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for entry, tensors in files.items():
        save_file(tensors.by_name, partial / f"{entry}.safetensors")
    (partial / "state.json").write_text(json.dumps({"values": values, "tensors": names}, indent=1))
    # A directory can't be replaced in one step. While there is none at its place, `load` reads the previous one.
    if directory.exists():
        shutil.rmtree(_previous(directory), ignore_errors=True)
        os.replace(directory, _previous(directory))
    os.replace(partial, directory)
    shutil.rmtree(_previous(directory), ignore_errors=True)


def load(path: str | Path) -> Tree:
    """Read a tree from a directory.

    :param path: the directory that :func:`save` wrote.
    :return: the tree, with tensors on the CPU. Tuples have become lists. Names that stood for the same tensor do so
        again.
    :raises FileNotFoundError: if there is no checkpoint, or if one of its files is missing.
    :raises ValueError: if the directory was written by another program, or by another version of this one.
    """
    directory = _directory(path)
    if not directory.exists() and _previous(directory).exists():
        directory = _previous(directory)
    if not (directory / "state.json").exists():
        raise FileNotFoundError(f"Expected a checkpoint directory with state.json, found none at {directory}.")
    state = json.loads((directory / "state.json").read_text())
    if not isinstance(state, dict) or set(state) != {"values", "tensors"}:
        raise ValueError(
            f"Expected {directory / 'state.json'} to have 'values' and 'tensors', got {sorted(state)}: it was written "
            "by something else, or by another version. Load it with the version that wrote it."
        )
    tree: Tree = state["values"]
    for entry, names in state["tensors"].items():
        _put_together(tree, {entry: names}, load_file(directory / f"{entry}.safetensors"))
    return tree


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
    return path.with_suffix("") if path.suffix == ".zip" else path


def _previous(directory: Path) -> Path:
    return directory.with_name(directory.name + ".previous")
