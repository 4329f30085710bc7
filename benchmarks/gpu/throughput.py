"""Tokens per second of a rollout: ours, with each way of decoding, beside ``generate()`` with each kind of cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from agents.models.decoding import DECODE_MODES
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
    """Our ways of decoding, the slowest first."""
    return [mode for mode in DECODE_MODES if mode != "auto"]


def ours(what: Subject, decode: str) -> rollout.Ours:
    """
    :param what: model and sizes.
    :param decode: one of :func:`decodings`.
    """
    return rollout.Ours(what, decode=decode)


def all_sides(what: Subject, ends: bool) -> Sides:
    """
    :param what: model and sizes; each side makes a copy of the model for itself.
    :param ends: whether texts end by themselves.
    :return: name → makes a run, which says how many tokens it has written.
    """
    env = rollout.make_env(what)
    sides: Sides = {f"ours, {decode}": lambda decode=decode: ours(what, decode) for decode in reversed(decodings())}  # type: ignore[misc]
    sides["generate, static cache"] = lambda: rollout.generate(what.own_copy(), env, ends, "static")
    sides["generate, dynamic cache"] = lambda: rollout.generate(what.own_copy(), env, ends)
    if ends:  # what is compiled meets another number of rows at nearly every step, and may take long to warm up
        return dict(sorted(sides.items(), key=lambda side: "compiled" in side[0] or "static" in side[0]))
    return sides


def ending_texts(rows: int, response: int, device: torch.device) -> Subject:
    """The small GPT-2, whose texts end by themselves after half the budget on average."""
    model = gpt2_4m(eos_hazard=hazard_for(response / 2, response)).to(device)
    model = model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    return Subject(model, words(), word_prompts(), False, rows, response)


def warmed_up(
    make: Callable[[], Callable[[], int]], device: torch.device, times: int
) -> tuple[Callable[[], int], dict[str, Any]]:
    """
    :param make: makes a run.
    :param device: on which it runs.
    :param times: how often it is run: where things are compiled, graphs are recorded in the second.
    :return: the run; and the seconds of the first, with what making it took, those of the last, and the bytes that were
        allocated at the peak.
    """
    cuda = device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    run = make()
    seconds_of(run)
    turn = first = time.perf_counter() - start
    for _ in range(times - 1):
        turn, _ = seconds_of(run)
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    return run, {"first_seconds": first, "turn_seconds": turn, "peak_bytes": peak}


def rounds(
    runs: dict[str, Callable[[], int]], repeats: int, seconds: float, look: Callable[[dict[str, list[float]]], None]
) -> None:
    """Rounds in which each side has its turn, in alternating order; each at least once, and then as long as its share
    of the time allows. So a slow side has fewer turns than a fast one, which are those of the first rounds.

    :param runs: the sides.
    :param repeats: rounds at most.
    :param seconds: for all of them.
    :param look: is called after each turn with the tokens per second so far, by name, one a turn.
    """
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    for number in range(repeats):
        for name in list(runs) if number % 2 == 0 else reversed(runs):
            turns = len(speeds[name])
            if turns < number or (turns and spent[name] * (turns + 1) / turns > seconds / len(runs)):
                continue
            elapsed, tokens = seconds_of(runs[name])
            spent[name] += elapsed
            speeds[name].append(tokens / elapsed)
            look(speeds)


def measure_rollouts(name: str, what: Subject, repeats: int, record: Record, ends: bool = False) -> None:
    """Measure one model with one number of rows.

    :param name: of the figures.
    :param what: model and sizes.
    :param repeats: rounds at most.
    :param record: where it goes; it says how much time there is.
    :param ends: whether texts end by themselves.
    """
    runs: dict[str, Callable[[], int]] = {}
    costs: dict[str, dict[str, Any]] = {}
    for side, make in all_sides(what, ends).items():
        # Whoever is warm needs another turn; the longest warm-up so far says what one more side may cost.
        needed = 3 + sum(cost["turn_seconds"] for cost in costs.values())
        with record.attempt(f"{name}: {side}", needs=needed) as enough:
            if enough:
                times = 2 if "compiled" in side or "static" in side else 1
                runs[side], costs[side] = warmed_up(make, what.model.device, times)
                # For now: what follows may be the last that there is time for.
                record.add(f"{name}: {side}", {**costs[side], "rounds": 0})

    def look(speeds: dict[str, list[float]]) -> None:
        for side, found in speeds.items():
            if not found:
                continue
            figure: dict[str, Any] = {**costs[side], "tokens_per_second": spread(found), "rounds": len(found)}
            # Beside what others make of the same round.
            figure["ratios"] = {
                f"÷ {other}": spread([a / b for a, b in zip(found, theirs, strict=False)])
                for other, theirs in speeds.items()
                if side.startswith("ours") and other != side and theirs
            }
            record.add(f"{name}: {side}", figure)

    with record.attempt(name):
        rounds(runs, repeats, record.seconds_left - 3, look)


def measure(options: Options, record: Record, which: int = 0) -> None:
    """
    :param options: resolved.
    :param record: where the figures go.
    :param which: 1: texts that end by themselves. Otherwise one of the models with one of the numbers of rows.
    """
    assert options.models is not None
    assert options.rows is not None
    assert options.prompt is not None
    assert options.response is not None
    device = torch.device(options.device or "cpu")
    if which == 1:
        rows = options.rows[0]
        name = f"gpt2-4m, texts that end by themselves, {rows} rows"
        what = ending_texts(rows, min(options.response, ENDING), device)
        measure_rollouts(name, what, options.repeats, record, ends=True)
        return
    todo = [(model, rows) for model in options.models for rows in options.rows]
    model, rows = todo[which - 1 if which else 0]
    what = subject(model, rows, options.prompt, options.response, device)
    measure_rollouts(f"{model}, {rows} rows", what, options.repeats, record)
