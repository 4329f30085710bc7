"""sb3-contrib's MaskablePPO, unmodified, with a language model as its policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3
import torch
from learners import (
    EOS,
    constant,
    even_tokens,
    largest_difference,
    make_env,
    make_model,
    make_policy,
    observation_of,
    randomize_value_head,
    weights_of,
)
from sb3_contrib import TRPO, MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy

from agents.models.contexts import contexts_of
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.policies.maskable import MaskableCausalLMPolicy
from agents.rollouts.sb3_vec_env import TextVecEnv
from text_env.constraints import AllowedTokens, Contexts, ForbiddenTokens, allowed_tokens

ALLOWED = AllowedTokens([EOS, *range(10, 60)])


def not_the_last_token_again(contexts: Contexts, n_tokens: int) -> np.ndarray:
    masks = np.ones((len(contexts.length), n_tokens), dtype=bool)
    rows = np.arange(len(contexts.length))
    masks[rows, contexts.input_ids[rows, contexts.length - 1]] = False
    return masks


def make_maskable(env: Any, model: Any = None, **kwargs: Any) -> MaskablePPO:
    policy_kwargs = {"model": make_model(ends=0.1) if model is None else model, **kwargs.pop("policy_kwargs", {})}
    defaults = {"n_steps": 8, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
    return MaskablePPO(MaskableCausalLMPolicy, TextVecEnv(env), policy_kwargs=policy_kwargs, **{**defaults, **kwargs})


def test_it_learns_and_writes_allowed_tokens_only() -> None:
    env = make_env(16, reward=even_tokens, constraint=[ALLOWED, not_the_last_token_again], min_new_tokens=6)
    model = make_maskable(env, n_steps=16, batch_size=128, n_epochs=4, learning_rate=5e-3)
    first = evaluate_policy(model, model.get_env(), n_eval_episodes=32, deterministic=False)[0]
    model.learn(16 * 16 * 12)
    last = evaluate_policy(model, model.get_env(), n_eval_episodes=32, deterministic=False)[0]
    assert first < 0.65
    assert last > 0.85
    observation = model.env.reset()
    for _ in range(6):
        masks = env.action_masks()
        actions, _ = model.predict(observation, action_masks=masks)
        assert masks[np.arange(16), actions].all()
        assert ((actions >= 10) & (actions < 60)).all()
        observation, *_ = model.env.step(actions)


def test_its_scores_are_those_of_the_plain_policy_under_the_same_constraint() -> None:
    env = make_env(constraint=[ALLOWED, not_the_last_token_again])
    spaces = env.single_observation_space, env.single_action_space
    plain = make_policy(env, constraint=env.constraint)
    maskable = MaskableCausalLMPolicy(*spaces, lambda _: 1e-2, model=make_model(), eos_token_id=EOS)
    randomize_value_head(maskable)
    observation = observation_of([[5, 6, 17], [8, 9], [5, 6], [5, 6, 17, 11]], [1, 2, 2, 1])
    assert env.constraint is not None
    masks = allowed_tokens(env.constraint, contexts_of(observation), 300)
    actions = torch.tensor([16, 10, EOS, 59])
    # MaskablePPO hands the masks on as floats.
    theirs = maskable.evaluate_actions(observation, actions, torch.from_numpy(masks).float())
    for left, right in zip(theirs, plain.evaluate_actions(observation, actions), strict=True):
        assert left is not None
        assert right is not None
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    with torch.no_grad():
        left, right = maskable.get_distribution(observation, masks), plain.get_distribution(observation)
        torch.testing.assert_close(left.distribution.probs, right.distribution.probs)
        torch.testing.assert_close(left.log_prob(actions), right.log_prob(actions))
        assert (left.distribution.probs[torch.from_numpy(~masks)] == 0).all()
        torch.manual_seed(3)
        taken, values, log_prob = maskable.forward(observation, action_masks=masks)
        torch.manual_seed(3)
        for ours, expected in zip((taken, values, log_prob), plain.forward(observation), strict=True):
            torch.testing.assert_close(ours, expected)


def test_the_ratio_is_one_at_the_first_minibatch_and_nothing_changes_at_learning_rate_zero() -> None:
    env = make_env(8, constraint=not_the_last_token_again, min_new_tokens=2)
    model = make_maskable(env, learning_rate=0.0, batch_size=64)
    before = weights_of(model.policy)
    model.learn(64)
    [data] = model.rollout_buffer.get(64)
    log_prob = model.policy.evaluate_actions(data.observations, data.actions.long().flatten(), data.action_masks)[1]
    torch.testing.assert_close(log_prob, data.old_log_prob, rtol=0, atol=1e-5)
    assert model.logger.name_to_value["train/approx_kl"] == pytest.approx(0, abs=1e-5)
    assert model.logger.name_to_value["train/clip_fraction"] == 0
    assert largest_difference(weights_of(model.policy), before) == 0


def test_a_constraint_of_the_policy_holds_beside_the_environments() -> None:
    env = make_env(8, constraint=ALLOWED, reward=constant)
    model = make_maskable(env, policy_kwargs={"constraint": ForbiddenTokens(range(30, 300))})
    model.learn(64)
    actions = model.rollout_buffer.actions
    assert set(np.unique(actions)) <= {EOS, *range(10, 30)}
    assert len(np.unique(actions)) > 10


def test_it_is_saved_and_loaded_as_stable_baselines_does_it(tmp_path: Path) -> None:
    model = make_maskable(make_env(4), policy_kwargs={"constraint": ALLOWED})
    model.learn(32)
    model.save(tmp_path / "model.zip")
    loaded = MaskablePPO.load(tmp_path / "model.zip", env=TextVecEnv(make_env(4)), device="cpu")
    assert largest_difference(weights_of(loaded.policy), weights_of(model.policy)) == 0
    assert loaded.policy.distribution.all_constraints == ALLOWED
    assert set(loaded.policy.state_dict()) == set(make_policy(make_env(), model=make_model(ends=0.1)).state_dict())


@pytest.mark.parametrize("algorithm", [stable_baselines3.PPO, stable_baselines3.A2C, TRPO])
def test_an_algorithm_without_masks_is_told_which_policy_to_use(algorithm: Any) -> None:
    with pytest.raises(ValueError, match="asks the environment for no masks: expected CausalLMPolicy"):
        algorithm(MaskableCausalLMPolicy, TextVecEnv(make_env()), policy_kwargs={"model": make_model()}, device="cpu")


def test_maskable_ppo_refuses_the_plain_policy_by_itself() -> None:
    """Its check comes after our constructor and before any of our methods, so the words are its own."""
    with pytest.raises(ValueError, match="Policy must subclass MaskableActorCriticPolicy"):
        MaskablePPO(CausalLMPolicy, TextVecEnv(make_env()), policy_kwargs={"model": make_model()}, device="cpu")
