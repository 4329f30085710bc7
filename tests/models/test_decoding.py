"""Decode steps that are compiled or captured: which of them are launched how, and what makes a graph invalid. That
their results are the same is proved in tests/invariants/test_memoised_equals_plain.py.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from graphs import RecordedGraphs
from learners import make_env, make_model, make_policy, observation_of
from transformers import BloomConfig, BloomForCausalLM

from agents.models import decoding
from agents.policies.causal_lm_policy import CausalLMPolicy

WIDTH = 24


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> RecordedGraphs:
    return RecordedGraphs(monkeypatch)


def write(policy: CausalLMPolicy, rows: int = 4, tokens: int = 5) -> torch.Tensor:
    """Log-probabilities of a rollout of fixed texts."""
    seen = []
    for length in range(2, 2 + tokens):
        observation = observation_of([[5 + row] * length for row in range(rows)], [2] * rows, WIDTH)
        with torch.no_grad():
            seen.append(policy.get_distribution(observation).distribution.logits)
    return torch.stack(seen)


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_graphs_are_captured_once_and_serve_all_rollouts_while_weights_change_in_place(
    autocast: str | None, graphs: RecordedGraphs
) -> None:
    policy, plain = (make_policy(make_env(), decode=decode, autocast=autocast) for decode in ("compiled", "eager"))
    tolerance = 1e-5 if autocast is None else 0.1
    before = write(policy)
    torch.testing.assert_close(before, write(plain), rtol=tolerance, atol=tolerance)
    captured, replayed = graphs.captured, graphs.replayed
    for _ in range(3):
        for each in (policy, plain):
            each.set_training_mode(True)
            torch.manual_seed(7)
            for parameter in each.lm.parameters():
                parameter.grad = torch.randn_like(parameter)
            each.optimizer.step()
        after = write(policy)
        torch.testing.assert_close(after, write(plain), rtol=tolerance, atol=tolerance)
        assert float((after - before).abs().max()) > 5 * tolerance
    assert graphs.captured == captured
    assert graphs.replayed == replayed + 3 * 4


@pytest.mark.parametrize("change", ["reassign", "exchange", "adapter", "autocast"])
def test_graphs_are_captured_anew_when_what_they_are_bound_to_has_changed(change: str, graphs: RecordedGraphs) -> None:
    lora = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} if change == "adapter" else None
    policy, plain = (make_policy(make_env(), decode=decode, lora=lora) for decode in ("compiled", "eager"))
    before = write(policy)
    captured = graphs.captured
    for each in (policy, plain):
        torch.manual_seed(7)
        if change == "reassign":
            for parameter in each.lm.parameters():
                parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
        elif change == "exchange":
            layers: Any = each.lm.backbone.h
            layers[0] = copy.deepcopy(layers[0])
            layers[0].mlp.c_fc.weight.data.mul_(1.5)
        elif change == "adapter":
            assert each.lm.adapter is not None
            each.lm.adapter.wrapper.base_model.disable_adapter_layers()
        else:
            object.__setattr__(each.lm.distribution, "autocast", "bfloat16")
    after, expected = write(policy), write(plain)
    tolerance = 0.05 if change == "autocast" else 1e-5
    torch.testing.assert_close(after, expected, rtol=tolerance, atol=tolerance)
    assert float((after - before).abs().max()) > 1e-2
    assert graphs.captured > captured


def test_storage_that_graphs_are_bound_to_is_used_again_and_freed_when_the_model_moves(graphs: RecordedGraphs) -> None:
    policy = make_policy(make_env(), decode="compiled")
    memo = policy._actor_memo
    assert memo is not None
    write(policy)
    [block] = memo._blocks
    storage = block.layers[0].keys
    policy.clear_cache()
    assert memo._blocks == []
    write(policy)
    assert memo._blocks[0].layers[0].keys is storage
    policy.to("cpu")
    assert memo._blocks == memo._unused == []


def test_numbers_of_rows_and_columns_of_graphs_are_few() -> None:
    rows = {decoding._rows_of_a_graph(n, 64) for n in range(1, 65)}
    assert rows == {2, 4, 8, 16, 32, 64}
    assert all(decoding._rows_of_a_graph(n, 13) >= n for n in range(1, 14))
    columns = [decoding._columns_of_a_graph(n, 4160) for n in range(1, 4161)]
    assert len(set(columns)) <= 20
    assert all(n <= size <= max(128, 1.25 * n + 128) for n, size in enumerate(columns, 1))


def test_graphs_of_a_large_and_a_small_number_of_rows_share_the_storage(graphs: RecordedGraphs) -> None:
    policy, plain = (make_policy(make_env(), decode=decode) for decode in ("compiled", "eager"))
    for lengths in ([3] * 8, [4] * 8, [5, 5, 5], [6, 6, 6], [7], [8]):
        observation = observation_of([[5 + row] * n for row, n in enumerate(lengths)], [2] * len(lengths), WIDTH)
        with torch.no_grad():
            one, other = (each.get_distribution(observation).distribution.logits for each in (policy, plain))
        torch.testing.assert_close(one, other)
    memo = policy._actor_memo
    assert memo is not None
    [block] = memo._blocks
    assert {rows for rows, _ in block.graphs.of(memo._weights.places)} == {8, 4, 2}


def test_a_copy_of_a_policy_has_no_graphs_that_write_to_the_original(graphs: RecordedGraphs) -> None:
    policy = make_policy(make_env(), decode="compiled")
    expected = write(policy)
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in twin.lm.parameters():
            parameter.mul_(1.5)
    assert float((write(twin) - expected).abs().max()) > 1e-2
    torch.testing.assert_close(write(policy), expected)


# ---- what can't be compiled ------------------------------------------------------------------------------------------


def bloom() -> Any:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    return BloomForCausalLM(config).float().eval()


def test_a_model_that_works_out_more_from_its_mask_decodes_as_before_and_says_so_once(
    graphs: RecordedGraphs, recwarn: pytest.WarningsRecorder
) -> None:
    policy, plain = (make_policy(make_env(), model=bloom(), decode=decode) for decode in ("compiled", "eager"))
    torch.testing.assert_close(write(policy), write(plain))
    assert policy._actor_memo is not None
    assert policy._actor_memo.enabled
    assert list(policy._actor_memo._launches.values()) == ["eager"]
    [warning] = recwarn
    assert "BloomModel can't decode as decode='compiled' asks for" in str(warning.message)


def test_without_a_compiler_texts_are_written_as_before_and_a_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> Any:
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(decoding, "_compiled_step", no_compiler)
    policy, plain = (make_policy(make_env(), decode=decode) for decode in ("compiled", "eager"))
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler was found"):
        written = write(policy)
    torch.testing.assert_close(written, write(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.clear_cache()
        write(policy)


def test_auto_is_eager_unless_the_device_has_graphs(request: pytest.FixtureRequest) -> None:
    eager = make_policy(make_env())
    write(eager)
    assert eager._actor_memo is not None
    assert eager._actor_memo._launches == {}
    graphs: RecordedGraphs = request.getfixturevalue("graphs")
    captured = make_policy(make_env())
    torch.testing.assert_close(write(captured), write(eager))
    assert graphs.replayed > 0


def test_a_policy_that_leaves_a_device_with_graphs_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, graphs: RecordedGraphs
) -> None:
    policy = make_policy(make_env())
    write(policy)
    assert graphs.replayed > 0
    monkeypatch.delitem(decoding.CAPTURES, "cpu")
    torch.testing.assert_close(write(policy), write(make_policy(make_env())))


def test_graphs_need_no_compiler(monkeypatch: pytest.MonkeyPatch, graphs: RecordedGraphs) -> None:
    def no_compiler() -> Any:
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr(decoding, "_compiled_step", no_compiler)
    policy = make_policy(make_env(), decode="compiled")
    write(policy)
    assert policy._actor_memo is not None
    assert list(policy._actor_memo._launches.values()) == ["captured"]
    assert graphs.replayed > 0


def test_another_way_to_decode_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Expected decode to be one of \('auto', 'eager', 'compiled'\), got 'fast'"):
        make_policy(make_env(), decode="fast")


def test_the_models_own_attention_is_its_own_again_after_a_step(graphs: RecordedGraphs) -> None:
    policy = make_policy(make_env(), model=make_model("llama", attn_implementation="eager"), decode="compiled")
    config = policy.lm.backbone.config
    assert config._attn_implementation == "eager"  # type: ignore[union-attr]
    write(policy)
    assert graphs.replayed > 0
    assert config._attn_implementation == "eager"  # type: ignore[union-attr]


def test_attention_of_another_kind_is_refused() -> None:
    query, mask = torch.zeros(2, 4, 1, 8), torch.ones(2, 1, 1, 3, dtype=torch.bool)
    keys = torch.zeros(2, 2, 3, 8)
    with pytest.raises(ValueError, match=r"asks for \['softcap'\]"):
        decoding.grouped_attention(torch.nn.Linear(1, 1), query, keys, keys, mask, softcap=30.0)
    with pytest.raises(ValueError, match=r"asks for 0\.1"):
        decoding.grouped_attention(torch.nn.Linear(1, 1), query, keys, keys, mask, dropout=0.1)


def test_shared_heads_attend_as_if_keys_and_values_were_repeated() -> None:
    torch.manual_seed(0)
    query, mask = torch.randn(3, 6, 1, 8), torch.rand(3, 1, 1, 5) < 0.6
    mask[..., 0] = True
    keys, values = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 4)
    attended, weights = decoding.grouped_attention(torch.nn.Linear(1, 1), query, keys, values, mask, scaling=0.3)
    scores = (query * 0.3) @ keys.repeat_interleave(3, dim=1).transpose(2, 3)
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values.repeat_interleave(3, dim=1)
    torch.testing.assert_close(attended, expected.transpose(1, 2))
    assert weights is None
    assert np.prod(attended.shape) == 3 * 6 * 4
