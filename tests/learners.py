"""What the tests of `agents` share: small environments, policies over random models, and the slow, obvious answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeBuffer
from text_env.vector_env import TextVectorEnv

PROMPTS = ["The movie", "I loved this", "a", "That film was so good and"]
EOS = 0  # of the tiny tokenizer
Observation = dict[str, torch.Tensor]


def even_tokens(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward with something to learn: the share of tokens that are even numbers."""
    return [float(np.mean([token % 2 == 0 for token in ids])) for ids in completion_ids]


def length_of(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The number of response tokens: tells which text a score belongs to."""
    return [float(len(ids)) for ids in completion_ids]


def constant(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Nothing to learn."""
    return [1.0 for _ in completions]


def four_is_right(completion_ids: list[list[int]], log_extra: Callable[..., None], **_: Any) -> list[float]:
    """A task with a right answer, as a verifier logs it: a text of even length gives it as its answer; 4 is right."""
    correct = [float(len(ids) == 4) for ids in completion_ids]
    log_extra("correct", correct)
    log_extra("well_formed", [float(len(ids) % 2 == 0) for ids in completion_ids])
    log_extra("answer", [None if len(ids) % 2 else str(len(ids)) for ids in completion_ids])
    return correct


def make_env(n: int = 4, **kwargs: Any) -> TextVectorEnv:
    """A vector environment of four short prompts over the tiny tokenizer, response budget 8."""
    defaults = {
        "tokenizer": tiny_tokenizer(),
        "prompts": PROMPTS,
        "reward": even_tokens,
        "max_prompt_tokens": 16,
        "max_new_tokens": 8,
    }
    return TextVectorEnv(n, **{**defaults, **kwargs})


def make_model(kind: str = "gpt2", ends: float = 0.0, sharp: float = 0.2, **kwargs: Any) -> PreTrainedModel:
    """A random model.

    :param kind: its architecture.
    :param ends: the probability of EOS that it starts with, about; 0 leaves it at 1/V.
    :param sharp: standard deviation of the weights; 0.2 makes distributions that differ well from uniform.
    """
    spread = "init_std" if kind == "opt" else "initializer_range"
    model = tiny_model(kind, **{spread: sharp, **kwargs})
    if ends:
        head = model.get_output_embeddings()
        n_logits = head.weight.shape[0]
        head.bias = torch.nn.Parameter(torch.zeros(n_logits))
        with torch.no_grad():
            # The other logits have a spread of their own, hence somewhat less than `ends` in fact.
            head.bias[EOS] = np.log(n_logits * ends / (1 - ends))
    return model


def save_model(directory: Path, kind: str = "gpt2", **kwargs: Any) -> str:
    """Save a random model and the tiny tokenizer, so that both can go by name.

    A bias of the head would not survive that: one of the final norm makes EOS likely instead, where there is one.
    """
    model = make_model(kind, **kwargs)
    if kind == "gpt2":
        with torch.no_grad():
            model.transformer.ln_f.bias[0] = 2.0
            model.get_output_embeddings().weight[EOS, 0] = 2.0
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


class Float64RMSNorm(LlamaRMSNorm):
    """transformers rounds to float32 in this layer, whatever the dtype of the weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """All of a model in float64, so that comparisons can be tight."""
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = Float64RMSNorm
    return model.double()


def make_policy(
    env: TextVectorEnv, kind: str = "gpt2", lr: float = 1e-2, model: Any = None, randomize: bool = True, **kwargs: Any
) -> CausalLMPolicy:
    """A policy for an environment, by default with a value head that is not zero; random numbers start anew."""
    torch.manual_seed(0)
    policy = CausalLMPolicy(
        env.single_observation_space,
        env.single_action_space,
        lambda _: lr,
        model=make_model(kind) if model is None else model,
        **{"eos_token_id": env.eos_token_id, **kwargs},
    )
    return randomize_value_head(policy) if randomize else policy


def randomize_value_head(policy: CausalLMPolicy) -> CausalLMPolicy:
    """Zero values would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        weight = policy.value_head.weight
        random = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.3
        policy.value_head.set(random[0], torch.tensor(0.1))
    return policy


def make_ppo(env: TextVectorEnv | None = None, model: Any = None, algorithm: Any = PPO, **kwargs: Any) -> PPO:
    """PPO, or another, with eight episodes a rollout on a tiny model whose texts are of different lengths."""
    env = make_env() if env is None else env
    policy_kwargs = {"model": make_model(ends=0.2) if model is None else model, **kwargs.pop("policy_kwargs", {})}
    defaults = {"n_episodes": 8, "batch_size": 4, "n_epochs": 2, "seed": 0, "device": "cpu"}
    made: PPO = algorithm("CausalLMPolicy", env, policy_kwargs=policy_kwargs, **{**defaults, **kwargs})
    return made


def observation_of(contexts: Sequence[Sequence[int]], prompt_lengths: Sequence[int], width: int = 24) -> Observation:
    """Contexts as the environment observes them, padded with the token 1."""
    input_ids = torch.ones(len(contexts), width, dtype=torch.int64)
    mask = torch.zeros(len(contexts), width, dtype=torch.int8)
    for row, context in enumerate(contexts):
        input_ids[row, : len(context)] = torch.tensor(context)
        mask[row, : len(context)] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "prompt_length": torch.tensor(prompt_lengths)[:, None],
    }


def tensors_of(observation: dict[str, np.ndarray]) -> Observation:
    return {name: torch.from_numpy(array) for name, array in observation.items()}


@torch.no_grad()
def plain_log_probs(policy: CausalLMPolicy, context: Sequence[int], response_length: int) -> torch.Tensor:
    """The policy's distribution after one context [V], by one call of the Hugging Face model itself."""
    input_ids = torch.tensor([list(context)], device=policy.lm.device)
    logits = policy.lm.model(input_ids).logits[0, -1, : policy.distribution.n_tokens].double().cpu()
    logits = logits / policy.distribution.temperature
    if response_length < policy.distribution.min_new_tokens:
        logits[list(policy.distribution.eos_token_ids)] = -torch.inf
    return torch.log_softmax(logits, dim=-1)


@torch.no_grad()
def plain_value(policy: CausalLMPolicy, context: Sequence[int]) -> float:
    """The policy's value of one context, by one call of the backbone itself."""
    backbone = policy.critic if policy.critic is not None else policy.lm.backbone
    hidden = backbone(torch.tensor([list(context)], device=policy.lm.device)).last_hidden_state[0, -1]
    return float(policy.value_head(hidden.to(policy.value_head.weight.dtype)))


@contextmanager
def counted_forwards(backbone: torch.nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Within it, the (rows, columns) of every forward pass of a backbone are noted."""
    shapes: list[tuple[int, int]] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    handle = backbone.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def prompt_of(buffer: EpisodeBuffer, episode: int) -> list[int]:
    """Token ids of an episode's prompt, as a learner reads them."""
    observations = buffer.pack(np.array([episode])).observations
    ids: list[int] = observations["input_ids"][0, : int(observations["prompt_length"])].tolist()
    return ids


def weights_of(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def after_each_rollout(model: OnPolicyAlgorithm, look: Callable[[], None]) -> OnPolicyAlgorithm:
    """Look at the algorithm between a rollout and the update that learns from it."""
    train = model.train

    def look_then_train() -> None:
        look()
        train()

    model.train = look_then_train  # type: ignore[method-assign]
    return model
