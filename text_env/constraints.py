"""Which tokens may follow a context: masks that belong to the task, and do not depend on the weights being trained.

A constraint is any callable ``constraint(contexts, n_tokens) -> bool [B, n_tokens]``, true where a token is allowed.
One object serves all: the environment answers ``action_masks()`` with it, and the policy and its frozen reference give
what it forbids probability 0, in rollout and update alike.

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
    """A batch of token contexts, on the CPU: they are compared and sorted, which a GPU should not wait for.

    :param input_ids: int64 [B, L], left-aligned.
    :param length: int64 [B], tokens in the context.
    :param step: int64 [B], tokens of the response among them.
    """

    input_ids: NDArray[np.int64]
    length: NDArray[np.int64]
    step: NDArray[np.int64]


class Constraint(Protocol):
    """A pure function of contexts. It must not depend on the weights that are trained: a policy that cuts its own
    distribution gives probability 0 to what it sampled before the last update, and its KL becomes infinite.
    """

    def __call__(self, contexts: Contexts, n_tokens: int) -> NDArray[np.bool_]:
        """
        :param contexts: B contexts; what stands to the right of a context is −1, which is no token.
        :param n_tokens: V.
        :return: bool [B, V], true where the token is allowed. At least one is, in each context.
        """
        ...


@dataclass(frozen=True)
class _TokenSet:
    token_ids: Iterable[int]

    def __post_init__(self) -> None:
        name = type(self).__name__
        try:
            ids = tuple(operator.index(token) for token in self.token_ids)
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
        :return: bool [V], true for these tokens.
        """
        ids = np.array(self.token_ids)
        if ids.max() >= n_tokens:
            raise ValueError(f"Expected {self} to name tokens of the vocabulary of {n_tokens}, got {ids.max()}.")
        mask = np.zeros(n_tokens, np.bool_)
        mask[ids] = True
        return mask


class AllowedTokens(_TokenSet):
    """These tokens and no others. EOS is a token like any other: name it, or texts end with the budget only.

    :param token_ids: integers in [0, V), at least one.
    """

    def __call__(self, contexts: Contexts, n_tokens: int) -> NDArray[np.bool_]:
        return np.broadcast_to(self.among(n_tokens), (len(contexts.length), n_tokens))


class ForbiddenTokens(_TokenSet):
    """Every token but these.

    :param token_ids: integers in [0, V), at least one.
    """

    def __call__(self, contexts: Contexts, n_tokens: int) -> NDArray[np.bool_]:
        return np.broadcast_to(~self.among(n_tokens), (len(contexts.length), n_tokens))


@dataclass(frozen=True)
class MinimumLength:
    """No EOS before the response has so many tokens.

    :param min_new_tokens: how many.
    :param eos_token_id: the token that ends a response.
    """

    min_new_tokens: int
    eos_token_id: int

    def __post_init__(self) -> None:
        if self.min_new_tokens < 0 or self.eos_token_id < 0:
            raise ValueError(f"Expected MinimumLength to have two integers >= 0, got {self}.")

    def __call__(self, contexts: Contexts, n_tokens: int) -> NDArray[np.bool_]:
        masks = np.ones((len(contexts.length), n_tokens), np.bool_)
        masks[contexts.step < self.min_new_tokens, self.eos_token_id] = False
        return masks


@dataclass(frozen=True)
class AllOf:
    """What every one of several constraints allows.

    :param constraints: two or more.
    """

    constraints: tuple[Constraint, ...]

    def __call__(self, contexts: Contexts, n_tokens: int) -> NDArray[np.bool_]:
        first, *others = self.constraints
        masks = _checked(first, contexts, n_tokens)
        for other in others:
            masks = masks & _checked(other, contexts, n_tokens)
        return masks


def make_constraint(constraint: Any) -> Constraint | None:
    """
    :param constraint: a callable (see :class:`Constraint`), its name as ``"module:function"``, a list of these (all of
        them hold), or None.
    :return: the constraint, or None where nothing is forbidden.
    :raises ValueError: if it is none of these.
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

    A constraint that ranks tokens, and keeps the best of them, has a method ``within(constraint)``. It is told of the
    others here and ranks what they allow: a nucleus that is EOS alone, under a minimum length, would leave nothing.

    :param constraints: any number; None forbids nothing.
    :return: None, the only one, or :class:`AllOf`.
    """
    parts: list[Any] = []
    for constraint in constraints:
        parts += constraint.constraints if isinstance(constraint, AllOf) else [constraint]
    fixed = tuple(part for part in parts if part is not None and not hasattr(part, "within"))
    ranking = [part for part in parts if hasattr(part, "within")]
    if len(fixed) + len(ranking) <= 1:
        return next(iter([*fixed, *ranking]), None)
    other = AllOf(fixed) if len(fixed) > 1 else next(iter(fixed), None)
    return AllOf((*fixed, *(part if other is None else part.within(other) for part in ranking)))


def allowed_tokens(constraint: Constraint, contexts: Contexts, n_tokens: int) -> NDArray[np.bool_]:
    """Ask a constraint, and check what it answers.

    :param constraint: any.
    :param contexts: B contexts, with anything to the right of them.
    :param n_tokens: V.
    :return: bool [B, V], a fresh array; at least one token of each context is allowed.
    :raises ValueError: if the answer is no such array, or forbids every token somewhere.
    """
    # A constraint must not see the tokens that follow, as they do in a batch of whole episodes.
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
    :param constraint: any.
    :return: how messages call it: a function by its name.
    """
    return getattr(constraint, "__name__", None) or repr(constraint)
