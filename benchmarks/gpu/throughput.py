"""Tokens per second of a rollout: ours, with each way of decoding, beside ``generate()`` with each kind of cache."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from agents.policies.causal_lm_policy import CausalLMPolicy
from benchmarks import rollout
from benchmarks.gpu.models import subject
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Record, spread
from benchmarks.models import Subject, gpt2_4m, hazard_for, word_prompts, words
from benchmarks.timing import seconds_of

ENDING = 32
"""The budget of texts that end by themselves."""
Sides = dict[str, Callable[[], Callable[[], int]]]


def decodings() -> list[str]:
    """Our ways of decoding, as far as the policy has them."""
    signatures = (inspect.signature(kind.__init__) for kind in CausalLMPolicy.__mro__[:-1])  # type: ignore[misc]
    return ["eager", "compiled"] if any("decode" in of.parameters for of in signatures) else ["eager"]


def ours(what: Subject, decode: str) -> rollout.Ours:
    """
    :param what: model and sizes.
    :param decode: one of :func:`decodings`.
    """
    return rollout.Ours(what, **({"decode": decode} if len(decodings()) > 1 else {}))


def all_sides(what: Subject, ends: bool) -> Sides:
    """
    :param what: model and sizes; each side makes a copy of the model for itself.
    :param ends: whether texts end by themselves.
    :return: name → makes a run, which says how many tokens it has written.
    """
    env = rollout.make_env(what)
    sides: Sides = {f"ours, {decode}": lambda decode=decode: ours(what, decode) for decode in decodings()}  # type: ignore[misc]
    sides["generate, dynamic cache"] = lambda: rollout.generate(what.own_copy(), env, ends)
    sides["generate, static cache"] = lambda: rollout.generate(what.own_copy(), env, ends, "static")
    return sides


def ending_texts(rows: int, response: int, device: torch.device) -> Subject:
    """The small GPT-2, whose texts end by themselves after half the budget on average."""
    model = gpt2_4m(eos_hazard=hazard_for(response / 2, response)).to(device)
    model = model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    return Subject(model, words(), word_prompts(), False, rows, response)


def warmed_up(make: Callable[[], Callable[[], int]], device: torch.device) -> tuple[Callable[[], int], dict[str, Any]]:
    """
    :param make: makes a run.
    :param device: on which it runs.
    :return: the run, after two rounds: in the first things are compiled, in the second graphs recorded; and the seconds
        of both, those of the first with what making it took, and the bytes that were allocated at the peak.
    """
    cuda = device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    run = make()
    run()
    if cuda:
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    second, tokens = seconds_of(run)
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    return run, {"first_seconds": first, "second_seconds": second, "peak_bytes": peak, "tokens": tokens}


def rounds(runs: dict[str, Callable[[], int]], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Rounds in which each side has its turn, in alternating order, at least one and then as many as time allows.

    :param runs: the sides.
    :param repeats: rounds at most.
    :param seconds: no round is begun that would probably end later.
    :return: name → tokens per second, one a round.
    """
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    start = time.monotonic()
    for number in range(repeats):
        spent = time.monotonic() - start
        if number and spent * (number + 1) / number > seconds:
            break
        for name in list(runs) if number % 2 == 0 else reversed(runs):
            elapsed, tokens = seconds_of(runs[name])
            speeds[name].append(tokens / elapsed)
    return speeds


def measure_rollouts(
    name: str, what: Subject, repeats: int, seconds: float, record: Record, ends: bool = False
) -> None:
    """Measure one model with one number of rows.

    :param name: of the figures.
    :param what: model and sizes.
    :param repeats: rounds at most.
    :param seconds: how long all of it may take.
    :param record: where it goes.
    :param ends: whether texts end by themselves.
    """
    start = time.monotonic()
    runs: dict[str, Callable[[], int]] = {}
    costs: dict[str, dict[str, Any]] = {}
    for side, make in all_sides(what, ends).items():
        with record.attempt(f"{name}: {side}", needs=5) as enough:
            if enough:
                runs[side], costs[side] = warmed_up(make, what.model.device)
                # Of this one the time alone: what follows may be the last that there is time for.
                tokens = costs[side].pop("tokens") / costs[side]["second_seconds"]
                record.add(f"{name}: {side}", {**costs[side], "tokens_per_second": spread([tokens]), "rounds": 0})
    speeds = rounds(runs, repeats, seconds - (time.monotonic() - start))
    for side, found in speeds.items():
        figure: dict[str, Any] = {**costs[side], "tokens_per_second": spread(found), "rounds": len(found)}
        # Beside what others make of the same round.
        figure["ratios"] = {
            f"÷ {other}": spread((np.array(found) / np.array(theirs)).tolist())
            for other, theirs in speeds.items()
            if side.startswith("ours") and other != side
        }
        record.add(f"{name}: {side}", figure)


def measure(options: Options, record: Record) -> None:
    """
    :param options: resolved.
    :param record: where the figures go.
    """
    assert options.models is not None
    assert options.rows is not None
    assert options.prompt is not None
    assert options.response is not None
    device = torch.device(options.device or "cpu")
    todo = [(model, rows) for model in options.models for rows in options.rows]
    for number, (model, rows) in enumerate(todo):
        name = f"{model}, {rows} rows"
        with record.attempt(name, needs=10) as enough:
            if enough:
                what = subject(model, rows, options.prompt, options.response, device)
                seconds = record.seconds_left / (len(todo) + 1 - number)
                measure_rollouts(name, what, options.repeats, seconds, record)
        if number == 0:
            name = f"gpt2-4m, texts that end by themselves, {rows} rows"
            with record.attempt(name, needs=10) as enough:
                if enough:
                    what = ending_texts(rows, min(options.response, ENDING), device)
                    seconds = record.seconds_left / (len(todo) - number)
                    measure_rollouts(name, what, options.repeats, seconds, record, ends=True)
