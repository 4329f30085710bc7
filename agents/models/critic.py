"""The critic: a value head on the policy's hidden states, or on those of a separate decoder."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from agents.models.causal_lm import fuse_activations
from agents.models.head import decoder_of
from agents.models.pretrained import check_positions, check_tokenizers, resolve_dtype, tokenizer_beside
from text_env.builtin import REWARD_MODEL
from text_env.rewards import reward_normalization


class ValueHead(nn.Linear):
    """A linear map from hidden states to values, which is 0 before training.

    Adam changes a weight by about the learning rate at each step, whatever the size of its gradient. At the learning
    rate of a language model, a new head would need a thousand steps to reach values of order 1. Therefore the values
    are ``SCALE`` times what the weights say, which amounts to a learning rate that is ``SCALE`` times as high for the
    head alone.

    :param hidden_size: H, the number of hidden units.
    """

    SCALE = 10.0

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        :param hidden: hidden states, [..., H].
        :return: values, [..., 1].
        """
        # The value is scaled but its gradient is not, since gradients are clipped by their norm over all weights.
        weight, bias = (w + (self.SCALE - 1) * w.detach() for w in (self.weight, self.bias))
        return nn.functional.linear(hidden, weight, bias)

    @torch.no_grad()
    def set(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Set the weights such that the head computes ``hidden @ weight + bias``.

        :param weight: [H].
        :param bias: [1].
        """
        self.weight.copy_(weight[None] / self.SCALE)
        self.bias.copy_(bias / self.SCALE)


def make_critic(
    base: PreTrainedModel,
    separate: bool | str | Path,
    dtype: str | torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
    longest: int,
) -> tuple[nn.Module | None, ValueHead]:
    """
    :param base: the policy's model.
    :param separate: False for a value head on the policy's decoder; True for a value head on a copy of that decoder; or
        the directory or hub name of a reward model (``"builtin"``: the built-in one), which the critic starts as.
    :param dtype: the floating-point type of a reward model's weights.
    :param tokenizer: the policy's tokenizer.
    :param longest: the length of the longest context, in tokens.
    :return: the decoder below the value head, None if it is the policy's; and the value head.
    :raises ValueError: if there is no such reward model, or if it has another tokenizer, too few positions or no
        ``score`` head of one label.
    """
    if not isinstance(separate, str | Path):
        embeddings = base.get_output_embeddings()
        hidden_size = 1 if embeddings is None else embeddings.weight.shape[1]  # `CausalLM` rejects such a model
        if not separate:
            return None, ValueHead(hidden_size)
        critic = copy.deepcopy(decoder_of(base)).eval()  # without dropout, like the policy
        fuse_activations(critic)
        return critic, ValueHead(hidden_size)
    name = str(REWARD_MODEL) if separate == "builtin" else str(separate)
    check_tokenizers(tokenizer, tokenizer_beside(name), separate)
    try:
        classifier = AutoModelForSequenceClassification.from_pretrained(name, dtype=resolve_dtype(dtype)).eval()
    except OSError as error:
        raise ValueError(
            "Expected separate_critic to be False, True (a copy of the model), 'builtin', or a directory or hub name "
            f"of a reward model; {separate!r} could not be loaded: {error}"
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
