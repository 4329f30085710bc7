"""Updates: our PPO against a bare forward and backward pass, stock SB3 with and without the memo, growth, memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.buffers import DictRolloutBuffer

from agents.algorithms.ppo import PPO
from agents.models.contexts import Contexts, contexts_of
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sb3_vec_env import TextVecEnv
from benchmarks.models import PROMPT_TOKENS, Subject
from benchmarks.rollout import make_env

MINIBATCHES = 4
EPOCHS = 2
LEARNING_RATE = 1e-5  # small, so that the hundredth update sees the model of the first


def minibatch(episodes: int) -> int:
    """
    :param episodes: of a rollout.
    :return: those of each of its minibatches.
    :raises ValueError: if not every minibatch has as many.
    """
    size, left = divmod(episodes, MINIBATCHES)
    if left or not size:
        raise ValueError(
            f"Expected a multiple of {MINIBATCHES} episodes, as many as there are minibatches, got {episodes}"
        )
    return size


def own_ppo(subject: Subject, separate_critic: bool = False) -> PPO:
    """
    :param subject: of which a copy is trained.
    :param separate_critic: whether the critic is a decoder of its own, another copy; otherwise it is a head.
    :return: our PPO after one iteration.
    """
    subject = subject.own_copy()
    algorithm = PPO(
        "CausalLMPolicy",
        make_env(subject),
        learning_rate=LEARNING_RATE,
        n_episodes=subject.episodes,
        batch_size=minibatch(subject.episodes),
        n_epochs=EPOCHS,
        seed=0,
        device=subject.model.device,
        policy_kwargs={"model": subject.model, "separate_critic": separate_critic},
    )
    return algorithm.learn(subject.episodes * subject.response)


def update(algorithm: PPO) -> Callable[[], int]:
    """Our whole update, as ``learn()`` makes it: the copy for undoing it, packing, loss, clipping, optimiser steps, the
    look at what came out."""

    def run() -> int:
        assert algorithm.update(), "an update that was undone says nothing of one that is made"
        return EPOCHS * algorithm.buffer.n_tokens

    return run


def bare_passes(algorithm: PPO, subject: Subject) -> Callable[[], int]:
    """Forward and backward of log-probabilities, and nothing else: no packing, no loss, no optimiser step. Where the
    critic has a decoder, another one reads and learns from the same sequences.

    :param algorithm: whose rollout it is; the sequences are packed before the clock starts.
    """
    model = subject.model
    critic = subject.own_copy().model.base_model if not algorithm.policy.share_features_extractor else None
    parts = np.split(np.arange(subject.episodes), MINIBATCHES)
    batches = []
    for part in parts:
        samples = algorithm.buffer.pack(part)
        observations = samples.observations
        batches.append((observations["input_ids"], observations["action_mask"], samples.actions))

    def run() -> int:
        tokens = 0
        for _ in range(EPOCHS):
            for input_ids, mask, actions in batches:
                model.zero_grad()
                log_probs = model(input_ids, use_cache=False).logits.log_softmax(dim=-1)
                log_probs[mask].gather(-1, actions[:, None]).mean().backward()
                if critic is not None:
                    critic.zero_grad()
                    critic(input_ids, use_cache=False).last_hidden_state[mask].mean().backward()
                tokens += len(actions)
        return tokens

    return run


class PlainPolicy(CausalLMPolicy):
    """What one writes first: every transition is a context of its own, and pays for all of it.

    Contexts are batched and cut to the longest, and the head works on the last position only; there is no memo, and
    nothing is shared between contexts that begin alike.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "prefix_cache": False})

    def _last_hidden(self, contexts: Contexts) -> torch.Tensor:
        input_ids = torch.from_numpy(contexts.input_ids[:, : contexts.length.max()]).to(self.lm.device)
        last = torch.from_numpy(contexts.length - 1).to(self.lm.device)
        return self.lm.hidden_states(input_ids)[torch.arange(len(last), device=last.device), last]

    def evaluate_actions(self, obs: Any, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        contexts = contexts_of(obs)
        hidden = self._last_hidden(contexts)
        log_prob, entropy = self.lm.log_prob_and_entropy(hidden, self._steps(contexts), actions.long().flatten())
        return self._values(hidden), log_prob, entropy


def stock_ppo(subject: Subject, policy: type[CausalLMPolicy], **kwargs: Any) -> Callable[[], int]:
    """One iteration of unmodified ``stable_baselines3.PPO``: single transitions, its own buffer, its own loss.

    :param policy: the only thing in which our side and the plain one differ.
    :param kwargs: further arguments of PPO, such as another ``rollout_buffer_class``.
    """
    subject = subject.own_copy()
    tokens = subject.episodes * subject.response
    algorithm = stable_baselines3.PPO(
        policy,
        TextVecEnv(make_env(subject)),
        learning_rate=LEARNING_RATE,
        n_steps=subject.response,
        batch_size=tokens // MINIBATCHES,
        n_epochs=EPOCHS,
        seed=0,
        device=subject.model.device,
        policy_kwargs={"model": subject.model},
        **kwargs,
    )

    def run() -> int:
        algorithm.learn(tokens)
        return tokens

    return run


def iteration(subject: Subject) -> Callable[[], int]:
    """One iteration of our PPO, rollout and update.

    :return: a run that counts *episodes*.
    """
    algorithm = own_ppo(subject)

    def run() -> int:
        algorithm.learn(subject.episodes * subject.response, reset_num_timesteps=False)
        return subject.episodes

    return run


def buffer_bytes(subject: Subject) -> tuple[float, float]:
    """What a rollout leaves allocated, by the tracing allocator, per generated token.

    :return: of ``EpisodeBuffer``, and of SB3's ``DictRolloutBuffer``.
    """
    env, episodes, response = make_env(subject), subject.episodes, subject.response
    spaces = env.single_observation_space, env.single_action_space
    observation, _ = env.reset()
    tokens = episodes * response
    numbers = np.zeros(episodes, dtype=np.float32)

    def fill() -> EpisodeBuffer:
        buffer = EpisodeBuffer(0, *spaces, "cpu", n_envs=episodes)
        context = {name: array.copy() for name, array in observation.items()}
        for step in range(response):
            actions = np.full(episodes, step)
            buffer.add(context, actions, numbers, np.full(episodes, step == 0), numbers, numbers)
            if step + 1 < response:
                position = PROMPT_TOKENS + step
                context["input_ids"][:, position], context["attention_mask"][:, position] = step, 1
        for row in range(episodes):
            buffer.close(row)
        buffer.compute_returns_and_advantage(torch.zeros(episodes), np.ones(episodes))
        return buffer

    def stock() -> DictRolloutBuffer:
        # Its arrays are made at once, for n_steps; what it holds doesn't depend on what is added.
        return DictRolloutBuffer(response, *spaces, "cpu", n_envs=episodes)  # type: ignore[arg-type]

    return _allocated(fill) / tokens, _allocated(stock) / tokens


def _allocated(make: Callable[[], Any]) -> int:
    make()  # whatever is made once only
    tracemalloc.start()
    kept = make()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return size
