"""The built-in arithmetic model: what ships is what its card says, and the script that made it works."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import pytest
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.utils import set_random_seed
from transformers import AutoModelForCausalLM

import text_env  # noqa: F401  (registers the environments)
from agents import PPO, make_vec_env
from agents.policies.causal_lm_policy import load_policy
from agents.rollouts.sampling import sample_texts
from text_env.arithmetic import MODEL, draw_problem, working
from text_env.builtin import ARITHMETIC_MODEL
from text_env.tokenization import load_tokenizer

DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(DATA))  # as for `python data/build_arithmetic.py`
    spec = importlib.util.spec_from_file_location("build_arithmetic", DATA / "build_arithmetic.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["build_arithmetic"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(DATA))
    return module


def test_all_that_ships_is_under_3_megabytes() -> None:
    assert sum(path.stat().st_size for path in ARITHMETIC_MODEL.rglob("*")) < 3e6
    assert 1e6 < AutoModelForCausalLM.from_pretrained(ARITHMETIC_MODEL).num_parameters() < 3e6


@pytest.mark.parametrize("n_steps", [1, 3, 4, 6])
def test_the_tokenizer_spells_every_problem_and_working_and_each_mark_is_one_token(n_steps: int) -> None:
    tokenizer, generator = load_tokenizer(MODEL), random.Random(n_steps)
    for _ in range(50):
        problem = draw_problem(generator, n_steps)
        text = problem.expression + working(problem)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        marks = sum(text.count(mark) * (len(mark) - 1) for mark in (": ", ", ", "#### "))
        assert len(ids) == len(text) - marks


def test_it_is_right_as_often_as_its_card_says_and_ends_its_texts_itself() -> None:
    report = json.loads((ARITHMETIC_MODEL / "report.json").read_text())
    env = gym.make_vec("TextArithmetic-v0", num_envs=64, task_kwargs={"split": "eval", "size": 192})
    policy = load_policy(MODEL, env, "cpu")
    set_random_seed(0)
    infos = sample_texts(policy, env, list(env.prompts))
    right = sum(info["correct"] for info in infos) / len(infos)
    assert right == pytest.approx(report["held_out"]["accuracy"], abs=0.11)  # three standard errors of 192 texts
    assert 0.25 <= report["held_out"]["accuracy"] <= 0.45
    assert sum(info["finish_reason"] == "eos" for info in infos) >= 190
    assert 60 < sum(info["length"] for info in infos) / len(infos) < 300


def test_the_script_rebuilds_a_miniature(script: ModuleType, tmp_path: Path) -> None:
    small = {
        "hidden_size": 16,
        "n_layers": 1,
        "n_heads": 2,
        "intermediate_size": 16,
        "batch_tokens": 512,
        "compile": False,
    }
    script.build(script.Build(tmp_path, threads=1, n_batches=2, n_problems=4, **small))
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"settings", "versions", "parameters", "megabytes", "held_out", "longer", "seconds"}
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.get_vocab() == load_tokenizer(MODEL).get_vocab()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.hidden_size == 16


def test_the_texts_that_it_learned_from_are_of_no_held_out_problem_and_as_sloppy_as_stated(script: ModuleType) -> None:
    from text_env.generated import split_of

    texts = script.texts(script.Build())
    drawn = [next(texts) for _ in range(400)]
    problems = [text[: text.index("=") + 1] for text in drawn]
    assert {split_of(problem) for problem in problems} == {"train"}
    wrong = 0
    for problem, text in zip(problems, drawn, strict=True):
        right = eval(problem[:-1])
        wrong += not text.endswith(f"#### {right}")
    assert 0.5 < wrong / 400 < 0.7


def test_sb3s_callback_evaluates_on_held_out_problems_in_training() -> None:
    kwargs = {"task_kwargs": {"split": "eval"}}
    held_out = make_vec_env("TextArithmetic-v0", n_envs=8, env_kwargs=kwargs)
    callback = EvalCallback(held_out, n_eval_episodes=8, eval_freq=32, deterministic=False, verbose=0)
    model = PPO("CausalLMPolicy", "TextArithmetic-v0", n_episodes=4, batch_size=4, n_epochs=1, seed=0)
    assert model.policy_kwargs["model"] == MODEL
    model.learn(1, callback=callback)
    assert callback.n_calls >= 2 * callback.eval_freq  # between the tokens of the first rollout
    assert 0 <= callback.last_mean_reward <= 1
