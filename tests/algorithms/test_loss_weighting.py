"""What a token counts in the loss: by token, by text, by the budget; texts that were cut; whitening within groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learners import even_tokens, largest_difference, length_of, make_env, make_ppo, weights_of

from agents.algorithms.dapo import DAPO
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.rloo import RLOO
from agents.objectives.advantages import signal_share, whiten

BUDGET = 8  # of the tiny environment


def collected(algorithm: type[OnPolicyAlgorithm] = RLOO, **kwargs: Any) -> Any:
    """An algorithm with a rollout of eight texts of different lengths, in groups of two."""
    model: Any = make_ppo(make_env(group_size=2), algorithm=algorithm, batch_size=8, n_epochs=1, **kwargs)
    _, callback = model._setup_learn(1, None)
    assert model.collect_rollouts(callback)
    assert len(set(model.buffer.lengths)) > 2
    return model


def gradient(model: OnPolicyAlgorithm, minibatch: np.ndarray) -> dict[str, torch.Tensor]:
    assert model._backward(minibatch)
    return {name: p.grad.clone() for name, p in model.policy.named_parameters() if p.grad is not None}


def sums_of_texts(model: OnPolicyAlgorithm) -> list[dict[str, torch.Tensor]]:
    """The gradient of the sum of the losses of each text: its mean over tokens, times its length."""
    each = [gradient(model, np.array([episode])) for episode in range(model.n_episodes)]
    lengths = model.buffer.lengths
    return [{k: g * int(length) for k, g in single.items()} for single, length in zip(each, lengths, strict=True)]


@pytest.mark.parametrize("micro_batch_tokens", [20, 4096])
def test_each_weighting_is_the_mean_that_it_says(micro_batch_tokens: int) -> None:
    sums, found, lengths = None, {}, None
    for weighting in ("token", "sequence", "constant"):
        model = collected(loss_weighting=weighting, micro_batch_tokens=micro_batch_tokens)
        sums = sums_of_texts(model) if sums is None else sums
        lengths = model.buffer.lengths
        found[weighting] = gradient(model, np.arange(8))
    assert sums is not None
    assert lengths is not None
    for name in sums[0]:
        text = torch.stack([of_text[name] for of_text in sums])
        per_length = text / torch.as_tensor(lengths, dtype=text.dtype).view(-1, *[1] * (text.dim() - 1))
        expected = {
            "token": text.sum(dim=0) / int(lengths.sum()),
            "sequence": per_length.mean(dim=0),
            "constant": text.sum(dim=0) / (8 * BUDGET),
        }
        for weighting, gradients in found.items():
            torch.testing.assert_close(gradients[name], expected[weighting], atol=1e-6, rtol=1e-4)
    assert largest_difference(found["token"], found["sequence"]) > 1e-4  # the control: they are not the same


def test_with_a_constant_weighting_what_a_text_counts_does_not_depend_on_the_others() -> None:
    """Minibatches of one text each have the sum of the gradients, as long as each is divided by the same number."""
    constant = collected(loss_weighting="constant")
    whole = gradient(constant, np.arange(8))
    single = [gradient(constant, np.array([episode])) for episode in range(8)]
    for name, expected in whole.items():
        torch.testing.assert_close(torch.stack([g[name] for g in single]).mean(0), expected, atol=1e-6, rtol=1e-4)


def test_what_is_logged_is_a_mean_over_tokens_whatever_the_loss_is_divided_by() -> None:
    means = {
        weighting: collected(PPO, loss_weighting=weighting)._backward(np.arange(8))
        for weighting in ("token", "constant")
    }
    assert means["token"].pop("grad_norm") > 1.2 * means["constant"].pop("grad_norm")  # which is not a mean
    assert means["token"] == pytest.approx(means["constant"])


def test_grpo_counts_texts_and_the_others_tokens_unless_told_otherwise() -> None:
    assert collected(GRPO).loss_weighting == "sequence"
    assert collected(RLOO).loss_weighting == collected(PPO).loss_weighting == "token"
    lengths = np.array([1, 4])
    assert collected(GRPO).token_weights(lengths).tolist() == [1.0, 0.25]
    assert collected(GRPO, loss_weighting="constant").token_weights(lengths).tolist() == [1.0, 1.0]


# ---- texts that the budget has cut ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["token", "sequence", "constant"])
def test_cut_texts_contribute_no_gradient(weighting: Any) -> None:
    masked = collected(mask_truncated=True, loss_weighting=weighting)
    plain = collected(loss_weighting=weighting)
    cut = masked.buffer.truncated
    last_tokens = masked.buffer.actions[masked.buffer.starts[1:] - 1]
    np.testing.assert_array_equal(cut, (masked.buffer.lengths == BUDGET) & (last_tokens != 0))
    assert 0 < cut.sum() < 8
    without = gradient(plain, np.flatnonzero(~cut))
    assert largest_difference(gradient(masked, np.arange(8)), without) < 1e-6
    assert largest_difference(gradient(plain, np.arange(8)), without) > 1e-4  # the control
    np.testing.assert_array_equal(masked.buffer.advantages, plain.buffer.advantages)  # as baselines they count
    share = masked.buffer.lengths[cut].sum() / masked.buffer.n_tokens
    assert masked.logger.name_to_value["completions/masked_token_ratio"] == pytest.approx(share)
    assert "completions/masked_token_ratio" not in plain.logger.name_to_value


def test_a_minibatch_of_cut_texts_alone_makes_no_step() -> None:
    env = make_env(group_size=2, min_new_tokens=BUDGET)  # no text can end by itself
    model: Any = make_ppo(env, algorithm=GRPO, mask_truncated=True, learning_rate=1e-2)
    before = weights_of(model.policy)
    model.learn(1)
    assert model.buffer.truncated.all()
    assert largest_difference(before, weights_of(model.policy)) == 0
    assert not model.policy.optimizer.state  # not even with the momentum of earlier steps
    plain: Any = make_ppo(env, algorithm=GRPO, learning_rate=1e-2)
    plain.learn(1)
    assert largest_difference(before, weights_of(plain.policy)) > 1e-3


# ---- whitening within groups ---------------------------------------------------------------------------------------


def test_advantages_are_whitened_within_each_group() -> None:
    model = collected(PPO, normalize_advantage="group")
    plain = collected(PPO, normalize_advantage=False)
    for first in range(0, 8, 2):
        group = slice(plain.buffer.starts[first], plain.buffer.starts[first + 2])
        advantages, returns = plain.buffer.advantages[group], plain.buffer.returns[group]
        expected = signal_share(advantages, returns) * whiten(advantages)
        np.testing.assert_allclose(model.buffer.advantages[group], expected, atol=1e-5)
    rollout = collected(PPO, normalize_advantage=True)
    assert np.abs(model.buffer.advantages - rollout.buffer.advantages).max() > 0.05
    assert model.buffer.advantages.dtype == np.float32


def test_whitening_within_groups_needs_groups() -> None:
    with pytest.raises(ValueError, match=r"normalize_advantage='group' compares the texts of one prompt.*got 1"):
        make_ppo(make_env(), normalize_advantage="group")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"normalize_advantage": "rollout"}, "True, False or 'group', got 'rollout'"),
        ({"loss_weighting": "text"}, r"one of \('token', 'sequence', 'constant'\), got 'text'"),
    ],
)
def test_choices_that_do_not_exist_are_refused(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_ppo(make_env(reward=length_of), **argument)


def test_leave_one_out_is_whitened_without_discount_and_without_a_critics_errors() -> None:
    whitened = []
    for gamma in (1.0, 0.5):
        model: Any = collected(RLOO, normalize_advantage=True, gamma=gamma)
        whitened.append(model.buffer.advantages)
        assert model._signal_share == 1.0
    np.testing.assert_array_equal(*whitened)
    assert whitened[0].std() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("algorithm", [GRPO, DAPO])
def test_advantages_that_have_no_unit_are_whitened_whatever_the_unit_of_the_score(algorithm: Any) -> None:
    spreads = []
    for scale in (1.0, 0.01, 1e6):
        env = make_env(4, reward=lambda scale=scale, **batch: [scale * x for x in even_tokens(**batch)], group_size=2)
        model: Any = make_ppo(env, algorithm=algorithm, normalize_advantage=True)
        model.learn(1)
        spreads.append(model.buffer.advantages.std())
    assert spreads == pytest.approx([1.0, 1.0, 1.0], abs=1e-3)
