"""`agents.objectives.losses` against arithmetic that can be followed by eye, and against each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.objectives.kl import KL_ESTIMATORS, kl_exact, kl_k1, kl_k2, kl_k3
from agents.objectives.losses import (
    cispo,
    clip_ratio,
    clipped_surrogate,
    effective_sample_size,
    is_near,
    policy_gradient,
    sequence_log_ratio,
    truncated_importance_weight,
    value_loss,
)


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_the_clipped_surrogate_is_the_one_worked_out_by_hand() -> None:
    # ε = 0.2. Ratios are 0.6/0.4 = 1.5, 0.2/0.4 = 0.5, and 0.44/0.4 = 1.1; the smaller of ρA and clip(ρ)A counts.
    #   ρ = 1.5, A =  2: min(3.0, 1.2 · 2)      =  2.4    clipped: no more to be gained
    #   ρ = 1.5, A = −2: min(−3.0, 1.2 · −2)    = −3.0    not clipped: the mistake must be undone
    #   ρ = 0.5, A =  2: min(1.0, 0.8 · 2)      =  1.0
    #   ρ = 0.5, A = −2: min(−1.0, 0.8 · −2)    = −1.6    clipped
    #   ρ = 1.1, A =  3: 3.3 either way
    log_prob, old_log_prob = log(0.6, 0.6, 0.2, 0.2, 0.44), log(0.4, 0.4, 0.4, 0.4, 0.4)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0], dtype=torch.float64)
    expected = [-2.4, 3.0, -1.0, 1.6, -3.3]
    np.testing.assert_allclose(clipped_surrogate(log_prob - old_log_prob, advantages, 0.2), expected, rtol=1e-12)
    wrong = clipped_surrogate(log_prob - old_log_prob, advantages, 0.3).numpy()
    assert np.abs(wrong - expected).max() > 0.15  # another ε misses by a lot


def test_a_clipped_ratio_has_no_gradient_and_an_unclipped_one_has() -> None:
    log_prob, old_log_prob = log(0.6, 0.6, 0.2, 0.2).requires_grad_(), log(0.4, 0.4, 0.4, 0.4)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0], dtype=torch.float64)
    clipped_surrogate(log_prob - old_log_prob, advantages, 0.2).sum().backward()
    # d(−ρA)/d log π = −ρA where it isn't clipped: 0, 1.5 · 2, −0.5 · 2, 0
    np.testing.assert_allclose(log_prob.grad, [0.0, 3.0, -1.0, 0.0], rtol=1e-12)


@given(st.lists(st.tuples(st.floats(-8, -0.01), st.floats(-5, 5)), min_size=1, max_size=10), st.floats(0.01, 0.5))
@settings(max_examples=50, deadline=None)
def test_at_ratio_one_every_surrogate_has_the_policy_gradient(
    tokens: list[tuple[float, float]], epsilon: float
) -> None:
    values, advantages = torch.tensor(tokens, dtype=torch.float64).unbind(dim=1)
    gradients = []
    for loss in (
        lambda x: policy_gradient(x, advantages),
        lambda x: clipped_surrogate(x - values, advantages, epsilon),
        lambda x: cispo(x, x - values, advantages, epsilon),
        lambda x: clipped_surrogate(sequence_log_ratio(x - values, torch.tensor([len(x)])), advantages, epsilon),
    ):
        log_prob = values.clone().requires_grad_()
        loss(log_prob).mean().backward()
        gradients.append(log_prob.grad)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-12, rtol=1e-12)


def test_the_policy_gradient_is_the_one_worked_out_by_hand() -> None:
    loss = policy_gradient(torch.tensor([-1.0, -2.0]), torch.tensor([3.0, -0.5]))
    assert loss.tolist() == [3.0, -1.0]  # −(−1 · 3) and −(−2 · −0.5)


def test_the_value_loss_is_the_one_worked_out_by_hand() -> None:
    values, old_values, returns = torch.tensor([[2.0, 1.1, 0.0, 3.0], [1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 3.0]])
    # Unclipped: ½ (V − G)²: ½ · 1, ½ · 0.81, ½ · 9, ½ · 0
    np.testing.assert_allclose(value_loss(values, old_values, returns, None), [0.5, 0.405, 4.5, 0.0], rtol=1e-6)
    # Clipped to within 0.5 of V_old = 1: V becomes 1.5, 1.1, 0.5, 1.5; the larger error counts:
    #   max(1, 0.25) = 1;  max(0.81, 0.81);  max(9, 6.25) = 9;  max(0, 2.25) = 2.25
    np.testing.assert_allclose(value_loss(values, old_values, returns, 0.5), [0.5, 0.405, 4.5, 1.125], rtol=1e-6)


@given(st.lists(st.tuples(*[st.floats(-5, 5)] * 3), min_size=1, max_size=10), st.floats(0.01, 10))
@settings(max_examples=50, deadline=None)
def test_clipping_never_lowers_the_value_loss(tokens: list[tuple[float, float, float]], epsilon: float) -> None:
    values, old_values, returns = torch.tensor(tokens, dtype=torch.float64).unbind(dim=1)
    free, clipped = value_loss(values, old_values, returns, None), value_loss(values, old_values, returns, epsilon)
    assert (clipped >= free).all()
    near = (values - old_values).abs() < epsilon
    torch.testing.assert_close(clipped[near], free[near])


# ---- relatives of the surrogate ------------------------------------------------------------------------------------


def gradient_of(loss: Callable[[torch.Tensor], torch.Tensor], log_prob: torch.Tensor) -> torch.Tensor:
    log_prob = log_prob.clone().requires_grad_()
    return torch.autograd.grad(loss(log_prob).sum(), log_prob)[0]


def test_clip_higher_moves_the_upper_bound_alone() -> None:
    # ε_low = 0.2, ε_high = 0.5.
    #   ρ = 1.4, A =  2: min(2.8, 1.4 · 2)  =  2.8    within the range, where ε = 0.2 would make it 1.2 · 2 = 2.4
    #   ρ = 2.0, A =  2: min(4.0, 1.5 · 2)  =  3.0    clipped
    #   ρ = 2.0, A = −2: min(−4.0, −3.0)    = −4.0    not clipped
    #   ρ = 0.5, A = −2: min(−1.0, 0.8 · −2) = −1.6   clipped at the lower bound
    log_ratio, advantages = log(1.4, 2.0, 2.0, 0.5), torch.tensor([2.0, 2.0, -2.0, -2.0], dtype=torch.float64)
    np.testing.assert_allclose(clipped_surrogate(log_ratio, advantages, 0.2, 0.5), [-2.8, -3.0, 4.0, 1.6], rtol=1e-12)
    gradient = gradient_of(lambda x: clipped_surrogate(x, advantages, 0.2, 0.5), log_ratio)
    np.testing.assert_allclose(gradient, [-2.8, 0.0, 4.0, 0.0], rtol=1e-12)
    np.testing.assert_allclose(clip_ratio(log_ratio.exp(), 0.2, 0.5), [1.4, 1.5, 1.5, 0.8], rtol=1e-12)


def test_dual_clip_bounds_what_a_bad_token_can_cost() -> None:
    # c = 3. ρ = 5, A = −2: max(−10, 3 · −2) = −6, without gradient.  ρ = 2, A = −2: max(−4, −6) = −4, as without c.
    log_ratio, advantages = log(5.0, 2.0), torch.tensor([-2.0, -2.0], dtype=torch.float64)
    np.testing.assert_allclose(clipped_surrogate(log_ratio, advantages, 0.2, dual_clip=3.0), [6.0, 4.0], rtol=1e-12)
    gradient = gradient_of(lambda x: clipped_surrogate(x, advantages, 0.2, dual_clip=3.0), log_ratio)
    np.testing.assert_allclose(gradient, [0.0, 4.0], rtol=1e-12)


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(0, 5)), min_size=1, max_size=10), st.floats(1.01, 4))
@settings(max_examples=50, deadline=None)
def test_with_positive_advantages_dual_clip_is_the_plain_surrogate(tokens: list[tuple[float, float]], c: float) -> None:
    log_ratio, advantages = torch.tensor(tokens, dtype=torch.float64).unbind(dim=1)
    plain = clipped_surrogate(log_ratio, advantages, 0.2)
    assert torch.equal(clipped_surrogate(log_ratio, advantages, 0.2, dual_clip=c), plain)


def test_cispo_is_the_one_worked_out_by_hand_and_a_clipped_token_keeps_its_gradient() -> None:
    # π = 0.6, 0.2, 0.44 and π_old = 0.4: ρ = 1.5, 0.5, 1.1; clipped with ε_low = 0.2, ε_high = 0.3: 1.3, 0.8, 1.1.
    log_prob, old_log_prob = log(0.6, 0.2, 0.44), log(0.4, 0.4, 0.4)
    advantages = torch.tensor([2.0, -2.0, 3.0], dtype=torch.float64)
    expected = [-1.3 * 2 * np.log(0.6), 0.8 * 2 * np.log(0.2), -1.1 * 3 * np.log(0.44)]
    np.testing.assert_allclose(cispo(log_prob, log_prob - old_log_prob, advantages, 0.2, 0.3), expected, rtol=1e-12)
    gradient = gradient_of(lambda x: cispo(x, x - old_log_prob, advantages, 0.2, 0.3), log_prob)
    np.testing.assert_allclose(gradient, [-2.6, 1.6, -3.3], rtol=1e-12)
    clipped = gradient_of(lambda x: clipped_surrogate(x - old_log_prob, advantages, 0.2, 0.3), log_prob)
    np.testing.assert_allclose(clipped, [0.0, 0.0, -3.3], rtol=1e-12)


def test_the_ratio_of_a_text_is_the_geometric_mean_of_those_of_its_tokens() -> None:
    # Two texts: ratios 2, 8 with the mean √16 = 4; and 0.5 alone.
    ratio = sequence_log_ratio(log(2.0, 8.0, 0.5), torch.tensor([2, 1])).exp()
    np.testing.assert_allclose(ratio, [4.0, 4.0, 0.5], rtol=1e-12)
    # Each token has its own gradient, d s_t / d log π_t = s, and not that of the others.
    gradient = gradient_of(lambda x: sequence_log_ratio(x, torch.tensor([2, 1])).exp(), log(2.0, 8.0, 0.5))
    np.testing.assert_allclose(gradient, [4.0, 4.0, 0.5], rtol=1e-12)


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-5, 5)), min_size=1, max_size=10))
@settings(max_examples=50, deadline=None)
def test_for_texts_of_one_token_gspo_is_ppo(tokens: list[tuple[float, float]]) -> None:
    log_ratio, advantages = torch.tensor(tokens, dtype=torch.float64).unbind(dim=1)
    ones = torch.ones(len(tokens), dtype=torch.int64)
    assert torch.equal(sequence_log_ratio(log_ratio, ones), log_ratio)
    gspo = gradient_of(lambda x: clipped_surrogate(sequence_log_ratio(x, ones), advantages, 0.2), log_ratio)
    assert torch.equal(gspo, gradient_of(lambda x: clipped_surrogate(x, advantages, 0.2), log_ratio))


def test_with_one_advantage_for_a_text_gspo_token_has_the_gradient_of_gspo() -> None:
    """GSPO's own objective is min(s A, clip(s) A) for each text, with s differentiated as it stands (eq. 5 and 10)."""
    log_ratio, lengths = log(1.1, 0.8, 1.3, 1.05, 0.9), torch.tensor([2, 3])
    advantages = torch.tensor([1.5, -0.5], dtype=torch.float64)

    def of_texts(x: torch.Tensor) -> torch.Tensor:
        return clipped_surrogate(torch.stack([text.mean() for text in x.split([2, 3])]), advantages, 0.5)

    def of_tokens(x: torch.Tensor) -> torch.Tensor:  # the mean over the tokens of a text, as with "sequence"
        loss = clipped_surrogate(sequence_log_ratio(x, lengths), advantages.repeat_interleave(lengths), 0.5)
        return torch.stack([text.mean() for text in loss.split([2, 3])])

    torch.testing.assert_close(of_tokens(log_ratio), of_texts(log_ratio))
    torch.testing.assert_close(gradient_of(of_tokens, log_ratio), gradient_of(of_texts, log_ratio))


def test_importance_weights_are_truncated_from_above_alone() -> None:
    # π_old/μ = 0.6/0.2 = 3, which C = 2 cuts; 0.1/0.4 = 0.25; 0.3/0.3 = 1.
    weight = truncated_importance_weight(log(0.6, 0.1, 0.3), log(0.2, 0.4, 0.3), 2.0)
    np.testing.assert_allclose(weight, [2.0, 0.25, 1.0], rtol=1e-12)


def test_importance_weights_that_are_not_truncated_make_samples_of_mu_mean_what_those_of_pi_old_mean() -> None:
    mu, pi_old = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    losses = torch.tensor([1.0, -2.0, 4.0])
    weight = truncated_importance_weight(pi_old.log(), mu.log(), 10.0)
    assert float((mu * weight * losses).sum()) == pytest.approx(float((pi_old * losses).sum()))
    assert float((mu * losses).sum()) != pytest.approx(float((pi_old * losses).sum()), abs=0.5)  # the control


def test_tokens_are_near_within_a_factor_in_either_direction() -> None:
    # π_old/μ = 3, 1/3, 1.9 and 1/1.9, beside a bound of 2.
    old, behaviour = log(0.6, 0.2, 0.38, 0.2), log(0.2, 0.6, 0.2, 0.38)
    assert is_near(old, behaviour, 2.0).tolist() == [False, False, True, True]
    assert is_near(old, behaviour, 4.0).all()


def test_the_effective_sample_size_is_the_one_worked_out_by_hand() -> None:
    # Ratios 3, 1, 1, 1: (3 + 1 + 1 + 1)² / (4 · (9 + 1 + 1 + 1)) = 36/48. A factor makes no difference, nor overflows.
    old, behaviour = log(0.6, 0.2, 0.3, 0.4), log(0.2, 0.2, 0.3, 0.4)
    assert float(effective_sample_size(old, behaviour)) == pytest.approx(0.75)
    assert float(effective_sample_size(old + 1000, behaviour)) == pytest.approx(0.75)
    assert float(effective_sample_size(old, old)) == 1.0
    assert float(effective_sample_size(torch.tensor([0.0, -900.0]), torch.zeros(2))) == pytest.approx(0.5)


# ---- KL estimators -------------------------------------------------------------------------------------------------

P, Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def test_kl_estimators_are_the_ones_worked_out_by_hand() -> None:
    # log(p/q) for p/q = 2.5, 1, 0.4 is 0.9162907, 0, −0.9162907.
    log_ratio = (P / Q).log()
    np.testing.assert_allclose(kl_k1(log_ratio), [0.9162907, 0, -0.9162907], atol=1e-7)
    # k2 = ½ · 0.9162907² = 0.4197943 in both cases.
    np.testing.assert_allclose(kl_k2(log_ratio), [0.4197943, 0, 0.4197943], atol=1e-7)
    # k3 = q/p − 1 − log(q/p): 0.4 − 1 + 0.9162907 = 0.3162907;  0;  2.5 − 1 − 0.9162907 = 0.5837093
    np.testing.assert_allclose(kl_k3(log_ratio), [0.3162907, 0, 0.5837093], atol=1e-7)


def test_k1_and_k3_have_the_true_kl_as_their_mean_and_k2_has_not() -> None:
    # KL(p‖q) = 0.5 · 0.9162907 + 0 − 0.2 · 0.9162907 = 0.2748872
    log_ratio = (P / Q).log()
    assert float((P * kl_k1(log_ratio)).sum()) == pytest.approx(0.2748872, abs=1e-7)
    assert float((P * kl_k3(log_ratio)).sum()) == pytest.approx(0.2748872, abs=1e-7)
    # k2's mean is 0.7 · 0.4197943 = 0.2938560
    assert float((P * kl_k2(log_ratio)).sum()) == pytest.approx(0.2938560, abs=1e-7)


def test_the_exact_divergence_of_two_tokens_is_the_one_worked_out_by_hand_and_a_forbidden_third_adds_nothing() -> None:
    # p = ¾, ¼;  q = ½, ½:  ¾ log 1.5 + ¼ log 0.5 = 0.3040988 − 0.1732868
    p, q = torch.tensor([[0.75, 0.25, 0.0]], dtype=torch.float64), torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    assert float(kl_exact(p.log(), q.log())) == pytest.approx(0.1308120, abs=1e-7)
    assert float(kl_exact(q.log(), p.log())) == pytest.approx(0.5 * np.log(4 / 3), abs=1e-7)  # ½ log ⅔ + ½ log 2
    # d/dlogit_v = p_v (log p_v/q_v − KL):  ¾ (0.4054651 − 0.1308120);  ¼ (−0.6931472 − 0.1308120)
    logits = p.log().requires_grad_()
    kl_exact(logits.log_softmax(-1), q.log()).backward()
    np.testing.assert_allclose(logits.grad, [[0.2059898, -0.2059898, 0.0]], atol=1e-7)


def test_the_exact_divergence_is_the_mean_of_k1_and_its_gradient_is_the_numerical_one() -> None:
    log_ratio = (P / Q).log()
    assert float(kl_exact(P.log(), Q.log())) == pytest.approx(float((P * kl_k1(log_ratio)).sum()), abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = 2 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    ref_log_probs = ref_logits.log_softmax(-1)
    assert torch.autograd.gradcheck(lambda x: kl_exact(x.log_softmax(-1), ref_log_probs), (logits.requires_grad_(),))


def test_with_the_ratio_the_wrong_way_round_k3_misses_by_a_lot() -> None:
    wrong = float((P * kl_k3((Q / P).log())).sum())
    assert abs(wrong - 0.2748872) > 0.05


class FourTokens:
    """A policy with logits, the reference's probabilities, and exact expectations and gradients (of the logits)."""

    def __init__(self, scale: float = 1.0) -> None:
        self.ref = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
        away = torch.tensor([0.9, -0.7, 0.1, -0.3], dtype=torch.float64)
        self.logits = (self.ref.log() + scale * away).requires_grad_()
        self.log_prob = self.logits.log_softmax(-1)
        self.prob = self.log_prob.detach().exp()
        self.log_ratio = self.log_prob - self.ref.log()

    def gradient(self, expression: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(expression.sum(), self.logits, retain_graph=True)[0]

    def reverse_kl(self) -> torch.Tensor:
        """∇ KL(π ‖ π_ref)."""
        return self.gradient(self.log_prob.exp() * self.log_ratio)

    def forward_kl(self) -> torch.Tensor:
        """∇ KL(π_ref ‖ π)."""
        return self.gradient(-self.ref * self.log_prob)

    def in_reward(self, name: str) -> torch.Tensor:
        """E[∇ log π · k(x)]: the policy gradient of a penalty that is a constant to it."""
        return self.gradient(self.prob * self.log_prob * KL_ESTIMATORS[name](self.log_ratio).detach())

    def in_loss(self, name: str) -> torch.Tensor:
        """E[∇ k(x)]: the gradient of a penalty that is differentiated, over tokens that π itself has written."""
        return self.gradient(self.prob * KL_ESTIMATORS[name](self.log_ratio))


def test_in_the_reward_only_k1_makes_the_policy_gradient_that_of_the_kl() -> None:
    four = FourTokens()
    kl = four.reverse_kl()
    torch.testing.assert_close(four.in_reward("k1"), kl, atol=1e-12, rtol=0)
    torch.testing.assert_close(four.in_reward("k3"), kl - four.forward_kl(), atol=1e-12, rtol=0)
    k2 = four.gradient(four.log_prob.exp() * kl_k2(four.log_ratio))  # of its expectation
    torch.testing.assert_close(four.in_reward("k2"), k2 - kl, atol=1e-12, rtol=0)
    for wrong in ("k2", "k3"):
        assert float((four.in_reward(wrong) - kl).norm()) > 0.5 * float(kl.norm())


def test_in_the_loss_it_is_k2_whose_gradient_is_that_of_the_kl_and_k3s_is_that_of_the_other_direction() -> None:
    four = FourTokens()
    torch.testing.assert_close(four.in_loss("k1"), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(four.in_loss("k2"), four.reverse_kl(), atol=1e-12, rtol=0)
    torch.testing.assert_close(four.in_loss("k3"), four.forward_kl(), atol=1e-12, rtol=0)
    assert float((four.forward_kl() - four.reverse_kl()).norm()) > 0.05


@pytest.mark.parametrize(("name", "order"), [("k1", 1), ("k2", 2), ("k3", 2)])
def test_near_the_reference_k2_and_k3_in_the_reward_hardly_pull(name: str, order: int) -> None:
    far, near = (FourTokens(scale).in_reward(name).norm() for scale in (1e-2, 1e-3))
    assert float(far / near) == pytest.approx(10**order, rel=0.05)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_k2_and_k3_are_never_negative_and_agree_with_each_other_near_zero(log_ratios: list[float]) -> None:
    log_ratio = torch.tensor(log_ratios, dtype=torch.float64)
    assert (kl_k2(log_ratio) >= 0).all()
    assert (kl_k3(log_ratio) >= 0).all()
    small = log_ratio * 1e-3  # k3 − k2 = −x³/6 + …
    assert float((kl_k3(small) - kl_k2(small)).abs().max()) < 1e-8


def test_k3_does_not_lose_tiny_ratios_to_rounding() -> None:
    """exp(x) − 1 in float32 is 0 or 1.2e-7 for x = 5e-8, either of which is larger than k3 itself."""
    assert float(kl_k3(torch.tensor([1e-3]))[0]) == pytest.approx(0.5e-6, rel=1e-2)
