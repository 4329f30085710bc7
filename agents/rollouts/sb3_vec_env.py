"""The vector environment with the interface of a Stable-Baselines3 ``VecEnv``, for SB3's algorithms and tools."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorObservationWrapper, VectorWrapper
from gymnasium.wrappers.vector import DictInfoToList
from stable_baselines3.common.vec_env import VecEnv

import text_env  # noqa: F401  registers TextRLHF-v0
from text_env.vector_env import TextVectorEnv

# Methods and attributes of the vector environment that have one entry per row.
PER_ROW_METHODS = frozenset({"action_masks", "render"})
PER_ROW_ATTRIBUTES = frozenset({"np_random", "np_random_seed"})
# What is one row's where the vector environment has that of all rows together.
SPACES = frozenset({"action_space", "observation_space"})
# What infos of a step say of episodes that it has finished; the last by Gymnasium's RecordEpisodeStatistics.
FINAL = frozenset({"final_obs", "_final_obs", "final_info", "_final_info", "episode", "_episode"})


class TextVecEnv(VecEnv):
    """The vector environment as an SB3 ``VecEnv``. The infos of finished episodes have ``terminal_observation``, and
    ``episode`` with the statistics of SB3's ``Monitor``.

    :param vector_env: the environment, or wrappers of its actions or rewards around it (``TextRLHFContinuous-v0``). It
        is switched to ``AutoresetMode.SAME_STEP``, the only mode that SB3 supports.
    :raises ValueError: if it is no text environment, or in a wrapper that does not work in that mode.
    """

    def __init__(self, vector_env: VectorEnv[Any, Any, Any]) -> None:
        if not isinstance(vector_env.unwrapped, TextVectorEnv):
            raise ValueError(f"Expected a text environment, for example gym.make_vec('TextRLHF-v0'), got {vector_env}.")
        _check_wrappers(vector_env)
        self.vector_env = vector_env.unwrapped
        self.outermost = vector_env  # with its wrappers, if it has any
        self.render_mode = vector_env.render_mode
        super().__init__(vector_env.num_envs, vector_env.single_observation_space, vector_env.single_action_space)
        self.vector_env.autoreset_mode = AutoresetMode.SAME_STEP
        self._actions = np.zeros(0)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, dtype=np.int64)
        self._start = time.time()
        self._guard: contextlib.ExitStack | None = None  # what restores the environment, as long as nobody has played

    def reset(self) -> dict[str, np.ndarray]:
        self._about_to_play()
        # SB3 keeps one dict of options per row. The vector environment takes one list of rows per option.
        seeds = [seed for seed in self._seeds if seed is not None]
        # All keys of theirs are handed on, so that it refuses those that it doesn't know.
        options = {key: [row.get(key) for row in self._options] for key in dict.fromkeys(chain(*self._options))}
        observation, infos = self.outermost.reset(
            seed=list(self._seeds) if len(seeds) == self.num_envs else None,  # type: ignore[arg-type]
            options=options or None,
        )
        self.reset_infos = _rows_of(infos, self.num_envs)
        self._returns[:] = 0
        self._lengths[:] = 0
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        # A copy: SB3 stores these actions afterwards, and some of Gymnasium's wrappers change them in place.
        self._actions = np.array(actions).reshape(self.num_envs, *(self.action_space.shape or ()))

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        self._about_to_play()
        # An algorithm of this package may have used the environment in between, and changed its mode.
        self.vector_env.autoreset_mode = AutoresetMode.SAME_STEP
        observation, rewards, terminations, truncations, infos = self.outermost.step(self._actions)
        dones = terminations | truncations
        self._returns += rewards
        self._lengths += 1
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if dones.any():
            final = _rows_of(infos["final_info"], self.num_envs)
            anew = _rows_of({k: v for k, v in infos.items() if k not in FINAL}, self.num_envs)
            for row in np.flatnonzero(dones):
                elapsed = round(time.time() - self._start, 6)
                rows[row] = {
                    **final[row],
                    "terminal_observation": infos["final_obs"][row],
                    "TimeLimit.truncated": bool(truncations[row] and not terminations[row]),
                    "episode": {"r": float(self._returns[row]), "l": int(self._lengths[row]), "t": elapsed},
                }
                # The row has started another episode, of which the vector environment tells beside the final info.
                self.reset_infos[row] = anew[row]
            self._returns[dones] = 0
            self._lengths[dones] = 0
        return observation, rewards.astype(np.float32), dones, rows

    @contextlib.contextmanager
    def left_as_it_was(self) -> Iterator[None]:
        """Within it, somebody else may play in this environment; what was being played goes on afterwards as if nobody
        had (see :meth:`text_env.vector_env.TextVectorEnv.left_as_it_was`). Nothing is copied unless somebody does play.
        """
        with contextlib.ExitStack() as self._guard:
            try:
                yield
            finally:
                self._guard = None

    def _about_to_play(self) -> None:
        if self._guard is not None:
            self._guard.enter_context(self.vector_env.left_as_it_was())
            self._guard = None  # once is enough

    def close(self) -> None:
        self.outermost.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name in SPACES:
            return [getattr(self, attr_name) for _ in self._get_indices(indices)]
        owner = self.outermost if hasattr(self.outermost, attr_name) else self.vector_env
        value = getattr(owner, attr_name)
        return [value[row] if attr_name in PER_ROW_ATTRIBUTES else value for row in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"The rows share their attributes: set {attr_name!r} for all of them (indices=None).")
        setattr(self.vector_env, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        if method_name in ("reset", "step"):
            raise ValueError(
                f"Expected a method that says something of a row, got {method_name!r}, which plays in all rows at "
                "once, whatever the indices: use the reset() of this environment, after seed() or set_options(), and "
                "its step()."
            )
        if method_name == "stream":
            rows = self._get_indices(indices)
            return [self.vector_env.stream(row, *method_args, **method_kwargs) for row in rows]
        owner = self.outermost if hasattr(self.outermost, method_name) else self.vector_env
        result = getattr(owner, method_name)(*method_args, **method_kwargs)
        return [result[row] if method_name in PER_ROW_METHODS else result for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        # SB3 asks this to find out whether infos have Monitor's episode statistics, which they have.
        from stable_baselines3.common.monitor import Monitor

        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        return list(self.vector_env.render()) if self.render_mode == "rgb_array" else [None] * self.num_envs


def make_vec_env(
    env_id: str = "TextRLHF-v0",
    n_envs: int = 1,
    seed: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
) -> TextVecEnv:
    """SB3's function of the same name for the text environment, with four of its arguments. All rows share one vector
    environment, and have no processes, monitors or wrappers of their own.

    :param env_id: the registered name of the environment.
    :param n_envs: the number of rows.
    :param seed: the seed of row 0; row i gets ``seed`` + i. None: random seeds.
    :param env_kwargs: the keyword arguments of the environment.
    :return: the environment, with one reward call for all texts that a step finishes.
    :raises ValueError: if the name is not that of a text environment.
    """
    env = TextVecEnv(gym.make_vec(env_id, num_envs=n_envs, **(env_kwargs or {})))
    env.seed(seed)
    return env


def _check_wrappers(env: VectorEnv[Any, Any, Any]) -> None:
    """Refuse the wrappers that would see some of what they are for, and the rest would pass them by."""
    inner = env
    while isinstance(inner, VectorWrapper):
        if isinstance(inner, VectorObservationWrapper):
            raise ValueError(
                f"Expected no wrapper of observations, got {type(inner).__name__}: SB3 resets a row in the step that "
                "ends its episode, and Gymnasium's vector wrappers leave the last observation of an episode as it was. "
                "Wrap single environments, in SB3's make_vec_env('TextRLHF-v0', wrapper_class=...)."
            )
        if isinstance(inner, DictInfoToList):
            raise ValueError(
                "Expected infos as a dict of arrays, got them from DictInfoToList: leave it out, since SB3 gets a list "
                "of infos anyway."
            )
        inner = inner.env


def _rows_of(infos: dict[str, Any], num_envs: int, mask: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Gymnasium's dict of arrays, which may hold others, as SB3's list of dicts.

    :param infos: by name, each with a mask that says which rows have it, under the same name after ``_``.
    :param num_envs: the number of rows.
    :param mask: which rows have what has no such mask; None: no row has it, as what a wrapper says of all together.
    :return: the infos of each row.
    """
    rows: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for key, values in infos.items():
        having = infos.get(f"_{key}", mask)
        if key.startswith("_") or having is None:
            continue
        of_rows = _rows_of(values, num_envs, having) if isinstance(values, dict) else values
        for row in np.flatnonzero(having):
            rows[row][key] = of_rows[row]
    return rows
