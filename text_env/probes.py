"""Probe tasks: so small that the best response is known. An algorithm that does not find it has a bug.

Each task tests one ability, as bsuite's experiments do (Osband et al. 2020, https://arxiv.org/abs/1908.03568). It is an
ordinary environment of this package, with a vocabulary of twelve tokens, and needs no download::

    gym.make_vec("TextRLHF-v0", num_envs=16, **PROBES["copy-prompt"].kwargs)

All possible responses can be listed (at most some 180,000 a prompt), so the optimal score and the score of random
responses are exact. Scores lie in [0, 1]. Every right token raises the score, so that random exploration finds the way,
except in the task that tests credit for a single early token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from text_env.vector_env import TextVectorEnv

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUMBERS = tuple("0123456789")
EOS = "<eos>"
VOCABULARY = (EOS, "<pad>", *NUMBERS)
"""The words of the vocabulary, in the order of their token ids."""

Words = Sequence[str]


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """
    :return: a word-level tokenizer over :data:`VOCABULARY`. A text with any other word is an error.
    """
    # This imports torch, so it waits until a tokenizer is needed: importing the environment alone stays fast.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: token for token, word in enumerate(VOCABULARY)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=EOS, pad_token="<pad>")


@dataclass(frozen=True)
class Probe:
    """A task with a known optimum. The object is the reward function of the task too: it can be called on a batch.

    :param name: the name of the task in :data:`PROBES`.
    :param max_new_tokens: the response budget.
    :param score: a function ``(prompt, response) -> score`` of words. An EOS is a word of the response.
    :param best: a function ``prompt -> response`` of words, which returns a whole response with the highest score.
    :param prompts: the prompts, each as likely as any other.
    :param optimal_score: the score of the best response, the same for every prompt.
    """

    name: str
    max_new_tokens: int
    score: Callable[[Words, Words], float]
    best: Callable[[Words], Words]
    prompts: tuple[str, ...] = ("0",)
    optimal_score: float = 1.0

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments for ``gym.make`` and ``gym.make_vec``."""
        return {
            "tokenizer": tokenizer(),
            "prompts": list(self.prompts),
            "reward": self,
            # At least 2, since Gymnasium warns of a space with a single value.
            "max_prompt_tokens": max(2, *(len(prompt.split()) for prompt in self.prompts)),
            "max_new_tokens": self.max_new_tokens,
        }

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [
            self.score(prompt.split(), [VOCABULARY[token] for token in ids])
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    def optimal_response(self, prompt: str) -> list[int]:
        """
        :param prompt: one of ``prompts``.
        :return: the token ids of a response with the score ``optimal_score``.
        """
        return [VOCABULARY.index(word) for word in self.best(prompt.split())]

    def responses(self) -> Iterator[list[int]]:
        """
        :return: the token ids of every possible response: those that end with EOS, and those that fill the budget.
        """
        end = VOCABULARY.index(EOS)
        others = [token for token in range(len(VOCABULARY)) if token != end]
        for length in range(self.max_new_tokens):
            yield from ([*body, end] for body in itertools.product(others, repeat=length))
        yield from (list(body) for body in itertools.product(others, repeat=self.max_new_tokens))

    @cached_property
    def random_score(self) -> float:
        """The expected score of a policy that draws every token uniformly: an exact sum over all responses."""
        responses = list(self.responses())
        chances = [len(VOCABULARY) ** -len(response) for response in responses]
        means = [
            sum(
                chance * score
                for chance, score in zip(chances, self([prompt] * len(responses), responses), strict=True)
            )
            for prompt in self.prompts
        ]
        return sum(means) / len(means)


# ---- the tasks -----------------------------------------------------------------------------------------------------

TARGET = "7"
LENGTH = 4
COUNT = 3


def _share_of_target(_: Words, response: Words) -> float:
    return response.count(TARGET) / LENGTH


def _only_target(_: Words) -> Words:
    return [TARGET] * LENGTH


def _share_of_increases(_: Words, response: Words) -> float:
    """A number counts if it is larger than all numbers before it, so after a large number there is little to gain."""
    largest, increases = -1, 0
    for size in (NUMBERS.index(word) for word in response if word in NUMBERS):
        increases += size > largest
        largest = max(size, largest)
    return increases / LENGTH


def _counting(_: Words) -> Words:
    return NUMBERS[:LENGTH]


def _closeness_to_count(_: Words, response: Words) -> float:
    """A response without EOS has the score 0."""
    return max(0.0, 1 - abs(len(response) - 1 - COUNT) / COUNT) if response[-1] == EOS else 0.0


def _count_then_eos(_: Words) -> Words:
    return [*NUMBERS[:COUNT], EOS]


def _share_copied(prompt: Words, response: Words) -> float:
    return sum(word == wanted for word, wanted in zip(response, prompt, strict=False)) / len(prompt)


def _itself(prompt: Words) -> Words:
    return prompt


def _first_is_target(_: Words, response: Words) -> float:
    return float(response[0] == TARGET)


def _target_first(_: Words) -> Words:
    return [TARGET, *NUMBERS[:LENGTH]]


PROBES = {
    probe.name: probe
    for probe in (
        # Does the gradient point the right way? The score is the share of the budget that is spent on one token.
        Probe("fixed-token", LENGTH, _share_of_target, _only_target),
        # Does an action depend on earlier actions? The score is the share of the budget spent on ever larger numbers.
        Probe("increasing-numbers", LENGTH, _share_of_increases, _counting),
        # Is ending the text an action like any other? Three tokens and then EOS are best; more or fewer score less.
        Probe("count-to-eos", COUNT + 2, _closeness_to_count, _count_then_eos),
        # Does an action depend on the prompt, two of four numbers? Without seeing it, one token in four is right.
        Probe("copy-prompt", 2, _share_copied, _itself, tuple(map(" ".join, itertools.product(NUMBERS[:4], repeat=2)))),
        # Does the reward at the end reach the first token? The score depends on nothing but that token.
        Probe("early-credit", LENGTH + 1, _first_is_target, _target_first),
    )
}
"""The tasks by their names."""


def make_probe(name: str, num_envs: int = 16, **kwargs: Any) -> TextVectorEnv:
    """
    :param name: a name in :data:`PROBES`.
    :param num_envs: number of rows.
    :param kwargs: further arguments of :class:`text_env.vector_env.TextVectorEnv`, such as ``group_size``.
    :return: the task as a vector environment.
    :raises ValueError: for an unknown name; the error lists the known ones.
    """
    if name not in PROBES:
        raise ValueError(f"Expected a probe's name, one of {sorted(PROBES)}, got {name!r}.")
    return TextVectorEnv(num_envs, **{**PROBES[name].kwargs, **kwargs})
