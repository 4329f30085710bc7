"""Potential-based shaping: what it pays cancels over an episode, and the optimum stays whatever the potential is."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from learners import (
    after_each_rollout,
    constant,
    even_tokens,
    length_of,
    make_env,
    make_model,
    make_ppo,
    prompt_of,
    save_model,
    weights_of,
)
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from tiny import RecordingReward, tiny_model, tiny_tokenizer

from agents.algorithms.ppo import PPO
from agents.algorithms.rloo import RLOO
from agents.rollouts.sampling import sample_texts
from agents.rollouts.sb3_vec_env import TextVecEnv
from agents.runs.config import EnvConfig, TrainConfig, dump_config, load_config
from agents.runs.train import train
from text_env import NO_ACTION, PotentialShaping, RewardError, TextEnv, TextVectorEnv
from text_env.checker import check_text_env, check_text_vector_env
from text_env.probes import PROBES, VOCABULARY, Probe, make_probe
from text_env.shaping import make_shaping

EOS = 0
TARGET = VOCABULARY.index("7")


class Arbitrary:
    """A potential without rhyme or reason, another number for each prefix: a multiple of 1/64, so that sums are exact.

    It remembers how it was called, and fails while it is told to.
    """

    name = "arbitrary"

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []
        self.fails = False

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        self.calls.append(completion_ids)
        if self.fails:
            return [float("nan")] * len(prompts)
        return [self.of(prompt, ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    @staticmethod
    def of(prompt: str, ids: list[int]) -> float:
        return zlib.crc32(repr((prompt, ids)).encode()) % 256 / 64 - 2


def play(env: TextVectorEnv, responses: list[list[int]], **options: Any) -> tuple[list[list[float]], list[float]]:
    """The rewards of these responses, one a row, each written to its end; and their scores."""
    env.autoreset_mode = "Disabled"
    env.reset(options=options)
    rewards: list[list[float]] = [[] for _ in responses]
    scores = np.full(env.num_envs, np.nan)
    while np.isnan(scores).any():
        tokens = np.full(env.num_envs, NO_ACTION)
        live = np.flatnonzero(np.isnan(scores))
        tokens[live] = [responses[row][len(rewards[row])] for row in live]
        _, paid, terminated, _, infos = env.step(tokens)
        for row in live:
            rewards[row].append(float(paid[row]))
        if terminated.any():
            scores[terminated] = infos["score"][terminated]
    return rewards, scores.tolist()


# ---- the identity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["copy-prompt", "fixed-token"])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_shaped_return_of_every_response_is_its_own_minus_the_potential_of_the_start(
    name: str, gamma: float
) -> None:
    probe = PROBES[name]
    pairs = [(prompt, response) for prompt in probe.prompts for response in probe.responses()]
    if name == "fixed-token":
        pairs = pairs[::7]  # of 16,105, which differ in their first tokens only every 1,331st
    env = make_probe(name, len(pairs), shaping=PotentialShaping(Arbitrary(), gamma=gamma))
    rewards, scores = play(env, [response for _, response in pairs], prompt=[prompt for prompt, _ in pairs])
    for (prompt, response), paid, score in zip(pairs, rewards, scores, strict=True):
        assert score == probe([prompt], [response])[0]
        # With γ: Σ_t γ^t r_t, where the score alone would be worth γ^(T−1) of itself. Exactly, all being binary.
        assert len(paid) == len(response)
        discounted = sum(gamma**time * reward for time, reward in enumerate(paid))
        assert discounted == gamma ** (len(paid) - 1) * score - Arbitrary.of(prompt, [])


def test_each_step_is_paid_the_discounted_potential_that_follows_minus_the_one_before() -> None:
    env = make_env(1, shaping=PotentialShaping(Arbitrary(), gamma=0.5, scale=4.0), max_new_tokens=3)
    response = [50, 51, 52]
    [rewards], [score] = play(env, [response], prompt=["a"])
    phi = [4 * Arbitrary.of("a", response[:length]) for length in range(3)]
    assert rewards == [0.5 * phi[1] - phi[0], 0.5 * phi[2] - phi[1], score - phi[2]]


def test_the_score_in_the_info_is_not_shaped() -> None:
    env = make_env(1, shaping=length_of, max_new_tokens=2)
    env.reset(options={"prompt": ["a"]})
    assert env.step(np.array([50]))[1].tolist() == [1.0]
    _, rewards, _, _, infos = env.step(np.array([50]))
    assert rewards.tolist() == [even_tokens(["a"], [""], [[50, 50]])[0] - 1.0]
    assert infos["final_info"]["score"].tolist() == [1.0]


# ---- what the potential sees -----------------------------------------------------------------------------------------


def test_one_call_a_step_holds_the_prefixes_of_all_rows_that_move_and_of_no_others() -> None:
    potential = Arbitrary()
    env = make_env(3, shaping=potential, autoreset_mode="Disabled", max_new_tokens=3)
    env.reset(seed=0)
    assert potential.calls == []  # a start cannot fail
    env.step(np.array([50, NO_ACTION, 60]))
    env.step(np.array([51, 70, EOS]))
    env.step(np.array([NO_ACTION, 71, NO_ACTION]))
    env.step(np.array([52, 72, NO_ACTION]))
    # First the empty prefixes of rows that begin to move; nothing is asked of what is finished.
    assert potential.calls == [[[], [], [50], [60]], [[], [50, 51], [70]], [[70, 71]]]


def test_every_k_shows_prefixes_of_whole_multiples_of_k_and_asks_no_more_than_that() -> None:
    calls: list[list[list[int]]] = []

    def tokens_seen(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    env = make_env(1, reward=constant, shaping=PotentialShaping(tokens_seen, every=2), max_new_tokens=6)
    [rewards], _ = play(env, [[50, 51, 52, 53, 54, EOS]])
    assert rewards == [0, 2, 0, 2, 0, 1 - 4]
    assert calls == [[[]], [[50, 51]], [[50, 51, 52, 53]]]
    for given, expected in ((1, [2, 0, 2, 0, 1 - 4]), (2, [0, 2, 0, 1 - 4]), (5, [1 - 4])):
        assert play(env, [[50, 51, 52, 53, 54, EOS][given:]], response=[[50, 51, 52, 53, 54][:given]])[0] == [expected]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_with_every_k_the_terms_still_cancel(every: int) -> None:
    generator = np.random.default_rng(0)
    responses = [[*generator.integers(2, 300, size=length).tolist(), EOS] for length in range(8)]
    env = make_env(8, shaping=PotentialShaping(Arbitrary(), every=every))
    rewards, scores = play(env, responses, prompt=["a"] * 8)
    start = Arbitrary.of("a", [])
    assert [sum(paid) for paid in rewards] == pytest.approx([score - start for score in scores], abs=1e-12)


@pytest.mark.parametrize("every", [1, 3])
def test_an_episode_that_starts_in_mid_response_is_paid_as_one_that_wrote_it(every: int) -> None:
    response = [50, 51, 52, 53, 54, 55, 56, EOS]
    env = make_env(8, shaping=PotentialShaping(Arbitrary(), every=every))
    rewards, scores = play(
        env,
        [response[given:] for given in range(8)],
        prompt=["a"] * 8,
        response=[response[:given] for given in range(8)],
    )
    for given in range(8):
        assert rewards[given] == rewards[0][given:]
        start = Arbitrary.of("a", response[: given - given % every])
        assert sum(rewards[given]) == pytest.approx(scores[0] - start, abs=1e-12)


def test_columns_reach_the_potential_and_a_prefix_is_text_too() -> None:
    seen: list[tuple[list[str], list[str], list[Any]]] = []

    def look(prompts: list[str], completions: list[str], answer: list[Any], **_: Any) -> list[float]:
        seen.append((prompts, completions, answer))
        return [0.0] * len(prompts)

    tokenizer = tiny_tokenizer()
    env = make_env(1, prompts=[{"prompt": "The movie", "answer": 42}], shaping=look)
    env.reset(seed=0)
    for token in tokenizer(" was good")["input_ids"]:
        env.step(np.array([token]))
    assert seen[0] == (["The movie"] * 2, ["", tokenizer.decode(tokenizer(" was good")["input_ids"][:1])], [42] * 2)
    assert seen[-1] == (["The movie"], [" was good"], [42])


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_step_whose_potential_or_reward_fails_changes_nothing_and_can_be_repeated() -> None:
    def make() -> tuple[TextVectorEnv, Arbitrary, Arbitrary]:
        reward, potential = Arbitrary(), Arbitrary()
        env = make_env(3, reward=reward, shaping=PotentialShaping(potential, 0.5), max_new_tokens=3)
        return env, reward, potential

    (env, reward, potential), (other, *_) = make(), make()
    env.reset(seed=0)
    other.reset(seed=0)
    tokens = np.random.default_rng(0).integers(2, 300, size=(8, 3))
    tokens[[1, 3, 4], [0, 1, 0]] = EOS
    for actions in tokens:
        before = env.episodes.observe()
        for culprit in (potential, reward):
            culprit.fails = True
            try:
                # Only where a text ends is the reward asked.
                if culprit is potential or (actions == EOS).any():
                    with pytest.raises(RewardError, match="'arbitrary' must return finite numbers"):
                        env.step(actions)
            finally:
                culprit.fails = False
            after = env.episodes.observe()
            assert all(np.array_equal(after[key], before[key]) for key in before)
        (obs, *rest), (other_obs, *other_rest) = env.step(actions), other.step(actions)
        assert all(np.array_equal(obs[key], other_obs[key]) for key in obs)
        assert [part.tolist() for part in rest[:3]] == [part.tolist() for part in other_rest[:3]]


# ---- arguments -------------------------------------------------------------------------------------------------------

HALVED = PotentialShaping(length_of, gamma=0.5, every=3)


def test_what_reward_may_be_stands_for_the_potential_of_a_shaping() -> None:
    assert make_env(1).shaping is None
    assert make_env(1, shaping=length_of).shaping == PotentialShaping(length_of)
    assert make_env(1, shaping="learners:length_of").shaping == PotentialShaping(length_of)
    assert make_env(1, shaping=f"{__name__}:HALVED").shaping == HALVED
    shaping = make_env(1, shaping="sentiment+0.5*learners:length_of").shaping
    assert shaping is not None
    assert shaping.potential.name == "1*sentiment+0.5*length_of"
    assert TextEnv(tokenizer=tiny_tokenizer(), prompts=["a"], reward="sentiment", shaping=HALVED).shaping == HALVED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.01}, r"gamma to lie in \[0, 1\], got 1.01"),
        ({"gamma": float("nan")}, "gamma to lie in"),
        ({"every": 0}, "every to be an integer of at least 1, got 0"),
        ({"every": 1.5}, "every to be an integer of at least 1, got 1.5"),
        ({"scale": float("inf")}, "a finite scale, got inf"),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PotentialShaping(length_of, **arguments)


def test_what_is_no_potential_is_refused_as_what_is_no_reward() -> None:
    with pytest.raises(ValueError, match="Unknown reward 'sentimnt'"):
        make_shaping(PotentialShaping("sentimnt"))
    with pytest.raises(TypeError, match="Expected a reward to be a callable"):
        make_shaping(3)


# ---- the contract ----------------------------------------------------------------------------------------------------


def kwargs(**changes: Any) -> dict[str, Any]:
    return {
        "tokenizer": tiny_tokenizer(),
        "prompts": ["The movie", "I loved", "The film was"],
        "reward": RecordingReward(),
        "max_prompt_tokens": 6,
        "max_new_tokens": 5,
        "shaping": PotentialShaping(Arbitrary(), gamma=0.75, every=2),
        **changes,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shaping": "sentiment"},
        {"min_new_tokens": 5},
        {"max_new_tokens": 1},
        {"stop": ["a", "e"]},
        {"prompts": [{"prompt": "The", "column": 1}]},
    ],
)
def test_shaped_environments_keep_the_contract_and_the_vector_one_is_n_scalar_ones(changes: dict[str, Any]) -> None:
    check_text_env(gym.make("TextRLHF-v0", **kwargs(**changes)))
    check_text_vector_env(TextVectorEnv(3, **kwargs(**changes)), lambda: TextEnv(**kwargs(**changes)))


class PaysThePotentialItself(TextEnv):
    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, reward + 0.5, *rest


class TakesEveryStartForEmpty(TextEnv):
    def reset(self, **options: Any) -> Any:
        answer = super().reset(**options)
        self.episodes._potential[:] = 0.25
        return answer


class ForgetsThePotentialAtTheEnd(TextEnv):
    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, info["score"] if terminated else reward, terminated, truncated, info


def starts_flat(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [Arbitrary.of(prompt, ids) if ids else 0.25 for prompt, ids in zip(prompts, completion_ids, strict=True)]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (PaysThePotentialItself, "A shaped reward must be γ Φ"),
        (ForgetsThePotentialAtTheEnd, "A shaped reward must be γ Φ"),
        (TakesEveryStartForEmpty, "must be paid as one that wrote it"),
    ],
)
def test_the_suite_fails_what_shapes_wrongly(broken: type[TextEnv], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_text_env(broken(**kwargs(shaping=starts_flat)))


# ---- learners --------------------------------------------------------------------------------------------------------


def test_logged_scores_stay_unshaped_and_what_is_optimised_is_shaped() -> None:
    env = make_env(shaping=Arbitrary())
    model = make_ppo(env)  # the policy is the reference still, so there is no KL to pay for
    logged: dict[str, Any] = {}
    after_each_rollout(model, lambda: logged.update(model.logger.name_to_value)).learn(1)
    buffer = model.buffer
    lasts = buffer.starts[1:] - 1
    texts = [buffer.actions[first : last + 1].tolist() for first, last in zip(buffer.starts, lasts, strict=False)]
    scores = even_tokens([], [], texts)
    prompts = {tuple(prompt.token_ids): prompt.text for prompt in env.prompts}
    opened = [prompts[tuple(prompt_of(buffer, episode))] for episode in range(buffer.n_episodes)]
    starts = [Arbitrary.of(prompt, []) for prompt in opened]
    shaped = np.array(scores) - starts
    assert buffer.episode_sums(buffer.rewards) == pytest.approx(shaped, abs=1e-5)
    assert logged["objective/scores"] == pytest.approx(np.mean(scores))
    assert logged["objective/rlhf_reward"] == pytest.approx(shaped.mean(), abs=1e-5)
    # What rollout/ep_rew_mean is the mean of.
    assert [info["r"] for info in model.ep_info_buffer or []] == pytest.approx(scores)


def test_the_return_that_sb3_reports_is_the_score_minus_the_potential_of_the_start() -> None:
    env = TextVecEnv(make_env(1, shaping=Arbitrary()))
    env.set_options({"prompt": "a"})
    env.reset()
    for token in (50, 51, EOS):
        *_, infos = env.step(np.array([token]))
    assert infos[0]["episode"]["r"] == pytest.approx(infos[0]["score"] - Arbitrary.of("a", []), abs=1e-6)


def test_for_rloo_whose_action_is_the_whole_text_shaping_changes_nothing_at_all() -> None:
    trained = []
    for shaping in (None, Arbitrary()):
        env = make_env(8, shaping=shaping, reward=length_of, group_size=2)
        model = RLOO(
            "CausalLMPolicy",
            env,
            n_episodes=8,
            kl_coef=0.0,
            seed=0,
            device="cpu",
            policy_kwargs={"model": make_model(ends=0.2)},
        ).learn(60)
        trained.append(weights_of(model.policy))
    assert all(tensor.equal(trained[1][name]) for name, tensor in trained[0].items())


def test_the_command_line_shapes_training_alone_and_with_the_algorithms_discount(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The movie\nI loved this\n")
    environment = EnvConfig(
        prompts=str(tmp_path / "prompts.txt"),
        reward="learners:even_tokens",
        gold=None,
        max_new_tokens=4,
        shaping="learners:length_of",
        shaping_every=2,
        reward_kwargs={"batch_size": "4", "dtype": "bfloat16"},
    )
    config = TrainConfig(
        model=save_model(tmp_path / "model", ends=0.2),
        env=environment,
        total_timesteps=10,
        run_dir=tmp_path / "run",
        n_episodes=4,
        algo_kwargs={"gamma": "0.9"},
        device="cpu",
        progress=False,
    )
    model = train(config)
    assert model.vector_env.shaping == PotentialShaping(length_of, gamma=0.9, every=2)
    assert load_config(tmp_path / "run" / "config.yaml").env.shaping == "learners:length_of"
    assert environment.make(2, config.model).shaping is None  # to sample and to evaluate
    (tmp_path / "part.yaml").write_text("env: {reward_kwargs: {batch_size: 4, chat_template: false}}")
    parsed = load_config(tmp_path / "part.yaml")
    assert parsed.env.reward_kwargs == {"batch_size": "4", "chat_template": "false"}
    (tmp_path / "again.yaml").write_text(dump_config(parsed))
    assert load_config(tmp_path / "again.yaml") == parsed


# ---- learning --------------------------------------------------------------------------------------------------------


def target_first(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """What the early-credit probe will pay at the end, said as soon as it is known."""
    return [float(ids[:1] == [TARGET]) for ids in completion_ids]


def target_last(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The opposite: it promises least where most will be paid."""
    return [-float(ids[:1] == [TARGET]) for ids in completion_ids]


class PaidUndifferenced(PotentialShaping):
    """The control: a bonus for each state, not a difference of potentials."""

    def rewards(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
        return after


class StopWhenSolved(BaseCallback):
    """Ends training, before its next update, once the latest two rollouts are all that they could be."""

    solved = False

    def _on_rollout_end(self) -> None:
        self.solved = float(np.mean([info["r"] for info in self.model.ep_info_buffer or []])) >= 0.985

    def _on_step(self) -> bool:
        return not self.solved


def learned_score(shaping: Any, seed: int, tokens: int, learning_rate: float, n_episodes: int, **kwargs: Any) -> float:
    """How often PPO, after so many tokens of the early-credit probe, writes the target first."""
    probe: Probe = PROBES["early-credit"]
    length = kwargs.pop("length", probe.max_new_tokens)
    env = make_probe(probe.name, n_episodes, shaping=shaping, max_new_tokens=length, min_new_tokens=length)
    model = PPO(
        "CausalLMPolicy",
        env,
        learning_rate=learning_rate,
        n_episodes=n_episodes,
        batch_size=n_episodes // 2,
        n_epochs=4,
        kl_coef=0.0,
        seed=seed,
        device="cpu",
        policy_kwargs={
            "model": tiny_model("gpt2", len(VOCABULARY), seed=seed, num_hidden_layers=1, initializer_range=0.1),
            "separate_critic": False,
        },
        stats_window_size=2 * n_episodes,
        # The critic believes itself, and so can hide what it doesn't know yet.
        **{"gae_lambda": 0.95, "gae_lambda_value": None, **kwargs},
    )
    model.learn(tokens, StopWhenSolved())
    measured_in = make_probe(probe.name, 256, max_new_tokens=length, min_new_tokens=length)  # all texts at once
    return float(np.mean([text["score"] for text in sample_texts(model.policy, measured_in, ["0"] * 256)]))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_good_potential_solves_within_a_budget_what_is_not_learned_without_it(seed: int) -> None:
    # The first of 24 tokens is paid at the end, and λ = 0.5 carries little further than four tokens back.
    settings = {"seed": seed, "tokens": 6_000, "learning_rate": 1.8e-3, "n_episodes": 16}
    blurred = {"length": 24, "gae_lambda": 0.5}
    assert learned_score(None, **settings, **blurred) < 0.3
    assert learned_score(PotentialShaping(target_first), **settings, **blurred) > 0.9


SHORT = {"tokens": 5_000, "learning_rate": 1.5e-3, "n_episodes": 32}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("potential", [target_last, Arbitrary()], ids=["misleading", "arbitrary"])
def test_a_bad_potential_leaves_the_optimum_where_it_was(potential: Any, seed: int) -> None:
    assert learned_score(PotentialShaping(potential), seed, **SHORT) > 0.9


def test_paid_as_a_bonus_the_same_misleading_potential_moves_the_optimum() -> None:
    assert learned_score(PaidUndifferenced(target_last), 0, **SHORT) < 0.1
