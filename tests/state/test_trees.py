"""Trees of tensors and JSON values go through a directory and come back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from agents.state import checkpoint
from agents.state.generators import generator_states, set_generator_states
from agents.state.manifest import CheckpointError, seal

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3),
    max_leaves=5,
)
tensors = st.builds(
    lambda shape, dtype: (torch.arange(int(np.prod(shape))) % 100).to(dtype).reshape(shape),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
)
trees = st.recursive(
    json_values | tensors, lambda below: st.dictionaries(st.text(max_size=3) | st.just("a.b"), below, max_size=4)
)
entries = st.dictionaries(st.from_regex(r"[a-z_]{1,4}", fullmatch=True), trees, max_size=4)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return type(left) is type(right) and left == right


@given(entries)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tree_comes_back_as_it_was(tmp_path: Path, tree: dict[str, Any]) -> None:
    checkpoint.save(tmp_path / "tree", tree)
    assert same(tree, checkpoint.load(tmp_path / "tree"))


def test_an_entry_with_tensors_has_a_file_of_them_under_readable_names(tmp_path: Path) -> None:
    x = torch.arange(3.0)
    checkpoint.save(tmp_path / "tree", {"policy": {"lm": {"head.weight": x}, "n": 2}, "other": [1], "x": x})
    files = {path.name for path in (tmp_path / "tree").iterdir()}
    assert files == {"policy.safetensors", "x.safetensors", "state.json", "manifest.json"}
    assert set(load_file(tmp_path / "tree" / "policy.safetensors")) == {"lm.head.weight"}
    assert json.loads((tmp_path / "tree" / "state.json").read_text())["values"] == {
        "policy": {"lm": {}, "n": 2},
        "other": [1],
    }


def test_names_that_read_the_same_are_kept_apart(tmp_path: Path) -> None:
    tree = {"w": {"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}}}
    checkpoint.save(tmp_path / "tree", tree)
    assert same(tree, checkpoint.load(tmp_path / "tree"))


def test_the_same_tensor_under_two_names_is_written_once_and_comes_back_under_both(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    tied = {"lm.head": weight, "lm.embedding": weight.detach(), "other": weight.detach().clone()}
    checkpoint.save(tmp_path / "tree", {"policy": tied})
    assert set(load_file(tmp_path / "tree" / "policy.safetensors")) == {"lm.head", "other"}
    loaded = checkpoint.load(tmp_path / "tree")["policy"]
    assert loaded["lm.head"] is loaded["lm.embedding"]
    assert all(torch.equal(tensor, weight) for tensor in loaded.values())


@pytest.mark.parametrize(
    "view",
    [lambda x: x.T, lambda x: x[1:], lambda x: x[:, 1], lambda x: x.view(-1), lambda x: x.view(torch.int32)],
    ids=["transposed", "part", "column", "flat", "as another type"],
)
def test_a_view_of_another_tensor_is_a_tensor_of_its_own(tmp_path: Path, view: Any) -> None:
    x = torch.randn(3, 4)
    checkpoint.save(tmp_path / "tree", {"w": {"whole": x, "view": view(x)}})
    loaded = checkpoint.load(tmp_path / "tree")["w"]
    assert torch.equal(loaded["whole"], x)
    assert torch.equal(loaded["view"], view(x))


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": {"b": {1: 2}}}, TypeError, r"keys of a checkpoint to be strings, got 1 in \('a', 'b'\)"),
        ({"a": {"b": object()}}, TypeError, "Expected a tensor or a JSON value at a/b, got object"),
        ({"a": [torch.zeros(1)]}, TypeError, "Expected a tensor or a JSON value at a, got list"),
        ({"a": {"b": np.float32(1)}}, TypeError, "Expected a tensor or a JSON value at a/b, got float32"),
        ({"../a": torch.zeros(1)}, ValueError, "identifiers .* got '../a'"),
    ],
)
def test_what_is_no_tree_is_refused_and_the_old_checkpoint_stays(
    tmp_path: Path, tree: Any, error: type[Exception], message: str
) -> None:
    checkpoint.save(tmp_path / "tree", {"old": 1})
    with pytest.raises(error, match=message):
        checkpoint.save(tmp_path / "tree", tree)
    assert checkpoint.load(tmp_path / "tree") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_a_directory_that_something_else_has_sealed_says_so(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "state.json").write_text('{"algorithm": "agents.ppo:PPO", "counters": {}}')
    seal(tmp_path / "tree", {})
    with pytest.raises(CheckpointError, match=r"as agents writes it, got something else in .*tree: KeyError: 'values'"):
        checkpoint.load(tmp_path / "tree")


@pytest.mark.parametrize("entry", ["../other/policy", "{tmp}/other/policy", "no name"])
def test_no_file_outside_of_the_checkpoint_is_read(tmp_path: Path, entry: str) -> None:
    checkpoint.save(tmp_path / "other", {"policy": {"weight": torch.zeros(1)}})
    checkpoint.save(tmp_path / "tree", {"old": 1})
    state = {"values": {}, "tensors": {entry.format(tmp=tmp_path): {"weight": "weight"}}}
    (tmp_path / "tree" / "state.json").write_text(json.dumps(state))
    (tmp_path / "tree" / "manifest.json").unlink()
    seal(tmp_path / "tree", {})
    with pytest.raises(CheckpointError, match="is not the name of a file of tensors"):
        checkpoint.load(tmp_path / "tree")


def test_numbers_that_are_not_finite_are_refused_only_where_they_are_asked_for(tmp_path: Path) -> None:
    tree = {"policy": {"good": torch.zeros(2), "bad": torch.tensor([1.0, float("nan")])}}
    checkpoint.save(tmp_path / "tree", tree)
    assert torch.isnan(checkpoint.load(tmp_path / "tree")["policy"]["bad"][1])
    with pytest.raises(FloatingPointError, match=r"got NaN or an infinite one in policy/bad: nothing was written"):
        checkpoint.save(tmp_path / "tree", tree, finite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


# ---- random generators ---------------------------------------------------------------------------------------------


def draw(rows: list[np.random.Generator]) -> list[Any]:
    return [
        [random.random(), random.gauss(0, 1)],
        [*np.random.rand(3).tolist(), np.random.normal()],  # an odd number of normals: one is left over
        torch.rand(3).tolist(),
        [row.random() for row in rows],
    ]


def test_every_generator_goes_on_where_it_was_after_a_way_through_a_checkpoint(tmp_path: Path) -> None:
    rows = [np.random.default_rng(seed) for seed in (1, 2)]
    draw(rows)
    checkpoint.save(tmp_path / "tree", {"generators": generator_states(rows)})
    expected = draw(rows)
    assert draw(rows) != expected
    set_generator_states(checkpoint.load(tmp_path / "tree")["generators"], rows)
    assert draw(rows) == expected


def test_generators_of_more_rows_than_there_are_say_so_and_change_nothing() -> None:
    rows = [np.random.default_rng(seed) for seed in (1, 2)]
    states = generator_states(rows)
    torch.rand(1)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"Expected an environment of 2 rows, .* got 1\."):
        set_generator_states(states, rows[:1])
    assert torch.equal(torch.get_rng_state(), before)
