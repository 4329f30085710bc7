"""Collecting whole episodes from the vector environment, for the training loop and for evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from agents.models.contexts import Contexts
from agents.models.finite import check_numbers
from agents.rollouts.episode_buffer import EpisodeBuffer
from text_env.episodes import NO_ACTION
from text_env.vector_env import TextVectorEnv


class Interrupted(Exception):
    """A callback stopped the training in the middle of a rollout."""


class Writer(Protocol):
    """What writes the next token of each context: a policy of this package, or what another program has written for it
    (:class:`agents.rollouts.continuations.Continuations`).
    """

    def write(self, contexts: Contexts, deterministic: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As ``CausalLMPolicy.write``.

        :param contexts: B contexts.
        :param deterministic: whether to choose the most probable token instead of sampling one.
        :return: tokens int64 [B], values [B, 1] and log-probabilities [B], in nats.
        """
        ...


@torch.no_grad()
def collect_episodes(
    policy: ActorCriticPolicy | Writer,
    env: TextVectorEnv,
    n_episodes: int,
    buffer: EpisodeBuffer,
    deterministic: bool = False,
    prompts: Sequence[Any] | None = None,
    responses: Sequence[Any] | None = None,
    on_step: Callable[[int, dict[str, Any]], bool] | None = None,
) -> list[dict[str, Any]]:
    """Start exactly ``n_episodes`` episodes and finish all of them.

    A row whose episode ends starts another one only as long as fewer than ``n_episodes`` have been started. Collecting
    until the first n episodes are *finished* would favour short ones. Rows without an episode are left out of the
    policy's batch, so they cost nothing.

    :param policy: the policy that chooses the tokens, or what another program has written in its place.
    :param env: the environment, which is switched to ``AutoresetMode.DISABLED``.
    :param n_episodes: the number of episodes.
    :param buffer: the buffer that is filled, after it has been emptied. Its i-th episode is the i-th that was started,
        and so is the i-th of its ``prompts``.
    :param deterministic: whether the policy chooses the most probable token instead of sampling one.
    :param prompts: the prompts of the episodes, one per episode, each in a form that a reset takes (see
        :meth:`text_env.episodes.Episodes.openings`); None: the environment draws them.
    :param responses: the beginnings of the responses, likewise, from which the policy goes on; None: there are none.
    :param on_step: a function that is called after each step with the number of live rows and what SB3's own loop has
        in its local variables then, for all rows of the environment (``new_obs``, ``actions``, ``rewards``, ``dones``,
        ``infos``), with the environment's infos as ``vector_infos``; it returns False to stop. A row that isn't live
        gets reward 0, and isn't done.
    :return: one dict per episode, in the order in which they were started: the environment's final info (``score``,
        ``completion``, …), and ``length``, the number of the tokens chosen.
    :raises Interrupted: if ``on_step`` returned False.
    :raises FloatingPointError: if the policy's answers are NaN.
    """
    if env.autoreset_mode != AutoresetMode.DISABLED:
        env.autoreset_mode = AutoresetMode.DISABLED
    buffer.reset()
    live = np.arange(min(env.num_envs, n_episodes))
    started = len(live)
    env.episodes.begin_group()  # an interrupted rollout may have left an incomplete group
    openings = {"prompt": prompts, "response": responses}

    def options(first: int, last: int, others: int = 0) -> dict[str, Any]:
        """How these episodes start, and after them so many rows that wait for another reset."""
        return {name: [*of[first:last], *[None] * others] for name, of in openings.items() if of is not None}

    observation, _ = env.reset(options=options(0, started, env.num_envs - started))
    buffer.prompts += map(env.episodes.prompt, live.tolist())
    starts = np.ones(len(live), dtype=bool)
    length = np.zeros(env.num_envs, dtype=np.int64)
    returns = np.zeros(env.num_envs)
    began = time.perf_counter()
    episodes: list[dict[str, Any]] = [{} for _ in range(n_episodes)]
    while len(live):
        contexts = env.episodes.contexts(live)
        chosen, value, log_prob = _next_tokens(policy, contexts, observation, live, deterministic)
        # One device-to-host copy per step. All become float64, which is exact for token ids and for float32 numbers.
        host = torch.stack([chosen, value.flatten(), log_prob.double()]).cpu().numpy()
        if np.isnan(host).any():
            for what, answers in (("values", host[1]), ("log-probabilities", host[2])):
                tokens = [ids[:n] for ids, n in zip(contexts.input_ids, contexts.length, strict=True)]
                assert isinstance(policy, nn.Module)  # others have no weights to look for the cause in
                check_numbers(torch.from_numpy(answers), what, tokens.__getitem__, policy)
        actions = np.full(env.num_envs, NO_ACTION, dtype=np.int64)
        actions[live] = host[0].astype(np.int64)
        observation, rewards, terminations, truncations, infos = env.step(actions)
        buffer.add(contexts, actions[live], rewards[live], starts, host[1], host[2], rows=live)
        length[live] += 1
        returns[live] += rewards[live]
        if on_step is not None:
            dones = terminations | truncations
            rows = _infos_of_rows(dones, infos, observation, returns, length, time.perf_counter() - began)
            step = {"new_obs": observation, "actions": actions, "rewards": rewards, "dones": dones, "infos": rows}
            if not on_step(len(live), {**step, "vector_infos": infos}):
                raise Interrupted
        over = (terminations | truncations)[live]
        starts = np.zeros(len(live), dtype=bool)
        if over.any():
            for row in live[over]:
                final = {k: v[row] for k, v in infos.items() if not k.startswith("_") and infos[f"_{k}"][row]}
                episodes[buffer.close(row)] = {**final, "length": int(length[row])}
                length[row] = 0
                returns[row] = 0
            refill = live[over][: n_episodes - started]
            started += len(refill)
            if len(refill):
                mask = np.isin(np.arange(env.num_envs), refill)
                observation, _ = env.reset(options={"reset_mask": mask, **options(started - len(refill), started)})
                buffer.prompts += map(env.episodes.prompt, refill.tolist())
            going_on = ~over | np.isin(live, refill)
            starts = over[going_on]
            live = live[going_on]
    return episodes


def first_contexts(env: TextVectorEnv, n_episodes: int) -> Contexts:
    """The contexts that :func:`collect_episodes` will begin with when it is called next, if nothing draws a prompt in
    between.

    :param env: the environment, which is left as it was.
    :param n_episodes: the number of episodes.
    :return: a context for each row in which an episode will start.
    """
    with env.left_as_it_was():
        env.episodes.begin_group()
        env.reset()
        return env.episodes.contexts(np.arange(min(env.num_envs, n_episodes)))


def _next_tokens(
    policy: ActorCriticPolicy | Writer,
    contexts: Contexts,
    observation: dict[str, np.ndarray],
    live: np.ndarray,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the policy answers to the live rows. One that writes is given the contexts, another the observations."""
    if (write := getattr(policy, "write", None)) is not None:
        written: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = write(contexts, deterministic)
        return written
    assert callable(policy)
    tensors = {name: torch.from_numpy(array[live]) for name, array in observation.items()}
    answers: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = policy(tensors, deterministic)
    return answers


def _infos_of_rows(
    dones: np.ndarray,
    infos: dict[str, Any],
    observation: dict[str, np.ndarray],
    returns: np.ndarray,
    length: np.ndarray,
    seconds: float,
) -> list[dict[str, Any]]:
    """Of each row what ``TextVecEnv`` tells SB3: nothing, until its episode is over."""
    rows: list[dict[str, Any]] = [{} for _ in dones]
    for row in np.flatnonzero(dones):
        rows[row] = {
            **{k: v[row] for k, v in infos.items() if not k.startswith("_") and infos[f"_{k}"][row]},
            "terminal_observation": {name: array[row] for name, array in observation.items()},
            "TimeLimit.truncated": False,
            "episode": {"r": float(returns[row]), "l": int(length[row]), "t": round(seconds, 6)},
        }
    return rows
