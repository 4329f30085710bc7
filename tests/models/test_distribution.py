"""The sampled distribution, described once: policy, reference, buffer and environment must agree on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from learners import constant, make_env, make_model, make_ppo, save_model
from tiny import tiny_tokenizer

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.models.distribution import TokenDistribution, alike
from agents.models.reference import Reference
from agents.models.reference_constraints import ReferenceTopP
from agents.objectives.kl import AdaptiveKL, FixedKL
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sb3_vec_env import TextVecEnv
from text_env.constraints import AllowedTokens, Contexts, ForbiddenTokens, allowed_tokens, make_constraint

V = 300
DIFFERENT: dict[str, Any] = {
    "temperature": 0.7,
    "min_new_tokens": 2,
    "constraint": ForbiddenTokens([5]),
    "autocast": "bfloat16",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def stock_ppo(saved: str, reference: Any, env_kwargs: dict[str, Any] | None = None, **policy_kwargs: Any) -> sb3.PPO:
    """SB3's own PPO, which makes the buffer before it makes the policy."""
    return sb3.PPO(
        CausalLMPolicy,
        TextVecEnv(make_env(4, **(env_kwargs or {}))),
        n_steps=8,
        batch_size=32,
        n_epochs=1,
        learning_rate=0.0,
        device="cpu",
        seed=0,
        rollout_buffer_class=EpisodeBuffer,
        rollout_buffer_kwargs={"reference": reference},
        policy_kwargs={"model": saved, **policy_kwargs},
    )


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_reference_of_another_distribution_is_refused_and_both_values_are_named(saved: str, name: str) -> None:
    value = DIFFERENT[name]
    env = make_env(constraint=value) if name == "constraint" else make_env()
    env = make_env(min_new_tokens=value) if name == "min_new_tokens" else env
    policy_kwargs = {"model": saved, name: value}
    default = {"temperature": "1.0", "min_new_tokens": "0", "constraint": "None", "autocast": "None"}[name]
    with pytest.raises(ValueError, match=rf"{name} is .* for the policy and {default} for the reference"):
        make_ppo(env, policy_kwargs=policy_kwargs, reference=Reference.load(saved, V, device="cpu"))
    right = make_ppo(env, policy_kwargs=policy_kwargs, reference=Reference.load(saved, V, "cpu", **{name: value}))
    right.learn(1)
    # A reference that is the policy itself: no divergence before the first update.
    assert np.abs(right.buffer.log_ratio).max() < (0.2 if name == "autocast" else 1e-5)


@pytest.mark.parametrize("name", ["temperature", "min_new_tokens", "constraint"])
def test_stock_ppo_refuses_it_before_the_first_update(saved: str, name: str) -> None:
    value = DIFFERENT[name]
    before = stock_ppo(saved, saved, **{name: value})
    weights = {key: tensor.clone() for key, tensor in before.policy.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{name} is .* for the policy and .* for the reference"):
        before.learn(32)
    assert all(tensor.equal(weights[key]) for key, tensor in before.policy.state_dict().items())
    model = stock_ppo(saved, Reference.load(saved, V, "cpu", **{name: value}), **{name: value})
    model.learn(32)
    assert np.abs(model.rollout_buffer.log_ratio).max() < 1e-5  # type: ignore[attr-defined]


def test_with_defaults_a_reference_by_name_is_right(saved: str) -> None:
    model = stock_ppo(saved, saved)
    model.learn(32)
    assert np.abs(model.rollout_buffer.log_ratio).max() < 1e-5  # type: ignore[attr-defined]


def test_a_reference_with_other_tokens_is_refused(saved: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_tokens is 300 for the policy and 290 for the reference"):
        make_ppo(policy_kwargs={"model": saved}, reference=Reference.load(saved, 290, device="cpu"))
    other = tiny_tokenizer(vocab_size=300)
    other.add_tokens(["new"])
    make_model(tokenizer=301).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    swapped = Reference.load(str(tmp_path), V, device="cpu")
    make_ppo(policy_kwargs={"model": saved}, reference=swapped)  # more tokens than the environment uses are fine
    assert swapped.tokenizer is not None
    swapped.tokenizer = type(other)(tokenizer_object=_reordered(), eos_token="<eos>")
    with pytest.raises(ValueError, match="another id there or none"):
        make_ppo(policy_kwargs={"model": saved}, reference=swapped)


def _reordered() -> Any:
    from tokenizers import Tokenizer, models

    vocabulary = tiny_tokenizer().get_vocab()
    return Tokenizer(models.WordLevel({token: V - 1 - index for token, index in vocabulary.items()}))


@pytest.mark.parametrize(
    ("env_kwargs", "policy_kwargs", "message"),
    [
        ({"min_new_tokens": 3}, {"min_new_tokens": 1}, "min_new_tokens is 1 for the policy and 3 for the environment"),
        (
            {"min_new_tokens": 2},
            {"eos_token_id": 7},
            r"eos_token_ids is \(7,\) for the policy and \(0,\) for the environment",
        ),
        (
            {},
            {"constraint": ForbiddenTokens([5])},
            "constraint is ForbiddenTokens.* for the policy and None for",
        ),
    ],
    ids=["minimum length", "eos", "constraint"],
)
def test_a_policy_that_differs_from_the_environment_is_refused(
    env_kwargs: dict[str, Any], policy_kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_ppo(make_env(**env_kwargs), policy_kwargs=policy_kwargs)


def test_all_that_differs_is_named_at_once() -> None:
    one = TokenDistribution(300, 0.5, (0,), 2)
    with pytest.raises(ValueError, match=r"min_new_tokens is 2 for the one and 3 .*; temperature is 0.5 for the one"):
        one.check_same(TokenDistribution(300, 1.0, (0,), 3), "one", "other")
    one.check_same(TokenDistribution(300, 0.5, (0,), 2), "one", "other")


def test_descriptions_are_the_same_where_they_mean_the_same() -> None:
    nucleus = ReferenceTopP(make_model(), 0.9, device="cpu")
    parts = [AllowedTokens(range(2, 40)), nucleus]
    one = TokenDistribution(300, constraint=parts)
    one.check_same(TokenDistribution(300, constraint=list(parts)), "one", "other")
    one.check_same(TokenDistribution(300, constraint=one.constraint), "one", "other")  # made from what was made
    # Without a minimum length, nothing depends on the ends of a text.
    one.check_same(TokenDistribution(300, eos_token_ids=(3,), constraint=parts[::-1]), "one", "other")
    assert TokenDistribution(9, autocast="bfloat16") == TokenDistribution(9, autocast=torch.bfloat16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="constraint is"):
        one.check_same(TokenDistribution(300, constraint=[parts[0], ReferenceTopP(make_model(), 0.8)]), "one", "other")


@dataclass(frozen=True)
class Tensors:
    """A constraint that holds a tensor, whose comparison is no truth value."""

    ids: torch.Tensor

    def __call__(self, contexts: Contexts, n_tokens: int) -> np.ndarray:
        masks = np.ones((len(contexts.length), n_tokens), dtype=bool)
        masks[:, self.ids.numpy()] = False
        return masks


class After(ForbiddenTokens):
    """A subclass that inherits equality from a class which doesn't know of what it adds."""

    def __init__(self, token_ids: list[int], after: int) -> None:
        super().__init__(token_ids)
        object.__setattr__(self, "after", after)

    def __call__(self, contexts: Contexts, n_tokens: int) -> np.ndarray:
        masks = np.array(super().__call__(contexts, n_tokens))
        masks[contexts.step < self.after] = True  # type: ignore[attr-defined]
        return masks


def make_lambda(token: int) -> Any:
    return lambda contexts, n_tokens: np.tile(np.arange(n_tokens) != token, (len(contexts.length), 1))


@pytest.mark.parametrize(
    ("one", "copied", "other"),
    [
        (Tensors(torch.tensor([5, 6])), Tensors(torch.tensor([5, 6])), Tensors(torch.tensor([5, 7]))),
        (After([5], 9), After([5], 9), After([5], 0)),
        (make_lambda(5), make_lambda(5), make_lambda(6)),
        (functools.partial(max, 1), functools.partial(max, 1), functools.partial(max, 2)),
        ({"a": [1, np.ones(2)]}, {"a": [1, np.ones(2)]}, {"a": [1, np.zeros(2)]}),
        (make_model(), make_model(), make_model(seed=1)),
        (1, 1, 1.0),
        (make_lambda, make_lambda, make_model),
    ],
    ids=["tensor", "inherited equality", "lambda", "partial", "array", "model", "number", "function"],
)
def test_copies_are_alike_and_nothing_else_is(one: Any, copied: Any, other: Any) -> None:
    assert alike(one, copied)
    assert not alike(one, other)


def test_an_object_that_contains_itself_is_like_none_but_itself() -> None:
    loop, twin = [], []  # type: ignore[var-annotated]
    loop.append(loop)
    twin.append(twin)
    assert alike(loop, loop)
    assert not alike(loop, twin)


def test_constraints_that_compare_equal_are_both_kept() -> None:
    contexts = Contexts(np.array([[1, 2]]), np.array([2]), np.array([1]))
    both = make_constraint([After([5], 9), After([5], 0)])
    assert both is not None
    assert not allowed_tokens(both, contexts, 9)[0, 5]
    with pytest.raises(ValueError, match="constraint is"):
        make_ppo(make_env(constraint=After([5], 9)), policy_kwargs={"constraint": After([5], 0)})


@pytest.mark.parametrize("name", ["nucleus", "tensor", "lambda"])
def test_stock_ppo_goes_on_after_it_was_saved_and_loaded(saved: str, tmp_path: Path, name: str) -> None:
    """SB3 pickles the policy's constraint and the reference's apart from one another."""
    constraint: Any = {
        "nucleus": ReferenceTopP(saved, 0.9, device="cpu"),
        "tensor": Tensors(torch.tensor([5, 6])),
        "lambda": make_lambda(5),
    }[name]
    reference = Reference.load(saved, V, "cpu", constraint=constraint)
    model = stock_ppo(saved, reference, constraint=constraint)
    model.save(tmp_path / "model")
    again = sb3.PPO.load(tmp_path / "model", env=model.get_env())
    again.learn(32)
    assert np.abs(again.rollout_buffer.log_ratio).max() < 1e-5  # type: ignore[attr-defined]


def test_every_end_of_a_text_waits_for_the_minimum_length() -> None:
    distribution = TokenDistribution(5, eos_token_ids=(1, 3), min_new_tokens=2)
    logits = distribution.logits(torch.zeros(2, 5), torch.tensor([1, 2]))
    assert torch.isinf(logits).int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature > 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature > 0, got nan"),
        ({"min_new_tokens": 2}, "min_new_tokens=2 needs eos_token_id"),
        ({"autocast": "auto"}, "autocast to be 'bfloat16', 'float16' or None"),
        ({"constraint": 3}, "constraint to be a callable"),
    ],
    ids=str,
)
def test_what_describes_no_distribution_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenDistribution(5, **arguments)


# ---- β lives in one place ------------------------------------------------------------------------------------------


def paid(model: OnPolicyAlgorithm) -> float:
    """What a nat of divergence costs, from what the rewards lack of the score, which is 1."""
    buffer = model.buffer
    return float((1.0 - buffer.episode_sums(buffer.rewards).mean()) / buffer.episode_sums(buffer.log_ratio).mean())


def test_a_coefficient_that_is_set_later_is_the_one_that_is_paid() -> None:
    reference = Reference(make_ppo(model=make_model(sharp=0.1)).policy.lm)
    model = make_ppo(make_env(reward=constant), reference=reference, kl_coef=0.5, learning_rate=0.0)
    model.learn(1)
    assert paid(model) == pytest.approx(0.5, rel=1e-3)
    model.kl_coef = 2.0
    assert model.kl.coef == model.buffer.kl_coef == 2.0
    model.learn(1)
    assert paid(model) == pytest.approx(2.0, rel=1e-3)
    model.buffer.kl_coef = 3.0
    assert model.kl_coef == 3.0
    model.kl = FixedKL(4.0)
    model.learn(1)
    assert paid(model) == pytest.approx(4.0, rel=1e-3)


def test_what_else_concerns_the_divergence_can_be_set_between_rollouts() -> None:
    far, near = (Reference(make_ppo(model=make_model(sharp=sharp)).policy.lm) for sharp in (0.1, 0.2))
    model = make_ppo(make_env(reward=constant), reference=far, learning_rate=0.0)
    model.learn(1)
    before = np.abs(model.buffer.log_ratio).mean()
    model.reference = near
    model.kl_estimator = "k3"
    model.learn(1)
    assert 0 < np.abs(model.buffer.log_ratio).mean() < before
    k3 = model.buffer.episode_sums(model.buffer.token_kl("k3")).mean()
    assert 1 - model.buffer.episode_sums(model.buffer.rewards).mean() == pytest.approx(model.kl_coef * k3, rel=1e-3)
    assert model.kl_target is None
    model.kl_target = 0.5
    assert isinstance(model.kl, AdaptiveKL)
    assert (model.kl.target, model.kl.coef, model.kl_target) == (0.5, 0.04, 0.5)


@pytest.mark.parametrize(("kl_target", "coef"), [(None, -0.1), (None, float("nan")), (0.5, 0.0), (0.5, -1.0)])
def test_a_coefficient_that_can_only_hurt_is_refused_whenever_it_is_set(kl_target: float | None, coef: float) -> None:
    with pytest.raises(ValueError, match=r"Expected (a )?kl_coef"):
        make_ppo(kl_coef=coef, kl_target=kl_target)
    model = make_ppo(kl_target=kl_target)
    with pytest.raises(ValueError, match="Expected a kl_coef"):
        model.kl_coef = coef
    assert model.kl_coef == 0.04
