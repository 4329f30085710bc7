"""rl-zoo3 trains with `hyperparams/*.yml`, as docs/plugs.md has the command: `make clients`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import stable_baselines3 as sb3
import yaml
from learners import largest_difference, weights_of

from agents.policies.causal_lm_policy import CausalLMPolicy

pytest.importorskip("rl_zoo3")

ROOT = Path(__file__).parents[2]
ALGORITHMS = {"ppo": sb3.PPO, "a2c": sb3.A2C}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_rl_zoo3_trains_with_our_file(algo: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rl_zoo3.train", "--algo", algo, "--env", "TextRLHF-v0"]
    command += ["--gym-packages", "text_env", "--conf-file", str(ROOT / "hyperparams" / f"{algo}.yml")]
    command += ["-n", "192", "--eval-freq", "-1", "--seed", "1", "-f", str(tmp_path), "--device", "cpu"]
    sizes = {"ppo": ["n_envs:4", "n_steps:16", "batch_size:32", "n_epochs:1"], "a2c": ["n_envs:4", "n_steps:16"]}
    command += ["--hyperparams", *sizes[algo]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / algo / "TextRLHF-v0_1"
    used = dict(yaml.unsafe_load((run / "TextRLHF-v0" / "config.yml").read_text()))
    assert used["policy"] == "agents.policies.causal_lm_policy.CausalLMPolicy"
    model = ALGORITHMS[algo].load(run / "TextRLHF-v0.zip", device="cpu")
    assert isinstance(model.policy, CausalLMPolicy)
    assert model.num_timesteps == 192
    fresh = CausalLMPolicy(model.observation_space, model.action_space, lambda _: 0.0, **model.policy_kwargs)
    assert largest_difference(weights_of(model.policy), weights_of(fresh)) > 0
