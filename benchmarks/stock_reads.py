"""How many tokens stock SB3's PPO must read, whatever the policy: what bounds ``stock_ppo_speedup``. It counts, and
looks at no clock.

python -m benchmarks.stock_reads
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from agents.models.contexts import Contexts, contexts_of, maximal_sequences
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeBuffer
from benchmarks import models, update

PASSES = 3
"""A backward pass has twice the products of the forward pass."""


class Reads(NamedTuple):
    """Columns that a forward pass reads, padding included.

    :param actions: N, the contexts.
    :param plain: a context after the other, each padded to the longest.
    :param ours: of the sequences that contain them all.
    :param least: the different beginnings of these contexts. Each has a hidden state of its own, which depends on the
        weights, so under one set of weights each must be computed, and needn't be computed twice.
    """

    actions: int
    plain: int
    ours: int
    least: int


def reads(contexts: Contexts) -> Reads:
    """
    :param contexts: N contexts, of one step of the optimiser.
    :return: what reading them takes.
    """
    rows = [row[:length] for row, length in zip(contexts.input_ids, contexts.length, strict=True)]
    different = {row[:end].tobytes() for row in rows for end in range(1, len(row) + 1)}
    sequences, _ = maximal_sequences(contexts)
    return Reads(len(rows), len(rows) * int(contexts.length.max()), sequences.size, len(different))


class Counting(CausalLMPolicy):
    """Our policy, which writes down what it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.written: list[Contexts] = []
        self.learned: list[Reads] = []

    def forward(self, obs: Any, *args: Any, **kwargs: Any) -> Any:
        self.written.append(contexts_of(obs))
        return super().forward(obs, *args, **kwargs)

    def evaluate_actions(self, obs: Any, actions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if "action_mask" in obs:  # a packed batch: the columns that the policy is given are those that it reads
            n, columns = len(actions), obs["input_ids"].numel()
            self.learned.append(Reads(n, 0, columns, columns))
        else:
            self.learned.append(reads(contexts_of(obs)))
        return super().evaluate_actions(obs, actions, *args, **kwargs)


class Counted(NamedTuple):
    """One iteration.

    :param rollout: of the whole rollout.
    :param steps: of each step of the optimiser.
    """

    rollout: Reads
    steps: list[Reads]

    def products(self, side: str, decoder: int, head: int) -> int:
        """
        :param side: ``"plain"``, ``"ours"`` or ``"least"``.
        :param decoder: multiplications of the decoder's weights with one token.
        :param head: those of the head, which every side computes for the contexts alone.
        :return: multiplications of an iteration.
        """

        def one(part: Reads) -> int:
            columns: int = getattr(part, side)
            return columns * decoder + part.actions * head

        return one(self.rollout) + PASSES * sum(map(one, self.steps))


def count(subject: models.Subject, **kwargs: Any) -> Counted:
    """
    :param subject: texts of these lengths are written by a model of one layer: what is counted doesn't depend on it.
    :param kwargs: further arguments of SB3's PPO.
    :return: what one iteration of ``stock_ppo`` reads.
    """
    made: list[Counting] = []

    class Kept(Counting):
        def __init__(self, *args: Any, **inner: Any) -> None:
            super().__init__(*args, **inner)
            made.append(self)

    update.stock_ppo(subject, Kept, **kwargs)()
    [policy] = made
    plain = sum(len(contexts.length) * int(contexts.length.max()) for contexts in policy.written)
    together = Contexts(*(np.concatenate(arrays) for arrays in zip(*policy.written, strict=True)))
    whole = reads(together)
    return Counted(whole._replace(plain=plain, ours=whole.least), policy.learned)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: of the command line; by default the process's.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stock_reads", description=__doc__)
    parser.add_argument("--episodes", type=int, default=models.EPISODES, help="at least 4")
    parser.add_argument("--response", type=int, default=models.RESPONSE)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    big = models.gpt2_4m()
    decoder = sum(p.numel() for p in big.transformer.h.parameters() if p.dim() == 2)
    head = big.lm_head.weight.numel()
    tiny = models.GPT2LMHeadModel(models.gpt2_config(n_embd=32, n_layer=1, n_head=2)).eval()
    subject = models.subject("gpt2-4m", torch.device("cpu"))._replace(
        model=tiny, masks_eos=True, episodes=args.episodes, response=args.response
    )
    single, packed = count(subject), count(subject, rollout_buffer_class=EpisodeBuffer)
    table = Table("columns read", "plain", "ours", "least", "with EpisodeBuffer")
    mean = [Reads(*(int(x) for x in np.mean(counted.steps, axis=0).round())) for counted in (single, packed)]
    table.add_row("a step", *map(str, (mean[0].plain, mean[0].ours, mean[0].least, mean[1].ours)))
    table.add_row("the rollout", *map(str, (single.rollout.plain, *2 * (single.rollout.ours,), packed.rollout.ours)))
    plain = single.products("plain", decoder, head)
    speedups = [
        plain / counted.products(side, decoder, head)
        for counted, side in ((single, "plain"), (single, "ours"), (single, "least"), (packed, "ours"))
    ]
    table.add_row("products of an iteration, plain ÷", *(f"{speedup:.2f}" for speedup in speedups))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
