"""Token contexts: from observations to the fewest sequences that contain them all.

Under causal attention, the hidden state at a position depends only on the tokens up to that position. So a context that
is the beginning of another one needs no forward pass of its own: its hidden state is among those of the longer one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from agents.models.causal_lm import Positions
from text_env.constraints import Contexts as Contexts


def contexts_of(observation: Any) -> Contexts:
    """
    :param observation: a batch of B observations of the environment: a mapping of arrays or tensors with the keys
        ``input_ids``, ``attention_mask`` and ``prompt_length``.
    :return: the B contexts.
    :raises ValueError: for a packed batch of whole episodes.
    """
    if "action_mask" in observation:
        raise ValueError(
            "Expected a batch of single observations, got a packed batch of whole episodes, which evaluate_actions "
            "alone takes. With an algorithm that asks for more in its update, as TRPO does, leave EpisodeBuffer out."
        )
    arrays = {name: _numpy(observation[name]) for name in ("input_ids", "attention_mask", "prompt_length")}
    length = arrays["attention_mask"].sum(axis=1, dtype=np.int64)
    step = length - arrays["prompt_length"][:, 0].astype(np.int64)
    return Contexts(arrays["input_ids"].astype(np.int64, copy=False), length, step)


def share_prefixes(contexts: Contexts, device: torch.device) -> tuple[torch.Tensor, Positions]:
    """Find the maximal sequences of a batch of contexts, those that are no beginning of another one, and where each
    context ends in them.

    :param contexts: B contexts, in any order, possibly repeated.
    :param device: the device of the returned tensors.
    :return: the S ≤ B maximal sequences, int64 [S, T], right-padded; and the positions in them of the B contexts.
    """
    input_ids, length, step = contexts
    used = int(length.max())
    columns = np.arange(used)
    # −1 as padding sorts before every token, so a context is sorted right before the contexts that extend it.
    tokens = np.where(columns < length[:, None], input_ids[:, :used], -1)
    order = np.lexsort(tokens.T[::-1])
    ordered, ordered_length = tokens[order], length[order]
    same = (ordered[:-1] == ordered[1:]) | (columns >= ordered_length[:-1, None])
    is_prefix_of_next = np.append(same.all(axis=1), False)
    maximal = np.flatnonzero(~is_prefix_of_next)
    # Every context belongs to the first maximal sequence at or after it in the sorted order.
    row = np.empty(len(length), dtype=np.int64)
    row[order] = np.searchsorted(maximal, np.arange(len(length)))
    sequences = ordered[maximal]
    # Causal attention never looks at padding. It repeats the first token because some models search their inputs for
    # the pad token and warn of a missing attention mask.
    sequences = np.where(sequences < 0, sequences[:, :1], sequences)
    at = Positions(*(torch.from_numpy(x).to(device) for x in (row, length - 1, step)))
    return torch.from_numpy(sequences).to(device), at


def packed_positions(observation: Mapping[str, torch.Tensor]) -> Positions:
    """The positions of the actions in a packed batch of whole episodes.

    :param observation: ``action_mask``, bool [E, T], true where an action follows, and ``prompt_length``, [E, 1].
    :return: N positions in row-major order, which is the order of a packed batch's actions.
    """
    row, column = observation["action_mask"].nonzero(as_tuple=True)
    return Positions(row, column, column + 1 - observation["prompt_length"].long()[row, 0])


def _numpy(array: torch.Tensor | np.ndarray) -> np.ndarray:
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else array
