"""Stock Stable-Baselines3 with our policy and environment: algorithms, callbacks, evaluation, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from learners import (
    EOS,
    PROMPTS,
    even_tokens,
    largest_difference,
    length_of,
    make_env,
    make_model,
    make_ppo,
    save_model,
    weights_of,
)
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env as sb3_make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

import text_env  # noqa: F401  registers TextRLHF-v0
from agents.algorithms.ppo import PPO
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.sampling import sample_texts
from agents.rollouts.sb3_vec_env import TextVecEnv, make_vec_env
from text_env.finished_texts import RESERVED_NAMES


def options() -> dict[str, Any]:
    """The environment's keyword arguments, as `make_env` has them."""
    return {"tokenizer": make_env(1).tokenizer, "prompts": PROMPTS, "reward": even_tokens, "max_new_tokens": 8}


def make_stock(algorithm: type[Any] = sb3.PPO, env: Any = None, model: Any = None, **kwargs: Any) -> Any:
    model = make_model(ends=0.2) if model is None else model
    extra = {"batch_size": 16, "n_epochs": 2} if algorithm is sb3.PPO else {}
    return algorithm(
        CausalLMPolicy,
        TextVecEnv(make_env(4)) if env is None else env,
        **{"n_steps": 8, "seed": 0, "device": "cpu", "policy_kwargs": {"model": model}, **extra, **kwargs},
    )


# ---- algorithms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [sb3.PPO, sb3.A2C])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_unmodified_algorithms_train_the_policy(algorithm: type[Any], kind: str) -> None:
    model = make_stock(algorithm, model=make_model(kind, ends=0.2))
    before = weights_of(model.policy)
    model.learn(100)
    assert largest_difference(before, weights_of(model.policy)) > 1e-4
    assert model.num_timesteps >= 100


def test_stock_ppo_learns_to_write_even_tokens() -> None:
    env = TextVecEnv(make_env(32, max_new_tokens=6, min_new_tokens=6))
    model = make_stock(
        env=env,
        model=make_model(num_hidden_layers=1),
        n_steps=6,
        batch_size=96,
        n_epochs=4,
        learning_rate=5e-3,
        stats_window_size=32,
        gamma=1.0,
    )
    model.learn(32 * 6)
    before = np.mean([episode["r"] for episode in model.ep_info_buffer])
    model.learn(4_000)
    after = np.mean([episode["r"] for episode in model.ep_info_buffer])
    assert before < 0.65
    assert after > before + 0.25


def test_the_environment_works_with_sb3s_own_vec_env_of_single_environments() -> None:
    env = sb3_make_vec_env("TextRLHF-v0", n_envs=3, seed=0, env_kwargs=options())
    model = make_stock(env=env, batch_size=24)
    model.learn(60)
    assert len(model.ep_info_buffer) > 3
    assert all(1 <= episode["l"] <= 8 for episode in model.ep_info_buffer)


def test_ratios_are_one_in_stock_ppos_first_minibatch() -> None:
    model = make_stock(n_epochs=1, batch_size=32, target_kl=None, normalize_advantage=False)
    model.learn(64)  # two rollouts; what the second update logs is still there
    assert model._n_updates == 2
    assert abs(model.logger.name_to_value["train/approx_kl"]) < 1e-6
    assert model.logger.name_to_value["train/clip_fraction"] == 0.0


# ---- evaluation and callbacks --------------------------------------------------------------------------------------


def test_evaluate_policy_gives_the_mean_score() -> None:
    model = make_stock()
    rewards, lengths = evaluate_policy(
        model, TextVecEnv(make_env(3)), n_eval_episodes=9, deterministic=False, return_episode_rewards=True
    )
    assert len(rewards) == len(lengths) == 9
    assert all(0 <= reward <= 1 for reward in rewards)
    assert all(1 <= length <= 8 for length in lengths)
    greedy = [evaluate_policy(model, TextVecEnv(make_env(1, prompts=["a"])), n_eval_episodes=2)[1] for _ in range(2)]
    assert greedy == [0.0, 0.0]  # one prompt, one greedy text: no spread


@pytest.mark.parametrize("ours", [True, False], ids=["our PPO", "stock PPO"])
def test_eval_callback_evaluates_in_mid_rollout_and_keeps_the_best_model(tmp_path: Path, ours: bool) -> None:
    name = save_model(tmp_path / "model")
    model = make_ppo(model=name) if ours else make_stock(model=name)
    callback = EvalCallback(
        TextVecEnv(make_env(2)),
        best_model_save_path=str(tmp_path / "best"),
        log_path=str(tmp_path / "log"),
        eval_freq=3,
        n_eval_episodes=4,
        verbose=0,
    )
    model.learn(60, callback=callback)
    evaluations = np.load(tmp_path / "log" / "evaluations.npz")
    assert len(evaluations["results"]) >= 3
    assert np.isfinite(evaluations["results"]).all()
    path = tmp_path / "best" / "best_model.zip"
    loaded = PPO.load(path, env=make_env(4), device="cpu") if ours else sb3.PPO.load(path, device="cpu")
    assert weights_of(loaded.policy).keys() == weights_of(model.policy).keys()


def test_evaluating_in_mid_rollout_does_not_disturb_the_rollout() -> None:
    """The same numbers, bit for bit, whether the greedy policy is asked in between or not."""
    runs = []
    for callback in (None, EvalCallback(TextVecEnv(make_env(2)), eval_freq=2, n_eval_episodes=2, verbose=0)):
        model = make_stock()
        model.learn(64, callback=callback)
        runs.append(model.rollout_buffer.actions.copy())
    np.testing.assert_array_equal(*runs)


def test_checkpoint_callback_works_with_stock_ppo_and_its_checkpoints_load(tmp_path: Path) -> None:
    model = make_stock(model=save_model(tmp_path / "model"))
    model.learn(64, callback=CheckpointCallback(save_freq=4, save_path=str(tmp_path / "checkpoints")))
    paths = sorted((tmp_path / "checkpoints").glob("*.zip"), key=lambda path: int(path.stem.split("_")[2]))
    assert len(paths) >= 3
    loaded = sb3.PPO.load(paths[-1], env=TextVecEnv(make_env(4)), device="cpu")
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps >= 96


@pytest.mark.parametrize(
    "policy_kwargs", [{}, {"lora": {"r": 2, "target_modules": "all-linear"}}, {"separate_critic": True}], ids=str
)
def test_stock_save_and_load_gives_the_same_policy(tmp_path: Path, policy_kwargs: dict[str, Any]) -> None:
    model = make_stock(policy_kwargs={"model": save_model(tmp_path / "model"), **policy_kwargs})
    model.learn(32)
    model.save(tmp_path / "saved.zip")
    loaded = sb3.PPO.load(tmp_path / "saved.zip", env=TextVecEnv(make_env(4)), device="cpu")
    assert largest_difference(weights_of(model.policy), weights_of(loaded.policy)) == 0.0
    observation = model.get_env().reset()
    np.testing.assert_array_equal(
        model.predict(observation, deterministic=True)[0], loaded.predict(observation, deterministic=True)[0]
    )
    before = weights_of(loaded.policy)
    loaded.learn(32)
    assert largest_difference(before, weights_of(loaded.policy)) > 0.0


def test_a_policy_alone_can_be_saved_and_loaded(tmp_path: Path) -> None:
    policy = make_stock(model=save_model(tmp_path / "model")).policy
    policy.save(tmp_path / "policy.pt")
    loaded = CausalLMPolicy.load(tmp_path / "policy.pt", device="cpu")
    assert largest_difference(weights_of(policy), weights_of(loaded)) == 0.0


def test_a_policy_alone_keeps_the_tokenizer_that_it_was_given(tmp_path: Path) -> None:
    tokenizer = make_env().tokenizer
    policy = make_stock(policy_kwargs={"model": make_model(), "tokenizer": tokenizer}).policy
    policy.save(tmp_path / "policy.pt")
    loaded = CausalLMPolicy.load(tmp_path / "policy.pt", device="cpu")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_predict_takes_one_observation_or_a_batch() -> None:
    env, model = make_env(3), make_stock()
    observation, _ = env.reset(seed=0)
    batched, state = model.predict(observation, deterministic=True)
    assert state is None
    assert batched.shape == (3,)
    for row in range(3):
        single, _ = model.predict({name: array[row] for name, array in observation.items()}, deterministic=True)
        assert single.shape == ()
        assert single == batched[row]
        assert env.single_action_space.contains(np.int64(single))
    torch.manual_seed(0)
    sampled = {tuple(model.predict(observation)[0].tolist()) for _ in range(5)}
    assert len(sampled) > 1


# ---- the vector environment as SB3 sees it -------------------------------------------------------------------------


def play(env: TextVecEnv, tokens: list[int]) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
    return env.step(np.array(tokens))  # type: ignore[return-value]


def test_finished_episodes_carry_monitors_statistics_and_the_terminal_observation() -> None:
    env = TextVecEnv(make_env(2, reward=length_of))
    env.seed(0)
    env.reset()
    _, rewards, dones, infos = play(env, [5, 6])
    assert dones.tolist() == [False, False]
    assert infos == [{}, {}]
    observation, rewards, dones, infos = play(env, [7, EOS])
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [0.0, 2.0]
    assert dones.tolist() == [False, True]
    assert infos[0] == {}
    assert infos[1]["episode"]["r"] == 2.0
    assert infos[1]["episode"]["l"] == 2
    assert infos[1]["episode"]["t"] >= 0
    assert infos[1]["TimeLimit.truncated"] is False
    assert infos[1]["finish_reason"] == "eos"
    terminal = infos[1]["terminal_observation"]
    length, prompt_length = int(terminal["attention_mask"].sum()), int(terminal["prompt_length"][0])
    assert terminal["input_ids"][prompt_length:length].tolist() == [6, EOS]
    # The row has begun anew, and its statistics too.
    assert int(observation["attention_mask"][1].sum()) == int(observation["prompt_length"][1, 0])
    _, _, dones, infos = play(env, [8, EOS])
    assert infos[1]["episode"]["l"] == 1


MIXED = [7, None, 2.5, {"a": 1}]


def mixed(completion_ids: list[list[int]], log_extra: Any, **_: Any) -> list[float]:
    """Logs of each text another kind of value, and its tokens, by which it is found again."""
    log_extra("tokens", completion_ids)
    log_extra("mixed", [MIXED[ids[0] % 4] for ids in completion_ids])
    return [1.0 for _ in completion_ids]


def test_values_of_any_type_that_a_reward_logs_reach_sb3_and_the_training_as_they_are() -> None:
    env = TextVecEnv(make_env(4, reward=mixed))
    env.reset()
    assert [info["mixed"] for info in play(env, [EOS] * 4)[3]] == [7] * 4
    play(env, [4, 5, 6, 7])
    assert [info["mixed"] for info in play(env, [EOS] * 4)[3]] == MIXED
    seen: list[dict[str, Any]] = []
    ours = make_ppo(make_env(8, reward=mixed, max_new_tokens=1), n_episodes=32)

    def look(given: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.extend(info for info in given["infos"] if info)
        return True

    ours.learn(1, callback=look)
    infos = [*seen, *sample_texts(ours.policy, ours.vector_env, PROMPTS * 8)]
    assert {info["tokens"][0] % 4 for info in infos} == {0, 1, 2, 3}
    for info in infos:
        assert info["mixed"] == MIXED[info["tokens"][0] % 4]


def test_no_metric_can_have_the_name_of_what_is_added_to_a_final_info() -> None:
    env = make_env(1)
    final = RESERVED_NAMES["the final info has already"]
    written = {*sample_texts(make_ppo(env).policy, env, PROMPTS[:1])[0]}
    stock = TextVecEnv(env)
    stock.reset()
    told = {*play(stock, [EOS])[3][0]}
    assert (written | told) - final == RESERVED_NAMES["learners add to the final info"]


def test_episode_statistics_reach_sb3s_logger() -> None:
    model = make_stock(env=TextVecEnv(make_env(4, reward=length_of)))
    model.learn(64)
    rewards = [episode["r"] for episode in model.ep_info_buffer]
    assert rewards == [episode["l"] for episode in model.ep_info_buffer]
    model.learn(1)
    # PPO has dumped its log already; what it wrote came from here.
    assert model.logger.name_to_value.keys() >= {"train/loss"}
    assert model.env.env_is_wrapped(Monitor) == [True] * 4


def test_seeds_make_the_prompts_repeat_and_rows_differ() -> None:
    env = make_vec_env("TextRLHF-v0", n_envs=8, seed=3, env_kwargs=options())
    first = env.reset()["input_ids"]
    drawn_on = env.reset()["input_ids"]
    env.seed(3)
    again = env.reset()["input_ids"]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, drawn_on)
    assert len({tuple(row) for row in first.tolist()}) > 1
    single = make_env(1)
    observation, _ = single.reset(seed=3 + 5)  # row i has seed + i
    np.testing.assert_array_equal(observation["input_ids"][0], first[5])


def test_options_of_a_reset_reach_each_row() -> None:
    env = TextVecEnv(make_env(3))
    env.set_options([{"prompt": "a"}, {}, {"prompt": "I loved this", "response": " film"}])
    observation = env.reset()
    tokenizer = env.vector_env.tokenizer
    expected = tokenizer("I loved this")["input_ids"] + tokenizer(" film")["input_ids"]
    assert observation["input_ids"][2][: len(expected)].tolist() == expected
    assert env.reset_infos[0]["prompt"] == "a"
    assert env.reset_infos[2]["prompt"] == "I loved this"
    assert env.reset_infos[1]["prompt"] in PROMPTS
    drawn = {env.reset() and env.reset_infos[0]["prompt"] for _ in range(20)}  # options hold for one reset
    assert len(drawn) > 1


@pytest.mark.parametrize("name", ["promt", "reset_mask"])
def test_options_of_a_reset_that_no_row_knows_are_refused(name: str) -> None:
    env = TextVecEnv(make_env(3))
    env.set_options([{"prompt": "a"}, {name: True}, {}])
    with pytest.raises(ValueError, match=f"Unknown reset options \\['{name}'\\]|'reset_mask'\\] to be a bool array"):
        env.reset()


def test_reset_infos_are_those_of_the_episodes_that_are_under_way() -> None:
    env = TextVecEnv(make_env(3))
    stock = sb3_make_vec_env("TextRLHF-v0", n_envs=3, seed=0, env_kwargs=options())
    env.seed(0)
    seen = set()
    for each in (env, stock):
        each.reset()
    for tokens in ([EOS, 5, 6], [EOS, EOS, 7], [8, EOS, 9]) * 4:
        play(env, tokens)
        stock.step(np.array(tokens))
        assert env.reset_infos == stock.reset_infos
        under_way = [env.vector_env.episodes.prompt(row).text for row in range(3)]
        assert [info["prompt"] for info in env.reset_infos] == under_way
        seen.add(env.reset_infos[1]["prompt"])
    assert len(seen) > 1


class SaysMore(gym.vector.VectorWrapper):
    """Tells of every step something of each row, in a dict of its own, and something of all rows together."""

    def step(self, actions: Any) -> Any:
        *step, infos = self.env.step(actions)
        rows = np.ones(self.num_envs, dtype=bool)
        return *step, {**infos, "said": {"row": np.arange(self.num_envs)}, "_said": rows, "load": 0.5}


def test_what_wrappers_say_of_a_step_is_taken_apart_into_the_rows() -> None:
    env = TextVecEnv(SaysMore(RecordEpisodeStatistics(make_env(3))))
    env.reset()
    _, _, _, infos = play(env, [EOS, 5, EOS])
    assert [info["episode"]["l"] for info in (infos[0], infos[2])] == [1, 1]
    assert infos[1] == {}
    for row in (0, 2):
        assert env.reset_infos[row]["prompt"] == env.vector_env.episodes.prompt(row).text
        assert env.reset_infos[row]["said"] == {"row": row}
        assert not {"episode", "load", "final_info"} & set(env.reset_infos[row])


def test_attributes_and_methods_of_the_environment_can_be_reached() -> None:
    env = TextVecEnv(make_env(3))
    assert env.get_attr("max_new_tokens") == [8, 8, 8]
    assert env.get_attr("eos_token_id", indices=[1]) == [EOS]
    env.set_attr("render_mode", "ansi")
    assert env.vector_env.render_mode == "ansi"
    env.reset()
    texts = env.env_method("render")
    assert len(texts) == 3
    with pytest.raises(ValueError, match="share their attributes: set 'render_mode' for all of them"):
        env.set_attr("render_mode", None, indices=[0])
    assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [False] * 3
    env.close()


def test_what_a_method_says_of_each_row_is_handed_out_by_row() -> None:
    env = TextVecEnv(make_env(3, render_mode="ansi", min_new_tokens=1))
    env.seed(0)
    env.reset()
    env.step(np.array([EOS, 6, 7]))
    texts = env.env_method("render")
    assert [type(text) for text in texts] == [str] * 3
    assert texts[2] == env.vector_env.render()[2]
    assert env.env_method("render", indices=[2]) == texts[2:]
    masks = env.env_method("action_masks")
    np.testing.assert_array_equal(np.stack(masks), env.vector_env.action_masks())
    assert masks[0].shape == (env.action_space.n,)
    assert env.has_attr("action_masks")
    streams = env.env_method("stream")
    assert [stream.token_ids[-1] for stream in streams[1:]] == [6, 7]
    assert streams == [env.vector_env.stream(row) for row in range(3)]
    assert env.env_method("stream", indices=[2]) == streams[2:]


def test_what_the_rows_have_of_their_own_is_handed_out_by_row() -> None:
    env = TextVecEnv(make_env(3))
    env.seed(5)
    env.reset()
    assert env.get_attr("action_space") == [env.action_space] * 3  # of one row, as SB3 knows them
    assert env.get_attr("observation_space", indices=[1]) == [env.observation_space]
    assert env.get_attr("np_random_seed") == [5, 6, 7]
    assert env.get_attr("np_random", indices=2) == [env.vector_env.np_random[2]]


@pytest.mark.parametrize("method", ["reset", "step"])
def test_no_row_can_be_played_in_behind_sb3s_back(method: str) -> None:
    env = TextVecEnv(make_env(3))
    env.reset()
    play(env, [5, 6, 7])
    with pytest.raises(ValueError, match=f"got '{method}', which plays in all rows at once, whatever the indices"):
        env.env_method(method, indices=[1])
    assert [stream.token_ids[-1] for stream in env.env_method("stream")] == [5, 6, 7]


def test_the_adapter_refuses_other_environments() -> None:
    with pytest.raises(
        ValueError, match=r"Expected a text environment, for example gym.make_vec\('TextRLHF-v0'\), got"
    ):
        TextVecEnv(gym.make_vec("CartPole-v1", num_envs=2))


def test_the_adapter_puts_the_environment_back_into_the_mode_that_sb3_knows() -> None:
    env = make_env(4)
    model = make_ppo(env)
    model.learn(1)
    assert env.autoreset_mode == AutoresetMode.DISABLED
    assert evaluate_policy(model, model.get_env(), n_eval_episodes=4)[0] >= 0
    assert env.autoreset_mode == AutoresetMode.SAME_STEP


def test_make_vec_env_refuses_names_of_other_environments() -> None:
    with pytest.raises(ValueError, match=r"Expected a text environment, for example .*'TextRLHF-v0'.*, got CartPole"):
        make_vec_env("CartPole-v1")
