"""`agents.evaluation`: the figures by which a policy is compared with its reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learners import even_tokens, length_of, make_env, make_model, make_policy

from agents.evaluation import distinct_n, evaluate, load_policy, sample_texts
from agents.policy import CausalLMPolicy


def make_pair() -> tuple[CausalLMPolicy, CausalLMPolicy, Any]:
    """A policy that writes short texts, a reference that writes long ones, and their environment."""
    env = make_env(8, reward=length_of, metrics={"gold_score": even_tokens})
    policy, reference = (make_policy(env, model=make_model(ends=ends)) for ends in (0.6, 0.05))
    torch.manual_seed(0)
    env.reset(seed=0)
    return policy, reference, env


def test_distinct_n_is_the_share_of_different_n_grams_worked_out_by_hand() -> None:
    # Words: "a b a b" and "b a": 6 unigrams, 2 different. Bigrams: ab ba ab | ba: 4, 2 different. Trigrams: aba bab.
    texts = ["a b a b", "B  a"]
    assert distinct_n(texts, 1) == pytest.approx(2 / 6)
    assert distinct_n(texts, 2) == pytest.approx(2 / 4)
    assert distinct_n(texts, 3) == 1.0
    assert distinct_n(texts, 5) == 0.0  # there are none
    assert distinct_n([], 1) == 0.0


def test_an_evaluation_says_what_the_issue_asks_for() -> None:
    policy, reference, env = make_pair()
    result = evaluate(policy, reference, env, 100)
    assert set(result) == {"policy", "reference", "kl", "score_gain_std", "episodes"}
    expected = {"score", "gold_score", "distinct_1", "distinct_2", "mean_length", "terminated_ratio", "perplexity"}
    assert set(result["policy"]) == set(result["reference"]) == expected
    ours, theirs = result["policy"], result["reference"]
    for name in ("policy", "reference"):
        assert result[name]["score"] == result[name]["mean_length"]  # the reward is the length
        assert 0 <= result[name]["gold_score"] <= 1
    assert ours["mean_length"] < theirs["mean_length"]
    assert ours["terminated_ratio"] > theirs["terminated_ratio"]
    assert result["score_gain_std"] < -0.5
    assert result["kl"] > 0.5
    assert result["episodes"] == 100


def test_a_policy_compared_with_itself_has_no_kl_and_no_gain() -> None:
    policy, _, env = make_pair()
    result = evaluate(policy, policy, env, 200)
    assert result["kl"] == pytest.approx(0, abs=1e-4)
    assert abs(result["score_gain_std"]) < 0.4  # four standard errors of a difference of two means of 200


def test_kl_gain_and_perplexity_are_those_of_the_texts_scored_by_hand() -> None:
    """KL: mean over texts of Σ log π − log π_ref; perplexity: exp of minus the mean of log π_ref over tokens."""
    policy, reference, env = make_pair()
    texts: list[tuple[list[int], list[int]]] = []

    def remember(completion_ids: list[list[int]], prompts: list[str], **_: Any) -> list[float]:
        texts.extend(
            (env.tokenizer(prompt)["input_ids"], ids) for prompt, ids in zip(prompts, completion_ids, strict=True)
        )
        return [float(len(ids)) for ids in completion_ids]

    env = make_env(8, reward=remember)
    torch.manual_seed(0)
    result = evaluate(policy, reference, env, 10)
    assert len(texts) == 20  # ten by each, the policy's first

    def log_probs(of: CausalLMPolicy, prompt: list[int], response: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = of.lm.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits, -1)[torch.arange(len(response)), torch.tensor(response)].numpy()

    ours, theirs = texts[:10], texts[10:]
    kl = np.mean([(log_probs(policy, *text) - log_probs(reference, *text)).sum() for text in ours])
    assert result["kl"] == pytest.approx(kl, abs=1e-4)
    for name, written in (("policy", ours), ("reference", theirs)):
        mean = np.concatenate([log_probs(reference, *text) for text in written]).mean()
        assert result[name]["perplexity"] == pytest.approx(np.exp(-mean), rel=1e-4)
    lengths = [[len(response) for _, response in part] for part in (ours, theirs)]
    gain = (np.mean(lengths[0]) - np.mean(lengths[1])) / np.std(lengths[1])
    assert result["score_gain_std"] == pytest.approx(gain)


def test_with_equal_reference_scores_there_is_no_standard_deviation_to_gain() -> None:
    policy, reference, _ = make_pair()
    env = make_env(4, reward=lambda completions, **_: [1.0] * len(completions))
    assert evaluate(policy, reference, env, 8)["score_gain_std"] is None


def test_one_text_is_written_for_each_prompt_in_order() -> None:
    policy, _, env = make_pair()
    prompts = ["a", "The movie", "I loved this", "a", "The movie"] * 3  # more than the environment has rows
    infos = sample_texts(policy, env, prompts)
    assert [info["prompt"] for info in infos] == prompts
    assert len({info["completion"] for info in infos}) > 3
    greedy = sample_texts(policy, env, prompts, deterministic=True)
    assert greedy[0]["completion"] == greedy[3]["completion"]


def test_a_loaded_policy_takes_its_distribution_from_the_environment() -> None:
    env = make_env(2, min_new_tokens=3)
    policy = load_policy(make_model(), env, device="cpu", temperature=0.5)  # type: ignore[arg-type]
    assert (policy.lm.min_new_tokens, policy.lm.eos_token_id, policy.lm.temperature) == (3, 0, 0.5)
    assert policy.tokenizer is env.tokenizer
