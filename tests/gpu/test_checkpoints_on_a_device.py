"""A training on a device is written down and taken up again, there or elsewhere, its generators included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import largest_difference, make_env, make_ppo, save_model, weights_of

from agents.algorithms.ppo import PPO
from agents.state.generators import generator_states, set_generator_states

LORA = {"r": 4, "target_modules": "all-linear"}
KINDS = pytest.mark.parametrize(
    "policy_kwargs", [{}, {"lora": LORA}, {"separate_critic": True}], ids=["value head", "lora", "separate critic"]
)


def trained(tmp_path: Path, device: str, dtype: torch.dtype, policy_kwargs: dict[str, Any]) -> PPO:
    """A run that has learned for a while and was saved."""
    name = str(dtype).removeprefix("torch.")
    model = make_ppo(
        model=save_model(tmp_path / "model"),
        device=device,
        learning_rate=1e-3,
        policy_kwargs={"dtype": name, **policy_kwargs},
    )
    model.learn(60, log_interval=0)
    model.save(tmp_path / "checkpoint")
    return model


@KINDS
def test_a_resumed_run_goes_on_as_the_run_that_was_never_stopped(
    device: str, dtype: torch.dtype, tmp_path: Path, policy_kwargs: dict[str, Any]
) -> None:
    whole = trained(tmp_path, device, dtype, policy_kwargs)
    whole.learn(1, reset_num_timesteps=False, log_interval=0)
    resumed = PPO.load(tmp_path / "checkpoint", env=make_env(), device=device)
    assert {parameter.device.type for parameter in resumed.policy.parameters()} == {device}
    resumed.learn(1, reset_num_timesteps=False, log_interval=0)
    # The same texts: weights and generators are the same to the last bit.
    assert resumed.num_timesteps == whole.num_timesteps
    np.testing.assert_array_equal(resumed.buffer.actions, whole.buffer.actions)
    np.testing.assert_array_equal(resumed.buffer.log_probs, whole.buffer.log_probs)
    # A GPU adds up gradients in any order; of this learning rate's steps little may come of it. In bfloat16 the
    # rounding of a weight near 1 may fall on either side, by 2⁻⁸, at each of four steps.
    distance = largest_difference(weights_of(whole.policy), weights_of(resumed.policy))
    assert distance <= (0.0 if device == "cpu" else 1e-3 if dtype == torch.float32 else 2**-6)


@KINDS
def test_a_checkpoint_of_the_device_can_be_read_on_the_cpu(
    device: str, tmp_path: Path, policy_kwargs: dict[str, Any]
) -> None:
    model = trained(tmp_path, device, torch.float32, policy_kwargs)
    elsewhere = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu")
    expected = {name: tensor.cpu() for name, tensor in weights_of(model.policy).items()}
    assert largest_difference(expected, weights_of(elsewhere.policy)) == 0.0
    elsewhere.learn(1, reset_num_timesteps=False, log_interval=0)
    assert largest_difference(expected, weights_of(elsewhere.policy)) > 1e-5


def test_the_devices_generator_is_restored(device: str) -> None:
    def draw() -> list[float]:
        return torch.rand(4, device=device).tolist()

    torch.manual_seed(3)
    draw()
    rows = [np.random.default_rng(1)]
    states = generator_states(rows)
    first, after = draw(), rows[0].random()
    assert draw() != first
    set_generator_states(states, rows)
    assert draw() == first
    assert rows[0].random() == after
