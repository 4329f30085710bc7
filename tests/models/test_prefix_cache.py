"""The memo and the contexts below it from near by. Invariant 2, memoised equals plain, has its own file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import counted_forwards, make_env, make_model, make_policy, observation_of
from transformers import AutoModelForCausalLM, GPTNeoConfig, MambaConfig, MptConfig, Phi3Config

from agents.models.cache_storage import SPARE_COLUMNS
from agents.models.contexts import Contexts, contexts_of, share_prefixes
from agents.models.prefix_cache import PrefixCache

CPU = torch.device("cpu")


def contexts(*rows: list[int], width: int = 24) -> Contexts:
    return contexts_of(observation_of(rows, [1] * len(rows), width))


def plain(backbone: torch.nn.Module, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return backbone(torch.tensor([row])).last_hidden_state[0, -1]


def assert_right(memo: PrefixCache, backbone: torch.nn.Module, *rows: list[int], width: int = 24) -> None:
    hidden = memo.last_hidden(contexts(*rows, width=width))
    for i, row in enumerate(rows):
        torch.testing.assert_close(hidden[i], plain(backbone, row), atol=1e-5, rtol=1e-5)


@pytest.fixture
def backbone() -> torch.nn.Module:
    return make_model("llama").base_model


# ---- contexts ------------------------------------------------------------------------------------------------------


def test_a_context_is_what_the_mask_says_and_not_what_the_tokens_say() -> None:
    observation = observation_of([[5, 1, 6], [1, 1]], [2, 1], width=5)  # 1 is the padding, too
    found = contexts_of(observation)
    assert found.length.tolist() == [3, 2]
    assert found.step.tolist() == [1, 1]
    as_arrays = contexts_of({name: tensor.numpy() for name, tensor in observation.items()})
    assert all((ours == theirs).all() for ours, theirs in zip(found, as_arrays, strict=True))


few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(st.lists(few_tokens, min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_shared_prefixes_are_the_maximal_sequences_and_hold_every_context(rows: list[list[int]]) -> None:
    input_ids, at = share_prefixes(contexts(*rows), CPU)
    maximal = {
        tuple(row) for row in rows if not any(other[: len(row)] == row and len(other) > len(row) for other in rows)
    }
    assert len(input_ids) == len(maximal)
    for row, sequence, column, step in zip(rows, at.row, at.column, at.step, strict=True):
        assert column == len(row) - 1
        assert step == len(row) - 1
        assert input_ids[sequence, : len(row)].tolist() == row


def test_padding_repeats_the_first_token_and_never_the_pad_token() -> None:
    """Some models look for the pad token in their inputs, and warn that there is no mask for it."""
    input_ids, _ = share_prefixes(contexts([5, 6, 7], [8]), CPU)
    assert sorted(input_ids.tolist()) == [[5, 6, 7], [8, 8, 8]]


# ---- the memo ------------------------------------------------------------------------------------------------------


def test_storage_stays_where_it_is_while_there_is_room(backbone: torch.nn.Module) -> None:
    """No copy of the whole cache for every token."""
    memo = PrefixCache(backbone)
    memo.last_hidden(contexts([5, 6], [7]))
    [block] = memo._blocks
    storage = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in block.layers]
    assert len(storage) == 2
    for length in range(3, 20):
        memo.last_hidden(contexts([5] + [6] * (length - 1), [7] * (length - 1)))
    assert memo._blocks == [block]
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in block.layers] == storage


def test_storage_is_little_larger_than_what_is_live_and_never_larger_than_the_longest_context_needs(
    backbone: torch.nn.Module,
) -> None:
    memo = PrefixCache(backbone)
    for length in range(1, 121):
        memo.last_hidden(contexts([5] * length, [7] * length, width=120))
        [block] = memo._blocks
        assert length <= block.capacity <= length + SPARE_COLUMNS
    assert block.capacity == 120


def test_rows_that_restart_for_ever_are_laid_out_anew_in_the_same_storage(backbone: torch.nn.Module) -> None:
    memo = PrefixCache(backbone)
    texts = [[5, 6], [7, 8, 9]]
    storages = set()
    for step in range(3 * SPARE_COLUMNS):
        restarts = [step % 20 == 0, step % 20 == 7]  # never both at once, which would be another stream of calls
        texts = [text[:2] if restarts[row] else [*text, 2 + step % 5] for row, text in enumerate(texts)]
        memo.last_hidden(contexts(*texts))
        storages.add(memo._blocks[0].layers[0].keys.data_ptr())
    assert len(storages) == 1
    assert_right(memo, backbone, *([*text, 3] for text in texts))


def test_as_many_streams_are_remembered_as_there_are_blocks_and_the_oldest_goes_first(
    backbone: torch.nn.Module,
) -> None:
    memo = PrefixCache(backbone, max_blocks=2)
    with counted_forwards(backbone) as shapes:
        memo.last_hidden(contexts([5, 6]))
        memo.last_hidden(contexts([7, 8]))
        memo.last_hidden(contexts([5, 6, 5]))
        assert shapes == [(1, 2), (1, 2), (1, 1)]
        memo.last_hidden(contexts([9, 9, 9]))  # pushes 7 8 out, which was used before 5 6 5 was
        memo.last_hidden(contexts([5, 6, 5, 5]))
        assert shapes[3:] == [(1, 3), (1, 1)]
        memo.last_hidden(contexts([7, 8, 7]))
        assert shapes[5:] == [(1, 3)]
    assert len(memo._blocks) == 2


def test_equal_contexts_in_several_rows_each_have_their_own_memory(backbone: torch.nn.Module) -> None:
    memo = PrefixCache(backbone)
    assert_right(memo, backbone, [5, 6], [5, 6], [5, 6])
    with counted_forwards(backbone) as shapes:
        memo.last_hidden(contexts([5, 6, 1], [5, 6, 2], [5, 6]))
        memo.last_hidden(contexts([5, 6, 1, 4], [5, 6, 2, 4], [5, 6, 3]))
    assert shapes == [(3, 1), (1, 1), (3, 1)]  # the row that has waited reads its token apart
    assert_right(memo, backbone, [5, 6, 2, 4], [5, 6, 3], [5, 6, 1, 4])


def test_contexts_in_observations_of_another_width_are_not_mixed_up(backbone: torch.nn.Module) -> None:
    memo = PrefixCache(backbone)
    assert_right(memo, backbone, [5, 6], width=8)
    assert_right(memo, backbone, [5, 6, 7], width=16)
    assert_right(memo, backbone, [5, 6, 8], width=8)


def test_the_answer_is_the_callers_own(backbone: torch.nn.Module) -> None:
    memo = PrefixCache(backbone)
    memo.last_hidden(contexts([5, 6])).zero_()
    assert_right(memo, backbone, [5, 6])


@pytest.mark.parametrize("failing_call", [1, 2])
def test_an_interrupted_call_leaves_nothing_half_written(backbone: torch.nn.Module, failing_call: int) -> None:
    memo = PrefixCache(backbone)
    assert_right(memo, backbone, [5, 6], [7, 8])
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise KeyboardInterrupt

    handle = backbone.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        memo.last_hidden(contexts([5, 6, 1], [9, 9, 9]))  # one token for one row, a prefill for the other
    handle.remove()
    assert_right(memo, backbone, [5, 6, 2], [7, 8, 3])


def test_storage_is_as_large_as_the_longest_context_asks_for_however_long_a_row_waits(
    backbone: torch.nn.Module,
) -> None:
    memo = PrefixCache(backbone)
    waiting, other = [7, 8], [5]
    for step in range(400):
        other = [5, step % 3] if len(other) > 20 else [*other, step % 5]
        memo.last_hidden(contexts(waiting, other))
    [block] = memo._blocks
    assert block.visible.shape[1] <= 24 + 1 + 64
    assert_right(memo, backbone, [*waiting, 3], [*other, 4])


@pytest.mark.parametrize("kind", ["mpt", "gpt_neo"])
def test_models_that_measure_distance_in_columns_are_right_after_a_wait_too(
    kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    small: dict[str, Any] = {"vocab_size": 300, "bos_token_id": None, "eos_token_id": 0}
    config = {
        "mpt": lambda: MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, initializer_range=0.2, **small),
        "gpt_neo": lambda: GPTNeoConfig(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
            max_position_embeddings=64,
            initializer_range=0.2,
            **small,
        ),
    }[kind]()
    backbone = AutoModelForCausalLM.from_config(config).eval().base_model
    memo = PrefixCache(backbone)
    assert memo.enabled == (kind == "mpt")
    first, second = [5, 6, 7], [9, 8, 7]
    for token in range(10, 16):
        first = [*first, token]
        assert_right(memo, backbone, first, second)
    for token in range(20, 24):
        first, second = [*first, token], [*second, token]
        assert_right(memo, backbone, first, second)


@given(st.lists(st.lists(few_tokens, min_size=1, max_size=5), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_any_sequence_of_calls_is_answered_as_if_it_were_the_first(calls: list[list[list[int]]]) -> None:
    backbone = SHARED.base_model
    memo = PrefixCache(backbone)
    for rows in calls:
        assert_right(memo, backbone, *rows)


SHARED = make_model("gpt2")


# ---- what it can't do ----------------------------------------------------------------------------------------------


def test_a_state_space_model_falls_back_says_so_once_and_is_right(recwarn: pytest.WarningsRecorder) -> None:
    config = MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.2)
    policy = make_policy(make_env(), model=AutoModelForCausalLM.from_config(config).eval())
    assert policy._actor_memo is not None
    assert not policy._actor_memo.enabled
    for row in ([5, 6], [5, 6, 7], [5, 6, 7, 8]):
        assert_right(policy._actor_memo, policy.lm.backbone, row, [9])
    said = [str(warning.message) for warning in recwarn if "prefix cache" in str(warning.message)]
    assert len(said) == 1
    assert "MambaModel is run without prefix cache" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda position_ids: position_ids + 1], ids=["none", "off by one"])
def test_a_model_whose_memo_gives_other_answers_is_found_out(
    wrong: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe at construction: an architecture that ignores position ids, say, is not trusted."""
    model = make_model("gpt2").to(dtype)
    forward = type(model.base_model).forward

    def deaf(self: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            position_ids = wrong(position_ids)
        return forward(self, position_ids=position_ids, **kwargs)

    deaf.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model.base_model), "forward", deaf)
    with pytest.warns(
        UserWarning, match="GPT2Model is run without prefix cache: memoised and plain hidden states differ"
    ):
        memo = PrefixCache(model.base_model)
    assert not memo.enabled


def test_the_probe_leaves_no_trace(backbone: torch.nn.Module) -> None:
    memo = PrefixCache(backbone)
    assert memo.enabled
    assert memo._blocks == []
    with counted_forwards(backbone) as shapes:
        memo.last_hidden(contexts([1, 6]))  # what the probe has seen
    assert shapes == [(1, 2)]
    assert np.isfinite(memo.last_hidden(contexts([1, 6])).numpy()).all()


def test_a_frozen_model_remembers_while_another_is_trained() -> None:
    frozen, trained = (make_model().base_model for _ in range(2))
    frozen.requires_grad_(False)
    memos = {model: PrefixCache(model) for model in (frozen, trained)}
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3)
    read = {}
    for step, context in enumerate(([5, 6, 7], [5, 6, 7, 8])):
        observation = observation_of([context], [2])
        for model, memo in memos.items():
            with counted_forwards(model) as shapes:
                memo.last_hidden(contexts_of(observation))
            read[model, step] = shapes
        for parameter in trained.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert read[frozen, 1] == [(1, 1)], "one new token"
    assert read[trained, 1] == [(1, 4)], "the whole context again"


def test_a_step_that_was_taken_while_a_model_was_trainable_is_noticed_when_it_is_frozen_again() -> None:
    backbone = make_model("llama").base_model
    memo = PrefixCache(backbone)
    optimizer = torch.optim.Adam(backbone.parameters(), lr=1e-2, fused=True)
    for frozen in (True, False, True):
        backbone.requires_grad_(not frozen)
        if frozen:
            assert_right(memo, backbone, [5, 6, 7])
        else:
            backbone(torch.tensor([[5, 6]])).last_hidden_state.sum().backward()
            optimizer.step()


def test_frequencies_that_are_written_anew_in_every_call_do_not_empty_the_memo() -> None:
    factors = [1.0] * 4
    config = Phi3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": factors,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 32,
        },
        pad_token_id=None,
        initializer_range=0.2,
        sliding_window=None,
    )
    backbone = AutoModelForCausalLM.from_config(config).eval().base_model
    memo = PrefixCache(backbone)
    assert memo.enabled
    with counted_forwards(backbone) as shapes:
        for row in ([5, 6], [5, 6, 7], [5, 6, 7, 8]):
            memo.last_hidden(contexts(row))
    assert shapes == [(1, 2), (1, 1), (1, 1)]
    assert_right(memo, backbone, [5, 6, 7, 8, 9])


def test_an_empty_memo_holds_no_weights() -> None:
    """Replaced weights, or those of a model that has moved to another device, can be freed."""
    policy = make_policy(make_env())
    memo = policy._actor_memo
    assert memo is not None
    for empty in (policy.clear_cache, policy.double):
        memo.last_hidden(contexts([5, 6]))
        assert memo._weights._contents
        empty()
        assert memo._weights._contents == []
        assert memo._weights._seen is None


def test_a_model_of_very_few_tokens_is_remembered_too() -> None:
    memo = PrefixCache(make_model(tokenizer=4).base_model)
    assert memo.enabled
