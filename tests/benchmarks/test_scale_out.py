"""Two processes beside one, measured in miniature; and the model that predicts more of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.algorithms.accelerate_engine import reduced_in
from benchmarks.provenance import commit
from benchmarks.scale_out import __main__ as scale_out
from benchmarks.scale_out import model

ROOT = Path(__file__).parents[2]
RANKS = ROOT / "benchmarks" / "results" / "scale_out" / "ranks.json"


def test_two_processes_beside_one_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ranks.json"
    scale_out.main(["--json", str(out), "--episodes", "32", "--response", "4", "--rounds", "1", "--iterations", "1"])
    report = {part: kept["figures"] for part, kept in json.loads(out.read_text()).items()}
    for how in ("replicated", "cut up"):
        for figures in report["weights"][how].values():
            assert figures["between processes"] == 0.0
            assert figures["from one process"] < 1e-6
    assert report["weights"]["replicated"].keys() == {"ppo", "grpo", "a2c"}
    assert len(set(report["weights"]["texts of one process, tokens"]["ppo"])) > 1

    [one] = report["memory"]["one process"]
    weights = one["update"]["weights"]
    assert one["update"]["gradient"] == weights
    assert 2 * weights <= one["rollout"]["moments"] < 2.01 * weights
    assert one["rollout"]["gradient"] == 0
    for rank in report["memory"]["replicated"]:
        assert rank == one
    for rank in report["memory"]["cut up"]:
        for kind, part in {"weights": 0.5, "gradient": 0.5, "moments": 1.0}.items():
            assert rank["update"].get(kind, 0) <= 1.01 * part * weights, kind
        assert rank["rollout"]["gradient"] == 0
        assert weights * 1.5 <= rank["rollout"]["weights"] <= weights * 1.51  # whole ones to write with, and its part

    for way in ("one process", "replicated", "cut up"):
        assert report["speed"][way]["rollout"] > 0
        assert report["speed"][way]["learner"] > 0
    assert report["speed"]["cut up"]["learner ÷ predicted"] > 0
    assert report["decode"]["at_once"] > 0
    assert report["decode"]["for_each_token"] > 0
    assert "decode" in capsys.readouterr().out


def test_figures_of_a_part_replace_its_older_ones_alone_and_only_ways_that_have_it_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run(jobs: Sequence[str], way: str, directory: Path, **options: Any) -> list[dict[str, Any]]:
        ran.append((list(jobs), way))
        return [{"decode": {"at_once": 2.0, "for_each_token": 1.0}}]

    monkeypatch.setattr(scale_out, "run", run)
    committed = json.loads(RANKS.read_text())
    out = tmp_path / "ranks.json"
    out.write_text(json.dumps(committed))
    scale_out.main(["--json", str(out), "--parts", "decode"])
    assert ran == [(["decode"], "cut up")]
    kept = json.loads(out.read_text())
    decode = kept.pop("decode")
    assert decode["figures"] == {"at_once": 2.0, "for_each_token": 1.0}
    assert decode["commit"] == commit() != committed["decode"]["commit"]
    assert kept == {part: of for part, of in committed.items() if part != "decode"}


def test_the_model_gives_back_what_was_measured() -> None:
    measured = json.loads(model.MEASURED.read_text())["parts"]
    found = model.predict(model.MODELS["135M"], 1, cut_up=False)
    speed = measured["throughput"]["figures"]["135m, 64 rows: ours, compiled"]["tokens_per_second"]["median"]
    assert found.tokens / found.rollout == pytest.approx(speed)
    speed = measured["throughput"]["figures"]["135m, 512 rows: ours, compiled"]["tokens_per_second"]["median"]
    many = model.predict(model.MODELS["135M"], 1, cut_up=False, work=model.Work(rows=512))
    assert many.tokens / many.rollout == pytest.approx(speed)
    parts = measured["ppo"]["figures"]["ours, value head"]["parts"]
    # The passes of the reference had 2,048 tokens; here they are as large as those of the update.
    assert found.learner == pytest.approx(parts["update"]["median"] + parts["reference"]["median"], rel=0.2)
    assert all(seconds > 0 for seconds in model.overheads())


def test_what_is_cut_up_takes_less_memory_and_what_is_replicated_none_but_gradients_of_the_network() -> None:
    for name, one in model.MODELS.items():
        alone, all_of_it = model.predict(one, 1, cut_up=False), model.predict(one, 8, cut_up=False)
        part, more = model.predict(one, 8, cut_up=True), model.predict(one, 64, cut_up=True)
        assert all_of_it.update_bytes == alone.update_bytes > part.update_bytes > more.update_bytes, name
        assert all_of_it.fetched == 0 < part.fetched < one.parameters * model.BYTES
        assert all_of_it.rollout == alone.rollout == part.rollout
        assert all_of_it.learner > alone.learner
        assert part.in_turn < part.overlapped
    assert model.predict(model.MODELS["0.5B"], 1, cut_up=False).fits
    assert not model.predict(model.MODELS["70B"], 64, cut_up=True).fits


def test_gradients_are_sent_in_the_dtype_in_which_engines_add_them_up_and_weights_in_their_own() -> None:
    assert reduced_in(torch.bfloat16).itemsize == model.REDUCED
    assert torch.bfloat16.itemsize == model.BYTES
    thousand = model.Model(parameters=1000, layers=1, hidden=1, kv=1)
    slow = model.GPU(link=1.0)  # a byte a second: besides, nothing takes time

    def seconds(cut_up: bool, adapter: bool = False) -> float:
        work = model.Work(rows=64, prompt=128, response=256, epochs=2, minibatches=4, micro_batch_tokens=4096)
        return model.LINK_SHARE * model.predict(thousand, 2, cut_up, adapter, work, slow).learner

    # Two processes. Replicated: in 2 x 4 steps half of the gradient goes, and half of the sum comes.
    assert seconds(cut_up=False) == pytest.approx(2 * 4 * (500 + 500) * 4, rel=1e-3)
    # Cut up: in 2 x 4 x 2 passes half of the weights comes twice, and half of the gradient goes.
    assert seconds(cut_up=True, adapter=True) == pytest.approx(16 * 2 * 500 * 2, rel=1e-3)
    assert seconds(cut_up=True) == pytest.approx(16 * (2 * 500 * 2 + 500 * 4), rel=1e-3)


def test_processes_share_the_work_and_wait_for_each_other() -> None:
    free = model.of_processes(2, 100.0, 50.0, tokens=1000, steps=4, seconds={})
    assert free == {"rollout": 200.0, "learner": 100.0}
    assert model.of_processes(2, 100.0, 50.0, 1000, 4, {"reduce": 0.5})["learner"] == pytest.approx(1000 / 12)
    assert model.of_processes(2, 100.0, 50.0, 1000, 4, {"unshard": 0.5})["learner"] == pytest.approx(1000 / 16)


def test_the_page_shows_what_the_model_says() -> None:
    assert model.table() in (ROOT / "docs" / "scaling.md").read_text()
