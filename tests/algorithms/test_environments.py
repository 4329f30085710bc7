"""Where an environment is given by name, given again, or not given; and what else may lie at a checkpoint's path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
from learners import (
    PROMPTS,
    constant,
    even_tokens,
    largest_difference,
    make_env,
    make_model,
    make_ppo,
    save_model,
    weights_of,
)
from peft import LoHaConfig, LoraConfig
from tiny import tiny_tokenizer

import text_env  # noqa: F401  registers TextRLHF-v0
from agents.algorithms.ppo import PPO
from agents.models.reference import Reference
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.sb3_vec_env import TextVecEnv
from agents.state import checkpoint
from agents.state.history import CheckpointHistory
from text_env.constraints import ForbiddenTokens


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory with a tiny model and its tokenizer."""
    return save_model(tmp_path / "model")


@pytest.fixture
def saved(model: str, tmp_path: Path) -> Path:
    """A checkpoint of one iteration."""
    make_ppo(model=model).learn(1).save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


# ---- by name -------------------------------------------------------------------------------------------------------


def test_an_environment_by_name_takes_the_models_tokenizer_and_has_room_for_its_prompts(model: str) -> None:
    ppo = PPO("CausalLMPolicy", "TextRLHF-v0", policy_kwargs={"model": model}, n_episodes=2, batch_size=2, device="cpu")
    env = ppo.vector_env
    assert len(env.tokenizer) == 300
    longest = max(len(prompt.token_ids) for prompt in env.prompts)
    assert env.max_prompt_tokens == longest > 16  # by this tokenizer, whose tokens are short
    assert env.max_new_tokens == 48


def test_the_built_in_task_by_name_is_what_it_was() -> None:
    ppo = PPO("CausalLMPolicy", "TextRLHF-v0", n_episodes=2, batch_size=2, device="cpu")
    assert (ppo.vector_env.max_prompt_tokens, ppo.vector_env.max_new_tokens) == (16, 48)


def test_what_a_registered_name_says_itself_is_left_alone(model: str) -> None:
    gym.register(
        "TinyText-v0",
        vector_entry_point="text_env.vector_env:TextVectorEnv",
        kwargs={"prompts": PROMPTS, "reward": even_tokens, "max_prompt_tokens": 20, "max_new_tokens": 5},
    )
    try:
        ppo = PPO("CausalLMPolicy", "TinyText-v0", policy_kwargs={"model": model}, n_episodes=2, device="cpu")
    finally:
        del gym.envs.registry["TinyText-v0"]
    assert (ppo.vector_env.max_prompt_tokens, ppo.vector_env.max_new_tokens) == (20, 5)
    assert len(ppo.vector_env.tokenizer) == 300


# ---- given again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"min_new_tokens": 2}, "min_new_tokens was 0 and is 2"),
        ({"stop": "."}, r"stop was \[\] and is \['\.'\]"),
        ({"max_new_tokens": 9}, "max_new_tokens was 8 and is 9"),
        (
            {"max_prompt_tokens": 17, "max_new_tokens": 7},
            "max_prompt_tokens was 16 and is 17; max_new_tokens was 8 and",
        ),
        ({"constraint": ForbiddenTokens([5])}, r"constraint was None and is 'ForbiddenTokens\(\(5,\)\)'"),
        ({"reward": constant}, "reward was 'even_tokens' and is 'constant'"),
        ({"group_size": 2}, "group_size was 1 and is 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_an_environment_of_other_settings_is_refused_by_field(saved: Path, setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"Expected the environment that the checkpoint was written in, .*{said}"):
        PPO.load(saved, env=make_env(**setting), device="cpu")


def test_an_environment_with_another_tokenizer_is_refused(saved: Path, tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.add_special_tokens({"additional_special_tokens": []})
    vocabulary = other.get_vocab()
    first, second = "a", "b"
    text = other.backend_tokenizer.to_str()
    swapped = text.replace(f'"{first}":{vocabulary[first]}', '"@@":0', 1)
    swapped = swapped.replace(f'"{second}":{vocabulary[second]}', f'"{second}":{vocabulary[first]}', 1)
    swapped = swapped.replace('"@@":0', f'"{first}":{vocabulary[second]}', 1)
    other._tokenizer = other.backend_tokenizer.from_str(swapped)
    assert other.get_vocab()[first] == vocabulary[second]
    with pytest.raises(ValueError, match=r"another id there or none|tokenizer was '"):
        PPO.load(saved, env=make_env(tokenizer=other), device="cpu")


def test_other_prompts_are_no_other_environment(saved: Path) -> None:
    env = make_env(prompts=["a", "I"])
    assert PPO.load(saved, env=env, device="cpu").learn(8, reset_num_timesteps=False).num_timesteps > 8


def test_an_environment_that_is_set_later_is_compared_as_well(saved: Path) -> None:
    loaded = PPO.load(saved, env=make_env(), device="cpu")
    with pytest.raises(ValueError, match="min_new_tokens was 0 and is 2"):
        loaded.set_env(TextVecEnv(make_env(min_new_tokens=2)))
    loaded.set_env(TextVecEnv(make_env()))


# ---- not given -----------------------------------------------------------------------------------------------------


def test_without_an_environment_what_is_loaded_predicts_as_what_was_saved(model: str, tmp_path: Path) -> None:
    env = make_env(min_new_tokens=3)
    ppo = make_ppo(env, model, policy_kwargs={"lora": {"r": 2}}).learn(1)
    ppo.save(tmp_path / "checkpoint")
    loaded = PPO.load(tmp_path / "checkpoint", device="cpu")
    assert largest_difference(weights_of(ppo.policy), weights_of(loaded.policy)) == 0.0
    assert loaded.policy.distribution == ppo.policy.distribution
    assert loaded.observation_space == ppo.observation_space
    assert loaded.num_timesteps == ppo.num_timesteps
    observation = env.reset(seed=0)[0]
    expected, _ = ppo.predict(observation, deterministic=True)
    np.testing.assert_array_equal(loaded.predict(observation, deterministic=True)[0], expected)
    assert loaded.get_env() is None
    for action in (lambda: loaded.learn(1), lambda: loaded.save(tmp_path / "again"), lambda: loaded.set_env(env)):
        with pytest.raises(ValueError, match=r"this PPO was loaded without one, .*: use load\(path, env="):
            action()


def test_a_run_from_an_adapter_is_loaded_without_an_environment_and_with_another_reference(
    model: str, tmp_path: Path
) -> None:
    first = make_ppo(make_env(), model, policy_kwargs={"lora": {"r": 2}}).learn(1)
    first.policy.save_pretrained(tmp_path / "adapter")
    ppo = make_ppo(make_env(), str(tmp_path / "adapter")).learn(1)
    assert ppo.reference.shares_base  # it is the adapter that the run began with, inside the policy
    ppo.save(tmp_path / "checkpoint")
    trained = {name: weight for name, weight in weights_of(ppo.policy).items() if ".reference." not in name}
    assert len(trained) < len(weights_of(ppo.policy))
    other = Reference(make_ppo(model=make_model()).policy.lm)
    for loaded in (
        PPO.load(tmp_path / "checkpoint", device="cpu"),
        PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu", reference=other),
    ):
        assert largest_difference(trained, weights_of(loaded.policy)) == 0.0
    whole = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu")
    assert largest_difference(weights_of(ppo.policy), weights_of(whole.policy)) == 0.0


def test_without_an_environment_a_constraint_is_asked_for(model: str, tmp_path: Path) -> None:
    constraint = ForbiddenTokens([5])
    make_ppo(make_env(constraint=constraint), model).save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"Expected the constraint ForbiddenTokens\(\(5,\)\), under which"):
        PPO.load(tmp_path / "checkpoint", device="cpu")
    loaded = PPO.load(tmp_path / "checkpoint", device="cpu", policy_kwargs={"constraint": constraint})
    assert loaded.policy.distribution.constraint == constraint


# ---- what else may lie there ---------------------------------------------------------------------------------------


def test_a_saved_policy_says_which_function_loads_it(saved: Path, tmp_path: Path) -> None:
    PPO.load(saved, env=make_env(), device="cpu").policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"a model as policy\.save_pretrained .*\.load_policy\('.*policy', env\)"):
        PPO.load(tmp_path / "policy", env=make_env())


def test_the_directory_of_several_checkpoints_says_which_is_the_newest(saved: Path, tmp_path: Path) -> None:
    history = CheckpointHistory(tmp_path / "run" / "checkpoints")
    for timesteps in (32, 64):
        history.save(checkpoint.load(saved), timesteps)
    for path in (history.directory, tmp_path / "run"):
        with pytest.raises(ValueError, match=r"there are several: use agents\.PPO\.load\('.*/000000000064', env="):
            PPO.load(path)


@pytest.mark.parametrize("name", ["stock.zip", "stock"])
def test_a_zip_file_of_sb3s_says_who_loads_it(model: str, tmp_path: Path, name: str) -> None:
    stock = sb3.PPO(
        CausalLMPolicy, TextVecEnv(make_env(4)), n_steps=8, batch_size=8, policy_kwargs={"model": model}, device="cpu"
    )
    stock.save(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"got the zip file .*stock\.zip, .*: use stable_baselines3\.PPO\.load\("):
        PPO.load(tmp_path / name, env=make_env())
    assert sb3.PPO.load(tmp_path / name, device="cpu").policy is not None


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint.zip"])
def test_sb3_says_that_a_checkpoint_is_ours(saved: Path, name: str) -> None:
    for path in (saved.with_name(name), str(saved.with_name(name))):
        with pytest.raises(ValueError, match=r"the directory .*checkpoint, a checkpoint of the package agents: use"):
            sb3.PPO.load(path)


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def test_a_lora_config_is_as_good_as_its_arguments(model: str, tmp_path: Path) -> None:
    arguments = {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj"]}
    runs = [
        make_ppo(model=model, policy_kwargs={"lora": lora}).learn(1) for lora in (arguments, LoraConfig(**arguments))
    ]
    assert largest_difference(*(weights_of(run.policy) for run in runs)) == 0.0
    runs[1].save(tmp_path / "checkpoint")  # and it can be written down
    loaded = PPO.load(tmp_path / "checkpoint", env=make_env(), device="cpu")
    assert largest_difference(weights_of(runs[1].policy), weights_of(loaded.policy)) == 0.0


def test_the_config_of_another_kind_of_adapter_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=r"arguments of peft\.LoraConfig .* or a LoraConfig, got LoHaConfig"):
        make_ppo(model=model, policy_kwargs={"lora": LoHaConfig(r=2)})
