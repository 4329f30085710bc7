"""Writing a text together with a model: what is read from the standard input, line by line."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import PROMPTS, make_env, save_model
from tiny import tiny_model

from agents.cli import main
from agents.policies.causal_lm_policy import load_policy
from agents.runs.play import Play


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("play") / "model")


def game(tokenizer: Any, **settings: Any) -> Play:
    env = make_env(1, tokenizer=tokenizer, **settings)
    policy = load_policy(tiny_model("llama", tokenizer), env, "cpu")
    return Play(policy, env, seed=0)


def test_each_token_is_shown_with_probabilities_and_entropy_and_the_score_comes_last(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "2", '"a', "g", "q")
    options = ["--prompt", "The movie", "--max-new-tokens", "5", "--reward", "learners:even_tokens", "--device", "cpu"]
    assert main(["play", model, "--top", "3", *options]) == 0
    shown = capsys.readouterr().out
    assert [int(number) for number in re.findall(r"token (\d+) · entropy \d\.\d\d nats", shown)] == [1, 2, 3]
    assert len(re.findall(r"\d\.\d%", shown)) == 9
    assert re.search(r"score [+-]\d\.\d{3}.* · ended by (length|eos)", " ".join(shown.split()))


def test_where_the_lines_end_the_play_ends(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch)
    assert main(["play", model, "--prompt", "The movie", "--device", "cpu", "--reward", "sentiment"]) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7", "Expected Enter, a number from 1 to 2"),
        ("nonsense", "Expected Enter, a number from 1 to 2"),
        ("b", "but this is its beginning"),
    ],
)
def test_what_can_not_be_done_is_told_and_the_play_goes_on(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    typed(monkeypatch, line, "2", "q")
    options = ["--prompt", "The movie", "--top", "2", "--reward", "sentiment", "--device", "cpu"]
    assert main(["play", model, *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert message in shown
    assert "token 2 · entropy" in shown


def test_own_text_is_written_and_taken_back(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, '" was good', "b", "q")
    options = ["--prompt", "The movie", "--reward", "sentiment", "--device", "cpu"]
    assert main(["play", model, *options]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "> The movie was good" in shown
    assert shown[-1] == "> "


def test_what_is_shown_is_the_policys_distribution(tokenizer: Any) -> None:
    play = game(tokenizer)
    sight = play.look(5)
    observation = {name: torch.from_numpy(array) for name, array in play._observation.items()}
    with torch.no_grad():
        distribution = play.policy.get_distribution(observation)
    assert sight.probabilities == sorted(sight.probabilities, reverse=True)
    for token, probability in zip(sight.tokens, sight.probabilities, strict=True):
        assert float(distribution.log_prob(torch.tensor([token])).exp()) == pytest.approx(probability, rel=1e-4)
    assert sight.entropy == pytest.approx(float(distribution.entropy()), rel=1e-4)
    assert sight.value is None  # its critic has learned nothing


def test_a_token_that_may_not_come_is_refused_and_never_offered(tokenizer: Any) -> None:
    play = game(tokenizer, min_new_tokens=2)
    sight = play.look(1000)
    assert sight.forbidden == 1
    assert tokenizer.eos_token_id not in sight.tokens
    with pytest.raises(ValueError, match="Expected a token that may come next, got '<eos>'"):
        play.append(tokenizer.eos_token_id)
    assert play.tokens == []


def test_going_back_is_having_never_gone_there_even_after_the_end(tokenizer: Any) -> None:
    play = game(tokenizer, min_new_tokens=3, max_new_tokens=3)
    first, second = play.look(4), None
    for number in range(3):
        play.append(play.look(1).tokens[0])
        if number == 0:
            second = play.look(4)
    assert play.outcome is not None
    assert play.outcome["finish_reason"] == "length"
    with pytest.raises(ValueError, match="this one is finished"):
        play.append(70)
    play.back()
    assert play.outcome is None
    play.back()
    assert second is not None
    assert play.look(4).tokens == second.tokens
    assert play.look(4).probabilities == pytest.approx(second.probabilities, rel=1e-5)
    play.back()
    assert play.look(4).probabilities == pytest.approx(first.probabilities, rel=1e-5)
    with pytest.raises(ValueError, match="this is its beginning"):
        play.back()


def test_the_critic_of_a_run_is_asked_and_the_reward_that_it_names_is_not_imported(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    names = ["--model", model, "--prompts", str(tmp_path / "prompts.txt"), "--reward", "learners:even_tokens"]
    sizes = ["--max-new-tokens", "6", "--n-episodes", "8", "--batch-size", "4", "--total-timesteps", "60"]
    run = str(tmp_path / "run")
    assert main(["train", *names, *sizes, "--device", "cpu", "--no-progress", "--run-dir", run]) == 0
    typed(monkeypatch, "g", "q")
    assert main(["play", run, "--device", "cpu"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "would import the module 'learners'" in shown
    assert "not scored: --trust would score it · ended by" in shown
    typed(monkeypatch, "1", "q")
    assert main(["play", run, "--device", "cpu", "--trust"]) == 0
    assert re.search(r"nats · value [+-]\d", capsys.readouterr().out)
