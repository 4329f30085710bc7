"""A run of the command line whose texts servers write: stopped, resumed, and left alone by its servers."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from learners import PROMPTS, largest_difference, save_model, weights_of
from transformers import AutoModelForCausalLM
from vllm_stand_in import StandIn, served

from agents.cli import main
from agents.rollouts.vllm_servers import NoServerLeft, VllmServers
from agents.runs.checkpoints import Checkpoints
from agents.runs.commands import ResumeConfig
from agents.runs.config import EnvConfig, TrainConfig, load_config
from agents.runs.train import resume, train
from agents.state.history import CheckpointHistory
from text_env.imports import UntrustedNameError


class Killed(Exception):
    """Stands for a kill."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandIn]:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model")).eval()
    with served(StandIn(model)) as stand_in:
        yield stand_in


def configured(root: Path, name: str, server: StandIn, **kwargs: Any) -> TrainConfig:
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    env = EnvConfig(prompts=str(root / "prompts.txt"), reward="length(budget=8)", gold=None, max_new_tokens=6)
    sizes: dict[str, Any] = {"n_episodes": 8, "batch_size": 4, "n_epochs": 1, "total_timesteps": 200, "n_samples": 2}
    options = {"checkpoint_every": 1, "rollouts": server.url, "device": "cpu", "progress": False, **sizes, **kwargs}
    return TrainConfig(model=str(root / "model"), env=env, run_dir=root / name, **options)


def table(directory: Path) -> list[dict[str, str]]:
    with (directory / "progress.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("max_lag", [0, 1])
def test_a_stopped_run_goes_on_from_its_directory_as_if_it_had_not_been(
    max_lag: int, tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(configured(tmp_path, "whole", server, max_lag=max_lag))

    class CheckpointThenStop(Checkpoints):
        def _on_rollout_start(self) -> None:
            super()._on_rollout_start()
            if len(self._table) == 2:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("agents.runs.train.Checkpoints", CheckpointThenStop)
        with pytest.raises(Killed):
            train(configured(tmp_path, "stopped", server, max_lag=max_lag))
    assert load_config(tmp_path / "stopped" / "config.yaml").rollouts == server.url
    with pytest.raises(UntrustedNameError, match=r"config\.yaml, rollouts: .* would be sent .* --trust"):
        resume(ResumeConfig(resume=tmp_path / "stopped"))
    resumed = resume(ResumeConfig(resume=tmp_path / "stopped", trust=True))
    assert resumed.num_timesteps == whole.num_timesteps
    assert largest_difference(weights_of(whole.policy), weights_of(resumed.policy)) == 0.0
    rows = table(tmp_path / "stopped")
    assert [row["mismatch/lag"] for row in rows] == ["0.0", *[f"{max_lag:.1f}"] * (len(rows) - 1)]
    assert rows[-1]["objective/scores"] == table(tmp_path / "whole")[-1]["objective/scores"]


def test_a_run_that_its_servers_leave_alone_stops_with_a_checkpoint(
    tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(url: str) -> VllmServers:
        return VllmServers(url, patience=0.0)

    monkeypatch.setattr("agents.rollouts.source.vllm_servers", impatient)
    server.dies_after = 20  # in the third rollout
    with pytest.raises(NoServerLeft) as caught:
        train(configured(tmp_path, "run", server, checkpoint_every=100))
    history = CheckpointHistory(tmp_path / "run" / "checkpoints")
    done = history.timesteps()[-1]
    assert done == int(table(tmp_path / "run")[-1]["time/total_timesteps"])
    assert any(f"goes on from {done} tokens" in note for note in caught.value.__notes__)
    server.restart()
    assert resume(ResumeConfig(resume=tmp_path / "run", trust=True)).num_timesteps >= 200


def test_the_command_line_says_what_is_wrong_with_an_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rollouts", "localhost:8000", "--run-dir", str(tmp_path / "run"), "--no-progress"]
    assert main(["train", *options]) == 1
    assert "Expected the addresses of servers of vLLM" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
