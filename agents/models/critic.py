"""The critic: a value head on the policy's hidden states, or on those of a separate decoder."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from agents.models.adapter import merge, unwrapped
from agents.models.causal_lm import fuse_activations
from agents.models.head import decoder_of
from agents.models.pretrained import check_positions, check_tokenizers, resolve_dtype, tokenizer_beside
from agents.objectives.losses import value_loss
from agents.objectives.value_targets import cross_entropy, hl_gauss, two_hot
from text_env.builtin import REWARD_MODEL
from text_env.classifier_reward import SequenceClassifierReward
from text_env.pretrained_files import load_pretrained, not_loaded
from text_env.reward_limits import LimitedReward
from text_env.rewards import reward_normalization


def critic_for(reward: Any, tokenizer: PreTrainedTokenizerBase) -> bool | str:
    """What a critic of its own had best start as.

    :param reward: the reward of the environment.
    :param tokenizer: the environment's tokenizer.
    :return: the name of the reward model, if the reward is one that a critic can start as: it knows already what is
        good, and only has to learn what is likely. Else True, for a copy of the policy's decoder.
    """
    if isinstance(reward, LimitedReward):
        reward = reward.reward
    if not isinstance(reward, SequenceClassifierReward) or reward.source is None or reward.chat_template:
        return True
    score = getattr(reward.model, "score", None)
    if not isinstance(score, nn.Linear) or score.out_features != 1 or reward.tokenizer.chat_template:
        return True
    if reward.tokenizer.get_vocab() != tokenizer.get_vocab():
        return True
    return "builtin" if reward.source == str(REWARD_MODEL) else reward.source


class ScaledHead(nn.Linear, ABC):
    """A linear map from hidden states to what a critic predicts of a context, which is 0 before training.

    Adam changes a weight by about the learning rate at each step, whatever the size of its gradient. At the learning
    rate of a language model, a new head would need a thousand steps to reach predictions of order 1. Therefore the
    predictions are ``SCALE`` times what the weights say, which amounts to a learning rate that is ``SCALE`` times as
    high for the head alone.

    :param hidden_size: H, the number of hidden units.
    :param outputs: P, the number of predictions.
    """

    SCALE = 10.0

    def __init__(self, hidden_size: int, outputs: int) -> None:
        super().__init__(hidden_size, outputs)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        :param hidden: hidden states, [..., H].
        :return: predictions, [..., P].
        """
        # The prediction is scaled but its gradient is not, since gradients are clipped by their norm over all weights.
        weight, bias = (w + (self.SCALE - 1) * w.detach() for w in (self.weight, self.bias))
        return nn.functional.linear(hidden, weight, bias)

    @abstractmethod
    def values(self, predictions: torch.Tensor) -> torch.Tensor:
        """
        :param predictions: [..., P].
        :return: the values that they stand for, [..., 1].
        """

    @abstractmethod
    def loss(
        self, predictions: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float | None
    ) -> torch.Tensor:
        """
        :param predictions: the predictions of the critic that is trained, [N, P].
        :param old_values: the values at the time of sampling, [N]; constants.
        :param returns: the targets of the values, [N]; constants.
        :param clip_range: ε of value clipping, as for :func:`agents.objectives.losses.value_loss`; None: no clipping.
        :return: the loss of each token, [N].
        """


class ValueHead(ScaledHead):
    """A head that predicts the value itself, by regression.

    :param hidden_size: H, the number of hidden units.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1)

    def values(self, predictions: torch.Tensor) -> torch.Tensor:
        """The predictions."""
        return predictions

    def loss(
        self, predictions: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float | None
    ) -> torch.Tensor:
        """Half the squared error."""
        return value_loss(predictions.reshape(-1), old_values, returns, clip_range)

    @torch.no_grad()
    def set(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Set the weights such that the head computes ``hidden @ weight + bias``.

        :param weight: [H].
        :param bias: [1].
        """
        self.weight.copy_(weight[None] / self.SCALE)
        self.bias.copy_(bias / self.SCALE)


class BinnedValueHead(ScaledHead):
    """A head that predicts a distribution over M values, by classification; the value is its mean. Before training it
    is the middle of the range.

    :param hidden_size: H, the number of hidden units.
    :param value_bins: the lowest value, the highest value, and M.
    :param sigma: the standard deviation of the targets of HL-Gauss, in distances between two values; None: two-hot
        targets.
    :raises ValueError: if the range is empty, if M is below 2, or if sigma is not above 0.
    """

    support: torch.Tensor

    def __init__(self, hidden_size: int, value_bins: Sequence[float], sigma: float | None) -> None:
        low, high, n_bins = value_bins if len(value_bins) == 3 else (0.0, 0.0, 0)
        if not (low < high and n_bins >= 2 and int(n_bins) == n_bins):
            raise ValueError(
                "Expected value_bins to be the lowest value, the highest value and the number of values, at least 2, "
                f"such as (-1.0, 1.0, 51); got {value_bins!r}."
            )
        if sigma is not None and not 0 < sigma < float("inf"):
            raise ValueError(f"Expected a finite value_sigma > 0, or None for two-hot targets, got {sigma!r}.")
        super().__init__(hidden_size, int(n_bins))
        self.register_buffer("support", torch.linspace(low, high, int(n_bins)))
        self.sigma = sigma

    def values(self, predictions: torch.Tensor) -> torch.Tensor:
        """The mean of the distribution whose logits the predictions are."""
        return (predictions.softmax(dim=-1) * self.support).sum(dim=-1, keepdim=True)

    def loss(
        self, predictions: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float | None
    ) -> torch.Tensor:
        """The cross-entropy to the target's distribution. Clipping does what it does in regression: where it leaves
        only a constant of the squared error, because the value has moved further than ε, there is no gradient.
        """
        returns = returns.to(self.support)
        if self.sigma is None:
            target = two_hot(returns, self.support)
        else:
            target = hl_gauss(returns, self.support, self.sigma * float(self.support[1] - self.support[0]))
        loss = cross_entropy(predictions, target)
        if clip_range is None:
            return loss
        values = self.values(predictions.detach()).squeeze(-1)
        clipped = value_loss(values, old_values, returns, clip_range) > value_loss(values, old_values, returns, None)
        return torch.where(clipped, loss.detach(), loss)


def make_critic(
    model: PreTrainedModel | PeftModel,
    separate: bool | str | Path,
    dtype: str | torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
    longest: int,
    value_bins: Sequence[float] | None = None,
    value_sigma: float | None = None,
) -> tuple[nn.Module | None, ScaledHead]:
    """
    :param model: the policy's model.
    :param separate: False for a value head on the policy's decoder; True for a value head on a copy of that decoder,
        with its adapter merged into it if there is one; or the directory or hub name of a reward model (``"builtin"``:
        the built-in one), which the critic starts as.
    :param dtype: the floating-point type of a reward model's weights.
    :param tokenizer: the policy's tokenizer.
    :param longest: the length of the longest context, in tokens.
    :param value_bins: as for :class:`BinnedValueHead`; None: the critic predicts the value itself.
    :param value_sigma: as for :class:`BinnedValueHead`.
    :return: the decoder below the value head, None if it is the policy's; and the value head.
    :raises ValueError: if there is no such reward model, or if it has another tokenizer, too few positions or no
        ``score`` head of one label; and if ``value_bins`` are out of range, or given with a reward model.
    """
    if not isinstance(separate, str | Path):
        embeddings = unwrapped(model).get_output_embeddings()
        hidden_size = 1 if embeddings is None else embeddings.weight.shape[1]  # `CausalLM` rejects such a model
        head = ValueHead(hidden_size) if value_bins is None else BinnedValueHead(hidden_size, value_bins, value_sigma)
        if not separate:
            return None, head
        critic = _copied_decoder(model).eval()  # without dropout, like the policy
        fuse_activations(critic)
        return critic, head
    if value_bins is not None:
        raise ValueError(
            f"Expected either separate_critic={separate!r}, a reward model whose head predicts the value itself, or "
            f"value_bins={value_bins!r}, for a head that predicts a distribution: leave one of them out."
        )
    name = str(REWARD_MODEL) if separate == "builtin" else str(separate)
    check_tokenizers(tokenizer, tokenizer_beside(name), separate)
    try:
        classifier = load_pretrained(AutoModelForSequenceClassification, name, dtype=resolve_dtype(dtype)).eval()
    except OSError as error:
        raise ValueError(
            "Expected separate_critic to be False, True (a copy of the model), 'builtin', or a directory or hub name "
            f"of a reward model; got {separate!r}, {not_loaded(name, str(error))}"
        ) from error
    check_positions(classifier, longest)
    score = getattr(classifier, "score", None)
    if not isinstance(score, nn.Linear) or score.out_features != 1:
        raise ValueError(
            f"Expected the critic {separate!r} to be a decoder with a `score` head of one label, as reward models have "
            f"it; {type(classifier).__name__} has {score}."
        )
    fuse_activations(classifier)
    value_head = ValueHead(score.in_features)
    mean, std = reward_normalization(classifier.config)
    bias = torch.zeros(1) if score.bias is None else score.bias
    value_head.set(score.weight[0].float() / std, (bias.float() - mean) / std)  # values in the units of the score
    return classifier.base_model, value_head


def _copied_decoder(model: PreTrainedModel | PeftModel) -> nn.Module:
    """A decoder of the same form whether the model has an adapter or not, so that its weights fit when they are loaded,
    after an adapter was trained in the model or before.
    """
    if isinstance(model, PeftModel):
        return decoder_of(merge(copy.deepcopy(model))).requires_grad_(True)
    return copy.deepcopy(decoder_of(model))
