"""Text with continuous actions: which token a point chooses, and that the rest is the environment as it was."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from learners import EOS, PROMPTS, even_tokens, save_model
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv
from tiny import RecordingReward, tiny_tokenizer

import text_env
from agents.algorithms.ppo import PPO
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.policies.token_features import TokenFeatures
from agents.rollouts.sb3_vec_env import make_vec_env
from text_env.action_spaces import EmbeddingPoints, Tokens
from text_env.constraints import AllowedTokens
from text_env.wrappers import NO_POINT, EmbeddingAction, NearestToken, VectorEmbeddingAction

H = 16
TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
EMBEDDINGS = np.random.default_rng(0).normal(size=(V, H)) + 3.0  # a large common component, as language models have


def options(**kwargs: Any) -> dict[str, Any]:
    defaults = {"tokenizer": TOKENIZER, "prompts": PROMPTS, "reward": even_tokens, "max_new_tokens": 6}
    return {"embeddings": EMBEDDINGS, **defaults, **kwargs}


def all_allowed(n: int) -> np.ndarray:
    return np.ones((n, V), np.bool_)


# ---- which token a point chooses -----------------------------------------------------------------------------------


def test_every_token_is_chosen_by_its_own_embedding_and_lies_inside_the_box() -> None:
    for embeddings in (EMBEDDINGS, EMBEDDINGS.astype(np.float16), EMBEDDINGS * np.geomspace(0.1, 10, V)[:, None]):
        nearest = NearestToken(embeddings, TOKENIZER)
        assert nearest(nearest.points, all_allowed(V)).tolist() == list(range(V))
        assert np.abs(nearest.points).max() <= 1


def test_every_token_of_the_builtin_model_is_chosen_by_its_own_embedding() -> None:
    env = gym.make("TextRLHFContinuous-v0")
    nearest: NearestToken = env.get_wrapper_attr("nearest_token")
    n_tokens = len(env.unwrapped.tokenizer)
    assert nearest.points.shape == (n_tokens, env.action_space.shape[0])
    assert nearest(nearest.points, np.ones((n_tokens, n_tokens), np.bool_)).tolist() == list(range(n_tokens))


def test_it_is_the_nearest_point_of_the_sphere_whatever_the_length_of_the_action() -> None:
    nearest = NearestToken(EMBEDDINGS, TOKENIZER)
    points = np.random.default_rng(1).uniform(-1, 1, (50, H))
    distance = np.linalg.norm(points[:, None] - nearest.points[None].astype(np.float64), axis=-1)
    for scale in (1.0, 1e-3, 0.5):
        assert nearest(points * scale, all_allowed(50)).tolist() == distance.argmin(axis=1).tolist()


def test_random_points_reach_most_tokens_which_they_would_not_without_centring() -> None:
    points = np.random.default_rng(1).uniform(-1, 1, (3000, H))
    embeddings = EMBEDDINGS + 10.0
    uncentred = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)

    def share_of_the_ten_most_frequent(tokens: np.ndarray) -> float:
        return float(np.sort(np.bincount(tokens, minlength=V))[-10:].sum() / len(tokens))

    assert share_of_the_ten_most_frequent(NearestToken(embeddings, TOKENIZER)(points, all_allowed(3000))) < 0.1
    assert share_of_the_ten_most_frequent((points @ uncentred.T).argmax(axis=1)) > 0.2


def test_a_forbidden_token_is_never_chosen() -> None:
    nearest = NearestToken(EMBEDDINGS, TOKENIZER)
    allowed = np.random.default_rng(2).random((V, V)) < 0.1
    allowed[:, 7] = True
    np.fill_diagonal(allowed, False)
    allowed[7, 8] = True
    chosen = nearest(nearest.points, allowed)
    assert allowed[np.arange(V), chosen].all()


def test_tokens_that_share_an_embedding_are_told_apart_by_what_is_allowed_only() -> None:
    embeddings = EMBEDDINGS.copy()
    embeddings[[20, 250, 299]] = embeddings[5]
    embeddings[[30, 31]] = 0.0
    nearest = NearestToken(embeddings, TOKENIZER)
    expected = np.arange(V)
    expected[[20, 250, 299]] = 5
    expected[31] = 30
    assert nearest(nearest.points, all_allowed(V)).tolist() == expected.tolist()
    allowed = all_allowed(V)
    allowed[:, [5, 20]] = False
    assert nearest(nearest.points, allowed)[[20, 250, 299]].tolist() == [250, 250, 250]


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (EMBEDDINGS[:-1], r"a row for each of the V=300 tokens .* got shape \(299, 16\)"),
        (EMBEDDINGS[0], r"got shape \(16,\)"),
        (np.where(np.arange(H) == 3, np.nan, EMBEDDINGS), "finite embeddings, got NaN"),
        (np.ones((V, H)), r"differ from their mean.*tokens \[0, 1, 2, 3, 4\] \(300 in all\) don't"),
        ("no/such/model", "'builtin', a directory or a hub name of a language model, or an array"),
        ("builtin", r"use the tokenizer of the model 'builtin'.*tokens have another id there or none"),
    ],
    ids=["too few rows", "a vector", "nan", "all the same", "no model", "another tokenizer"],
)
def test_embeddings_that_cannot_be_used_are_refused(embeddings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make("TextRLHFContinuous-v0", **options(embeddings=embeddings))


def test_embeddings_may_be_those_of_a_model_in_a_directory(tmp_path: Path) -> None:
    name = save_model(tmp_path / "model")
    env = gym.make("TextRLHFContinuous-v0", **options(embeddings=name, tokenizer=name))
    assert env.action_space.shape == (32,)
    # More rows than tokens (embeddings padded to a round number) are no fault.
    assert NearestToken(np.vstack([EMBEDDINGS, EMBEDDINGS[:4]]), TOKENIZER).points.shape == (V, H)


# ---- the environment -----------------------------------------------------------------------------------------------


def test_gymnasiums_and_sb3s_checkers_pass() -> None:
    env = gym.make("TextRLHFContinuous-v0", **options())
    assert isinstance(env.action_space, spaces.Box)
    with warnings.catch_warnings():
        # It is a wrapper, and the checker recommends to check what is inside.
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version")
        check_env(env, skip_render_check=True)
    sb3_check_env(env)


def test_it_is_made_by_name_and_made_again_by_its_spec(tmp_path: Path) -> None:
    name = save_model(tmp_path / "model")
    env = gym.make("TextRLHFContinuous-v0", **options(embeddings=name, tokenizer=name))
    again = gym.make(env.spec)
    assert isinstance(again.unwrapped, text_env.TextEnv)
    assert again.action_space == env.action_space == EmbeddingPoints(32)
    assert [spec.name for spec in again.spec.additional_wrappers] == []  # the name says it all
    with_array = gym.make("TextRLHFContinuous-v0", **options())
    assert gym.make(with_array.spec).action_space == EmbeddingPoints(H)
    vector = gym.make_vec("TextRLHFContinuous-v0", num_envs=3, **options())
    assert isinstance(vector, VectorEmbeddingAction)
    assert vector.action_space.shape == (3, H)
    assert vector.single_action_space == EmbeddingPoints(H)
    by_hand = EmbeddingAction(gym.make("TextRLHF-v0", tokenizer=name, prompts=PROMPTS), name)
    assert gym.make(by_hand.spec).action_space == by_hand.action_space == EmbeddingPoints(32)


def test_other_environments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected a text environment, for example 'TextRLHF-v0', got .*CartPole"):
        EmbeddingAction(gym.make("CartPole-v1"), EMBEDDINGS)


def test_scalar_and_vector_agree_step_by_step_with_each_other_and_with_discrete_tokens() -> None:
    kwargs = options(constraint=AllowedTokens([EOS, *range(10, 200)]), min_new_tokens=2, reward=RecordingReward())
    n = 5
    vector = gym.make_vec("TextRLHFContinuous-v0", num_envs=n, **kwargs)
    scalars = [gym.make("TextRLHFContinuous-v0", **kwargs) for _ in range(n)]
    embeddings = kwargs.pop("embeddings")
    discrete = gym.make_vec("TextRLHF-v0", num_envs=n, **kwargs)
    nearest = NearestToken(embeddings, TOKENIZER)
    observation, _ = vector.reset(seed=3)
    discrete.reset(seed=3)
    for row, env in enumerate(scalars):
        env.reset(seed=3 + row)
    generator = np.random.default_rng(4)
    ends = 0
    for _ in range(40):
        points = generator.uniform(-1, 1, (n, H)).astype(np.float32)
        points[generator.random(n) < 0.3] = nearest.points[EOS]
        tokens = nearest(points, discrete.action_masks())
        assert discrete.action_masks()[np.arange(n), tokens].all()
        observation, rewards, terminated, _, infos = vector.step(points)
        expected = discrete.step(tokens)
        for name in observation:
            np.testing.assert_array_equal(observation[name], expected[0][name])
        np.testing.assert_array_equal(rewards, expected[1])
        for row, env in enumerate(scalars):
            one, reward, done, _, info = env.step(points[row])
            assert reward == rewards[row]
            assert done == terminated[row]
            length = one["attention_mask"].sum()
            assert one["input_ids"][length - 1] == tokens[row]
            if done:
                ends += 1
                assert info["completion"] == infos["final_info"]["completion"][row]
                np.testing.assert_array_equal(one["input_ids"], infos["final_obs"][row]["input_ids"])
                one, _ = env.reset()
            np.testing.assert_array_equal(one["input_ids"], observation["input_ids"][row])
    assert ends > 10


def test_rows_of_no_point_stay_as_they_are() -> None:
    env = gym.make_vec("TextRLHFContinuous-v0", num_envs=3, autoreset_mode=AutoresetMode.DISABLED, **options())
    points = env.nearest_token.points
    before, _ = env.reset(seed=0)
    actions = points[[EOS, 5, 6]].copy()
    observation, _, terminated, _, _ = env.step(actions)
    assert terminated.tolist() == [True, False, False]
    with pytest.raises(gym.error.ResetNeeded):
        env.step(actions)
    actions[0] = NO_POINT
    after, rewards, terminated, _, _ = env.step(actions)
    np.testing.assert_array_equal(after["input_ids"][0], observation["input_ids"][0])
    assert rewards[0] == 0.0
    assert not terminated[0]
    assert (after["attention_mask"].sum(axis=1) - before["attention_mask"].sum(axis=1)).tolist() == [1, 2, 2]
    unchanged, *_ = env.step(np.full((3, H), NO_POINT, np.float32))
    np.testing.assert_array_equal(unchanged["input_ids"], after["input_ids"])
    restarted, _ = env.reset(options={"reset_mask": np.array([True, False, False])})
    np.testing.assert_array_equal(restarted["input_ids"][1:], after["input_ids"][1:])


def test_actions_that_are_no_points_are_refused_and_change_nothing() -> None:
    env = gym.make("TextRLHFContinuous-v0", disable_env_checker=True, **options())
    vector = gym.make_vec("TextRLHFContinuous-v0", num_envs=2, **options())
    observation, _ = env.reset(seed=0)
    vector.reset(seed=0)
    diverged = np.full(H, np.nan, np.float32)
    with pytest.raises(ValueError, match=r"finite actions of shape \(1, 16\).*16 numbers that are NaN or infinite"):
        env.step(diverged)
    with pytest.raises(ValueError, match=r"shape \(1, 16\).*got shape \(1, 4\)"):
        env.step(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="16 numbers that are NaN"):
        vector.step(np.stack([diverged, np.zeros(H, np.float32)]))
    with pytest.raises(ValueError, match=r"shape \(2, 16\).*got shape \(2,\)"):
        vector.step(np.array([3, 4]))
    after, *_ = env.step(np.zeros(H, np.float32))
    assert after["attention_mask"].sum() == observation["attention_mask"].sum() + 1


# ---- as SB3 sees it ------------------------------------------------------------------------------------------------


def test_make_vec_env_makes_an_sb3_vec_env_of_it() -> None:
    env = make_vec_env("TextRLHFContinuous-v0", n_envs=4, seed=0, env_kwargs=options(min_new_tokens=1))
    assert env.action_space == EmbeddingPoints(H)
    points = env.get_attr("nearest_token")[0].points
    assert env.get_attr("max_new_tokens") == [6] * 4
    first = env.reset()
    masks = np.stack(env.env_method("action_masks"))
    assert masks.shape == (4, V)
    assert not masks[:, EOS].any()
    env.step(points[[5, 6, 7, 8]])
    assert np.stack(env.env_method("action_masks", indices=[1, 2]))[:, EOS].all()
    _, _, dones, infos = env.step(points[[EOS, 6, 7, EOS]])
    assert dones.tolist() == [True, False, False, True]
    terminal = infos[3]["terminal_observation"]
    length = int(first["attention_mask"][3].sum())
    assert terminal["input_ids"][length : length + 2].tolist() == [8, EOS]
    assert infos[3]["episode"]["l"] == 2
    env.close()


def test_td3_learns_where_in_the_embedding_space_the_reward_is() -> None:
    nearest = NearestToken(EMBEDDINGS, TOKENIZER)
    worth = nearest.points[:, 0] > 0.3  # of a token: about one in eight

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(np.mean(worth[ids])) for ids in completion_ids]

    env = make_vec_env("TextRLHFContinuous-v0", 8, 0, options(max_new_tokens=3, min_new_tokens=3, reward=reward))
    model = sb3.TD3(
        "MultiInputPolicy",
        env,
        policy_kwargs={
            "features_extractor_class": TokenFeatures,
            "features_extractor_kwargs": {"features_dim": 16},
            "net_arch": [32],
        },
        learning_rate=3e-3,
        learning_starts=800,
        train_freq=(2, "step"),
        gradient_steps=2,
        batch_size=64,
        gamma=1.0,
        action_noise=NormalActionNoise(np.zeros(H), np.full(H, 0.1)),
        seed=0,
        device="cpu",
    )
    model.learn(800)
    before = np.mean([episode["r"] for episode in model.ep_info_buffer])
    model.learn(2_400)
    after = np.mean([episode["r"] for episode in model.ep_info_buffer])
    assert before < 0.25
    assert after > 0.7


# ---- an algorithm for the other kind of actions --------------------------------------------------------------------


@pytest.mark.parametrize("space", [Tokens(V), EmbeddingPoints(H)], ids=["tokens", "points"])
def test_the_spaces_are_gymnasiums_own_in_all_but_their_repr(space: Any) -> None:
    plain = spaces.Discrete(V) if isinstance(space, Tokens) else spaces.Box(-1.0, 1.0, (H,), np.float32)
    assert space == plain
    assert plain == space
    assert batch_space(space, 3) == batch_space(plain, 3)
    for copied in (copy.deepcopy(space), pickle.loads(pickle.dumps(space))):
        assert copied == space
        assert repr(copied) == repr(space)
        assert type(copied) is type(space)
    space.seed(1)
    plain.seed(1)
    np.testing.assert_array_equal(space.sample(), plain.sample())
    assert repr(space).startswith(repr(plain))


def test_an_algorithm_for_box_actions_is_told_which_environment_to_use() -> None:
    env = gym.make("TextRLHF-v0", **{key: value for key, value in options().items() if key != "embeddings"})
    for algorithm in (sb3.TD3, sb3.DDPG, sb3.SAC):
        with pytest.raises(
            AssertionError, match=r"only supports .*Box.* but .*Box actions use 'TextRLHFContinuous-v0'"
        ):
            algorithm("MultiInputPolicy", env)


def test_an_algorithm_for_tokens_is_told_which_environment_to_use() -> None:
    env = gym.make("TextRLHFContinuous-v0", **options())
    with pytest.raises(AssertionError, match=r"only supports .*Discrete.* but .*Discrete actions use 'TextRLHF-v0'"):
        sb3.DQN("MultiInputPolicy", env)
    with pytest.raises(ValueError, match=r"CausalLMPolicy chooses tokens.*Discrete actions use 'TextRLHF-v0'"):
        sb3.PPO(CausalLMPolicy, env)
    with pytest.raises(ValueError, match="got it wrapped in VectorEmbeddingAction"):
        PPO(CausalLMPolicy, make_vec_env("TextRLHFContinuous-v0", n_envs=2, env_kwargs=options()))


def test_the_spaces_go_through_sb3s_own_vec_env() -> None:
    env = DummyVecEnv([lambda: gym.make("TextRLHFContinuous-v0", **options())])
    assert isinstance(env.action_space, EmbeddingPoints)
    env.reset()
    env.step(env.action_space.sample()[None])
