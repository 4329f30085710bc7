"""Why a policy is not sampled from its own most probable tokens, and is from those of a frozen reference.

Top-k, top-p and min-p keep some tokens and sample from π(a)/Z, where Z is the probability that these have together: the
kept mass. `docs/ppo.md` tells what comes of it.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from learners import make_env, make_model, make_policy, make_ppo, plain_log_probs
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from agents.models.reference_constraints import ReferenceMinP, ReferenceTopK, ReferenceTopP
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeSamples
from agents.rollouts.sampling import collect_texts
from text_env.vector_env import TextVectorEnv


def rollout(policy: CausalLMPolicy, env: TextVectorEnv, n_episodes: int = 64) -> EpisodeSamples:
    torch.manual_seed(0)
    env.reset(seed=0)
    buffer, _ = collect_texts(policy, env, n_episodes)
    buffer.finalize()
    return buffer.pack(np.arange(n_episodes))


@torch.no_grad()
def log_ratios(policy: CausalLMPolicy, samples: EpisodeSamples) -> torch.Tensor:
    """log π(a) − log π_old(a) of every token of a rollout, [N]."""
    return policy.evaluate_actions(samples.observations, samples.actions)[1] - samples.old_log_prob


def kept_masses(policy: CausalLMPolicy, samples: EpisodeSamples, warper: LogitsProcessor) -> torch.Tensor:
    """Z after the context of every token of a rollout, [N], by the Hugging Face model and transformers' samplers."""
    masses = []
    for row, last in samples.observations["action_mask"].nonzero().tolist():  # where a context ends that was acted upon
        context = samples.observations["input_ids"][row, : last + 1]
        response_length = len(context) - int(samples.observations["prompt_length"][row])
        log_probs = plain_log_probs(policy, context.tolist(), response_length)[None]
        masses.append(float(warper(context[None], log_probs).exp().sum()))
    return torch.tensor(masses)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("keep", "parameter", "warper"),
    [
        (ReferenceTopK, 20, TopKLogitsWarper(20)),
        (ReferenceTopP, 0.8, TopPLogitsWarper(0.8)),
        (ReferenceMinP, 0.1, MinPLogitsWarper(0.1)),
    ],
)
def test_what_was_sampled_from_the_policys_own_best_tokens_has_the_kept_mass_as_its_ratio(
    kind: str, keep: Any, parameter: float, warper: LogitsProcessor
) -> None:
    env, model = make_env(), make_model(kind, ends=0.2)
    policy = make_policy(env, model=copy.deepcopy(model))
    # As long as the policy has the weights of the frozen model, that model's best tokens are the policy's own.
    truncated = make_policy(env, model=copy.deepcopy(model), constraint=keep(model, parameter, device="cpu"))
    samples = rollout(truncated, env)
    ratio = log_ratios(policy, samples).exp()
    torch.testing.assert_close(ratio, kept_masses(policy, samples, warper), rtol=1e-5, atol=0)
    assert float(ratio.max()) < 0.95  # before any update, every one of them is off
    # Where the truncation is part of the distribution that is scored, all of them are 1.
    assert float(log_ratios(truncated, samples).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("keep", "parameter", "least", "clipped"),
    [(ReferenceTopP, 0.9, 0.9, 0.0), (ReferenceTopK, 50, 0.4, 0.05), (ReferenceMinP, 0.05, 0.3, 0.25)],
)
def test_top_p_bounds_such_ratios_and_top_k_and_min_p_put_many_outside_the_clip_range(
    keep: Any, parameter: float, least: float, clipped: float
) -> None:
    """The built-in model, of which nothing has been trained. The clip range is 0.2."""
    env = TextVectorEnv(32, max_new_tokens=24)
    truncated = make_policy(env, model="builtin", constraint=keep("builtin", parameter, device="cpu"))
    samples = rollout(truncated, env, 32)
    ratio = log_ratios(make_policy(env, model="builtin"), samples).exp()
    print(
        f"{truncated.distribution.constraint}: ratios {ratio.min():.2f} to {ratio.max():.2f}, mean {ratio.mean():.2f}, "
        f"{(ratio < 0.8).double().mean():.0%} below 0.8"
    )
    assert least - 1e-5 <= float(ratio.min()) <= float(ratio.max()) <= 1 + 1e-5
    assert float(log_ratios(truncated, samples).abs().max()) < 1e-5
    assert float(ratio.mean()) < 0.95
    assert float((ratio < 0.8).double().mean()) >= clipped


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_nucleus_that_moves_makes_the_divergence_infinite_and_a_frozen_one_does_not(kind: str) -> None:
    env, model = make_env(), make_model(kind, ends=0.2)
    ppo = make_ppo(env, copy.deepcopy(model), learning_rate=3e-4)
    ppo.learn(200)  # a few updates, of an ordinary policy
    old_nucleus, new_nucleus = (ReferenceTopP(m, 0.8, device="cpu") for m in (model, ppo.policy.lm.model))

    def before_and_after(*nuclei: ReferenceTopP) -> list[CausalLMPolicy]:
        models = model, ppo.policy.lm.model
        return [
            make_policy(env, model=copy.deepcopy(m), constraint=nucleus)
            for m, nucleus in zip(models, nuclei, strict=True)
        ]

    before, after = before_and_after(old_nucleus, new_nucleus)
    for sampler, scorer in ((before, after), (after, before)):
        impossible = log_ratios(
            scorer, rollout(sampler, env)
        ).isneginf()  # sampled by one, of probability 0 to the other
        assert 0 < int(impossible.sum()) < len(impossible)

    before, after = before_and_after(old_nucleus, old_nucleus)
    for sampler, scorer in ((before, after), (after, before)):
        samples = rollout(sampler, env)
        assert float(log_ratios(sampler, samples).abs().max()) < 1e-5
        assert log_ratios(scorer, samples).isfinite().all()
        assert float(log_ratios(scorer, samples).abs().max()) > 0.1  # the policy has moved
