"""The vector environment, a ``gymnasium.vector.VectorEnv``: n episodes as arrays, and one reward call per step for all
texts that the step finishes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from text_env.episodes import (
    NO_ACTION,
    Episodes,
    EpisodesFace,
    Observation,
    Opening,
    checked_options,
    checked_seed,
    unpaid,
)
from text_env.rendering import METADATA, check_render_mode, render
from text_env.settings import check_integer, takes_settings
from text_env.task_names import settings_of


class TextVectorEnv(EpisodesFace, VectorEnv[Observation, NDArray[np.int64], NDArray[Any]]):
    """Write ``num_envs`` texts side by side. With ``group_size=1`` the rows are as many scalar environments.

    Observations, rewards, terminations and infos are those of :class:`text_env.env.TextEnv`, batched as Gymnasium
    batches them: arrays of shape ``(num_envs, …)``, infos with ``_key`` masks, and under SAME_STEP also ``final_obs``
    and ``final_info``. Values that no array of numbers can hold as they are, such as numbers of different types, are
    in an array of objects: each row has exactly what the scalar environment says.

    :param num_envs: number of rows.
    :param render_mode: as for :class:`text_env.env.TextEnv`.
    :param autoreset_mode: ``AutoresetMode`` or its value (``"SameStep"``, ``"NextStep"``, ``"Disabled"``). The mode can
        be set later. Under ``Disabled``, finished rows wait for ``reset(options={"reset_mask": …})``.
    :param settings: the fields of :class:`text_env.settings.EpisodeSettings`, whose documentation
        ``help(TextVectorEnv.__init__)`` shows. ``group_size`` counts episodes in the order in which they start; rows
        that start in one call do so in the order of their numbers.
    :raises TypeError: for an argument that does not exist; the error names those that do.
    :raises ValueError: if an argument is out of range, or names something that does not exist.
    """

    metadata: dict[str, Any] = METADATA

    @takes_settings
    def __init__(
        self,
        num_envs: int = 1,
        *,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        **settings: Any,
    ) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self.num_envs = num_envs
        self.metadata = dict(self.metadata)  # the autoreset mode belongs to this instance, not to the class
        self.autoreset_mode = autoreset_mode
        self.episodes = Episodes(num_envs, settings_of(settings))
        self.single_observation_space = self.episodes.observation_space()
        self.single_action_space = self.episodes.action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[tuple[np.random.Generator, int]] = [seeding.np_random() for _ in range(num_envs)]

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """What happens to a row whose episode has ended."""
        mode: AutoresetMode = self.metadata["autoreset_mode"]
        return mode

    @autoreset_mode.setter
    def autoreset_mode(self, mode: AutoresetMode | str) -> None:
        self.metadata["autoreset_mode"] = AutoresetMode(mode)

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The random generator of each row."""
        return tuple(generator for generator, _ in self._generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each row's generator."""
        return tuple(seed for _, seed in self._generators)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start episodes in all rows, or in some of them.

        :param seed: row i is seeded with ``seed + i``, or with entry i of a list; None leaves the row's generator as it
            is. With a seed, a new group of episodes begins as well.
        :param options: ``"reset_mask"``, bool [n], marks the rows to reset; the others are left as they are.
            ``"prompt"`` and ``"response"`` are lists with one entry per row that is reset: a text, token ids, or None
            (a drawn prompt, an empty response).
        :return: observations of all rows, and infos with ``prompt`` for the rows that were reset.
        :raises ValueError: if an option or a seed cannot be used, or if a generated prompt cannot be made; whatever
            else the program raises that makes it is passed on. Nothing has then changed.
        """
        options = checked_options(options)
        rows = self._masked_rows(options.pop("reset_mask", None))
        openings = self.episodes.openings(len(rows), options)
        seeds = self._seeds(seed)
        fresh = {row: seeding.np_random(seeds[row]) for row in rows.tolist() if seeds[row] is not None}
        generators = [fresh.get(row, self._generators[row])[0] for row in rows.tolist()]
        openings = self.episodes.drawn(openings, generators, new_group=bool(fresh))
        for row, generator in fresh.items():
            self._generators[row] = generator
        infos = self._start(rows, openings)
        return self.episodes.observe(), batch_infos(infos, self.num_envs)

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Append a token to every row that is given one.

        :param actions: integers [n]; :data:`~text_env.episodes.NO_ACTION` leaves a row exactly as it is.
        :return: observations, rewards float64 [n], terminated bool [n], truncated bool [n] (always false), infos.
        :raises ValueError: if an action is no token of the vocabulary, or the number of actions is wrong; or if the
            generated prompt of an episode that starts in this step cannot be made. Whatever else the program raises
            that makes it is passed on.
        :raises gymnasium.error.ResetNeeded: if an action is given for a row whose episode has ended and which only
            ``reset`` can start again.
        :raises text_env.rewards.RewardError: if the reward fails. After any of these errors nothing has changed, and
            the step can be repeated.
        """
        tokens = self.episodes.tokens(actions)
        moving = tokens != NO_ACTION
        over = np.zeros(0, np.int64)
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            # For a row whose episode has ended, any action means "reset", whatever token it is.
            over = np.flatnonzero(self.episodes.finished & moving)
            moving[over] = False
        rows = np.flatnonzero(moving)
        outcome = self.episodes.outcome(rows, tokens[rows])
        ended = rows[outcome.terminated]
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            over = ended
        generators = [self._generators[row][0] for row in over.tolist()]
        openings = self.episodes.drawn([Opening()] * len(over), generators)

        self.episodes.append(outcome)  # from here on nothing can fail
        rewards, terminated = np.zeros(self.num_envs), np.zeros(self.num_envs, np.bool_)
        rewards[rows], terminated[rows] = outcome.rewards, outcome.terminated
        infos = dict(zip(ended.tolist(), outcome.infos, strict=True))
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            infos = {row: {"final_obs": self.episodes.observe(row), "final_info": of} for row, of in infos.items()}
        for row, info in self._start(over, openings).items():
            infos[row] = {**infos.get(row, {}), **info}
        batched = batch_infos(infos, self.num_envs)
        return self.episodes.observe(), rewards, terminated, np.zeros(self.num_envs, np.bool_), batched

    def action_masks(self) -> NDArray[np.bool_]:
        """
        :return: bool [n, V]: for each row what :meth:`text_env.env.TextEnv.action_masks` returns.
        :raises ValueError: for the reasons given there.
        """
        return self.episodes.action_masks()

    def render(self) -> tuple[Any, ...]:
        """
        :return: for each row what :meth:`text_env.env.TextEnv.render` returns.
        """
        return tuple(render(self.render_mode, *self.episodes.text(row)) for row in range(self.num_envs))

    @contextlib.contextmanager
    def left_as_it_was(self) -> Iterator[None]:
        """Within it, somebody else may play in this environment. Afterwards the episodes, the random generators and the
        autoreset mode are put back, so that what was being played goes on as if nobody had.
        """
        episodes = {name: _copied(value) for name, value in vars(self.episodes).items()}
        generators = list(self._generators)
        states = [generator.bit_generator.state for generator, _ in generators]
        mode = self.autoreset_mode
        try:
            yield
        finally:
            vars(self.episodes).update(episodes)
            self._generators = generators
            for (generator, _), state in zip(generators, states, strict=True):
                generator.bit_generator.state = state
            self.autoreset_mode = mode

    def _start(self, rows: NDArray[np.int64], openings: Sequence[Opening]) -> dict[int, dict[str, Any]]:
        """Start an episode in each of these rows, and say of each its reset info."""
        return dict(zip(rows.tolist(), self.episodes.start(rows, openings), strict=True))

    def _masked_rows(self, mask: Any) -> NDArray[np.int64]:
        if mask is None:
            return np.arange(self.num_envs)
        if (
            not isinstance(mask, np.ndarray)
            or mask.shape != (self.num_envs,)
            or mask.dtype != np.bool_
            or not mask.any()
        ):
            raise ValueError(
                f"Expected options['reset_mask'] to be a bool array of shape ({self.num_envs},) with at least one "
                f"True, got {mask!r}."
            )
        return np.flatnonzero(mask)

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, list | tuple) or (isinstance(seed, np.ndarray) and seed.ndim):
            if len(seed) != self.num_envs:
                raise ValueError(f"Expected one seed, or a list of num_envs={self.num_envs} seeds, got {seed!r}.")
            return [checked_seed(entry) for entry in seed]
        first = checked_seed(seed)
        assert first is not None
        return [first + row for row in range(self.num_envs)]


def batch_infos(infos: Mapping[int, Mapping[str, Any]], n: int) -> dict[str, Any]:
    """The infos of single rows as Gymnasium batches them, except that nothing is converted: Gymnasium gives an array
    the type of the row that comes first, which may not hold the value of another row, and takes dictionaries apart.

    :param infos: the infos by the numbers of their rows.
    :param n: the number of all rows.
    :return: for each key an array [n, …], and as ``_key`` a mask bool [n] of the rows that have it. ``final_info`` is
        such a dictionary itself.
    """
    batched: dict[str, Any] = {}
    for key in dict.fromkeys(key for info in infos.values() for key in info):
        values = {row: info[key] for row, info in infos.items() if key in info}
        batched[key] = batch_infos(values, n) if key == "final_info" else _column(values, n)
        batched[f"_{key}"] = np.isin(np.arange(n), list(values))
    return batched


def _column(values: Mapping[int, Any], n: int) -> NDArray[Any]:
    """An array [n, …] of the values of some rows: of numbers if all of them are alike, otherwise of objects."""
    kinds = {_kind(value) for value in values.values()}
    kind = kinds.pop() if len(kinds) == 1 else None
    array: NDArray[Any] = np.full(n, None) if kind is None else np.zeros((n, *kind[1]), kind[0])
    for row, value in values.items():
        array[row] = value
    return array


def _kind(value: Any) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
    """The type and the shape of the array of numbers that holds this value as it is; None: there is none."""
    if type(value) in (bool, float) or (type(value) is int and abs(value) < 2**63):
        return np.dtype(type(value)), ()
    if isinstance(value, np.number) or type(value) is np.ndarray:
        return value.dtype, value.shape
    return None


def _copied(value: Any) -> Any:
    """What a step changes in place: arrays and lists. Everything else is exchanged as a whole, or never changes."""
    if isinstance(value, np.ndarray):
        return value.copy()
    return list(value) if type(value) is list else value


def make_vector_env(num_envs: int = 1, max_episode_steps: int | None = None, **kwargs: Any) -> TextVectorEnv:
    """The function that ``gym.make_vec("TextRLHF-v0")`` calls.

    :param num_envs: number of rows.
    :param max_episode_steps: Gymnasium's argument. Nothing cuts an episode here, so it must not be below
        ``max_new_tokens``; None and -1 mean no limit.
    :param kwargs: the other arguments of :class:`TextVectorEnv`.
    :return: the vector environment.
    :raises ValueError: if episodes would be cut.
    """
    env = TextVectorEnv(num_envs, **kwargs)
    if max_episode_steps is not None and max_episode_steps != -1:
        check_integer("max_episode_steps", max_episode_steps, 1)
        if max_episode_steps < env.max_new_tokens:
            raise ValueError(unpaid(max_episode_steps, env.max_new_tokens))
    return env


def plain(env: Any) -> TextVectorEnv:
    """Tell the text vector environment itself from one inside wrappers.

    :param env: a vector environment, or SB3's view of one, ``agents.TextVecEnv``.
    :return: the :class:`TextVectorEnv`.
    :raises ValueError: if it is a wrapper around one, naming the wrappers, or something else altogether.
    """
    env = getattr(env, "outermost", env)  # of `TextVecEnv`, which this package knows nothing of
    wrappers, inner = [], env
    while isinstance(inner, VectorWrapper):
        wrappers.append(type(inner).__name__)
        inner = inner.env
    if not isinstance(inner, TextVectorEnv):
        raise ValueError(
            f"Expected a text vector environment, for example gym.make_vec('TextRLHF-v0', num_envs=64), got {env}."
        )
    if wrappers:
        raise wrapped_error(*wrappers)
    return inner


def wrapped_error(*wrappers: str) -> ValueError:
    """
    :param wrappers: the names of the wrappers around a text environment.
    :return: the error for whoever hands it to a learner of this package.
    """
    return ValueError(
        f"Expected the text environment itself, got it wrapped in {', '.join(wrappers)}. The learners of this package "
        "drive the text environment itself, so these wrappers would never apply: put what they do into reward=, "
        "shaping= or constraint=, or use Stable-Baselines3's own algorithms on TextVecEnv."
    )
