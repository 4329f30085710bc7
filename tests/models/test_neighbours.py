"""What a model says of a context depends on the context alone: models for which it doesn't are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from learners import make_env, make_policy, observation_of, plain_log_probs
from tiny import tiny_classifier, tiny_model, tiny_tokenizer

from agents.models.reference import Reference
from agents.policies.token_features import TokenFeatures

ORIGINAL = 8


def longrope(original: int = ORIGINAL) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "factor": 16.0,
        "original_max_position_embeddings": original,
        "rope_theta": 1e4,
    }


def model_with(rope_parameters: dict[str, Any], **kwargs: Any) -> Any:
    return tiny_model("llama", rope_parameters=rope_parameters, initializer_range=0.2, **kwargs)


def test_a_budget_beyond_the_length_at_which_longrope_switches_is_refused() -> None:
    env = make_env(prompts=["a"], max_prompt_tokens=4, max_new_tokens=5)
    expected = (
        r"Expected contexts of at most 8 tokens, the original length of the rotary embeddings \('longrope'\) of Ll\w+"
        r", got max_prompt_tokens \+ max_new_tokens = 9: .* Make the environment's budgets smaller, or change"
    )
    with pytest.raises(ValueError, match=expected):
        make_policy(env, model=model_with(longrope()))
    with pytest.raises(ValueError, match=expected):
        make_policy(env, model=model_with({"full_attention": longrope(), "sliding_attention": longrope(64)}))
    with pytest.raises(ValueError, match=expected):
        TokenFeatures(env.single_observation_space, model=model_with(longrope()))


def test_a_critic_that_switches_is_refused(tmp_path: Any) -> None:
    critic = tiny_classifier("llama", rope_parameters=longrope(), pad_token_id=1)
    critic.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"at most 8 tokens, the original length .* of LlamaForSequenceClass"):
        make_policy(make_env(prompts=["a"], max_prompt_tokens=4, max_new_tokens=5), separate_critic=tmp_path)


def test_a_reference_that_switches_is_refused() -> None:
    reference = Reference.load(model_with(longrope()), 300, device="cpu")
    batch = {"input_ids": torch.full((1, 9), 5), "prompt_length": torch.tensor([[8]])}
    batch["action_mask"] = torch.arange(9)[None] == 8
    with pytest.raises(ValueError, match=r"at most 8 tokens, .* 9:"):
        reference.log_probs(batch, torch.tensor([7]))


def test_dynamic_frequencies_end_where_they_would_switch() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="at least 9 positions"):
        make_policy(
            make_env(prompts=["a"], max_prompt_tokens=4, max_new_tokens=5),
            model=model_with(dynamic, max_position_embeddings=8),
        )


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_below_that_length_a_context_does_not_depend_on_its_neighbours(prefix_cache: bool) -> None:
    env = make_env(prompts=["a"], max_prompt_tokens=4, max_new_tokens=4)
    policy = make_policy(env, model=model_with(longrope()), prefix_cache=prefix_cache)
    contexts = [[5, 6, 7, 9], [9, 8, 7, 6, 5, 4, 3, 2]]
    with torch.no_grad():
        together = policy.get_distribution(observation_of(contexts, [4, 4], width=8)).distribution.logits
        for row, context in enumerate(contexts):
            expected = plain_log_probs(policy, context, 4)
            torch.testing.assert_close(together[row].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", [0, 1], ids=["neighbours", "what follows"])
def test_a_model_that_looks_elsewhere_is_refused(dim: int) -> None:
    model = tiny_model("llama")

    def look(_module: Any, _args: Any, output: Any) -> Any:
        output["last_hidden_state"] = output.last_hidden_state + output.last_hidden_state.mean(dim, keepdim=True)
        return output

    model.model.register_forward_hook(look)
    with pytest.raises(ValueError, match=r"whose answer to a context depends on nothing else; what LlamaForCausalLM"):
        make_policy(make_env(), model=model)
