"""The environment of a run: its options on the command line and in files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from agents.cli import main
from agents.runs.config import EnvConfig, TrainConfig, dump_config, load_config
from text_env.settings import EpisodeSettings

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
    monkeypatch.setattr("agents.cli.train", trained.append)
    assert main(["train", "--config", str(path), "--max-new-tokens", "5"]) == 0
    env = dataclasses.replace(trained[0].env, group_size=None)  # type: ignore[arg-type]
    assert env == EnvConfig(metrics={"mood": "sentiment"}, stop="x", max_new_tokens=5)


def test_metrics_of_a_file_are_measured_beside_the_gold_score() -> None:
    env = EnvConfig(reward="sentiment", metrics={"mood": "sentiment"}).make(2, "builtin")
    assert set(env.episodes.metrics) == {"mood", "gold_score"}
    assert EnvConfig(reward="sentiment", gold=None).make(2, "builtin").episodes.metrics == {}
