"""Token contexts as features: what they depend on, and that a frozen language model stays out of the way."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from gymnasium.spaces.utils import flatten
from learners import EOS, PROMPTS, even_tokens, largest_difference, make_env, make_model, save_model, weights_of
from stable_baselines3.common.preprocessing import preprocess_obs
from tiny import tiny_model

import agents.policies.token_features
from agents.models.contexts import contexts_of
from agents.policies.token_features import TokenFeatures
from agents.rollouts.sb3_vec_env import TextVecEnv
from text_env.vector_env import TextVectorEnv


def played(env: TextVectorEnv, steps: int, seed: int = 0, eos: float = 0.1) -> list[dict[str, torch.Tensor]]:
    """Batches of observations of random texts that end with probability ``eos``, as SB3 hands them to an extractor."""
    generator = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    batches = []
    for _ in range(steps):
        batches.append(preprocessed(env, observation))
        tokens = generator.integers(1, env.single_action_space.n, size=env.num_envs)
        observation, *_ = env.step(np.where(generator.random(env.num_envs) < eos, EOS, tokens))
    return batches


def preprocessed(env: TextVectorEnv, observation: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    tensors = {name: torch.as_tensor(array) for name, array in observation.items()}
    return preprocess_obs(tensors, env.single_observation_space, normalize_images=True)  # type: ignore[return-value]


def features_of(env: TextVectorEnv, **kwargs: Any) -> TokenFeatures:
    torch.manual_seed(0)
    return TokenFeatures(env.single_observation_space, **kwargs)


def together(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.fixture(params=["learned", "frozen"])
def model(request: Any) -> Any:
    return None if request.param == "learned" else make_model()


# ---- what the features depend on -----------------------------------------------------------------------------------


def test_one_row_of_features_a_context_whatever_the_batch(model: Any) -> None:
    env = make_env(4)
    features = features_of(env, features_dim=24, model=model)
    batch = together(played(env, 12))
    with torch.no_grad():
        expected = features(batch)
        order = torch.randperm(48)
        shuffled = features({name: x[order] for name, x in batch.items()})
        singles = torch.cat([features({name: x[i : i + 1] for name, x in batch.items()}) for i in range(48)])
    assert expected.shape == (48, 24)
    assert features.features_dim == 24
    torch.testing.assert_close(shuffled, expected[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(singles, expected, rtol=1e-5, atol=1e-5)


def test_every_token_of_the_context_counts_and_the_padding_doesnt(model: Any) -> None:
    env = make_env(1, prompts=["I loved this"])
    features = features_of(env, model=model)
    batch = played(env, 5, eos=0.0)[-1]
    length, prompt_length = int(batch["attention_mask"].sum()), int(batch["prompt_length"])
    assert 0 < prompt_length < length - 2
    with torch.no_grad():
        expected = features(batch)
        for column in range(batch["input_ids"].shape[1]):
            changed = {name: x.clone() for name, x in batch.items()}
            changed["input_ids"][0, column] = (changed["input_ids"][0, column] + 7) % 300
            difference = float((features(changed) - expected).abs().max())
            assert (difference > 1e-5) == (column < length), column


def test_the_budget_that_is_left_counts(model: Any) -> None:
    env = make_env(1, prompts=["I loved this film"])
    features = features_of(env, model=model)
    batch = played(env, 1)[0]
    later = {**batch, "prompt_length": batch["prompt_length"] - 2}
    with torch.no_grad():
        assert float((features(later) - features(batch)).abs().max()) > 1e-3


def test_token_ids_survive_sb3s_floats_exactly() -> None:
    ids = torch.arange(2**24 - 300_000, 2**24)
    space = gym.spaces.Box(0, 2**24, ids.shape, np.int64)
    assert torch.equal(preprocess_obs(ids, space).long(), ids)  # type: ignore[union-attr]


def test_flattened_observations_have_the_same_features(model: Any) -> None:
    env = make_env(3)
    flat_space = gym.spaces.flatten_space(env.single_observation_space)
    torch.manual_seed(0)
    of_flat = TokenFeatures(flat_space, model=model)
    of_dict = features_of(env, model=model)
    env.reset(seed=0)
    for _ in range(4):
        observation, *_ = env.step(np.array([5, 6, 7]))
        rows = [{name: array[row] for name, array in observation.items()} for row in range(3)]
        flat = torch.as_tensor(np.stack([flatten(env.single_observation_space, row) for row in rows])).float()
        torch.testing.assert_close(of_flat(flat), of_dict(preprocessed(env, observation)))


def test_the_empty_contexts_that_recurrent_ppo_pads_with_change_nothing(model: Any) -> None:
    env = make_env(3)
    features = features_of(env, model=model)
    batch = played(env, 4)[-1]
    padded = {name: torch.cat([x[:2], torch.zeros_like(x), x[2:]]) for name, x in batch.items()}
    with torch.no_grad():
        answer = features(padded)
        torch.testing.assert_close(answer[[0, 1, 5]], features(batch))
    assert bool(torch.isfinite(answer).all())


# ---- the frozen language model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "acting"])
def test_the_frozen_encoding_is_the_models_last_hidden_state_normalised(kind: str, grad: bool) -> None:
    env = make_env(4)
    lm = make_model(kind)
    features = features_of(env, model=lm)
    for batch in played(env, 20):
        with torch.set_grad_enabled(grad):
            actual = features.encoder(batch)
        contexts = contexts_of(batch)
        for row, length in enumerate(contexts.length):
            with torch.no_grad():
                ids = torch.from_numpy(contexts.input_ids[row : row + 1, :length])
                hidden = lm.base_model(input_ids=ids).last_hidden_state[0, -1]
            expected = (hidden - hidden.mean()) / hidden.std(correction=0)
            torch.testing.assert_close(actual[row], expected, rtol=1e-3, atol=1e-4)


def test_the_frozen_model_is_neither_trained_nor_saved_nor_copied() -> None:
    env = make_env(4)
    lm = make_model()
    features = features_of(env, model=lm, features_dim=24)
    assert set(features.state_dict()) == {"linear.weight", "linear.bias"}
    assert sum(p.numel() for p in features.parameters()) == (32 + 1) * 24 + 24
    target, second = copy.deepcopy(features), features_of(env, model=lm)
    assert target.encoder.lm is second.encoder.lm is features.encoder.lm
    assert target.linear.weight is not features.linear.weight
    with torch.no_grad():  # the original may be trained on: the features are of a copy
        before = features.encoder(played(env, 1)[0])
        lm.base_model.wte.weight.add_(1.0)
        features.encoder.lm._row_of.clear()
        torch.testing.assert_close(features.encoder(played(env, 1)[0]), before)


def test_the_frozen_model_goes_when_the_last_extractor_goes() -> None:
    env = make_env(1)
    lm = make_model()
    first, second = features_of(env, model=lm), features_of(env, model=lm)
    before = len(agents.policies.token_features._frozen_lms)
    del first
    gc.collect()
    assert len(agents.policies.token_features._frozen_lms) == before
    del second
    gc.collect()
    assert len(agents.policies.token_features._frozen_lms) == before - 1


def count_tokens(features: TokenFeatures) -> list[int]:
    """The sizes of all batches that the model will read."""
    sizes: list[int] = []
    backbone = features.encoder.lm._backbone
    backbone.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return sizes


def test_acting_reads_each_new_token_once_and_replaying_reads_nothing() -> None:
    env = make_env(4, max_new_tokens=20, prompts=["I loved this"])
    features = features_of(env, model=make_model())
    batches = played(env, 15, eos=0.0)
    sizes = count_tokens(features)
    with torch.no_grad():
        for batch in batches:
            features(batch)
    assert sizes[1:] == [4] * 14
    sizes.clear()
    features(together(batches))
    with torch.no_grad():
        features(together(batches[3:9]))
    assert sizes == []


def test_a_minibatch_of_a_learner_reads_each_sequence_once() -> None:
    env = make_env(2, max_new_tokens=20, prompts=["I loved this"])
    features = features_of(env, model=make_model())
    sizes = count_tokens(features)
    batches = played(env, 10, eos=0.0)
    features(together(batches))
    assert sizes == [int(batches[-1]["attention_mask"].sum())]  # 20 contexts in two sequences


def test_a_full_memory_changes_nothing(monkeypatch: Any) -> None:
    env = make_env(4)
    lm = make_model()
    batches = played(env, 30)
    with torch.no_grad():
        expected = [features_of(env, model=lm)(batch) for batch in batches]
        gc.collect()
        for n_contexts in (1, 5, 7):
            monkeypatch.setattr(agents.policies.token_features, "MEMORY_BYTES", n_contexts * 32 * 4)
            features = features_of(env, model=lm)
            assert len(features.encoder.lm._answers) == n_contexts
            for batch, answer in zip(batches, expected, strict=True):
                torch.testing.assert_close(features(batch), answer, rtol=1e-5, atol=1e-5)
                assert len(features.encoder.lm._row_of) <= n_contexts
            del features
            gc.collect()


def test_a_model_by_name_is_loaded_once_and_an_algorithm_can_be_saved_and_loaded(tmp_path: Path) -> None:
    name = save_model(tmp_path / "model")
    env = TextVecEnv(make_env(4))
    kwargs = {"features_extractor_class": TokenFeatures, "features_extractor_kwargs": {"model": name}}
    model = sb3.DQN("MultiInputPolicy", env, policy_kwargs=kwargs, learning_starts=8, buffer_size=100, device="cpu")
    assert model.q_net.features_extractor.encoder.lm is model.q_net_target.features_extractor.encoder.lm
    model.learn(40)
    model.save(tmp_path / "dqn")
    loaded = sb3.DQN.load(tmp_path / "dqn", env=env, device="cpu")
    assert largest_difference(weights_of(model.policy), weights_of(loaded.policy)) == 0.0
    observation = env.reset()
    assert (
        model.predict(observation, deterministic=True)[0].tolist()
        == loaded.predict(observation, deterministic=True)[0].tolist()
    )


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_other_observations_are_refused() -> None:
    for space in (
        gym.spaces.Box(0, 1, (5,), np.float32),
        gym.spaces.Dict({"input_ids": gym.spaces.Box(0, 9, (5,), np.int64)}),
        gym.spaces.Discrete(3),
    ):
        with pytest.raises(ValueError, match=r"TokenFeatures reads token contexts.*as TextRLHF-v0 has it.*Flatten"):
            TokenFeatures(space)


def test_a_model_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 300 tokens, .* has 200\. .*whose tokenizer"):
        features_of(make_env(1), model=tiny_model("gpt2", 200))
    with pytest.raises(ValueError, match=r"at least 24 positions .* has 20\. .*budgets smaller"):
        features_of(make_env(1), model=tiny_model("gpt2", max_position_embeddings=20))
    with pytest.raises(ValueError, match=r"'builtin', a directory with config\.json"):
        features_of(make_env(1), model="no/such/model")


# ---- and that they are good for something --------------------------------------------------------------------------


def test_dqn_learns_to_write_even_tokens_with_learned_embeddings() -> None:
    env = TextVecEnv(make_env(8, max_new_tokens=4, min_new_tokens=4, prompts=PROMPTS, reward=even_tokens))
    model = sb3.DQN(
        "MultiInputPolicy",
        env,
        policy_kwargs={"features_extractor_class": TokenFeatures, "net_arch": [64]},
        learning_rate=1e-3,
        learning_starts=1_000,
        train_freq=(4, "step"),
        gradient_steps=4,
        batch_size=64,
        gamma=1.0,
        exploration_fraction=0.3,
        seed=0,
        device="cpu",
    )
    rewards = []
    model.learn(1_000)
    rewards.append(np.mean([episode["r"] for episode in model.ep_info_buffer]))
    model.learn(4_000)
    rewards.append(np.mean([episode["r"] for episode in model.ep_info_buffer]))
    assert rewards[0] < 0.6
    assert rewards[1] > 0.8
