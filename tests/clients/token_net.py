"""What the tests of the clients share: a small network on token features, and a task that it learns in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from agents.policies.token_features import TokenFeatures
from text_env.episodes import NO_ACTION, Observation
from text_env.probes import PROBES, make_probe

NAMES = ("input_ids", "attention_mask", "prompt_length")
PROBE = PROBES["fixed-token"]  # four tokens, of which each that is the right one is worth a quarter
LEARNED = 0.5  # a score, 1 at best; random texts have 0.07 or so
SPACE = make_probe(PROBE.name, 1).single_observation_space
N_TOKENS = int(make_probe(PROBE.name, 1).single_action_space.n)


class TokenNet(nn.Module):
    """Numbers for token contexts: logits, or a value.

    :param outputs: how many for each context.
    :param space: the environment's observation space.
    """

    def __init__(self, outputs: int, space: spaces.Space[Any] = SPACE) -> None:
        super().__init__()
        self.features = TokenFeatures(space, features_dim=32)
        self.head = nn.Linear(32, outputs)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_length: torch.Tensor) -> Any:
        batch = input_ids.shape[:-1]  # of any dimensions, also none
        parts = (part.reshape(-1, part.shape[-1]) for part in (input_ids, attention_mask, prompt_length))
        numbers = self.head(self.features(dict(zip(NAMES, parts, strict=True))))
        return numbers.reshape(*batch, -1)


def tensors(observations: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(np.asarray(observations[name])) for name in NAMES}


def drawing(net: Callable[..., torch.Tensor]) -> Callable[[Observation], np.ndarray]:
    """
    :param net: logits, called with the entries of observations.
    :return: the function that draws an action for each observation.
    """
    return lambda observations: torch.distributions.Categorical(logits=net(**tensors(observations))).sample().numpy()


@torch.no_grad()
def mean_score(draw: Callable[[Observation], np.ndarray], n: int = 256) -> float:
    """The mean score of texts written in the environment itself, without the client that has trained the writer.

    :param draw: an action for each observation.
    :param n: the number of texts.
    """
    env = make_probe(PROBE.name, n, autoreset_mode="Disabled")
    observations = env.reset(seed=0)[0]
    total, running = 0.0, np.ones(n, bool)
    while running.any():
        observations, rewards, terminated, _, _ = env.step(np.where(running, draw(observations), NO_ACTION))
        total += float(rewards.sum())
        running &= ~terminated
    return total / n
