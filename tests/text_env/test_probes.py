"""The probes: their optimum is the optimum, their chance level is what chance gets, and they are environments."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import text_env  # noqa: F401  (registers the environment)
from text_env.checker import check_text_env, check_text_vector_env
from text_env.probes import PROBES, VOCABULARY, Probe, make_probe
from text_env.vector_env import TextVectorEnv

V = len(VOCABULARY)
GOES_ON = (V - 1) / V  # the probability that a uniform token is not EOS

every_probe = pytest.mark.parametrize("probe", PROBES.values(), ids=list(PROBES))


def ids(text: str) -> list[int]:
    return [VOCABULARY.index(word) for word in text.split()]


def play(env: TextVectorEnv, responses: list[list[int]], prompts: list[str]) -> list[float]:
    """The scores of these responses, one a row, each written token by token until its episode is over."""
    env.autoreset_mode = "Disabled"
    env.reset(options={"prompt": prompts})
    scores, over = np.zeros(env.num_envs), np.zeros(env.num_envs, bool)
    for place in range(env.max_new_tokens):
        tokens = [-1 if done else response[place] for response, done in zip(responses, over, strict=True)]
        _, rewards, terminated, _, _ = env.step(np.array(tokens))
        scores, over = scores + rewards, over | terminated
    assert over.all()
    return scores.tolist()


# ---- the optimum ---------------------------------------------------------------------------------------------------


@every_probe
def test_the_optimal_response_gets_the_optimal_score_in_the_scalar_environment(probe: Probe) -> None:
    env = gym.make("TextRLHF-v0", **probe.kwargs)
    for prompt in probe.prompts:
        env.reset(options={"prompt": prompt})
        rewards, terminated = [], False
        for token in probe.optimal_response(prompt):
            assert not terminated
            _, reward, terminated, _, info = env.step(token)
            rewards.append(reward)
        assert terminated
        assert rewards == [*[0.0] * (len(rewards) - 1), probe.optimal_score]
        assert info["score"] == probe.optimal_score


@every_probe
def test_the_optimal_response_gets_the_optimal_score_in_the_vector_environment(probe: Probe) -> None:
    n = len(probe.prompts)
    env = gym.make_vec("TextRLHF-v0", num_envs=n, **probe.kwargs)
    assert isinstance(env, TextVectorEnv)
    best = [probe.optimal_response(prompt) for prompt in probe.prompts]
    assert play(env, best, list(probe.prompts)) == [probe.optimal_score] * n


@every_probe
def test_no_response_beats_the_optimal_one(probe: Probe) -> None:
    responses = list(probe.responses())
    for prompt in probe.prompts:
        scores = probe([prompt] * len(responses), responses)
        assert max(scores) == probe.optimal_score
        assert min(scores) == 0.0


@every_probe
def test_the_responses_are_all_that_there_are(probe: Probe) -> None:
    # V^-length is the probability of a response under uniform tokens, and nothing else can happen.
    responses = [tuple(response) for response in probe.responses()]
    assert len(set(responses)) == len(responses)
    assert math.fsum(V ** -len(response) for response in responses) == pytest.approx(1, abs=1e-12)
    eos = VOCABULARY.index("<eos>")
    assert all(eos not in response[:-1] for response in responses)
    assert all(response[-1] == eos or len(response) == probe.max_new_tokens for response in responses)


@pytest.mark.parametrize(
    ("name", "prompt", "response", "score"),
    [
        ("fixed-token", "0", "7 7 7 7", 1),
        ("fixed-token", "0", "7 1 <pad> 7", 0.5),
        ("fixed-token", "0", "7 <eos>", 0.25),
        ("increasing-numbers", "0", "0 1 2 3", 1),
        ("increasing-numbers", "0", "2 5 6 9", 1),
        ("increasing-numbers", "0", "9 0 1 2", 0.25),
        ("increasing-numbers", "0", "3 <pad> 2 5", 0.5),
        ("increasing-numbers", "0", "4 4 4 4", 0.25),
        ("increasing-numbers", "0", "<eos>", 0),
        ("count-to-eos", "0", "5 5 5 <eos>", 1),
        ("count-to-eos", "0", "<pad> 1 <eos>", 2 / 3),
        ("count-to-eos", "0", "1 2 3 4 <eos>", 2 / 3),
        ("count-to-eos", "0", "<eos>", 0),
        ("count-to-eos", "0", "1 2 3 4 5", 0),
        ("copy-prompt", "3 1", "3 1", 1),
        ("copy-prompt", "3 1", "1 1", 0.5),
        ("copy-prompt", "3 1", "1 3", 0),
        ("copy-prompt", "3 1", "<eos>", 0),
        ("early-credit", "0", "7 1 2 3 4", 1),
        ("early-credit", "0", "7 <eos>", 1),
        ("early-credit", "0", "1 7 7 7 7", 0),
    ],
)
def test_responses_are_worth_what_the_task_says(name: str, prompt: str, response: str, score: float) -> None:
    assert PROBES[name]([prompt], [ids(response)]) == [pytest.approx(score)]


# ---- chance --------------------------------------------------------------------------------------------------------


def record_probability(place: int) -> float:
    """That a uniform token is a number larger than all numbers before it, given that it stands at this place.

    None of the tokens before it is EOS, so each is one of V − 1, of which number k rules out those up to k.
    """
    return sum(((V - 1 - (10 - k)) / (V - 1)) ** place for k in range(10)) / V


BY_HAND = {
    "fixed-token": sum(GOES_ON**place / V for place in range(4)) / 4,
    "increasing-numbers": sum(GOES_ON**place * record_probability(place) for place in range(4)) / 4,
    "count-to-eos": sum(GOES_ON**n / V * score for n, score in enumerate([0, 1 / 3, 2 / 3, 1, 2 / 3])),
    "copy-prompt": sum(GOES_ON**place / V for place in range(2)) / 2,
    "early-credit": 1 / V,
}


@every_probe
def test_the_random_score_is_the_one_worked_out_by_hand(probe: Probe) -> None:
    assert probe.random_score == pytest.approx(BY_HAND[probe.name], abs=1e-9)


@every_probe
def test_uniform_actions_get_the_random_score_in_the_environment(probe: Probe) -> None:
    n, generator = 4_000, np.random.default_rng(0)
    responses = generator.integers(V, size=(n, probe.max_new_tokens)).tolist()
    prompts = [probe.prompts[row % len(probe.prompts)] for row in range(n)]
    scores = play(make_probe(probe.name, n), responses, prompts)
    assert abs(np.mean(scores) - probe.random_score) < 4 * np.std(scores) / np.sqrt(n)
    assert probe.random_score < 0.5 * probe.optimal_score  # there is something to learn


# ---- the environments ----------------------------------------------------------------------------------------------


@every_probe
def test_a_probe_is_an_environment_that_keeps_the_contract(probe: Probe) -> None:
    check_text_env(gym.make("TextRLHF-v0", **probe.kwargs))
    check_text_vector_env(make_probe(probe.name, 3), lambda: gym.make("TextRLHF-v0", **probe.kwargs))


@every_probe
def test_without_options_every_prompt_comes_up(probe: Probe) -> None:
    env = make_probe(probe.name, 256)
    assert set(env.reset(seed=0)[1]["prompt"]) == set(probe.prompts)


def test_make_probe_takes_the_arguments_of_the_environment() -> None:
    env = make_probe("copy-prompt", num_envs=8, group_size=4)
    assert (env.num_envs, env.group_size) == (8, 4)
    prompts = env.reset(seed=0)[1]["prompt"].tolist()
    assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4


def test_an_unknown_probe_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"one of \['copy-prompt', .*, got 'copy'"):
        make_probe("copy")


def test_importing_the_probes_does_not_import_torch() -> None:
    script = "import sys, text_env.probes; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"
