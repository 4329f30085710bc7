"""A reward model's scores as our ``SequenceClassifierReward`` gives them, in the shapes that TRL's trainers want.

A text is prompt and completion together, without special tokens (a text that ended by itself has no EOS any more), and
is tokenised anew: a policy may spell a word with other tokens than the tokenizer would.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def normalized_classifier(directory: Path) -> PreTrainedModel:
    """
    :param directory: a sequence classifier with one output, ``reward_mean`` and ``reward_std`` in its config.
    :return: it in float32, with (logit − mean) / std folded into its head.
    """
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32, num_labels=1)
    mean, std = model.config.reward_mean, model.config.reward_std
    head = nn.Linear(model.score.in_features, 1)
    with torch.no_grad():
        bias = 0.0 if model.score.bias is None else model.score.bias
        head.weight.copy_(model.score.weight / std)
        head.bias.copy_((bias - mean) / std)
    model.score = head
    return model.eval()


class Scorer:
    """
    :param directory: of the reward model.
    """

    def __init__(self, directory: Path) -> None:
        self._model = normalized_classifier(directory)
        self._tokenizer = AutoTokenizer.from_pretrained(directory)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """
        :return: scores, float32 [B].
        """
        inputs = self._tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        with torch.inference_mode():
            scores = self._model(**inputs).logits[:, 0]
        return scores.clone()  # a tensor of inference mode may not be changed, and TRL adds to it


class RewardModule(nn.Module):
    """What TRL's PPO takes for a reward model.

    PPO calls the backbone and then the head, and reads the token's output where the text ends: at EOS, which the reward
    model has never seen. So the backbone here gives every token the score of the whole text, and the head does nothing.

    :param score: of texts.
    :param tokenizer: the policy's.
    """

    base_model_prefix = "backbone"

    def __init__(self, score: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self._score, self._tokenizer = score, tokenizer
        self.score = nn.Identity()

    def backbone(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        """
        :param input_ids: [B, T].
        :param attention_mask: bool [B, T].
        :return: with ``hidden_states`` [1 × [B, T, 1]].
        """
        ids = [row[mask].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        scores = self._score(texts)
        return SimpleNamespace(hidden_states=[scores[:, None, None].expand(*input_ids.shape, 1)])
