"""What lies at a path from which an algorithm is to be loaded, where it is no checkpoint of this package."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from stable_baselines3.common import save_util

from agents.state.history import CheckpointHistory


def check_found(path: str | Path, algorithm: str) -> None:
    """
    :param path: where a checkpoint is looked for.
    :param algorithm: the name of the class that looks.
    :raises ValueError: if there is something else, saying what, and which function loads that.
    """
    path = Path(path)
    directory = _directory(path)
    if (directory / "state.json").exists():
        return
    for file in (path, directory.with_name(directory.name + ".zip")):
        if file.is_file() and zipfile.is_zipfile(file):
            raise ValueError(
                f"Expected a checkpoint directory, as agents.{algorithm}.save writes it, got the zip file {file}, as "
                f"Stable-Baselines3's own algorithms write it: use stable_baselines3.{algorithm}.load({str(file)!r})."
            )
    if any((directory / name).exists() for name in ("adapter_config.json", "config.json")):
        raise ValueError(
            f"Expected a checkpoint directory, as agents.{algorithm}.save writes it, got {directory}, a model as "
            "policy.save_pretrained or transformers write it: use agents.policies.causal_lm_policy.load_policy("
            f"{str(directory)!r}, env) for a policy that writes, or policy_kwargs={{'model': {str(directory)!r}}} to "
            "train on from it."
        )
    for history in (CheckpointHistory(directory), CheckpointHistory(directory / "checkpoints")):
        if timesteps := history.timesteps():
            raise ValueError(
                f"Expected a checkpoint directory, as agents.{algorithm}.save writes it, got {directory}, in which "
                f"there are several: use agents.{algorithm}.load({str(history.path(timesteps[-1]))!r}, env=...) for "
                "the newest, or textrlhf train --resume to go on with the run."
            )


def _directory(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".zip" else path


# SB3's own way to teach `load` a further kind of path; without it, our directories give a bare IsADirectoryError.
@save_util.open_path.register(str)
@save_util.open_path.register(Path)
def _open_path(path: str | Path, mode: str, verbose: int = 0, suffix: str | None = None) -> Any:
    path = Path(path)
    directory = _directory(path)
    if mode.startswith("r") and not path.is_file() and (directory / "state.json").exists():
        raise ValueError(
            f"Expected a zip file, as Stable-Baselines3's own algorithms write it, got the directory {directory}, a "
            "checkpoint of the package agents: use agents.PPO.load(path, env=...), or whichever algorithm of agents "
            "has written it."
        )
    return save_util.open_path_pathlib(path, mode, verbose, suffix)
