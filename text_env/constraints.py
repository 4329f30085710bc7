"""Constraints: which tokens may follow a context. A constraint belongs to the task, not to the weights being trained.

A constraint is any callable ``constraint(contexts, n_tokens) -> bool [B, n_tokens]``, true where a token is allowed.
The same object is used everywhere: the environment computes ``action_masks()`` with it, and the policy and its frozen
reference give the tokens that it forbids probability 0, in the rollout and in the update alike.

Notation: B contexts, L columns, V tokens.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from text_env.imports import import_object, is_object_name


class Contexts(NamedTuple):
    """A batch of token contexts. They stay on the CPU, since they are compared and sorted, which a GPU would wait for.

    :param input_ids: int64 [B, L], left-aligned.
    :param length: int64 [B], the number of tokens in each context.
    :param step: int64 [B], how many of these tokens belong to the response.
    """

    input_ids: NDArray[np.int64]
    length: NDArray[np.int64]
    step: NDArray[np.int64]


class Constraint(Protocol):
    """A pure function of contexts, which must not depend on the weights being trained.

    If it did, an updated policy could give probability 0 to tokens that it sampled before the update, and its KL
    divergence would be infinite.
    """

    def __call__(self, contexts: Contexts, n_tokens: int) -> NDArray[np.bool_]:
        """
        :param contexts: B contexts. Columns to the right of a context hold −1, which is no token.
        :param n_tokens: V.
        :return: bool [B, V], true where the token is allowed. Each context allows at least one token.
        """
        ...


@dataclass(frozen=True)
class _TokenSet:
    token_ids: Iterable[int]

    def __post_init__(self) -> None:
        name = type(self).__name__
        try:
            ids = tuple(sorted({operator.index(token) for token in self.token_ids}))
        except TypeError:
            ids = ()
        if not ids or min(ids) < 0:
            raise ValueError(f"Expected token ids for {name}, at least one integer >= 0, got {self.token_ids!r}.")
        object.__setattr__(self, "token_ids", ids)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({reprlib.repr(self.token_ids)})"

    def among(self, n_tokens: int) -> NDArray[np.bool_]:
        """
        :param n_tokens: V.
        :return: bool [V], true for the tokens of this set.
        :raises ValueError: if one of them is outside the vocabulary.
        """
        ids = np.array(self.token_ids)
        if ids.max() >= n_tokens:
            raise ValueError(f"Expected {self} to name tokens of the vocabulary of {n_tokens}, got {ids.max()}.")
        mask = np.zeros(n_tokens, np.bool_)
        mask[ids] = True
        return mask


class AllowedTokens(_TokenSet):
    """Allows these tokens and no others. EOS is a token like any other: unless it is named, only the budget ends texts.

    :param token_ids: integers in [0, V), at least one.
    """

    def __call__(self, contexts: Contexts, n_tokens: int) -> NDArray[np.bool_]:
        return np.broadcast_to(self.among(n_tokens), (len(contexts.length), n_tokens))


class ForbiddenTokens(_TokenSet):
    """Allows every token but these.

    :param token_ids: integers in [0, V), at least one.
    """

    def __call__(self, contexts: Contexts, n_tokens: int) -> NDArray[np.bool_]:
        return np.broadcast_to(~self.among(n_tokens), (len(contexts.length), n_tokens))


@dataclass(frozen=True)
class MinimumLength:
    """Forbids EOS until the response has a minimum number of tokens.

    :param min_new_tokens: the minimum.
    :param eos_token_ids: the tokens that end a response.
    """

    min_new_tokens: int
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.min_new_tokens < 0 or not self.eos_token_ids or min(self.eos_token_ids) < 0:
            raise ValueError(f"Expected MinimumLength to have a number and token ids, all >= 0, got {self}.")

    def __call__(self, contexts: Contexts, n_tokens: int) -> NDArray[np.bool_]:
        masks = np.ones((len(contexts.length), n_tokens), np.bool_)
        masks[np.ix_(contexts.step < self.min_new_tokens, np.array(self.eos_token_ids))] = False
        return masks


@dataclass(frozen=True)
class AllOf:
    """Allows the tokens that every one of several constraints allows.

    :param constraints: two or more constraints.
    """

    constraints: tuple[Constraint, ...]

    def __call__(self, contexts: Contexts, n_tokens: int) -> NDArray[np.bool_]:
        first, *others = self.constraints
        masks = _checked(first, contexts, n_tokens)
        for other in others:
            masks = masks & _checked(other, contexts, n_tokens)
        return masks


def make_constraint(constraint: Any) -> Constraint | None:
    """Resolve the environment's argument ``constraint``.

    :param constraint: a callable (see :class:`Constraint`), its name as ``"module:function"``, a list of these, all of
        which must hold, or None.
    :return: the constraint, or None if nothing is forbidden.
    :raises ValueError: if the argument is none of these.
    """
    if constraint is None:
        return None
    if isinstance(constraint, list | tuple):
        return all_of(*(make_constraint(part) for part in constraint))
    found = import_object(constraint) if isinstance(constraint, str) and is_object_name(constraint) else constraint
    if not callable(found) or isinstance(found, type):
        raise ValueError(
            "Expected constraint to be a callable (contexts, n_tokens) -> bool [B, n_tokens], the name of one as "
            f"'module:function', or a list of these, got {constraint!r}."
        )
    return all_of(found)


def all_of(*constraints: Constraint | None) -> Constraint | None:
    """The conjunction of several constraints.

    A constraint that ranks the tokens and keeps the best of them has a method ``within(constraint)``, which returns the
    same constraint ranking only what the other one allows. It is called here with the conjunction of the other
    constraints. Otherwise a nucleus that holds EOS alone would, under a minimum length, leave no token at all.

    :param constraints: any number of constraints; None forbids nothing.
    :return: None if there is no constraint, the constraint if there is one, else an :class:`AllOf`.
    """
    parts: list[Any] = []
    for constraint in constraints:
        for part in constraint.constraints if isinstance(constraint, AllOf) else [constraint]:
            if not any(part is other for other in parts):  # whatever they compare as
                parts.append(part)
    fixed = tuple(part for part in parts if part is not None and not hasattr(part, "within"))
    ranking = [part for part in parts if hasattr(part, "within")]
    if len(fixed) + len(ranking) <= 1:
        return next(iter([*fixed, *ranking]), None)
    other = AllOf(fixed) if len(fixed) > 1 else next(iter(fixed), None)
    return AllOf((*fixed, *(part if other is None else part.within(other) for part in ranking)))


def allowed_tokens(constraint: Constraint, contexts: Contexts, n_tokens: int) -> NDArray[np.bool_]:
    """Call a constraint, and check the mask that it returns.

    :param constraint: any constraint.
    :param contexts: B contexts. Columns to the right of a context may hold anything.
    :param n_tokens: V.
    :return: bool [B, V], a fresh array; each context allows at least one token.
    :raises ValueError: if the constraint returns no such array, or forbids every token after some context.
    """
    # In a batch of whole episodes the tokens that follow a context stand to its right; a constraint must not see them.
    columns = np.arange(contexts.input_ids.shape[1])
    input_ids = np.where(columns < contexts.length[:, None], contexts.input_ids, -1)
    return np.array(_checked(constraint, contexts._replace(input_ids=input_ids), n_tokens))


def _checked(constraint: Constraint, contexts: Contexts, n_tokens: int) -> NDArray[np.bool_]:
    masks = constraint(contexts, n_tokens)
    shape = (len(contexts.length), n_tokens)
    if not isinstance(masks, np.ndarray) or masks.dtype != np.bool_ or masks.shape != shape:
        got = f"{masks.dtype} of shape {masks.shape}" if isinstance(masks, np.ndarray) else f"a {type(masks).__name__}"
        raise ValueError(
            f"Expected the constraint {name_of(constraint)} to return a NumPy array of bool of shape {shape} "
            f"(contexts, tokens), true where a token is allowed; got {got}."
        )
    if not (some := masks.any(axis=1)).all():
        row = int(np.flatnonzero(~some)[0])
        length, step = int(contexts.length[row]), int(contexts.step[row])
        raise ValueError(
            f"Expected the constraint {name_of(constraint)} to allow at least one token after every context; it allows "
            f"none after {contexts.input_ids[row, :length].tolist()}, of which {step} are the response. Let it allow "
            f"EOS there, for example."
        )
    return masks


def name_of(constraint: Constraint) -> str:
    """
    :param constraint: any constraint.
    :return: its name in error messages: the name of a function, else the ``repr``.
    """
    return getattr(constraint, "__name__", None) or repr(constraint)
