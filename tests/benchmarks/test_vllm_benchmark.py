"""`benchmarks.vllm` in miniature, with a server that is none of vLLM's."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from vllm_stand_in import StandIn, served

from benchmarks.vllm.__main__ import WRITERS, Options, Subject, kept, run, subjects, summary
from benchmarks.vllm.server import untied
from text_env.builtin import ARITHMETIC_MODEL


class Served:
    """A stand-in with the methods that the benchmark uses of a server."""

    def __init__(self, stand_in: StandIn) -> None:
        self.stand_in, self.url = stand_in, stand_in.url
        self.kills = 0

    def kill(self) -> None:
        self.kills += 1
        self.stand_in.dies_after = 0

    def start(self) -> None:
        self.stand_in.restart()


@pytest.fixture(scope="module")
def subject() -> Subject:
    arithmetic = subjects(Path("none"))["arithmetic"]
    return arithmetic._replace(env={**arithmetic.env, "max_new_tokens": 4}, held_out=None)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_training_says_what_it_reached_and_how_far_the_server_was_from_the_policy(
    writer: str, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.vllm.__main__.KILLED_ROLLOUT", 2)
    with served(StandIn(AutoModelForCausalLM.from_pretrained(ARITHMETIC_MODEL).eval())) as stand_in:
        server = None if writer == "local" else Served(stand_in)
        options = Options(out=tmp_path / "vllm.json", tokens=300)
        row = run(subject, writer, 0, server, options)  # type: ignore[arg-type]
    assert (row["rollouts"], row["episodes"]) == (2, 128)
    assert len(row["scores"]) == 2
    if server is not None:
        assert row["largest_log_prob_difference"] < (1e-3 if row["lag"] == 0 else 1.0)
        assert row["lag"] == (1 if "lag" in writer else 0)
        assert server.kills == ("killed" in writer) == row.get("server_killed", False)


def test_the_summary_has_means_over_seeds_and_their_intervals() -> None:
    rows = [{"writer": "local", "seed": seed, "score_at_end": score} for seed, score in enumerate((0.4, 0.5, 0.6))]
    found = summary(rows)["local"]
    assert found["seeds"] == 3
    assert found["score_at_end"] == pytest.approx(0.5)
    low, high = found["score_at_end_interval"]
    assert low < 0.5 < high


def test_a_training_that_is_there_is_not_run_again(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"score": 3}

    assert [kept(tmp_path / "a" / "row.json", make) for _ in range(2)] == [{"score": 3}] * 2
    assert made == [1]


def test_a_tied_head_is_copied_and_a_free_one_left_alone(tmp_path: Path) -> None:
    copy = untied(ARITHMETIC_MODEL, tmp_path / "untied")
    assert copy == tmp_path / "untied"
    model = AutoModelForCausalLM.from_pretrained(copy)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight.equal(model.get_input_embeddings().weight)
    assert untied(copy, tmp_path / "again") == copy
