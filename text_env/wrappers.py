"""Text for algorithms with continuous actions: ``gym.make("TextRLHFContinuous-v0")``.

An action is a point, and chooses the token whose embedding is nearest to the point. V logits could be an action too,
but a replay buffer of a million such actions takes hundreds of gigabytes, and an embedding is a few hundred numbers.

Notation: V tokens in the vocabulary, H dimensions of an embedding, n rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorActionWrapper, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from text_env import vector_env
from text_env.action_spaces import EmbeddingPoints
from text_env.env import TextEnv
from text_env.episodes import NO_ACTION, EpisodesFace, Observation
from text_env.pretrained_files import load_pretrained
from text_env.tokenization import load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    PointsWrapper: TypeAlias = VectorActionWrapper[Observation, NDArray[np.float32], NDArray[np.int64], NDArray[Any]]
else:
    PointsWrapper = VectorActionWrapper  # below Gymnasium 1.4 it takes no types

NO_POINT = -np.inf
"""In the vector environment, a row filled with this value means :data:`~text_env.episodes.NO_ACTION`. The value lies
outside the box, so that no clipped action has it by accident. It is not NaN, which is what a network that has diverged
returns and must stay an error."""

CONTINUOUS_ID = "TextRLHFContinuous-v0"
ENTRY_POINT = "text_env.wrappers:make_env"
"""The function that :data:`CONTINUOUS_ID` is registered with."""


class NearestToken:
    """Maps every token to a point on the unit sphere, and any point to the nearest token.

    The rows of the embedding matrix are centred, since the embeddings of language models share a large common component
    beside which their differences are small, and then scaled to length 1. So every token lies inside the box
    [-1, 1]^H, and no token is near to everything just because its embedding is long or short. The nearest token is then
    the one with the largest dot product: the direction of an action matters, and its length does not.

    Tokens with the same embedding (often entries of the vocabulary that the model was never trained on) cannot be told
    apart; the lowest allowed token id among them is chosen.

    :param embeddings: ``"builtin"``, or the directory or hub name of a model whose input embeddings are used; or an
        array [≥ V, H], of which the first V rows are used.
    :param tokenizer: the tokenizer of the environment.
    :raises ValueError: if there is no such model, the model has another tokenizer, or the array is no such matrix.
    """

    def __init__(self, embeddings: str | Path | ArrayLike, tokenizer: Any) -> None:
        if isinstance(embeddings, str | Path):
            matrix = _input_embeddings(embeddings, tokenizer)
        else:
            matrix = np.asarray(embeddings)
        n_tokens = vocabulary_size(tokenizer)
        if matrix.ndim != 2 or len(matrix) < n_tokens or not matrix.shape[1]:
            raise ValueError(
                f"Expected embeddings of shape [V, H] with a row for each of the V={n_tokens} tokens of the "
                f"tokenizer, got shape {matrix.shape}. Use the embeddings of the tokenizer's own model."
            )
        matrix = matrix[:n_tokens].astype(np.float64)
        if not np.isfinite(matrix).all():
            raise ValueError("Expected finite embeddings, got NaN or infinity among them.")
        matrix -= matrix.mean(axis=0)
        length = np.linalg.norm(matrix, axis=1, keepdims=True)
        if (middle := np.flatnonzero(length[:, 0] <= 1e-9 * length.max())).size:
            raise ValueError(
                f"Expected embeddings that differ from their mean, which is what gives them a direction; those of "
                f"tokens {middle[:5].tolist()} ({middle.size} in all) don't."
            )
        self.points: NDArray[np.float32] = (matrix / length).astype(np.float32)
        """float32 [V, H]: the point of each token. As an action, the point chooses this token."""
        self.points.setflags(write=False)
        # Each of several equal rows must get the same product, and a matrix product may differ in the last bit from
        # column to column. So every different row is multiplied once.
        number: dict[bytes, int] = {}
        group = [number.setdefault(row.tobytes(), len(number)) for row in self.points]
        self._group = np.array(group) if len(number) < n_tokens else None
        self._different = self.points if self._group is None else self.points[np.unique(group, return_index=True)[1]]

    def __call__(self, points: ArrayLike, allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
        """
        :param points: float [n, H].
        :param allowed: bool [n, V], true for the tokens that may be chosen.
        :return: int64 [n], for each point the nearest allowed token.
        :raises ValueError: if ``points`` has another shape, or a number in it is not finite.
        """
        actions = np.asarray(points, np.float32)
        expected = (len(allowed), self.points.shape[1])
        if actions.shape != expected or not np.isfinite(actions).all():
            raise ValueError(
                f"Expected finite actions of shape {expected}, points among the token embeddings; got shape "
                f"{actions.shape} with {int((~np.isfinite(actions)).sum())} numbers that are NaN or infinite."
            )
        similarity = actions @ self._different.T
        if self._group is not None:
            similarity = similarity[:, self._group]
        return np.where(allowed, similarity, -np.inf).argmax(axis=1)


class EmbeddingAction(gym.ActionWrapper[Observation, NDArray[np.float32], np.int64], RecordConstructorArgs):
    """The scalar environment with points as actions: a point chooses the nearest token (see :class:`NearestToken`).

    The chosen token is the last token of the next observation.

    :param env: ``TextRLHF-v0``, possibly in other wrappers that leave its actions as they are.
    :param embeddings: as for :class:`NearestToken`.
    """

    def __init__(self, env: gym.Env[Observation, np.int64], embeddings: str | Path | ArrayLike = "builtin") -> None:
        RecordConstructorArgs.__init__(self, embeddings=embeddings)
        gym.ActionWrapper.__init__(self, env)
        self.nearest_token = NearestToken(embeddings, _text(env).tokenizer)
        self.action_space: spaces.Space[Any] = EmbeddingPoints(self.nearest_token.points.shape[1])

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """The specification that this environment can be made from again."""
        inner = self.env.spec
        # An environment made by name has this wrapper by its name already. If the spec named the wrapper too, Gymnasium
        # would compare the arguments of both, which may be arrays.
        return inner if inner is not None and inner.entry_point == ENTRY_POINT else super().spec

    def action(self, action: NDArray[np.float32]) -> np.int64:
        """
        :param action: the point, float [H].
        :return: the nearest token.
        """
        return self.nearest_token(np.asarray(action)[None], _text(self.env).action_masks()[None])[0]


class VectorEmbeddingAction(PointsWrapper):
    """The vector environment with points as actions. A row of :data:`NO_POINT` means ``NO_ACTION``.

    :param env: ``gym.make_vec("TextRLHF-v0")``.
    :param embeddings: as for :class:`NearestToken`.
    """

    def __init__(
        self,
        env: VectorEnv[Observation, NDArray[np.int64], NDArray[Any]],
        embeddings: str | Path | ArrayLike = "builtin",
    ) -> None:
        super().__init__(env)
        self.nearest_token = NearestToken(embeddings, _text(env).tokenizer)
        self.single_action_space = EmbeddingPoints(self.nearest_token.points.shape[1])
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def actions(self, actions: NDArray[np.float32]) -> NDArray[np.int64]:
        """
        :param actions: the points, float [n, H].
        :return: int64 [n], the nearest tokens and ``NO_ACTION``.
        """
        points = np.asarray(actions, np.float32)
        tokens = np.full(self.num_envs, NO_ACTION, np.int64)
        moving = np.ones(self.num_envs, np.bool_)
        if points.shape == self.action_space.shape:
            moving = ~(points == NO_POINT).all(axis=1)
            points = points[moving]
        tokens[moving] = self.nearest_token(points, _text(self.env).action_masks()[moving])
        return tokens


def make_env(embeddings: str | Path | ArrayLike = "builtin", **kwargs: Any) -> EmbeddingAction:
    """The function that ``gym.make("TextRLHFContinuous-v0")`` calls.

    :param embeddings: as for :class:`NearestToken`.
    :param kwargs: the arguments of :class:`text_env.env.TextEnv`.
    :return: the scalar environment.
    """
    return EmbeddingAction(TextEnv(**kwargs), embeddings)


def make_vector_env(
    num_envs: int = 1, embeddings: str | Path | ArrayLike = "builtin", **kwargs: Any
) -> VectorEmbeddingAction:
    """The function that ``gym.make_vec("TextRLHFContinuous-v0")`` calls.

    :param num_envs: number of rows.
    :param embeddings: as for :class:`NearestToken`.
    :param kwargs: the arguments of :func:`text_env.vector_env.make_vector_env`.
    :return: the vector environment.
    """
    return VectorEmbeddingAction(vector_env.make_vector_env(num_envs, **kwargs), embeddings)


def _text(env: Any) -> Any:
    """The text environment inside all wrappers."""
    if not isinstance(env.unwrapped, EpisodesFace):
        raise ValueError(f"Expected a text environment, for example 'TextRLHF-v0', got {env}.")
    return env.unwrapped


def _input_embeddings(model: str | Path, tokenizer: Any) -> NDArray[Any]:
    from transformers import AutoModelForCausalLM  # this imports torch, so it waits until embeddings go by name

    from text_env.builtin import LANGUAGE_MODEL

    name = str(LANGUAGE_MODEL if model == "builtin" else model)
    try:
        loaded = load_pretrained(AutoModelForCausalLM, name, dtype="float32")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected embeddings to be 'builtin', a directory or a hub name of a language model, or an array [V, H]; "
            f"got {model!r}, which could not be loaded: {error}"
        ) from error
    try:
        own = load_tokenizer(name).get_vocab()
    except ValueError:
        own = tokenizer.get_vocab()  # there is no tokenizer beside the weights to compare with
    if strange := [token for token, index in tokenizer.get_vocab().items() if own.get(token) != index]:
        raise ValueError(
            f"Expected the environment to use the tokenizer of the model {model!r}, whose embeddings its actions are "
            f"among; {len(strange)} tokens have another id there or none, for example {strange[:3]}. Make the "
            f"environment with tokenizer={model!r}, or with embeddings= of the model that its tokenizer belongs to."
        )
    layer: Any = loaded.get_input_embeddings()
    matrix: NDArray[Any] = layer.weight.detach().numpy()
    return matrix
