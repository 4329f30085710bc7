"""What runs on an accelerator ends as on the CPU, bit by bit. No tensor is left on the host or brought there by chance:
the simulated device refuses to mix its tensors with the CPU's.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerator import counted
from learners import largest_difference, make_env, make_model, make_policy, make_ppo, save_model, weights_of
from tiny import KINDS, tiny_model

from agents.algorithms.grpo import GRPO
from agents.algorithms.ppo import PPO
from agents.algorithms.vineppo import VinePPO
from agents.models import sizes
from agents.models.reference_constraints import ReferenceTopP
from agents.rollouts.sampling import collect_texts, sample_texts

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def batches_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much is computed at once as on the CPU: sums in another order would differ in the last bits."""
    monkeypatch.setattr(sizes, "ACCELERATOR", sizes.CPU)


def trained(device: torch.device, tokens: int = 60, **kwargs: Any) -> PPO:
    return make_ppo(device=device, **kwargs).learn(tokens)


def end_alike(one: PPO, other: PPO) -> bool:
    ours, theirs = ({name: x.cpu() for name, x in weights_of(model.policy).items()} for model in (one, other))
    return largest_difference(ours, theirs) == 0


# ---- the device itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_says_the_same_on_the_device(kind: str, accelerator: torch.device) -> None:
    model = tiny_model(kind)
    moved = copy.deepcopy(model).to(accelerator)
    input_ids = torch.arange(10).reshape(2, 5)
    answers = [m(input_ids.to(device)).logits.cpu() for m, device in ((model, CPU), (moved, accelerator))]
    assert torch.equal(*answers)
    assert len(list(moved.parameters())) == len(list(model.parameters()))  # what was tied is tied


def test_tensors_of_host_and_device_cannot_be_mixed(accelerator: torch.device) -> None:
    host, device = torch.ones(3), torch.ones(3, device=accelerator)
    for mixed in (
        lambda: host + device,
        lambda: device @ host,
        lambda: torch.where(device > 0, device, host),
        lambda: torch.cat([host, device]),
        lambda: host[torch.zeros(1, dtype=torch.int64, device=accelerator)],
    ):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            mixed()
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\) first"):
        device.numpy()
    assert torch.equal((device + torch.tensor(2.0)).cpu(), torch.full((3,), 3.0))  # a number may come from anywhere


def test_copies_waits_and_kernels_are_counted(accelerator: torch.device) -> None:
    with counted() as counts:
        device = torch.from_numpy(torch.arange(4).numpy()).to(accelerator)
        torch.tensor([1, 2], device=accelerator)
        assert (counts.to_device, counts.to_host, counts.waits) == (2, 0, 0)
        (device + 1)[1:].reshape(3, 1)
        assert counts.kernels == {"add.Tensor": 1}
        device.cpu()
        device.tolist()
        assert (counts.to_host, counts.waits, counts.synchronizations) == (2, 0, 2)
        assert float(device.sum()) == 6
        assert bool((device > 2).any())
        device.nonzero()
        device[device > 2]
        assert counts.waits == 4
        device[torch.tensor([0])]  # an index of the host's is copied, as on CUDA
        assert (counts.to_device, counts.synchronizations) == (3, 6)
    device.cpu()
    assert counts.to_host == 2


# ---- learning on it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "kwargs"),
    [
        (PPO, {}),  # a critic of its own
        (PPO, {"policy_kwargs": {"separate_critic": False, "temperature": 0.7}}),
        (PPO, {"policy_kwargs": {"lora": {"r": 4}}}),
        (PPO, {"policy_kwargs": {"value_bins": (-1, 2, 11), "gradient_checkpointing": True}}),
        (PPO, {"kl_estimator": "exact", "target_kl": 0.01}),
        (PPO, {"trust_region": 0.01, "critic_epochs": 1, "mask_truncated": True, "loss_weighting": "sequence"}),
        (VinePPO, {"n_branches": 2}),
    ],
    ids=["critic", "shared", "lora", "bins", "exact", "region", "vine"],
)
def test_a_training_on_the_device_ends_as_on_the_cpu(
    algorithm: type[PPO], kwargs: dict[str, Any], accelerator: torch.device
) -> None:
    with counted() as counts:
        on_device = trained(accelerator, algorithm=algorithm, **copy.deepcopy(kwargs))
    assert all(parameter.device.type == "simulated" for parameter in on_device.policy.parameters())
    assert counts.kernels["embedding.default"] > 0
    assert end_alike(trained(CPU, algorithm=algorithm, **copy.deepcopy(kwargs)), on_device)
    assert on_device._n_updates > 0


def test_groups_constraints_and_minimum_lengths_are_the_same_on_the_device(accelerator: torch.device) -> None:
    model = make_model(ends=0.2)

    def run(device: torch.device) -> PPO:
        constraint = ReferenceTopP(copy.deepcopy(model), 0.9, device=str(device))
        env = make_env(8, group_size=4, min_new_tokens=3, constraint=constraint)
        return trained(device, algorithm=GRPO, env=env, model=copy.deepcopy(model))

    assert end_alike(run(CPU), run(accelerator))


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_the_same_on_the_device(kind: str, accelerator: torch.device) -> None:
    env = make_env(3)
    policy = make_policy(env, kind, model=make_model(kind, ends=0.1))

    def texts() -> list[Any]:
        torch.manual_seed(1)
        env.reset(seed=1)
        buffer, episodes = collect_texts(policy, env, 8)
        buffer.finalize()
        greedy = sample_texts(policy, env, ["The movie", "a"], deterministic=True)
        return [[e["completion"] for e in (*episodes, *greedy)], buffer.values.tolist(), buffer.log_probs.tolist()]

    on_cpu = texts()
    policy.to(accelerator)
    assert texts() == on_cpu


def test_a_checkpoint_of_the_device_goes_on_there_and_on_the_cpu(tmp_path: Path, accelerator: torch.device) -> None:
    """Nearly bit by bit: weights that were read from a file lie at other addresses, where kernels add up otherwise."""
    on_device = trained(accelerator, model=save_model(tmp_path / "model"))
    on_device.save(tmp_path / "checkpoint")
    ends = []
    for device in (CPU, accelerator):
        resumed = PPO.load(tmp_path / "checkpoint", env=make_env(), device=device)
        assert resumed.policy.device.type == device.type
        assert end_alike(on_device, resumed)
        resumed.learn(60, reset_num_timesteps=False)
        assert not end_alike(on_device, resumed)
        ends.append({name: x.cpu() for name, x in weights_of(resumed.policy).items()})
    assert largest_difference(*ends) < 1e-6


def test_a_policy_of_the_device_is_saved_for_everybody(tmp_path: Path, accelerator: torch.device) -> None:
    env = make_env()
    policy = make_policy(env, separate_critic=True).to(accelerator)
    policy.save_pretrained(tmp_path)
    again = make_policy(env, model=str(tmp_path), separate_critic=True)
    again.load_value_head(tmp_path)
    assert largest_difference({n: x.cpu() for n, x in weights_of(policy).items()}, weights_of(again)) == 0
