"""Where the time of a rollout goes: a profile of one that is decoded eagerly, and of one that is compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.models import subject
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Record
from benchmarks.gpu.throughput import decodings, ours
from benchmarks.timing import seconds_of

RESPONSE = 32
"""Tokens of a response under the profiler, which writes down some thousand events for each."""
TOP = 15
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
COPIES = ("cudaMemcpyAsync", "cudaMemcpy")


def counts(events: Any, steps: int) -> dict[str, float]:
    """
    :param events: the profiler's averages by name.
    :param steps: tokens of a row.
    :return: per step (one token of each row): calls of PyTorch's operators, kernels and graphs launched, copies between
        or within memories, and how often the processor waited for the device.
    """

    def calls(names: tuple[str, ...]) -> float:
        return sum(event.count for event in events if event.key in names) / steps

    operators = sum(event.count for event in events if event.key.startswith("aten::")) / steps
    return {
        "operators_per_step": operators,
        "launches_per_step": calls(LAUNCHES),
        "copies_per_step": calls(COPIES),
        "waits_per_step": calls(WAITS),
        "stream_waits_per_step": calls(("cudaStreamSynchronize",)),
    }


def table(events: Any, attribute: str) -> list[dict[str, Any]]:
    """
    :param events: the profiler's averages by name.
    :param attribute: of an event, in microseconds.
    :return: the names with the most of it.
    """
    ordered = sorted(events, key=lambda event: -float(getattr(event, attribute)))[:TOP]
    return [
        {"name": event.key[:120], "calls": event.count, "milliseconds": float(getattr(event, attribute)) / 1000}
        for event in ordered
    ]


def profiled(run: Any, device: torch.device, response: int) -> dict[str, Any]:
    """
    :param run: writes texts of ``response`` tokens; things are compiled already.
    :param device: on which it runs.
    :param response: tokens.
    """
    plain, _ = seconds_of(run)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        seconds_of(run)
    events = found.key_averages()
    busy = sum(float(event.self_device_time_total) for event in events) / 1e6
    return {
        "seconds": plain,  # without the profiler
        "device_busy_share": busy / plain if cuda else None,
        **counts(events, response),
        "by_device_time": table(events, "self_device_time_total") if cuda else [],
        "by_processor_time": table(events, "self_cpu_time_total"),
    }


def measure(options: Options, record: Record) -> None:
    """
    :param options: resolved; the first model and number of rows are profiled.
    :param record: where the figures go.
    """
    assert options.models is not None
    assert options.rows is not None
    assert options.prompt is not None
    assert options.response is not None
    device = torch.device(options.device or "cpu")
    response = min(options.response, RESPONSE)
    what = subject(options.models[0], options.rows[0], options.prompt, response, device)
    for decode in decodings():
        with record.attempt(decode, needs=10) as enough:
            if enough:
                run = ours(what, decode)
                run()
                run()
                where = {"model": options.models[0], "rows": options.rows[0], "response": response}
                record.add(decode, {**where, **profiled(run, device, response)})
