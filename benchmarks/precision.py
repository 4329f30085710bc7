"""What bfloat16 does to PPO's ratios before any update, and what the ways to mend it cost.

    make smollm2                    # fetches the model
    python -m benchmarks.precision --json benchmarks/results/precision.json

A token's log-probability is taken while decoding and computed again in the packed pass of the update. In float32 both
agree to 1e-5. In bfloat16 the two passes round differently, so ratios are not 1 although the policy is the same. Three
ways are compared on the same model and prompts: the head as it is (bfloat16), the head in float32 on the same bfloat16
hidden states, and the sampled log-probabilities computed once more by the packed pass before the update begins, after
which every ratio is 1 by construction and the mismatch is one between behaviour and old policy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.policies.causal_lm_policy import CausalLMPolicy, load_policy
from agents.rollouts.sampling import collect_texts
from benchmarks.provenance import provenance
from benchmarks.timing import alternate
from text_env.vector_env import TextVectorEnv

CLIP_RANGE = 0.2
HEADS = ("bfloat16", "float32", "float32, kept")


def with_head(policy: CausalLMPolicy, head: str) -> CausalLMPolicy:
    """
    :param policy: is changed.
    :param head: one of ``HEADS``: as it is; in float32, its weights converted in each call; the same, converted once.
    :return: the policy, whose head runs in that type.
    """
    layer: Any = policy.lm.model.get_output_embeddings()
    if head == "float32":
        policy.lm._head = lambda hidden: torch.nn.functional.linear(hidden.float(), layer.weight.float())  # type: ignore[method-assign]
    elif head == "float32, kept":
        kept = layer.weight.detach().float()
        policy.lm._head = lambda hidden: torch.nn.functional.linear(hidden.float(), kept)  # type: ignore[method-assign]
    return policy


def ratios(policy: CausalLMPolicy, env: TextVectorEnv, n_episodes: int, rollouts: int) -> np.ndarray:
    """
    :param policy: samples, and scores what it sampled.
    :param env: gives prompts.
    :param n_episodes: texts of a rollout.
    :param rollouts: how many.
    :return: float64 [N], π/π_old of every token, though nothing was updated.
    """
    found = []
    for _ in range(rollouts):
        buffer, _ = collect_texts(policy, env, n_episodes)
        buffer.finalize()
        for part in buffer.batches(np.arange(n_episodes), 4096):
            samples = buffer.pack(part)
            with torch.no_grad():
                log_prob = policy.evaluate_actions(samples.observations, samples.actions)[1]
            found.append((log_prob - samples.old_log_prob).double().exp().cpu().numpy())
    return np.concatenate(found)


def summary(ratio: np.ndarray) -> dict[str, float]:
    """
    :param ratio: float64 [N].
    :return: how far from 1 the ratios are.
    """
    distance = np.abs(ratio - 1)
    return {
        "tokens": len(ratio),
        "lowest": float(ratio.min()),
        "highest": float(ratio.max()),
        "mean_distance": float(distance.mean()),
        "p99_distance": float(np.quantile(distance, 0.99)),
        "outside_clip_range": float((distance > CLIP_RANGE).mean()),
    }


def rollout(policy: CausalLMPolicy, env: TextVectorEnv, n_episodes: int) -> int:
    policy.clear_cache()
    buffer, _ = collect_texts(policy, env, n_episodes)
    buffer.finalize()
    return buffer.n_tokens


def passes(policy: CausalLMPolicy, samples: Any, gradient: bool) -> int:
    """One packed pass over a rollout, with its gradient or without."""
    with torch.set_grad_enabled(gradient):
        _, log_prob, _ = policy.evaluate_actions(samples.observations, samples.actions)
        if gradient:
            policy.zero_grad()
            log_prob.sum().backward()
    return len(samples.actions)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="runs/smollm2/base", help="a language model; its weights are made bfloat16")
    parser.add_argument("--prompts", default="examples.film_reviews:held_out_prompts")
    parser.add_argument("--episodes", type=int, default=32, help="texts of a rollout")
    parser.add_argument("--response", type=int, default=32, help="tokens of a text")
    parser.add_argument("--rollouts", type=int, default=4, help="rollouts whose ratios are looked at")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args(args)
    origin = provenance("benchmarks.precision", args)
    torch.set_num_threads(options.threads)
    env = TextVectorEnv(
        options.episodes,
        tokenizer=options.model,
        prompts=options.prompts,
        reward="sentiment",
        max_prompt_tokens=64,
        max_new_tokens=options.response,
    )
    policies = {head: with_head(load_policy(options.model, env, "cpu", "bfloat16"), head) for head in HEADS}
    figures: dict[str, Any] = {}
    for head, policy in policies.items():
        torch.manual_seed(0)
        env.reset(seed=0)
        figures[head] = summary(ratios(policy, env, options.episodes, options.rollouts))
    rollouts: dict[str, Callable[[], int]] = {
        head: partial(rollout, policy, env, options.episodes) for head, policy in policies.items()
    }
    speeds = alternate(rollouts, options.repeats)
    buffer, _ = collect_texts(policies["bfloat16"], env, options.episodes)
    buffer.finalize()
    samples = buffer.pack(np.arange(options.episodes))
    updates: dict[str, Callable[[], int]] = {
        head: partial(passes, policy, samples, True) for head, policy in policies.items()
    }
    updates["once more"] = partial(passes, policies["bfloat16"], samples, False)
    speeds_of_updates = alternate(updates, options.repeats)
    for head in HEADS:
        for name, found in (("rollout", speeds), ("update", speeds_of_updates)):
            relative = [base / own for base, own in zip(found["bfloat16"], found[head], strict=True)]
            figures[head][f"{name}_time"] = float(np.median(relative))
    again = [
        base / own for base, own in zip(speeds_of_updates["bfloat16"], speeds_of_updates["once more"], strict=True)
    ]
    figures["once more"] = {"update_time": 1 + float(np.median(again))}
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        result = {
            **origin,
            "what": "ratios before any update; times relative to those with the bfloat16 head",
            "figures": figures,
        }
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
