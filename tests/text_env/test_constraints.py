"""Constraints by hand: what they allow, what the environment tells of them, what the policy makes of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from learners import (
    EOS,
    PROMPTS,
    counted_forwards,
    even_tokens,
    make_env,
    make_model,
    make_policy,
    make_ppo,
    observation_of,
    save_model,
)
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from tiny import tiny_tokenizer
from torch.distributions import kl_divergence
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import agents.models.sizes
from agents.algorithms.ppo import PPO
from agents.models.contexts import contexts_of
from agents.models.distribution import LogProbAndEntropy
from agents.models.reference import Reference
from agents.models.reference_constraints import ReferenceConstraint, ReferenceMinP, ReferenceTopK, ReferenceTopP
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sb3_vec_env import TextVecEnv
from text_env.constraints import (
    AllOf,
    AllowedTokens,
    Contexts,
    ForbiddenTokens,
    MinimumLength,
    all_of,
    allowed_tokens,
    make_constraint,
)
from text_env.env import TextEnv

V = 300


def contexts(*rows: list[int], prompt: int = 1, width: int = 6) -> Contexts:
    """Contexts whose first `prompt` tokens are the prompt; to their right stands 9."""
    input_ids = np.full((len(rows), width), 9)
    for row, ids in zip(input_ids, rows, strict=True):
        row[: len(ids)] = ids
    length = np.array([len(ids) for ids in rows])
    return Contexts(input_ids, length, length - prompt)


def allowed(constraint: Any, *rows: list[int], n_tokens: int = 5) -> list[list[int]]:
    """The tokens that may follow each context."""
    made = make_constraint(constraint)
    assert made is not None
    return [np.flatnonzero(mask).tolist() for mask in allowed_tokens(made, contexts(*rows), n_tokens)]


def not_the_last_token_again(contexts: Contexts, n_tokens: int) -> np.ndarray:
    masks = np.ones((len(contexts.length), n_tokens), dtype=bool)
    rows = np.arange(len(contexts.length))
    masks[rows, contexts.input_ids[rows, contexts.length - 1]] = False
    return masks


# ---- what they allow -----------------------------------------------------------------------------------------------


def test_each_constraint_allows_what_its_name_says() -> None:
    assert allowed(AllowedTokens([4, 1]), [2], [2, 3]) == [[1, 4], [1, 4]]
    assert allowed(ForbiddenTokens({0, 3}), [2], [2, 3]) == [[1, 2, 4], [1, 2, 4]]
    assert allowed(MinimumLength(2, (0,)), [2], [2, 1], [2, 1, 1], [2, 1, 1, 1]) == [
        [1, 2, 3, 4],
        [1, 2, 3, 4],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
    ]
    assert allowed(not_the_last_token_again, [2], [2, 3]) == [[0, 1, 3, 4], [0, 1, 2, 4]]


def test_of_several_constraints_all_hold() -> None:
    parts = [MinimumLength(1, (0,)), AllowedTokens([0, 1, 2]), None, not_the_last_token_again]
    assert allowed(parts, [2], [2, 1], [2, 4]) == [[1], [0, 2], [0, 1, 2]]
    assert allowed(parts[::-1], [2], [2, 1], [2, 4]) == [[1], [0, 2], [0, 1, 2]]
    assert all_of() is None
    assert all_of(None, parts[1]) is parts[1]
    assert make_constraint([]) is None
    nested = all_of(all_of(parts[0], parts[1]), parts[3])
    assert isinstance(nested, AllOf)
    assert len(nested.constraints) == 3


def test_a_constraint_goes_by_name() -> None:
    name = "test_constraints:not_the_last_token_again"
    made = make_constraint(name)
    assert made is not None
    assert made.__name__ == "not_the_last_token_again"  # type: ignore[attr-defined]
    assert allowed([name, AllowedTokens([2, 3])], [2], [3]) == [[3], [2]]


@pytest.mark.parametrize("wrong", [3, "allowed", AllowedTokens, [3], {"a": 1}])
def test_what_is_no_constraint_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected constraint to be a callable \(contexts, n_tokens\)"):
        make_constraint(wrong)
    with pytest.raises(ValueError, match="Expected constraint to be a callable"):
        make_env(1, constraint=wrong)
    with pytest.raises(ValueError, match="Expected constraint to be a callable"):
        make_policy(make_env(1), constraint=wrong)


@pytest.mark.parametrize("ids", [[], [-1], [1.5], ["a"], 3])
def test_token_ids_are_integers_and_not_negative(ids: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected token ids for AllowedTokens, at least one integer >= 0"):
        AllowedTokens(ids)


def test_token_ids_beyond_the_vocabulary_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"Expected ForbiddenTokens\(\(2, 5\)\) to name tokens of the vocabulary of 5"):
        allowed(ForbiddenTokens([2, 5]), [1])


def test_a_constraint_that_forbids_everything_is_named() -> None:
    def nothing_after_three(contexts: Contexts, n_tokens: int) -> np.ndarray:
        last = contexts.input_ids[np.arange(len(contexts.length)), contexts.length - 1]
        return np.repeat(last[:, None] != 3, n_tokens, axis=1)

    expected = r"constraint nothing_after_three to allow at least one token.*none after \[2, 3\], of which 1 are"
    with pytest.raises(ValueError, match=expected):
        allowed(nothing_after_three, [2], [2, 3])
    with pytest.raises(ValueError, match=expected):  # the part, not the conjunction
        allowed([AllowedTokens([1]), nothing_after_three], [2], [2, 3])
    with pytest.raises(ValueError, match=r"AllOf\(.*AllowedTokens\(\(1,\)\), ForbiddenTokens\(\(1,\)\)"):
        allowed([AllowedTokens([1]), ForbiddenTokens([1])], [2])


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (np.ones((1, 5)), r"float64 of shape \(1, 5\)"),
        (np.ones(5, dtype=bool), r"bool of shape \(5,\)"),
        (np.ones((1, 4), dtype=bool), r"bool of shape \(1, 4\)"),
        (torch.ones(1, 5, dtype=torch.bool), "a Tensor"),
        (None, "a NoneType"),
    ],
)
def test_an_answer_of_another_form_is_an_error(answer: Any, got: str) -> None:
    def odd(contexts: Contexts, n_tokens: int) -> Any:
        return answer

    with pytest.raises(
        ValueError, match=rf"Expected the constraint odd to return .* bool of shape \(1, 5\).*got {got}"
    ):
        allowed(odd, [1])


# ---- what the environment tells ------------------------------------------------------------------------------------


def test_without_a_constraint_everything_is_allowed_but_eos_before_the_minimum_length() -> None:
    env = make_env(2, min_new_tokens=2)
    assert make_env(2).action_masks().all()  # also before the first reset
    env.reset(seed=0)
    for step in range(4):
        masks = env.action_masks()
        assert masks.shape == (2, V)
        assert masks.dtype == np.bool_
        assert masks[:, 1:].all()
        assert (masks[:, EOS] == (step >= 2)).all()
        env.step(np.array([7, 8]))


def test_the_masks_of_single_environments_are_the_rows_of_the_vector_environments() -> None:
    kwargs = {
        "tokenizer": tiny_tokenizer(),
        "prompts": PROMPTS,
        "reward": even_tokens,
        "max_new_tokens": 6,
        "min_new_tokens": 2,
        "constraint": [not_the_last_token_again, ForbiddenTokens([5, 6])],
    }
    vector, singles = make_env(3, **kwargs), [TextEnv(**kwargs) for _ in range(3)]
    vector.reset(seed=4)
    for number, single in enumerate(singles):
        single.reset(seed=4 + number)
    rng = np.random.default_rng(0)
    for _ in range(5):
        masks = vector.action_masks()
        for mask, single in zip(masks, singles, strict=True):
            np.testing.assert_array_equal(mask, single.action_masks())
        actions = rng.integers(7, V, 3)  # never EOS
        vector.step(actions)
        for action, single in zip(actions, singles, strict=True):
            single.step(action)
        assert not vector.action_masks()[np.arange(3), actions].any()  # not again


def test_masks_are_fresh_copies_and_all_true_where_nothing_follows() -> None:
    env = make_env(2, constraint=AllowedTokens([EOS, 7]), autoreset_mode="Disabled")
    assert env.action_masks().all()
    env.reset(seed=0)
    env.action_masks()[:] = False
    assert env.action_masks().sum(axis=1).tolist() == [2, 2]
    env.step(np.array([EOS, 7]))
    assert env.action_masks().sum(axis=1).tolist() == [V, 2]


def test_the_environment_takes_forbidden_tokens_all_the_same() -> None:
    env = make_env(1, constraint=AllowedTokens([EOS, 7]))
    env.reset(seed=0)
    observation, *_ = env.step(np.array([8]))
    assert observation["attention_mask"].sum() == observation["prompt_length"].item() + 1


def test_the_masks_are_found_through_gymnasium_and_through_stable_baselines() -> None:
    wrapped = gym.make("TextRLHF-v0", constraint=AllowedTokens([1, 2]))
    wrapped.reset(seed=0)
    assert is_masking_supported(wrapped)
    assert np.flatnonzero(get_action_masks(wrapped)).tolist() == [1, 2]
    env = TextVecEnv(make_env(3, constraint=not_the_last_token_again))
    env.reset()
    assert is_masking_supported(env)
    np.testing.assert_array_equal(get_action_masks(env), env.vector_env.action_masks())
    assert get_action_masks(env).shape == (3, V)


# ---- what the policy makes of it -----------------------------------------------------------------------------------

CONTEXTS = [[5, 6, 7], [5, 6, 7, 8, 9], [10, 11], [5, 6, 7]]


def test_forbidden_tokens_have_probability_zero_and_the_others_keep_their_proportions() -> None:
    env = make_env()
    free, bound = make_policy(env), make_policy(env, constraint=[not_the_last_token_again, AllowedTokens(range(4, 90))])
    observation = observation_of(CONTEXTS, [2] * 4)
    with torch.no_grad():
        masks = torch.from_numpy(allowed_tokens(bound.distribution.all_constraints, contexts_of(observation), V))  # type: ignore[arg-type]
        expected = free.get_distribution(observation).distribution.probs * masks
        actual = bound.get_distribution(observation).distribution.probs
    assert masks.sum(dim=1).tolist() == [85, 85, 85, 85]
    assert (actual[~masks] == 0).all()
    torch.testing.assert_close(actual, expected / expected.sum(dim=1, keepdim=True))


def test_the_score_of_a_forbidden_action_is_minus_infinity() -> None:
    policy = make_policy(make_env(), constraint=AllowedTokens([5, 6]))
    _, log_prob, entropy = policy.evaluate_actions(observation_of([[7, 8]] * 3, [1] * 3), torch.tensor([5, 6, 7]))
    assert log_prob[:2].exp().sum().item() == pytest.approx(1)
    assert log_prob[2] == -torch.inf
    probs = log_prob[:2].exp()
    assert entropy is not None
    assert entropy[0].item() == pytest.approx(-float((probs * log_prob[:2]).sum().detach()), abs=1e-6)


@pytest.mark.parametrize("sharp", [0.2, 3.0])  # the latter: probabilities that underflow in float32
def test_gradients_are_finite_and_flow_through_allowed_tokens_only(sharp: float) -> None:
    policy = make_policy(make_env(), model=make_model(sharp=sharp), constraint=AllowedTokens(range(2, 40)))
    observation = observation_of(CONTEXTS, [2] * 4)
    _, log_prob, entropy = policy.evaluate_actions(observation, torch.tensor([2, 3, 39, 20]))
    assert entropy is not None
    (log_prob - entropy).sum().backward()
    gradients = [p.grad for p in policy.lm.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 0

    hidden = torch.randn(3, policy.lm.hidden_size)
    masks = torch.rand(3, V) < 0.5
    logits = policy.lm.logits(hidden, torch.zeros(3), masks)
    logits.retain_grad()
    LogProbAndEntropy.apply(logits, masks.int().argmax(dim=1))[1].sum().backward()
    assert logits.grad is not None
    assert (logits.grad[~masks] == 0).all()


def test_the_distribution_has_first_and_second_derivatives_of_its_divergence() -> None:
    policy = make_policy(make_env(), constraint=AllowedTokens(range(2, 40)))
    observation = observation_of(CONTEXTS, [2] * 4)
    with torch.no_grad():
        old = policy.get_distribution(observation).distribution
    new = policy.get_distribution(observation)
    divergence = kl_divergence(new.distribution, old).mean()
    assert divergence.item() == pytest.approx(0, abs=1e-6)
    weight = policy.lm.backbone.h[0].attn.c_attn.weight
    (first,) = torch.autograd.grad(divergence + new.entropy().mean(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()
    assert float(second.abs().max()) > 0


class Asked:
    """A constraint that allows everything, and remembers what it was asked."""

    def __init__(self) -> None:
        self.contexts: set[tuple[tuple[int, ...], int]] = set()

    def __call__(self, contexts: Contexts, n_tokens: int) -> np.ndarray:
        for ids, length, step in zip(*contexts, strict=True):
            assert (ids[length:] == -1).all()  # the future is not shown
            self.contexts.add((tuple(ids[:length].tolist()), int(step)))
        return np.ones((len(contexts.length), n_tokens), dtype=bool)

    def take(self) -> set[tuple[tuple[int, ...], int]]:
        taken, self.contexts = self.contexts, set()
        return taken


def filled(policy: CausalLMPolicy, env: Any, **kwargs: Any) -> EpisodeBuffer:
    """A buffer with six episodes."""
    buffer = EpisodeBuffer(0, env.single_observation_space, env.single_action_space, "cpu", n_envs=4, **kwargs)
    torch.manual_seed(0)
    env.reset(seed=0)
    collect_episodes(policy, env, 6, buffer)
    buffer.finalize()
    return buffer


def test_rollout_update_and_reference_ask_about_the_same_contexts() -> None:
    env, asked = make_env(4), Asked()
    policy = make_policy(env, model=make_model(ends=0.1), constraint=asked)
    reference = Reference.of(policy)
    assert reference.distribution.all_constraints is asked  # shared by the copy
    buffer = filled(policy, env)
    rollout = asked.take()
    assert len(rollout) > 20
    samples = buffer.pack(np.arange(6))
    policy.evaluate_actions(samples.observations, samples.actions)
    assert asked.take() == rollout
    reference.log_probs(samples.observations, samples.actions)
    assert asked.take() == rollout


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(agents.models.sizes, "CPU", agents.models.sizes.CPU._replace(chunk_elements=5 * V))
        yield


def scores_and_gradients(with_masks: bool) -> tuple[torch.Tensor, ...]:
    env = make_env(4, constraint=not_the_last_token_again)
    policy = make_policy(env, model=make_model(ends=0.1), constraint=env.constraint, min_new_tokens=2)
    buffer = filled(policy, env)
    samples = buffer.pack(np.arange(6))
    torch.manual_seed(1)
    masks = (torch.rand(len(samples.actions), V) < 0.5).scatter(1, samples.actions[:, None], True)
    given = (masks.float(),) if with_masks else ()
    _, log_prob, entropy = policy.evaluate_actions(samples.observations, samples.actions, *given)
    assert entropy is not None
    (log_prob + entropy).mean().backward()
    return log_prob.detach(), entropy.detach(), *(p.grad for p in policy.lm.parameters() if p.grad is not None)


@pytest.mark.parametrize("with_masks", [False, True])
def test_chunks_of_positions_get_the_masks_of_their_own_contexts(
    with_masks: bool, request: pytest.FixtureRequest
) -> None:
    whole = scores_and_gradients(with_masks)
    assert torch.isfinite(whole[0]).all()
    request.getfixturevalue("small_chunks")
    for expected, actual in zip(whole, scores_and_gradients(with_masks), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_given_masks_and_the_policys_own_constraint_both_hold() -> None:
    policy = make_policy(make_env(), constraint=AllowedTokens([5, 6, 7]), min_new_tokens=1)
    observation = observation_of([[8, 9]] * 400, [2] * 400)
    masks = np.zeros((400, V), dtype=bool)
    masks[:, [EOS, 6, 7, 8]] = True
    with torch.no_grad():
        actions, _, log_prob = policy.forward(observation, action_masks=masks)
        scored = policy.evaluate_actions(observation, actions, torch.from_numpy(masks).float())[1]
    assert set(actions.tolist()) == {6, 7}
    torch.testing.assert_close(log_prob, scored, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"AllOf\(.*action_masks.* to allow at least one token"):
        policy.forward(observation, action_masks=np.eye(V, dtype=bool)[[EOS] * 400])


def test_where_nothing_but_an_early_eos_is_forbidden_no_mask_is_made() -> None:
    observed = contexts_of(observation_of(CONTEXTS, [2] * 4))
    for policy in (make_policy(make_env()), make_policy(make_env(), min_new_tokens=2)):
        assert policy.lm.allowed(observed) is None
    bound = make_policy(make_env(), constraint=not_the_last_token_again)
    with pytest.raises(ValueError, match="the masks of not_the_last_token_again, got None"):
        bound.lm.logits(torch.zeros(1, bound.lm.hidden_size), torch.zeros(1))


def test_a_constraint_with_a_model_in_it_does_not_have_that_trained() -> None:
    class Network(torch.nn.Linear):
        def forward(self, contexts: Contexts, n_tokens: int) -> np.ndarray:  # type: ignore[override]
            return np.ones((len(contexts.length), n_tokens), dtype=bool)

    policy = make_policy(make_env(), constraint=Network(2, 2))
    assert sum(p.numel() for p in policy.parameters()) == sum(p.numel() for p in make_policy(make_env()).parameters())


def test_a_checkpoint_asks_again_for_a_constraint_by_name_or_live(tmp_path: Path) -> None:
    """A file that could name it would name code to be run."""
    policy_kwargs = {"model": save_model(tmp_path / "model")}
    for number, constraint in enumerate(("test_constraints:not_the_last_token_again", not_the_last_token_again)):
        directory = tmp_path / str(number)
        env = make_env(constraint=constraint)
        make_ppo(env, policy_kwargs={**policy_kwargs, "constraint": constraint}).save(directory)
        with pytest.raises(ValueError, match=r"\['constraint'\] can't be written down .* policy_kwargs="):
            PPO.load(directory, env)
        again = PPO.load(directory, env, policy_kwargs={"constraint": constraint})
        assert again.policy.distribution.all_constraints is not_the_last_token_again


# ---- the most probable tokens of the frozen reference --------------------------------------------------------------


def nucleus_by_hand(model: Any, context: list[int], p: float, among: set[int] | None = None) -> set[int]:
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, -1].double()
    tokens = sorted(among or set(range(V)), key=lambda token: -float(logits[token]))
    total = float(torch.logsumexp(logits[tokens], 0).exp())
    kept: set[int] = set()
    mass = 0.0
    for token in tokens:
        if mass >= p:
            break
        kept.add(token)
        mass += float(logits[token].exp()) / total
    return kept


def nuclei(constraint: ReferenceConstraint, *rows: list[int]) -> list[set[int]]:
    return [set(np.flatnonzero(mask).tolist()) for mask in allowed_tokens(constraint, contexts(*rows), V)]


ROWS = [[5], [5, 6, 7], [5, 6], [8, 3, 4, 1], [8, 3]]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9])
def test_the_nucleus_is_the_fewest_tokens_that_have_probability_p(kind: str, p: float) -> None:
    model = make_model(kind, sharp=0.5)
    found = nuclei(ReferenceTopP(model, p, device="cpu"), *ROWS)
    assert found == [nucleus_by_hand(model, row, p) for row in ROWS]
    sizes = {len(nucleus) for nucleus in found}
    assert sizes == {1} if p < 0.1 else max(sizes) > 1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("make", "parameter", "warper"),
    [
        *((ReferenceTopK, k, TopKLogitsWarper(k)) for k in (1, 7, V, V + 1)),
        *((ReferenceTopP, p, TopPLogitsWarper(p)) for p in (0.05, 0.5, 0.95)),
        *((ReferenceMinP, min_p, MinPLogitsWarper(min_p)) for min_p in (0.001, 0.1, 1.0)),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (str(value) if isinstance(value, int | float) else ""),
)
def test_they_keep_the_tokens_that_transformers_keeps(
    kind: str, make: Any, parameter: float, warper: LogitsProcessor
) -> None:
    model = make_model(kind, sharp=0.5)
    expected = []
    for row in ROWS:
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[:, -1]
        expected.append(set(torch.isfinite(warper(torch.tensor([row]), logits))[0].nonzero()[:, 0].tolist()))
    assert nuclei(make(model, parameter, device="cpu"), *ROWS) == expected


def kept(make: Any, parameter: float, probabilities: list[float]) -> list[int]:
    """What a constraint keeps of a distribution that is given by hand."""
    constraint = make(make_model(), parameter, device="cpu")
    mask = constraint.keeps(torch.tensor([probabilities], dtype=torch.float64).log())
    return [int(token) for token in mask[0].nonzero()]


def test_of_equally_probable_tokens_top_k_and_top_p_take_the_first_and_min_p_all() -> None:
    probabilities = [0.1, 0.2, 0.25, 0.2, 0.2, 0.05]
    assert kept(ReferenceTopK, 2, probabilities) == [1, 2]
    assert kept(ReferenceTopK, 3, probabilities) == [1, 2, 3]
    assert kept(ReferenceTopP, 0.4, probabilities) == [1, 2]
    assert kept(ReferenceMinP, 0.79, probabilities) == [1, 2, 3, 4]
    assert kept(ReferenceMinP, 0.81, probabilities) == [2]
    assert kept(ReferenceMinP, 1, [0.4, 0.2, 0.4]) == [0, 2]


@pytest.mark.parametrize("make", [ReferenceTopK, ReferenceTopP, ReferenceMinP])
def test_what_a_subclass_keeps_of_the_forbidden_tokens_stays_forbidden(make: Any) -> None:
    few = AllowedTokens([5, 6, 7])
    bound = make(make_model(), {ReferenceTopK: 9, ReferenceTopP: 1 - 1e-9, ReferenceMinP: 1e-9}[make], device="cpu")
    assert nuclei(bound.within(few), *ROWS) == [{5, 6, 7}] * len(ROWS)
    assert {len(tokens) for tokens in nuclei(bound, *ROWS)} != {3}


def test_under_another_constraint_top_k_takes_k_of_those_that_it_allows() -> None:
    model = make_model(sharp=0.5)
    top = ReferenceTopK(model, 4, device="cpu")
    odd = set(range(1, V, 2))
    [few] = nuclei(top.within(AllowedTokens(odd)), [5, 6])
    assert len(few) == 4
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]])).logits[0, -1]
    assert few == set(sorted(odd, key=lambda token: -float(logits[token]))[:4])


OF_EACH_KIND = [(ReferenceTopK, 5), (ReferenceTopP, 0.8), (ReferenceMinP, 0.1)]


@pytest.mark.parametrize(("make", "parameter"), OF_EACH_KIND)
def test_it_is_the_same_however_contexts_are_asked_for(make: Any, parameter: float) -> None:
    model = make_model(sharp=0.5)
    together = nuclei(make(model, parameter, device="cpu"), *ROWS)
    alone = make(model, parameter, device="cpu")
    assert [nuclei(alone, row)[0] for row in ROWS] == together
    forgetful = make(model, parameter, device="cpu", memory_bytes=300)
    assert [nuclei(forgetful, row)[0] for row in ROWS] == together
    assert len(forgetful._masks) <= 2


def test_it_does_not_move_with_the_model_that_is_trained() -> None:
    model = make_model(sharp=0.5)
    constraint = ReferenceTopP(model, 0.8, device="cpu", memory_bytes=0)
    before = nuclei(constraint, *ROWS)
    with torch.no_grad():
        model.transformer.ln_f.weight.neg_()
    assert nuclei(ReferenceTopP(model, 0.8, device="cpu"), *ROWS) != before
    assert nuclei(constraint, *ROWS) == before


def test_under_another_constraint_it_is_the_nucleus_of_what_that_allows() -> None:
    """A reference that is sure of EOS too early would else leave nothing."""
    model = make_model(ends=0.97)
    top = ReferenceTopP(model, 0.9, device="cpu")
    assert nuclei(top, [5], [5, 6]) == [{EOS}, {EOS}]
    parts = (top, MinimumLength(1, (EOS,)), ForbiddenTokens([7]))
    bound = make_constraint(parts)
    assert make_constraint(AllOf(parts)).constraints[:2] == bound.constraints[:2]  # type: ignore[union-attr]
    rest = set(range(1, V)) - {7}
    expected = [nucleus_by_hand(model, [5], 0.9, rest), nucleus_by_hand(model, [5, 6], 0.9, rest | {EOS})]
    assert len(expected[0]) > 1
    assert [set(np.flatnonzero(m).tolist()) for m in allowed_tokens(bound, contexts([5], [5, 6]), V)] == expected  # type: ignore[arg-type]
    assert nuclei(top, [5], [5, 6]) == [{EOS}, {EOS}]  # itself as before


@pytest.mark.parametrize(("make", "parameter"), OF_EACH_KIND)
def test_copies_share_the_model_and_pickles_bring_it_along(make: Any, parameter: float) -> None:
    constraint = make(make_model(sharp=0.5), parameter, device="cpu")
    expected = nuclei(constraint, *ROWS)
    assert copy.deepcopy(constraint) is constraint
    assert copy.deepcopy(AllOf((constraint,))).constraints[0] is constraint
    again = pickle.loads(pickle.dumps(constraint))
    assert again is not constraint
    assert not again._masks
    assert nuclei(again, *ROWS) == expected
    assert repr(again) == repr(constraint)
    assert repr(parameter) in repr(constraint)


def test_a_rollout_pays_one_token_a_step_and_the_update_nothing() -> None:
    env = make_env(4, max_new_tokens=8, prompts=["The movie", "I loved this", "a film", "bad"])
    top = ReferenceTopP(make_model("llama"), 0.95, device="cpu")
    policy = make_policy(env, "llama", constraint=top)
    with counted_forwards(top._lm.backbone) as shapes:
        buffer = filled(policy, env)
        rollout = len(shapes)
        assert sum(columns > 1 for _, columns in shapes) <= 5  # prompts
        assert sum(columns == 1 for _, columns in shapes) >= 8
        samples = buffer.pack(np.arange(6))
        policy.evaluate_actions(samples.observations, samples.actions)
        Reference.of(policy).log_probs(samples.observations, samples.actions)
    assert len(shapes) == rollout
    forgetful = ReferenceTopP(make_model("llama"), 0.95, device="cpu")
    with counted_forwards(forgetful._lm.backbone) as shapes:
        make_policy(env, "llama", constraint=forgetful).evaluate_actions(samples.observations, samples.actions)
    assert [rows for rows, _ in shapes] == [6]  # whole episodes, once


@pytest.mark.parametrize("p", [0, 1, -0.1, 1.5])
def test_p_lies_between_zero_and_one(p: float) -> None:
    with pytest.raises(ValueError, match="Expected 0 < p < 1"):
        ReferenceTopP("builtin", p)


@pytest.mark.parametrize("min_p", [0, -0.1, 1.5, float("nan")])
def test_min_p_is_greater_than_zero_and_at_most_one(min_p: float) -> None:
    with pytest.raises(ValueError, match="Expected 0 < min_p <= 1"):
        ReferenceMinP("builtin", min_p)


@pytest.mark.parametrize("k", [0, -1, 2.0, "3"])
def test_k_is_an_integer_and_at_least_one(k: Any) -> None:
    with pytest.raises(ValueError, match="Expected an integer k >= 1"):
        ReferenceTopK("builtin", k)


def test_a_reference_with_fewer_tokens_than_the_environment_is_refused() -> None:
    constraint = ReferenceTopP(make_model(), 0.9, device="cpu")
    with pytest.raises(ValueError, match="a logit for each of the 301 tokens of the environment, got 300"):
        allowed_tokens(constraint, contexts([5]), 301)


def test_a_reference_with_fewer_positions_than_the_context_is_refused() -> None:
    constraint = ReferenceTopP(make_model(max_position_embeddings=8), 0.9, device="cpu")
    allowed_tokens(constraint, contexts([5] * 8, width=9), V)
    with pytest.raises(ValueError, match=r"at least 9 positions .* GPT2LMHeadModel has 8"):
        allowed_tokens(constraint, contexts([5] * 9, width=9), V)
