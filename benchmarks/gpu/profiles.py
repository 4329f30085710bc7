"""Where the time of a rollout and of an update goes: profiles, and what a step asks of the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from agents.models.attention import without_cudnn_attention
from benchmarks import update
from benchmarks.gpu.models import subject
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Record
from benchmarks.gpu.throughput import decodings, ours
from benchmarks.timing import seconds_of

RESPONSE = 32
"""Tokens of a response under the profiler, which writes down some thousand events for each."""
TOP = 15
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")  # for the whole device only the profiler waits, at its end
COPIES = ("cudaMemcpyAsync", "cudaMemcpy")


def counts(events: Any, steps: int) -> dict[str, float]:
    """
    :param events: the profiler's averages by name.
    :param steps: how many steps were taken.
    :return: per step: calls of PyTorch's operators, kernels and graphs launched, copies between or within memories, how
        often the processor waited for the device, and calls of cuDNN's attention, which plans anew for each new shape.
    """

    def calls(*names: str) -> float:
        return sum(event.count for event in events if event.key in names) / steps

    operators = sum(event.count for event in events if event.key.startswith("aten::")) / steps
    return {
        "operators_per_step": operators,
        "launches_per_step": calls(*LAUNCHES),
        "graphs_per_step": calls("cudaGraphLaunch"),
        "copies_per_step": calls(*COPIES),
        "waits_per_step": calls(*WAITS),
        "stream_waits_per_step": calls("cudaStreamSynchronize"),
        "cudnn_attention_per_step": calls("aten::_cudnn_attention_forward"),
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


def profiled(run: Callable[[], Any], device: torch.device, steps: int) -> dict[str, Any]:
    """
    :param run: takes ``steps`` steps; it is run twice before it is looked at.
    :param device: on which it runs.
    :param steps: tokens of a row, or steps of the optimiser.
    """
    run()
    run()
    plain, _ = seconds_of(run)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        run()
    events = found.key_averages()
    on_processor = [event for event in events if event.device_type == DeviceType.CPU]
    # Spans with a name, such as steps of the optimiser, repeat the time of the kernels in them.
    on_device = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    # Operators repeat the time of the kernels that they have launched.
    busy = sum(float(event.self_device_time_total) for event in on_device) / 1e6
    return {
        "seconds": plain,  # without the profiler
        "steps": steps,
        "device_busy_share": busy / plain if cuda else None,
        **counts(events, steps),
        "kernels": table(on_device, "self_device_time_total"),
        "by_device_time": table(on_processor, "self_device_time_total") if cuda else [],
        "by_processor_time": table(on_processor, "self_cpu_time_total"),
    }


def measure(options: Options, record: Record, which: int = 0) -> None:
    """
    :param options: resolved; the first model and number of rows are profiled.
    :param record: where the figures go.
    :param which: there is but one stage.
    """
    assert options.models is not None
    assert options.rows is not None
    assert options.prompt is not None
    assert options.response is not None
    device = torch.device(options.device or "cpu")
    response = min(options.response, RESPONSE)
    what = subject(options.models[0], options.rows[0], options.prompt, response, device)

    def look(name: str, make: Callable[[], Callable[[], Any]], steps: int) -> None:
        with record.attempt(name, needs=10) as enough:
            if enough:
                record.add(name, profiled(make(), device, steps))

    decode = decodings()
    look(f"rollout, {decode[0]}", lambda: ours(what, decode[0]), response)
    for other in decode[1:]:
        look(f"rollout, {other}", lambda other=other: ours(what, other), response)
    with record.attempt("update", needs=10) as enough:
        if enough:
            algorithm = update.own_ppo(what)
            steps = update.EPOCHS * update.MINIBATCHES
            look("update", lambda: update.update(algorithm), steps)
            look("bare passes", lambda: update.bare_passes(algorithm, what), steps)
            if device.type == "cuda":
                with without_cudnn_attention(device):  # as our update has it
                    look("bare passes, cuDNN attention off", lambda: update.bare_passes(algorithm, what), steps)
