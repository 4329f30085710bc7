"""The script that compares the weights which two commits train to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.same_weights import compare, main, verdict


def test_a_commit_trains_to_its_own_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A miniature of the whole: HEAD is checked out beside this tree, and both train."""
    out = tmp_path / "same.json"
    assert main(["HEAD", "--learners", "rloo", "--iterations", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["differences"] == {"rloo": {"1": 0.0}}
    assert found["base"] == str(found["commit"]).removesuffix("-dirty")
    assert found["learners"] == ["rloo"]
    assert "the same bits" in capsys.readouterr().out


def test_a_weight_that_differs_is_found_after_the_iteration_in_which_it_does(tmp_path: Path) -> None:
    weights = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    for iteration, shift in ((1, 0.0), (2, 1e-3)):
        for tree, moved in (("base", 0.0), ("ours", shift)):
            (tmp_path / tree).mkdir(exist_ok=True)
            changed = {**weights, "b": weights["b"] + moved}
            save_file(changed, tmp_path / tree / f"ppo-{iteration}.safetensors")
    found = compare(tmp_path / "base", tmp_path / "ours", ["ppo"], 2)
    assert found == {"ppo": {"1": 0.0, "2": pytest.approx(1e-3)}}
    for asked in ((["ppo"], 3), (["ppo", "a2c"], 2), (["demo"], 2)):
        with pytest.raises(FileNotFoundError):
            compare(tmp_path / "base", tmp_path / "ours", *asked)


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ({"1": 0.0, "2": 0.0}, "the same bits"),
        ({"1": 0.0, "2": 0.5, "3": 2.0}, "different"),
        ({"1": 0.0, "2": 9e-6, "3": 2.0}, "close"),  # a token that flips changes everything after it
        ({"1": 9e-6, "2": 0.1}, "close"),
        ({"1": 2e-5, "2": 0.0}, "different"),
    ],
)
def test_what_counts_is_how_far_apart_the_first_different_iteration_is(
    differences: dict[str, float], said: str
) -> None:
    assert verdict(differences) == said
