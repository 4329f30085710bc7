"""What learning costs on an accelerator besides its arithmetic, in figures that need no clock: copies between host and
device, times at which the host waits for the device, and kernels.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from accelerator import Counts, counted
from learners import largest_difference, make_env, make_model, make_policy, make_ppo, weights_of
from stable_baselines3.common.callbacks import CallbackList
from transformers import DynamicCache

from agents.algorithms.ppo import PPO
from agents.algorithms.snapshot import Snapshot
from agents.models.decoding import CACHE_ARGUMENT
from agents.models.transfers import to_device
from agents.rollouts.collector import Interrupted, collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sampling import collect_texts
from text_env.vector_env import TextVectorEnv

N_TOKENS = 12
ALIKE = ["The movie"]  # prompts of one length, so that no row waits for another and no mask is needed
DIFFERENT = ["The movie", "a"]


def endless_env(n: int = 4, prompts: list[str] = ALIKE, **kwargs: Any) -> TextVectorEnv:
    """Texts of 12 tokens each."""
    return make_env(n, prompts=prompts, max_new_tokens=N_TOKENS, min_new_tokens=N_TOKENS, **kwargs)


def rollout(device: torch.device, env: TextVectorEnv, n_episodes: int, **kwargs: Any) -> tuple[Counts, EpisodeBuffer]:
    policy = make_policy(env, min_new_tokens=env.min_new_tokens, **kwargs).to(device)
    with counted() as counts:
        buffer, _ = collect_texts(policy, env, n_episodes)
    return counts, buffer


def test_arrays_of_all_kinds_travel_in_one_copy(accelerator: torch.device) -> None:
    arrays = [
        np.arange(6).reshape(2, 3)[:, ::2],
        np.array([True, False, True]),
        np.array(2.5),
        np.zeros((0, 4), np.float32),
        np.arange(5, dtype=np.int32),
        np.array([[1.5, np.nan]], np.float32),
    ]
    with counted() as counts:
        moved = to_device(accelerator, *arrays)
    assert counts.to_device == 1
    assert counts.synchronizations == 0
    for array, tensor in zip(arrays, moved, strict=True):
        assert tensor.device.type == "simulated"
        assert tensor.dtype == torch.from_numpy(array).dtype
        np.testing.assert_array_equal(tensor.cpu().numpy(), array)
    for array, tensor in zip(arrays, to_device(torch.device("cpu"), *arrays), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("prompts", [ALIKE, DIFFERENT], ids=["alike", "different"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_a_token_of_all_rows_costs_one_copy_each_way(kind: str, prompts: list[str], accelerator: torch.device) -> None:
    counts, buffer = rollout(accelerator, endless_env(prompts=prompts), 4, kind=kind)
    assert buffer.n_episodes == 4
    assert counts.to_host == N_TOKENS
    # To read the prompts, to store them, and to learn which rows the storage has them in.
    assert counts.to_device == (N_TOKENS - 1) + 3
    assert counts.waits == 0
    assert counts.synchronizations == N_TOKENS


def test_a_critic_of_its_own_costs_one_more_copy_to_the_device(accelerator: torch.device) -> None:
    counts, _ = rollout(accelerator, endless_env(), 4, separate_critic=True)
    assert counts.to_host == counts.synchronizations == N_TOKENS
    assert counts.to_device == 2 * (N_TOKENS - 1 + 3)


def test_rows_that_end_and_restart_cost_a_few_copies_each(accelerator: torch.device) -> None:
    env = make_env(4, prompts=ALIKE, max_new_tokens=N_TOKENS)
    counts, buffer = rollout(accelerator, env, 12, model=make_model(ends=0.1))
    buffer.finalize()
    assert len(set(buffer.lengths.tolist())) > 2
    assert counts.waits <= buffer.n_episodes  # transformers' look at the mask of a text that is read beside others
    assert counts.to_host < counts.to_device < counts.to_host + 4 * buffer.n_episodes


def after_a_rollout(device: torch.device, **kwargs: Any) -> PPO:
    """PPO whose rollout of eight texts of 12 tokens is in the buffer, after a first update."""
    model = make_ppo(
        endless_env(),
        model=make_model(),
        device=device,
        **{"batch_size": 2, "n_epochs": 2, "target_kl": 100.0, **kwargs},
    )
    model.learn(1)
    callback = CallbackList([])
    callback.init_callback(model)
    model.collect_rollouts(callback)
    return model


@pytest.mark.parametrize(
    ("n_steps", "n_parts", "kwargs"),
    [
        (8, 1, {}),
        (8, 1, {"policy_kwargs": {"separate_critic": False}}),
        (8, 2, {"micro_batch_tokens": 20}),
        (
            4,
            4,
            {
                "batch_size": 4,
                "micro_batch_tokens": 20,
                "clip_range_vf": None,
                "ent_coef": 0.1,
                "positive_lm_coef": 0.1,
            },
        ),
    ],
)
def test_an_update_waits_once_a_step_however_many_parts_the_step_has(
    n_steps: int, n_parts: int, kwargs: dict[str, Any], accelerator: torch.device
) -> None:
    model = after_a_rollout(accelerator, **kwargs)
    with counted() as counts:
        model.update()
    assert model.bad_updates == 0
    # For the trust region all eight texts are read once more, without the critic, in parts of the same size.
    measured = 1 if model.micro_batch_tokens is None else 8
    assert counts.to_device == n_steps * n_parts + measured  # a packed batch
    assert counts.to_host == n_steps  # what is logged, the norm of the gradient, and whether all of it is finite
    # transformers looks at the positions of whole sequences, once a forward pass; and we at the distance and the
    # weights, at the end.
    decoders = 1 if model.policy.critic is None else 2
    assert counts.waits == decoders * n_steps * n_parts + measured + 2


def test_the_reference_of_a_rollout_is_waited_for_once(accelerator: torch.device) -> None:
    model = make_ppo(endless_env(), model=make_model(), device=accelerator)
    buffer, _ = collect_texts(model.policy, model.vector_env, 8, model.reference)
    with counted() as counts:
        buffer.finalize()
    assert (counts.to_device, counts.to_host, counts.waits) == (1, 1, 1)  # the last one is transformers' look


@pytest.mark.parametrize("prompts", [ALIKE, DIFFERENT], ids=["alike", "different"])
@pytest.mark.parametrize(("kind", "share"), [("gpt2", 0.15), ("llama", 0.05)])
def test_a_token_launches_few_kernels_more_than_the_bare_model(
    kind: str, share: float, prompts: list[str], accelerator: torch.device
) -> None:
    """On twelve layers, as the smallest models have them."""
    env = make_env(4, prompts=prompts, max_new_tokens=N_TOKENS)
    policy = make_policy(env, kind, model=make_model(kind, num_hidden_layers=12)).to(accelerator)
    totals: list[int] = []
    buffer = EpisodeBuffer(0, env.single_observation_space, env.single_action_space, accelerator, n_envs=4)
    with counted() as counts:

        def note(n_rows: int, step: dict[str, Any]) -> bool:
            totals.append(sum(counts.kernels.values()))
            return n_rows == 4

        with contextlib.suppress(Interrupted):  # a row has ended
            collect_episodes(policy, env, 4, buffer, on_step=note)
    assert len(totals) > 6
    cache, model = DynamicCache(), policy.lm.model
    tokens = torch.ones(4, 6, dtype=torch.int64, device=accelerator)
    with torch.no_grad():
        model(tokens, **{CACHE_ARGUMENT: cache}, use_cache=True)
        with counted() as bare:
            model(tokens[:, :1], **{CACHE_ARGUMENT: cache}, use_cache=True)
    ours, theirs = totals[5] - totals[4], sum(bare.kernels.values())
    print(f"{kind}: {ours} kernels a token, {theirs} of the bare model")
    assert ours <= (1 + share) * theirs


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("n_layers", [2, 6])
def test_a_step_of_the_update_launches_116_kernels_more_than_bare_passes_however_deep_the_model(
    kind: str, n_layers: int, accelerator: torch.device
) -> None:
    """Loss, statistics, clipping, the optimiser: whatever isn't the forward and the backward pass of the model."""
    shape = make_model(kind, num_hidden_layers=n_layers)
    model = make_ppo(
        endless_env(),
        model=shape,
        device=accelerator,
        batch_size=8,
        n_epochs=1,
        policy_kwargs={"separate_critic": False},
        trust_region=None,  # which isn't measured step by step
    ).learn(1)
    samples = model.buffer.pack(np.arange(8))
    observations = samples.observations
    with counted() as ours:
        model.train()
    bare_model = model.policy.lm.model
    bare_model.zero_grad()
    with counted() as bare:
        log_probs = bare_model(observations["input_ids"], use_cache=False).logits.log_softmax(dim=-1)
        log_probs[observations["action_mask"]].gather(-1, samples.actions[:, None]).mean().backward()
    assert sum(ours.kernels.values()) - sum(bare.kernels.values()) == 116


def test_what_an_update_might_have_to_take_back_is_copied_by_a_launch_a_kind(accelerator: torch.device) -> None:
    model = after_a_rollout(accelerator)
    with counted() as counts:
        before = Snapshot(model.policy)
    assert counts.kernels == {"_foreach_copy_.default": 2}  # the weights, and the optimiser's state
    was = weights_of(model.policy)
    model.train()
    assert largest_difference(*on_the_host(was, weights_of(model.policy))) > 0
    before.restore()
    assert largest_difference(*on_the_host(was, weights_of(model.policy))) == 0


def on_the_host(*many: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: tensor.cpu() for name, tensor in tensors.items()} for tensors in many]
