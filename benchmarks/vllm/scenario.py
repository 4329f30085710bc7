"""What a client asks of a server in the course of a training, in small: the same requests every time.

``benchmarks/vllm/record.py`` plays it with a real server, and a test with what that server answered.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.backend import Continuation, Request, Sampling
from agents.rollouts.vllm_servers import VllmServers
from text_env.builtin import ARITHMETIC_MODEL
from text_env.constraints import AllowedTokens
from text_env.vector_env import TextVectorEnv

PROMPTS = ["1+2=", "(7+2)*3=", "12+9="]
NAME = "textrlhf-recorded"
"""What the adapters are called."""
MODEL = ARITHMETIC_MODEL
"""The model that the server is started with."""
MAX_MODEL_LEN = 64
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
SERVER_OPTIONS = ("--enable-lora", "--max-lora-rank", "8")


class Written(NamedTuple):
    """What a server wrote, and what the policy says of it.

    :param request: what was asked for.
    :param continuation: what was answered.
    :param log_probs: the policy's log-probabilities of its tokens, float64 [T].
    """

    request: Request
    continuation: Continuation
    log_probs: np.ndarray


def play(url: str, directory: Path) -> Iterator[list[Written]]:
    """
    :param url: the address of a server.
    :param directory: an empty directory, for weights.
    :return: what it wrote with an adapter, with the weights of the built-in model, and with other weights. The adapter
        comes first: whole weights stay in the server, and later adapters would be added to them.
    """
    plain = {"max_prompt_tokens": 16, "max_new_tokens": 12}
    strict = {**plain, "min_new_tokens": 4, "constraint": AllowedTokens(range(14)), "stop": ["77"]}
    servers = VllmServers(url, directory, patience=0.0)
    servers.name = NAME
    for version, (settings, policy_kwargs) in enumerate(
        ((plain, {"lora": LORA}), (plain, {}), (strict, {"temperature": 0.7})), 1
    ):
        env = TextVectorEnv(1, tokenizer="builtin:arithmetic", prompts=PROMPTS, reward="length(budget=8)", **settings)
        policy = policy_of(env, policy_kwargs)
        if version != 2:
            change(policy)
        servers.take_weights(policy, version)
        prompts = [env.prompts[index].token_ids for index in range(len(PROMPTS))]
        requests = [Request(list(ids), 0, 10 * version + i) for i, ids in enumerate(prompts)]
        requests.append(Request([*prompts[0], *prompts[1][:2]], 2, 10 * version + 9))
        written = servers.write(requests, Sampling.of(policy, env))
        yield [Written(*pair, log_probs_of(policy, *pair)) for pair in zip(requests, written, strict=True)]


def policy_of(env: TextVectorEnv, arguments: dict[str, Any]) -> CausalLMPolicy:
    """
    :param env: the environment.
    :param arguments: the arguments of the policy.
    :return: a policy over the model of the scenario.
    """
    known = {"eos_token_id": env.eos_token_ids, "min_new_tokens": env.min_new_tokens, "constraint": env.constraint}
    return CausalLMPolicy(
        env.single_observation_space, env.single_action_space, lambda _: 0.0, model=str(MODEL), **{**known, **arguments}
    )


@torch.no_grad()
def change(policy: CausalLMPolicy) -> None:
    """Give a policy other weights, by a rule and not by chance, in whatever of the actor is trained.

    :param policy: the policy, which is changed.
    """
    for name, parameter in policy.lm.named_parameters():
        if parameter.requires_grad:
            if "lora_" in name:  # which begins at random
                parameter.zero_()
            count = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            parameter.add_(0.05 * torch.sin(count).to(parameter.dtype))


@torch.no_grad()
def log_probs_of(policy: CausalLMPolicy, request: Request, continuation: Continuation) -> np.ndarray:
    """
    :param policy: the policy.
    :param request: a request.
    :param continuation: its continuation.
    :return: the policy's log-probability of each token, float64 [T].
    """
    tokens = [*request.token_ids, *continuation.token_ids.tolist()]
    n, before = len(continuation.token_ids), len(request.token_ids)
    mask = torch.zeros(1, len(tokens) - 1, dtype=torch.bool)
    mask[:, before - 1 :] = True
    observation = {
        "input_ids": torch.tensor([tokens[:-1]]),
        "action_mask": mask,
        "prompt_length": torch.tensor([[before - request.step]]),
    }
    _, log_prob, _ = policy.evaluate_actions(observation, torch.tensor(tokens[-n:]))
    return log_prob.double().numpy()
