"""The environment of a run: its options on the command line and in files, and which environments learners refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml
from gymnasium.wrappers.vector import TransformReward
from learners import PROMPTS, save_model

from agents.cli import main
from agents.runs.algorithms import resolved
from agents.runs.config import EnvConfig, TrainConfig, dump_config, load_config
from text_env.settings import EpisodeSettings
from text_env.vector_env import TextVectorEnv

# As runs wrote it before the environment's settings were one class.
OLD = """
algo: ppo
model: builtin
env:
  env: TextRLHF-v0
  tokenizer: null
  prompts: builtin
  reward: builtin+0.5*sentiment
  gold: sentiment
  max_prompt_tokens: 16
  max_new_tokens: 24
  min_new_tokens: 2
  constraint: null
  stop: ' end'
  group_size: 4
  overlong_prompts: truncate_left
  chat_template: null
  reward_kwargs: {batch_size: '64'}
  shaping: null
  shaping_every: 1
total_timesteps: 60000
run_dir: runs/ppo
learning_rate: 0.0001
"""


def test_a_config_of_an_older_run_loads_as_it_was_meant(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(OLD)
    config = load_config(tmp_path / "config.yaml")
    assert config.env == EnvConfig(
        reward="builtin+0.5*sentiment",
        gold="sentiment",
        max_new_tokens=24,
        min_new_tokens=2,
        stop=" end",
        group_size=4,
        overlong_prompts="truncate_left",
        reward_kwargs={"batch_size": "64"},
    )
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_the_command_line_has_an_option_for_every_setting_but_live_objects(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    options = {field.name for field in dataclasses.fields(EnvConfig)} - {"metrics"}
    assert {field.name for field in dataclasses.fields(EpisodeSettings)} <= options | {"metrics"}
    for name in options:
        assert f"--{name.replace('_', '-')} " in shown
    assert "--metrics" not in shown
    assert "--env.metrics" not in shown
    assert "the response budget, in tokens" in shown  # inherited together with the field


def test_options_change_the_environment_of_a_file_and_keep_what_they_do_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "part.yaml"
    path.write_text(yaml.safe_dump({"env": {"metrics": {"mood": "sentiment"}, "stop": "x", "max_new_tokens": 9}}))
    trained: list[TrainConfig] = []
    monkeypatch.setattr("agents.runs.train.train", trained.append)
    assert main(["train", "--config", str(path), "--max-new-tokens", "5"]) == 0
    env = dataclasses.replace(trained[0].env, group_size=None)  # type: ignore[arg-type]
    assert env == EnvConfig(metrics={"mood": "sentiment"}, stop="x", max_new_tokens=5, gold="sentiment")


def test_metrics_of_a_file_are_measured_beside_the_gold_score() -> None:
    env = EnvConfig(metrics={"mood": "sentiment"}).make(2, "builtin")
    assert set(env.episodes.metrics) == {"mood", "gold_score"}
    assert EnvConfig(reward="sentiment", gold=None).make(2, "builtin").episodes.metrics == {}


@pytest.mark.parametrize(
    ("reward", "lexicon"),
    [
        *(("builtin", True), ("0.5*sentiment+2*builtin", True), ("builtin(batch_size=2)", True)),
        *(({"builtin": 1.0, "sentiment": 0.5}, True), ("sentiment", False), ("length(budget=4)", False)),
        *(("learners:even_tokens", False), ("http://builtin:8000/score", False), ({"learners:length_of": 1.0}, False)),
        ("text_env/builtin/reward_model", False),
    ],
    ids=str,
)
def test_the_lexicon_is_the_gold_score_beside_the_built_in_reward_alone(reward: Any, lexicon: bool) -> None:
    env = EnvConfig(reward=reward)
    assert env.gold_reward() == ("sentiment" if lexicon else None)
    assert resolved(TrainConfig(env=env)).env.gold == env.gold_reward()  # what config.yaml says
    for gold in ("sentiment", "length(budget=4)", None):  # what is named counts, and config.yaml has always named it
        assert dataclasses.replace(env, gold=gold).gold_reward() == gold
    for gold in ("auto", "sentiment", None):
        assert dataclasses.replace(env, gold=gold, task="arithmetic").gold_reward() is None


def wrapped(**kwargs: Any) -> TransformReward:
    """A registered environment may come in wrappers, which the learners would go round."""
    return TransformReward(TextVectorEnv(**kwargs), lambda reward: 2 * reward)


def not_text(**kwargs: Any) -> gym.vector.VectorEnv:
    return gym.make_vec("CartPole-v1", num_envs=kwargs["num_envs"])


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry_point in (("Doubled-v0", wrapped), ("NotText-v0", not_text)):
        monkeypatch.setitem(gym.registry, name, gym.envs.registration.EnvSpec(name, vector_entry_point=entry_point))


@pytest.mark.usefixtures("registered")
def test_an_environment_in_wrappers_is_refused_by_its_name_and_theirs() -> None:
    with pytest.raises(ValueError, match=r"env='Doubled-v0': .*wrapped in TransformReward\..*would never apply"):
        EnvConfig(env="Doubled-v0", reward="sentiment").make(2, "builtin")


@pytest.mark.usefixtures("registered")
def test_an_environment_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="env='NotText-v0': Expected a text vector environment"):
        EnvConfig(env="NotText-v0").make(2, "builtin")


@pytest.mark.parametrize("name", ["TextRLHFContinuous-v0", "text_env:TextRLHFContinuous-v0"])
def test_the_continuous_environment_is_refused_on_the_command_line_whatever_the_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    for model in ("builtin", save_model(tmp_path / "model")):  # the second has another tokenizer than the embeddings
        options = ["--env", name, "--model", model, "--prompts", str(tmp_path / "prompts.txt")]
        assert main(["train", *options, "--run-dir", str(tmp_path / "run")]) == 1
        shown = " ".join(capsys.readouterr().out.split())
        assert f"env='{name}': Expected the text environment itself, got it wrapped in VectorEmbeddingAction" in shown
        assert "use Stable-Baselines3's own algorithms on TextVecEnv" in shown
    assert not (tmp_path / "run").exists()


def test_the_ends_of_a_text_are_a_list_on_the_command_line_and_in_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ends.yaml"
    path.write_text("env: {eos_token_ids: [5, 7]}")
    trained: list[TrainConfig] = []
    monkeypatch.setattr("agents.runs.train.train", trained.append)
    assert main(["train", "--config", str(path)]) == main(["train", "--eos-token-ids", "5", "7"]) == 0
    assert [config.env.make(1, "builtin").eos_token_ids for config in trained] == [(1, 5, 7)] * 2
    path.write_text("env: {eos_token_ids: 5}")
    with pytest.raises(ValueError, match="eos_token_ids to be a list or null, got 5"):
        load_config(path)
