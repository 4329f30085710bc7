"""Rollouts: the Gym step against ``generate()`` and against a loop written by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig

from agents.models.decoding import CACHE_ARGUMENT
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer
from benchmarks.models import Subject
from text_env.vector_env import TextVectorEnv


class ConstantReward:
    """Costs nothing, and knows how much that is."""

    name = "constant"

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, prompts: list[str], **_: Any) -> list[float]:
        start = time.perf_counter()
        scores = [0.0] * len(prompts)
        self.seconds += time.perf_counter() - start
        return scores


class TimedEnv(TextVectorEnv):
    """Knows how long its steps took."""

    seconds = 0.0

    def step(self, actions: Any) -> Any:
        start = time.perf_counter()
        result = super().step(actions)
        self.seconds += time.perf_counter() - start
        return result


def make_env(subject: Subject, reward: Any = None) -> TimedEnv:
    """
    :param subject: model, tokenizer, prompts, and how much is written.
    :param reward: by default a constant.
    """
    return TimedEnv(
        subject.episodes,
        tokenizer=subject.tokenizer,
        prompts=subject.prompts,
        reward=reward if reward is not None else ConstantReward(),
        max_prompt_tokens=subject.prompt_tokens,
        max_new_tokens=subject.response,
        min_new_tokens=subject.response if subject.masks_eos else 0,
        chat_template=False,  # `generate` continues plain text, so both sides do
    )


def make_policy(subject: Subject, env: TextVectorEnv, **policy_kwargs: Any) -> CausalLMPolicy:
    """
    :param subject: whose model it is; nobody else may use it.
    :param env: says what spaces.
    :param policy_kwargs: further arguments of the policy.
    """
    return CausalLMPolicy(
        env.single_observation_space,
        env.single_action_space,
        lambda _: 1e-5,
        model=subject.model,
        tokenizer=subject.tokenizer,
        eos_token_id=env.eos_token_ids,
        min_new_tokens=env.min_new_tokens,
        **policy_kwargs,
    )


class Ours:
    """Our rollout, as our learners do it.

    :param subject: what is measured.
    :param policy_kwargs: further arguments of the policy.
    """

    def __init__(self, subject: Subject, **policy_kwargs: Any) -> None:
        subject = subject.own_copy()
        self.episodes = subject.episodes
        self.env = make_env(subject)
        self.policy = make_policy(subject, self.env, **policy_kwargs).to(subject.model.device)
        spaces = self.env.single_observation_space, self.env.single_action_space
        self.buffer = EpisodeBuffer(0, *spaces, subject.model.device, n_envs=self.episodes)
        self.env_shares: list[float] = []
        self.env_seconds: list[float] = []
        self.total_seconds: list[float] = []
        self.lengths: list[float] = []

    def __call__(self) -> int:
        # A rollout starts after an update, which empties the memo.
        self.policy.clear_cache()
        reward = self.env.reward
        self.env.seconds = reward.seconds = 0.0
        start = time.perf_counter()
        episodes = collect_episodes(self.policy, self.env, self.episodes, self.buffer)
        total = time.perf_counter() - start
        lengths = [episode["length"] for episode in episodes]
        self.env_seconds.append(self.env.seconds - reward.seconds)
        self.total_seconds.append(total)
        self.env_shares.append(self.env_seconds[-1] / total)
        self.lengths.append(float(np.mean(lengths)))
        return sum(lengths)


def prompt_batch(subject: Subject, env: TextVectorEnv) -> Callable[[], torch.Tensor]:
    """
    :return: draws int64 [episodes, prompt_tokens] from the environment's prompts.
    """
    ids = torch.tensor([prompt.token_ids for prompt in env.prompts], device=subject.model.device)
    return lambda: ids[torch.randint(len(ids), (subject.episodes,))]


def generate(
    subject: Subject, env: TextVectorEnv, ends: bool, cache_implementation: str | None = None
) -> Callable[[], int]:
    """Hugging Face's ``generate``, sampling from the whole distribution.

    :param ends: EOS ends a text. Otherwise ``generate`` isn't even told of EOS: the least work for it.
    :param cache_implementation: its kind of cache, such as ``"static"``, with which it compiles the model on CUDA;
        None: its default.
    :return: a run that says how many real tokens it wrote (EOS included, padding not).
    """
    eos = list(env.eos_token_ids)
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=subject.response,
        min_new_tokens=None if ends else subject.response,
        eos_token_id=eos if ends else None,
        pad_token_id=env.pad_token_id,
        cache_implementation=cache_implementation,
    )
    # What the model's own file says of EOS must not come back in.
    subject.model.generation_config = config
    draw = prompt_batch(subject, env)

    def run() -> int:
        prompts = draw()
        with torch.inference_mode():
            texts = subject.model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
        responses = texts[:, prompts.shape[1] :]
        if not ends:
            return responses.numel()
        is_eos = torch.isin(responses, torch.tensor(eos, device=responses.device))
        after_eos = is_eos.cumsum(dim=1) - is_eos.long() > 0
        return int((~after_eos).sum())

    return run


def hand_loop(subject: Subject, env: TextVectorEnv) -> Callable[[], int]:
    """What one writes by hand: the model, a ``DynamicCache``, softmax and ``multinomial``."""
    model, draw = subject.model, prompt_batch(subject, env)
    n_tokens = env.single_action_space.n

    def run() -> int:
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            inputs = draw()
            response = []
            for _ in range(subject.response):
                logits = model(inputs, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits[:, -1]
                inputs = torch.multinomial(torch.softmax(logits[:, :n_tokens].float(), dim=-1), 1)
                response.append(inputs)
            return torch.cat(response, dim=1).numel()

    return run
