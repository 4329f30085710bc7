"""Decode steps as CUDA graphs, on a device that has them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from learners import make_env, make_model, make_policy, observation_of

from agents.models import decoding
from agents.models.decoding import Launch
from agents.policies.causal_lm_policy import CausalLMPolicy

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own, of its compiler
]

LENGTH = 40


def write(policy: CausalLMPolicy, rows: int = 6, tokens: int = 20) -> torch.Tensor:
    """Log-probabilities of a rollout of fixed texts, some of which end early and some of which restart."""
    random = torch.Generator().manual_seed(0)
    texts = torch.randint(2, 300, (rows, LENGTH), generator=random).tolist()
    seen = []
    for step in range(tokens):
        lengths = [3 + row % 2 + (step if row != 1 else step % 7) for row in range(rows)]
        live = [row for row in range(rows) if row < 4 or step < 10]
        observation = observation_of([texts[row][: lengths[row]] for row in live], [2] * len(live), LENGTH)
        with torch.no_grad():
            logits = policy.get_distribution(observation).distribution.logits
        seen.append(logits.cpu())
    return torch.cat(seen)


def pair(kind: str, **options: Any) -> tuple[CausalLMPolicy, CausalLMPolicy]:
    """The same policy, with compiled and with eager decoding, on the device."""
    model = make_model(kind)
    compiled, eager = (
        make_policy(make_env(max_prompt_tokens=32), model=copy.deepcopy(model), decode=decode, **options).to("cuda")
        for decode in ("compiled", "eager")
    )
    return compiled, eager


def launches_of(policy: CausalLMPolicy) -> set[Launch]:
    memo = policy._actor_memo
    assert memo is not None
    return set(memo._launches.values())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gpt_neox", "opt"])
def test_graphs_give_the_eager_log_probs(kind: str) -> None:
    graphs, eager = pair(kind)
    torch.testing.assert_close(write(graphs), write(eager), rtol=1e-4, atol=1e-4)
    assert launches_of(graphs) == {"captured"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}},
        {"autocast": "bfloat16"},
        {"separate_critic": True},
    ],
    ids=["plain", "lora", "autocast", "critic"],
)
def test_graphs_follow_weights_that_change_in_place(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    def counted(step: Any) -> Any:
        captured.append(step)
        return decoding.cuda_graph(step)

    monkeypatch.setitem(decoding.CAPTURES, "cuda", counted)
    graphs, eager = pair("llama", **options)
    tolerance = 0.1 if "autocast" in options else 1e-3
    before = write(graphs)
    n_captured = len(captured)
    for _ in range(2):
        for each in (graphs, eager):
            each.set_training_mode(True)
            torch.manual_seed(3)
            for parameter in each.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.randn(parameter.shape).to(parameter)
            each.optimizer.step()
        after = write(graphs)
        torch.testing.assert_close(after, write(eager), rtol=tolerance, atol=tolerance)
        assert float((after - before).abs().max()) > tolerance
    assert len(captured) == n_captured


def test_bfloat16_graphs_are_as_near_to_float32_as_eager_bfloat16_is() -> None:
    exact = make_policy(make_env(max_prompt_tokens=32), "llama").to("cuda")
    graphs, eager = (policy.to(torch.bfloat16) for policy in pair("llama"))
    expected = write(exact)
    ours, theirs = (float((write(policy).float() - expected).abs().mean()) for policy in (graphs, eager))
    assert ours < 1.5 * theirs + 1e-3
