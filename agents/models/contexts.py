"""Token contexts: from observations to the fewest sequences that contain them all.

Under causal attention, the hidden state at a position depends only on the tokens up to that position. So a context that
is the beginning of another one needs no forward pass of its own: its hidden state is among those of the longer one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from agents.models.causal_lm import Positions
from agents.models.transfers import to_device
from text_env.constraints import Contexts as Contexts

NAMES = ("attention_mask", "input_ids", "prompt_length")
"""The entries of an observation, in the order in which Gymnasium flattens them."""


def check_spaces(observation_space: Any, action_space: Any = None, reader: str = "CausalLMPolicy") -> None:
    """
    :param observation_space: should be that of the text environment.
    :param action_space: should be that of the text environment; None: not looked at.
    :param reader: who asks, for the error.
    :raises ValueError: if an entry of the observations is missing, or its shape, its dtype or its bounds are not those
        that belong to the other entries and to the actions. A wrapper may have changed them.
    """
    entries = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {}
    if not set(NAMES) <= set(entries):
        raise ValueError(
            f"{reader} reads token contexts: expected a Dict observation space with {sorted(NAMES)} (as TextRLHF-v0 "
            f"has it), got {observation_space}."
        )
    if action_space is not None and not (isinstance(action_space, spaces.Discrete) and action_space.start == 0):
        raise ValueError(
            f"{reader} chooses tokens: expected a Discrete action space starting at 0, got {action_space}."
        )
    wrong = {
        name: f"{name!r} is {entries[name]}" for name in NAMES if not isinstance(entries[name], spaces.Box)
    } or _strange_boxes(entries, None if action_space is None else int(action_space.n))
    if wrong:
        raise ValueError(
            f"{reader} reads token contexts: expected input_ids to be integers from 0 to V - 1 of shape (L,), "
            "attention_mask integers from 0 to 1 of shape (L,), and prompt_length integers from 1 to less than L of "
            f"shape (1,), with V as in the action space; got {'; '.join(wrong.values())}. A wrapper that stacks, "
            "normalises, rescales or casts observations does that: leave it out, as token ids are names and no amounts."
        )


def _strange_boxes(entries: Mapping[str, Any], n_tokens: int | None) -> dict[str, str]:
    """What is wrong with each entry of an observation space, by the entry's name."""
    ids, mask, prompt = (entries[name] for name in ("input_ids", "attention_mask", "prompt_length"))
    wrong = {}
    for name, box, shape in (
        ("input_ids", ids, ids.shape if len(ids.shape) == 1 and ids.shape[0] > 1 else ("L",)),
        ("attention_mask", mask, ids.shape),
        ("prompt_length", prompt, (1,)),
    ):
        if box.shape != shape:
            wrong[name] = f"{name} of shape {box.shape} where input_ids has {ids.shape}"
        elif not np.issubdtype(box.dtype, np.integer):
            wrong[name] = f"{name} of dtype {box.dtype}"
    if wrong:
        return wrong
    vocabulary = int(ids.high.max()) + 1
    if ids.low.any() or (ids.high != ids.high[0]).any() or (n_tokens is not None and vocabulary != n_tokens):
        than = "" if n_tokens is None else f" beside {n_tokens} actions"
        wrong["input_ids"] = f"input_ids from {ids.low.min()} to {ids.high.max()}{than}"
    if mask.low.any() or (mask.high != 1).any():
        wrong["attention_mask"] = f"attention_mask from {mask.low.min()} to {mask.high.max()}"
    if prompt.low[0] != 1 or not 1 <= prompt.high[0] < ids.shape[0]:
        wrong["prompt_length"] = f"prompt_length from {prompt.low[0]} to {prompt.high[0]} where L is {ids.shape[0]}"
    return wrong


def contexts_of(observation: Any) -> Contexts:
    """
    :param observation: a batch of B observations of the environment: a mapping of arrays or tensors with the keys
        ``input_ids``, ``attention_mask`` and ``prompt_length``. Numbers may be of a floating-point type, as SB3 makes
        them for some networks, if they are whole.
    :return: the B contexts.
    :raises ValueError: for a packed batch of whole episodes, and for numbers that are no context, because something has
        normalised them, say, or padded them on the left.
    """
    if "action_mask" in observation:
        raise ValueError(
            "Expected a batch of single observations, got a packed batch of whole episodes, which evaluate_actions "
            "alone takes. With an algorithm that asks for more in its update, as TRPO does, leave EpisodeBuffer out."
        )
    arrays = {name: _numpy(observation[name]) for name in ("input_ids", "attention_mask", "prompt_length")}
    _check_values(**arrays)
    length = arrays["attention_mask"].sum(axis=1, dtype=np.int64)
    step = length - arrays["prompt_length"][:, 0].astype(np.int64)
    if (step < 0).any():
        row = int(step.argmin())
        raise ValueError(
            f"Expected a context to begin with its prompt; that of row {row} has {length[row]} tokens and a prompt of "
            f"{length[row] - step[row]}. Hand on attention_mask and prompt_length as the environment gives them."
        )
    return Contexts(arrays["input_ids"].astype(np.int64, copy=False), length, step)


def _check_values(input_ids: np.ndarray, attention_mask: np.ndarray, prompt_length: np.ndarray) -> None:
    """A wrapper may change observations and leave their space as it was, as SB3's VecNormalize does."""
    shapes = input_ids.shape, attention_mask.shape, prompt_length.shape
    if input_ids.ndim != 2 or shapes != (input_ids.shape, input_ids.shape, (len(input_ids), 1)):
        raise ValueError(
            "Expected observations of B contexts with input_ids [B, L], attention_mask [B, L] and prompt_length "
            f"[B, 1], got the shapes {shapes}: a wrapper that stacks observations has to go."
        )
    for name, array in (
        ("input_ids", input_ids),
        ("attention_mask", attention_mask),
        ("prompt_length", prompt_length),
    ):
        if np.issubdtype(array.dtype, np.floating) and (array != np.round(array)).any():
            raise ValueError(
                f"Expected {name} to be whole numbers, got {array[array != np.round(array)][0]} in it: something has "
                "normalised or rescaled the observations. Leave it out (VecNormalize: norm_obs=False); token ids are "
                "names and no amounts."
            )
    if input_ids.size and input_ids.min() < 0:
        raise ValueError(f"Expected input_ids to be token ids, 0 or more, got {input_ids.min()}.")
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError(
            f"Expected attention_mask to be 0 or 1, got values from {attention_mask.min()} to {attention_mask.max()}: "
            "hand it on as the environment gives it."
        )
    if (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        row = int(np.flatnonzero((attention_mask[:, 1:] > attention_mask[:, :-1]).any(axis=1))[0])
        raise ValueError(
            "Expected contexts that are padded on the right, so that attention_mask is 1 up to the last token and 0 "
            f"after it; in row {row} padding stands before a token. Put the padding after the tokens."
        )


def maximal_sequences(contexts: Contexts) -> tuple[np.ndarray, np.ndarray]:
    """Find those of a batch of contexts that are no beginning of another one.

    :param contexts: B contexts, in any order, possibly repeated.
    :return: the S ≤ B maximal sequences, int64 [S, T], right-padded; and for each context the number of a sequence that
        begins with it, int64 [B].
    """
    input_ids, length, _ = contexts
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
    return np.where(sequences < 0, sequences[:, :1], sequences), row


def share_prefixes(contexts: Contexts, device: torch.device) -> tuple[torch.Tensor, Positions]:
    """Find the maximal sequences of a batch of contexts, and where each context ends in them.

    :param contexts: B contexts, in any order, possibly repeated.
    :param device: the device of the returned tensors.
    :return: the sequences that :func:`maximal_sequences` finds, int64 [S, T]; and the positions in them of the B
        contexts.
    """
    sequences, row = maximal_sequences(contexts)
    input_ids, *at = to_device(device, sequences, row, contexts.length - 1, contexts.step)
    return input_ids, Positions(*at)


def packed_positions(observation: Mapping[str, torch.Tensor]) -> Positions:
    """The positions of the actions in a packed batch of whole episodes.

    :param observation: ``action_mask``, bool [E, T], true where an action follows, and ``prompt_length``, [E, 1]. If it
        has an attribute ``at``, as the batches of ``EpisodeBuffer`` have, the positions are known already. Otherwise a
        GPU is waited for, since their number depends on what the mask holds.
    :return: N positions in row-major order, which is the order of a packed batch's actions.
    """
    known: Positions | None = getattr(observation, "at", None)
    if known is not None:
        return known
    row, column = observation["action_mask"].nonzero(as_tuple=True)
    return Positions(row, column, column + 1 - observation["prompt_length"].long()[row, 0])


def _numpy(array: torch.Tensor | np.ndarray) -> np.ndarray:
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else array
