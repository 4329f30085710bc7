"""An update in which a number was not finite, written down for inspection."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.state import checkpoint
from text_env.vector_env import TextVectorEnv

COLUMNS = ("rewards", "values", "log_probs", "log_ratio", "advantages", "returns", "scores")


def save_for_inspection(
    directory: str | None, name: str, buffer: EpisodeBuffer, env: TextVectorEnv, facts: dict[str, Any]
) -> Path:
    """Write the rollout of an update to a directory that :func:`agents.state.checkpoint.load` reads.

    :param directory: where it goes, such as the directory of the logger; None: a new temporary directory.
    :param name: the name of the directory that is written in there.
    :param buffer: the rollout.
    :param env: the environment, whose tokenizer makes the texts readable.
    :param facts: JSON values to write beside it: what happened, and when.
    :return: the directory that was written. In its tree, ``rollout`` has the columns of the buffer (one number per
        action, ``tokens``, ``is_action`` and ``stream_starts`` per token, ``scores`` per episode), and ``texts`` the
        episodes as strings. A column with a number that is not finite is a list in ``not_finite`` instead, since
        checkpoints hold no such tensors.
    """
    streams = np.split(buffer.tokens, buffer.stream_starts[1:-1])
    names = (*COLUMNS, "tokens", "is_action", "stream_starts", "starts")
    columns = {name: np.asarray(getattr(buffer, name)) for name in names}
    finite = {name: bool(np.isfinite(column).all()) for name, column in columns.items()}
    path = Path(directory or tempfile.mkdtemp(prefix="textrlhf-")) / name
    tree = {
        "rollout": {name: torch.tensor(column) for name, column in columns.items() if finite[name]},
        "not_finite": {name: column.tolist() for name, column in columns.items() if not finite[name]},
        "texts": [env.tokenizer.decode(stream.tolist()) for stream in streams],
        "facts": facts,
    }
    checkpoint.save(path, tree)
    return path
