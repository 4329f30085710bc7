"""`benchmarks.vllm` in miniature, with a server that is none of vLLM's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from vllm_stand_in import StandIn, served

from benchmarks.vllm.__main__ import WRITERS, Options, Subject, main, run, subjects, summary
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
    monkeypatch.setattr("benchmarks.vllm.killed.WRITING", 0.05)
    with served(StandIn(AutoModelForCausalLM.from_pretrained(ARITHMETIC_MODEL).eval())) as stand_in:
        server = None if writer == "local" else Served(stand_in)
        options = Options(out=tmp_path / "vllm.json", tokens=300)
        row = run(subject, writer, 0, server, options)  # type: ignore[arg-type]
    assert (row["rollouts"], row["episodes"]) == (2, 128)
    assert len(row["scores"]) == 2
    if server is not None:
        assert row["largest_log_prob_difference"] < (1e-3 if row["lag"] == 0 else 1.0)
        assert row["lag"] == (1 if "lag" in writer else 0)
        assert server.kills == ("killed" in writer) == (row.get("requests_cut_off", 0) > 0)
        assert set(server.stand_in.cut_off) == ({"/v1/completions"} if "killed" in writer else set())


def test_a_server_that_was_to_be_killed_and_was_not_is_an_error(subject: Subject, tmp_path: Path) -> None:
    few = subject._replace(arguments={**subject.arguments, "n_episodes": 16})
    with (
        served(StandIn(AutoModelForCausalLM.from_pretrained(ARITHMETIC_MODEL).eval())) as stand_in,
        pytest.raises(RuntimeError, match=r"while it writes texts of rollout 4, .* there were 1 rollouts"),
    ):
        run(few, "vllm, killed", 0, Served(stand_in), Options(tokens=1))  # type: ignore[arg-type]


def test_the_summary_has_means_over_seeds_and_their_intervals() -> None:
    rows = [{"writer": "local", "seed": seed, "score_at_end": score} for seed, score in enumerate((0.4, 0.5, 0.6))]
    found = summary(rows)["local"]
    assert found["seeds"] == 3
    assert found["score_at_end"] == pytest.approx(0.5)
    low, high = found["score_at_end_interval"]
    assert low < 0.5 < high


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, bool]]:
    """The writer, the seed, and whether there was a server, of each training; none of them is a real one."""
    made: list[tuple[str, int, bool]] = []

    def stands_in(_: Subject, writer: str, seed: int, server: Any, options: Options) -> dict[str, Any]:
        made.append((writer, seed, server is not None))
        return {"writer": writer, "seed": seed, "score_at_end": len(made)}

    @contextmanager
    def there(*_: Any) -> Iterator[str]:
        yield "a server"

    monkeypatch.setattr("benchmarks.vllm.__main__.run", stands_in)
    monkeypatch.setattr("benchmarks.vllm.__main__.served", there)
    monkeypatch.setattr("benchmarks.vllm.__main__.version", lambda: "vllm 9")
    return made


def test_fewer_seeds_and_writers_take_nothing_from_the_results(
    tmp_path: Path, runs: list[tuple[str, int, bool]]
) -> None:
    options = {"out": tmp_path / "vllm.json", "runs": tmp_path / "first"}
    main(Options(**options, seeds=2, writers=("local", "vllm, killed")))
    main(Options(**{**options, "runs": tmp_path / "second"}, seeds=1, writers=("local",)))
    main(Options(**options, seeds=2, writers=("local", "vllm, killed")))  # all there: none is run
    assert runs == [("local", 0, False), ("vllm, killed", 0, True), ("local", 1, False), ("local", 0, False)]
    found = json.loads(options["out"].read_text())["arithmetic"]
    assert [(row["writer"], row["seed"]) for row in found["trainings"]] == [run[:2] for run in runs[:3]]
    assert found["summary"]["local"]["seeds"] == 2
    assert found["server"] == "vllm 9"
    assert sum(found["commits"].values()) == 3


def test_the_policy_alone_needs_no_server(
    tmp_path: Path, runs: list[tuple[str, int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.vllm.__main__.served", None)
    main(Options(out=tmp_path / "vllm.json", runs=tmp_path, seeds=1, writers=("local",)))
    assert runs == [("local", 0, False)]


def test_trainings_of_another_length_are_not_mixed_into_the_results(
    tmp_path: Path, runs: list[tuple[str, int, bool]]
) -> None:
    options: dict[str, Any] = {"out": tmp_path / "vllm.json", "runs": tmp_path, "writers": ("local",)}
    main(Options(**options, tokens=300))
    with pytest.raises(ValueError, match=r"got \{'tokens': 400, 'episodes': 256\}. Pass those, or another file"):
        main(Options(**options, tokens=400))
    assert len(runs) == 5


def test_a_tied_head_is_copied_and_a_free_one_left_alone(tmp_path: Path) -> None:
    copy = untied(ARITHMETIC_MODEL, tmp_path / "untied")
    assert copy == tmp_path / "untied"
    model = AutoModelForCausalLM.from_pretrained(copy)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight.equal(model.get_input_embeddings().weight)
    assert untied(copy, tmp_path / "again") == copy
