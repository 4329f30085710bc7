"""Decode steps beside the least that they can cost: the products of their rows with the model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers.pytorch_utils import Conv1D

from agents.policies.causal_lm_policy import CausalLMPolicy
from benchmarks.models import PROMPT_TOKENS, Subject
from benchmarks.plan import Figures, Plan
from benchmarks.rollout import make_env, make_policy
from benchmarks.timing import entry, seconds_of

Observations = list[dict[str, torch.Tensor]]


class Steps:
    """The decode steps of a rollout: ``policy.forward`` with texts that are one token longer each time, the memo's
    search, the head, sampling and the value included. The prompts are read before the clock starts.

    :param subject: the model, the number of texts, and how many tokens each of them gets.
    :param decode: how the policy decodes.
    """

    def __init__(self, subject: Subject, decode: str) -> None:
        subject = subject.own_copy()
        env = make_env(subject)
        self.policy: CausalLMPolicy = make_policy(subject, env, decode=decode).to(subject.model.device)
        self.observations = _growing(subject)

    @torch.no_grad()
    def seconds(self) -> float:
        """
        :return: the seconds that the steps take.
        """
        self.policy.clear_cache()
        self.policy.forward(self.observations[0])

        def steps() -> None:
            for observation in self.observations[1:]:
                self.policy.forward(observation)

        return seconds_of(steps)[0]

    @torch.no_grad()
    def profiled(self) -> dict[str, float]:
        """
        :return: the number of operators of PyTorch that a step calls, those inside of others included, and the shares
            of the time that go into products of matrices and into attention.
        """
        self.policy.clear_cache()
        for observation in self.observations[:-4]:
            self.policy.forward(observation)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for observation in self.observations[-4:]:
                self.policy.forward(observation)
        events = [event for event in seen.key_averages() if event.key.startswith("aten::")]
        total = sum(event.self_cpu_time_total for event in events)

        def share(*names: str) -> float:
            mine = [event.self_cpu_time_total for event in events if any(name in event.key for name in names)]
            return float(sum(mine) / total)

        return {
            "operators_per_step": sum(event.count for event in events) / 4,
            "share_of_products": share("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
            "share_of_attention": share("_scaled_dot_product", "_flash_attention", "_efficient_attention"),
        }


def _growing(subject: Subject) -> Observations:
    """Observations of random texts, each one token longer than the one before."""
    rows, width = subject.episodes, PROMPT_TOKENS + subject.response
    random = np.random.default_rng(0)
    tokens = random.integers(2, subject.model.config.vocab_size - 8, (rows, width))
    observations = []
    for length in range(PROMPT_TOKENS, width):
        known = np.arange(width) < length
        observations.append(
            {
                "input_ids": torch.from_numpy(np.where(known, tokens, 0)),
                "attention_mask": torch.from_numpy(np.tile(known, (rows, 1)).astype(np.int8)),
                "prompt_length": torch.full((rows, 1), PROMPT_TOKENS),
            }
        )
    return observations


def weight_products(subject: Subject) -> Callable[[], None]:
    """
    :param subject: the model, and the number of rows.
    :return: a function that multiplies as many rows with each matrix of the model, the head included, into memory that
        is there already: what a decode step can't do without.
    """
    model = subject.model
    weights = [
        module.weight.detach() if isinstance(module, Conv1D) else module.weight.detach().t()
        for module in model.modules()
        if isinstance(module, Conv1D | torch.nn.Linear)
    ]
    inputs = [torch.randn(subject.episodes, w.shape[0]).to(w) for w in weights]
    outputs = [torch.empty(subject.episodes, w.shape[1]).to(w) for w in weights]

    def run() -> None:
        for x, w, out in zip(inputs, weights, outputs, strict=True):
            torch.mm(x, w, out=out)

    return run


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """With several threads, waiting for one another is a part of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def beside_products(subject: Subject, modes: tuple[str, ...], repeats: int) -> tuple[dict[str, list[float]], Any]:
    """Decode steps and bare products in turns.

    :param subject: the model, the rows and the tokens of a text.
    :param modes: how the policies decode.
    :param repeats: the number of rounds that count, after one that doesn't.
    :return: seconds a step, one a round, by mode and for ``"products"``; and what the profiler says of each mode.
    """
    products = weight_products(subject)
    n_steps = subject.response - 1
    steps = {mode: Steps(subject, mode) for mode in modes}

    def bare() -> None:
        for _ in range(n_steps):
            products()

    sides: dict[str, Callable[[], float]] = {mode: side.seconds for mode, side in steps.items()}
    sides["products"] = lambda: seconds_of(bare)[0]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, repeats):
        for name in list(sides) if number % 2 == 0 else reversed(sides):
            taken = sides[name]() / n_steps
            if number >= 0:
                seconds[name].append(taken)
    return seconds, {mode: side.profiled() for mode, side in steps.items()}


def decode_steps(plan: Plan) -> Figures:
    """Decode steps beside the bare products of their rows with the weights, on one thread."""
    figures: Figures = {}
    for name in ("gpt2-4m", "builtin"):
        suffix = "" if name == "gpt2-4m" else f"_{name}"
        keys = {mode: f"decode_step_{mode}_vs_products{suffix}" for mode in ("eager", "compiled")}
        modes = tuple(mode for mode, key in keys.items() if plan.wants(key))
        if name not in plan.models or not modes:
            continue
        with one_thread():
            seconds, profiles = beside_products(plan.subject(name), modes, plan.repeats)
        for mode in modes:
            figures[keys[mode]] = entry(
                [a / b for a, b in zip(seconds[mode], seconds["products"], strict=True)],
                seconds[mode],
                seconds["products"],
                "s/step",
                f'A decode step with decode="{mode}", head, sampling and value included ÷ the bare products of its '
                f"rows with the weights, one thread; {name}, contexts of {PROMPT_TOKENS + 1} to "
                f"{PROMPT_TOKENS + plan.response - 1} tokens, {plan.episodes} rows.",
                **profiles[mode],
                threads=1,
            )
    return figures
