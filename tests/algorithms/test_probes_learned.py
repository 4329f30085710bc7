"""Every algorithm solves every probe within a budget of tokens, and solves none where it must not.

The controls: paid for somebody else's text, no algorithm learns to copy; with γ = 0 nothing carries the pay of the last
token to the first.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from learners import weights_of
from stable_baselines3.common.callbacks import BaseCallback
from tiny import tiny_model

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sampling import sample_texts
from agents.runs.algorithms import ALGORITHMS
from text_env.probes import PROBES, VOCABULARY, Probe, make_probe
from text_env.vector_env import TextVectorEnv

OWN = ("ppo", "a2c", "reinforce", "rloo", "grpo", "dapo", "vineppo")
EPISODES = 32  # of a rollout
TEXTS = 1024  # to measure a policy by
STEPS = {"ppo": 8, "vineppo": 8}  # gradient steps a rollout (two minibatches, four epochs); the others take one

OPTIONS = {"vineppo": {"n_branches": 1, "branch_every": 3}}  # texts are short; branches count as tokens


class Allowance(NamedTuple):
    learning_rate: float
    tokens: int


# The same for all algorithms, whose settings are their defaults otherwise. A rollout is 64 to 160 tokens.
ALLOWANCES = {
    "fixed-token": Allowance(1e-2, 8_000),
    "increasing-numbers": Allowance(6e-3, 24_000),
    "count-to-eos": Allowance(6e-3, 16_000),
    "copy-prompt": Allowance(3e-3, 16_000),
    "early-credit": Allowance(6e-3, 12_000),
}
CONTROL = (
    0.5  # the share of the allowance that a control gets; by then, the learners that it is compared with have learned
)


def towards_optimum(probe: Probe, share: float) -> float:
    """The score that lies this share of the way from the random policy to the optimum."""
    return probe.random_score + share * (probe.optimal_score - probe.random_score)


class StopWhenSolved(BaseCallback):
    """Ends training once the latest four rollouts are well beyond what is asked for; keeps the policy that wrote them.

    The update that follows is left out: where all texts are worth the same, advantages are noise, which whitening makes
    as large as any signal.
    """

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.enough = towards_optimum(probe, 0.985)
        self.solution: dict[str, torch.Tensor] | None = None

    def _on_rollout_end(self) -> None:
        if np.mean([info["r"] for info in self.model.ep_info_buffer or []]) >= self.enough:
            self.solution = weights_of(self.model.policy)

    def _on_step(self) -> bool:
        return self.solution is None


def make_learner(
    algorithm: str, name: str, seed: int = 0, group_size: int | None = None, **kwargs: Any
) -> OnPolicyAlgorithm:
    cls = ALGORITHMS[algorithm]
    model = tiny_model("gpt2", len(VOCABULARY), seed=seed, num_hidden_layers=1, initializer_range=0.1)
    return cls(
        "CausalLMPolicy",
        make_probe(name, EPISODES, group_size=group_size or cls.default_group_size),
        # Of many small steps each is noisier than one large one: as for batches, the root of their number.
        learning_rate=ALLOWANCES[name].learning_rate / STEPS.get(algorithm, 1) ** 0.5,
        n_episodes=EPISODES,
        kl_coef=0.0,
        seed=seed,
        device="cpu",
        policy_kwargs={"model": model},
        stats_window_size=4 * EPISODES,
        **{**OPTIONS.get(algorithm, {}), **kwargs},
    )


@functools.cache
def environment_to_measure_in(name: str) -> TextVectorEnv:
    """One row for each text that is measured: a thousand texts cost as many forward passes as one."""
    return make_probe(name, TEXTS)


def mean_score(model: OnPolicyAlgorithm, probe: Probe) -> float:
    """Of 1,024 sampled texts, each prompt as often as any other."""
    prompts = list(probe.prompts) * (TEXTS // len(probe.prompts))
    env = environment_to_measure_in(probe.name)
    return float(np.mean([text["score"] for text in sample_texts(model.policy, env, prompts)]))


def learned_score(model: OnPolicyAlgorithm, name: str, share_of_allowance: float = 1.0) -> float:
    probe = PROBES[name]
    assert mean_score(model, probe) < towards_optimum(probe, 0.3)  # there is something to learn
    callback = StopWhenSolved(probe)
    model.learn(int(share_of_allowance * ALLOWANCES[name].tokens), callback)
    if callback.solution is not None:
        model.policy.load_state_dict(callback.solution)
    return mean_score(model, probe)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("algorithm", OWN)
def test_every_algorithm_solves_every_probe(algorithm: str, name: str, seed: int) -> None:
    assert learned_score(make_learner(algorithm, name, seed), name) >= towards_optimum(PROBES[name], 0.95)


@pytest.mark.parametrize("name", PROBES)
def test_reinforce_with_a_learned_baseline_solves_every_probe(name: str) -> None:
    assert learned_score(make_learner("reinforce", name, baseline="value"), name) >= towards_optimum(PROBES[name], 0.95)


# Without a baseline the other two take more than their allowance with some seeds.
@pytest.mark.parametrize("name", ["fixed-token", "count-to-eos", "early-credit"])
def test_reinforce_without_a_baseline_solves_the_easier_probes(name: str) -> None:
    assert learned_score(make_learner("reinforce", name, baseline="none"), name) >= towards_optimum(PROBES[name], 0.95)


# Settings under which an algorithm has another name. Where the ratio is what they change, there are several steps.
SEVERAL_STEPS = {"batch_size": 16, "n_epochs": 2}
RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "Dr. GRPO": ("grpo", {"loss_weighting": "constant", "scale_rewards": False}),
    "GSPO": ("grpo", {"surrogate": "gspo", "clip_range": 0.02, "clip_range_high": 0.03, **SEVERAL_STEPS}),
    "CISPO": ("grpo", {"surrogate": "cispo", "clip_range": 1.0, "clip_range_high": 0.5, **SEVERAL_STEPS}),
    "PPO with the ratios of texts": ("ppo", {"surrogate": "gspo", "clip_range": 0.1}),
    "PPO with clipped weights": ("ppo", {"surrogate": "cispo"}),
    "PPO with dual clip, whitened by group": ("ppo", {"dual_clip": 3.0, "normalize_advantage": "group"}),
    "VAPO": (
        "ppo",
        {
            "critic_warmup_episodes": 64,
            "gae_lambda_value": 1.0,
            "length_adaptive_alpha": 1.0,
            "clip_range_high": 0.28,
            "positive_lm_coef": 0.1,
        },
    ),
}


@pytest.mark.parametrize(
    ("relative", "name"),
    [*((relative, "fixed-token") for relative in RELATIVES), ("Dr. GRPO", "copy-prompt"), ("GSPO", "copy-prompt")],
)
def test_the_relatives_of_ppo_and_grpo_solve_probes(relative: str, name: str) -> None:
    algorithm, settings = RELATIVES[relative]
    group_size = 4 if settings.get("normalize_advantage") == "group" else None
    model = make_learner(algorithm, name, group_size=group_size, **settings)
    assert learned_score(model, name) >= towards_optimum(PROBES[name], 0.95)


def pay_for_another_text(model: OnPolicyAlgorithm) -> OnPolicyAlgorithm:
    """Every episode is paid the score of another one of its rollout, which it has nothing to do with.

    A reward that shuffles would not do: it is called with the texts that end in one step, which have their length in
    common, and may be a single one.
    """
    estimate, generator = model.estimate, np.random.default_rng(0)

    def estimate_from_shuffled(buffer: EpisodeBuffer) -> None:
        last_tokens = generator.permutation(buffer.starts[1:] - 1)
        buffer.rewards[last_tokens] = buffer.rewards[np.roll(last_tokens, 1)]
        estimate(buffer)

    model.estimate = estimate_from_shuffled  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("algorithm", OWN)
def test_paid_for_other_texts_no_algorithm_learns_to_copy(algorithm: str) -> None:
    # A policy that is blind to the prompt gets 0.25 at most, whatever it has drifted to.
    model = pay_for_another_text(make_learner(algorithm, "copy-prompt"))
    assert learned_score(model, "copy-prompt", CONTROL) < 0.4


def test_without_credit_for_early_tokens_ppo_fails_the_probe_of_it() -> None:
    models = [make_learner("ppo", "early-credit", seed, gamma=0.0) for seed in (0, 1)]
    scores = [learned_score(model, "early-credit", 1 / 3) for model in models]  # with credit it takes a quarter
    assert np.mean(scores) < 0.5
