"""The episodes that a run writes down token by token: what the training made of each token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learners import make_env
from tiny import tiny_model

from agents.algorithms.ppo import PPO
from agents.cli import main
from agents.runs.config import TrainConfig
from agents.runs.token_records import RecordEpisodes, records, token_texts

FIGURES = ("value", "return", "reward", "advantage", "kl", "entropy", "probability", "ratio")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def algorithm(tokenizer: Any, **options: Any) -> PPO:
    env = make_env(8, tokenizer=tokenizer)
    return PPO(
        "CausalLMPolicy",
        env,
        **{"n_episodes": 8, "batch_size": 4, "n_epochs": 2, "learning_rate": 3e-3, **options},
        policy_kwargs={"model": tiny_model("llama", tokenizer)},
        device="cpu",
        seed=0,
    )


def test_the_figures_are_those_of_the_rollout_and_the_ratio_that_of_the_update(tokenizer: Any, tmp_path: Path) -> None:
    model = algorithm(tokenizer)
    recorded = RecordEpisodes(tmp_path / "episodes.jsonl", TrainConfig(n_samples=3, sample_every=100))
    model.learn(1, recorded)
    rows, buffer = rows_of(tmp_path / "episodes.jsonl"), model.buffer
    assert len(rows) == 3
    assert {row["timesteps"] for row in rows} == {model.num_timesteps}
    for number, row in enumerate(rows):
        own = slice(buffer.starts[number], buffer.starts[number + 1])
        assert {len(row[name]) for name in FIGURES} == {len(row["tokens"])} == {buffer.lengths[number]}
        for name, numbers in (
            ("value", buffer.values),
            ("return", buffer.returns),
            ("reward", buffer.rewards),
            ("advantage", buffer.advantages),
            ("kl", buffer.log_ratio),
        ):
            assert row[name] == pytest.approx(numbers[own], rel=1e-3, abs=1e-9)
        assert np.log(row["probability"]) == pytest.approx(buffer.log_probs[own], abs=2e-3)
        assert all(entropy >= 0 for entropy in row["entropy"])
    assert max(abs(ratio - 1) for row in rows for ratio in row["ratio"]) > 0.01  # the policy has moved
    samples = buffer.pack(np.array([0]))
    _, now, _ = model.policy.evaluate_actions(samples.observations, samples.actions)
    ratio = (now - samples.old_log_prob).exp().detach().numpy()
    assert rows[0]["ratio"] == pytest.approx(ratio, rel=1e-3)


def test_without_an_update_every_ratio_is_1(tokenizer: Any) -> None:
    model = algorithm(tokenizer, learning_rate=0.0)
    seen: list[dict[str, Any]] = []

    class Look(RecordEpisodes):
        def _write(self) -> None:
            seen.extend(records(model, self._infos))

    model.learn(1, Look(Path("nowhere"), TrainConfig()))
    ratios = [ratio for row in seen for ratio in row["ratio"]]
    assert ratios == pytest.approx(np.ones(len(ratios)), abs=1e-3)


def test_recording_changes_nothing_of_the_training(tokenizer: Any, tmp_path: Path) -> None:
    recorded = algorithm(tokenizer)
    recorded.learn(150, RecordEpisodes(tmp_path / "episodes.jsonl", TrainConfig(sample_every=1)))
    plain = algorithm(tokenizer)
    plain.learn(150)
    assert len({row["timesteps"] for row in rows_of(tmp_path / "episodes.jsonl")}) >= 3
    assert recorded.num_timesteps == plain.num_timesteps
    for one, other in zip(recorded.policy.parameters(), plain.policy.parameters(), strict=True):
        assert one.equal(other)


def test_the_first_rollout_one_every_few_and_the_last_are_recorded(tmp_path: Path) -> None:
    from learners import PROMPTS, save_model

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    names = ["--model", save_model(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt")]
    sizes = ["--reward", "learners:even_tokens", "--max-new-tokens", "6", "--n-episodes", "8", "--batch-size", "4"]
    run = tmp_path / "run"
    options = ["--sample-every", "3", "--n-samples", "2", "--no-progress", "--run-dir", str(run), "--device", "cpu"]
    assert main(["train", *names, *sizes, *options, "--total-timesteps", "250", "--checkpoint-every", "1"]) == 0
    tokens = [int(line.split(",")[index_of(run)]) for line in (run / "progress.csv").read_text().splitlines()[1:]]
    recorded = sorted({row["timesteps"] for row in rows_of(run / "episodes.jsonl")})
    assert len(tokens) >= 5
    assert recorded == sorted({*tokens[::3], tokens[-1]})
    # A resumed run goes on from what its checkpoint knows of.
    assert main(["train", "--resume", str(run), "--trust", "--total-timesteps", "400"]) == 0
    longer = sorted({row["timesteps"] for row in rows_of(run / "episodes.jsonl")})
    assert longer[: len(recorded)] == recorded
    assert longer[-1] >= 400
    assert main(["report", str(run)]) == 0
    assert main(["watch", str(run), "--once"]) == 0


def index_of(run: Path) -> int:
    return (run / "progress.csv").read_text().splitlines()[0].split(",").index("time/total_timesteps")


@pytest.mark.parametrize("text", ["The movie “was” — naïve 電影 🎬 good", " good", "good"])
def test_the_texts_of_tokens_make_up_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in texts)
    assert token_texts(tokenizer, [*ids, tokenizer.eos_token_id])[-1] == "<eos>"
