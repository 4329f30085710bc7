"""How fast a training would be, and what would fit, on machines that are not here: a model of one iteration of PPO.

python -m benchmarks.scale_out.model

What one GPU takes for a token beside the work of its matrices was measured on one H200 with a model of 135 million
parameters (``benchmarks/results/gpu/nvidia-h200.json``). All else comes from data sheets and from assumptions, each of
which is named below. No row with more than one GPU has been run.

Notation: P parameters, n GPUs, R texts for each GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

MEASURED = Path(__file__).parents[1] / "results" / "gpu" / "nvidia-h200.json"

# ---- assumptions ----------------------------------------------------------------------------------------------------

MATRIX_SHARE = 0.4  # of the peak of matrix products that large forward and backward passes reach
MEMORY_SHARE = 0.6  # of the bandwidth of the memory that a decode step reaches
LINK_SHARE = 0.7  # of the bandwidth between GPUs that collectives reach
BYTES = 2  # of a weight, of its gradient, and of each of Adam's two moments: all in bfloat16
REDUCED = 4  # of a number of the gradient while it is added up over GPUs: float32, as both engines do it
RESERVED = 0.1  # of the memory, for the allocator, kernels and libraries


class GPU(NamedTuple):
    """What the data sheet says of an NVIDIA H200 (SXM), and of a node of eight with InfiniBand NDR.

    :param memory: bytes.
    :param bandwidth: of the memory, bytes per second.
    :param flops: dense products in bfloat16, per second.
    :param node: GPUs that are connected by NVLink.
    :param link: bytes per second and direction that a GPU has within a node.
    :param network: bytes per second that it has to other nodes.
    """

    memory: float = 141e9
    bandwidth: float = 4.8e12
    flops: float = 989e12
    node: int = 8
    link: float = 450e9
    network: float = 50e9


class Model(NamedTuple):
    """
    :param parameters: P.
    :param layers: the number of layers.
    :param hidden: the number of hidden units.
    :param kv: keys and values of one token in one layer, in numbers.
    """

    parameters: float
    layers: int
    hidden: int
    kv: int


MODELS = {
    "135M": Model(0.135e9, 30, 576, 2 * 3 * 64),  # SmolLM2, which was measured
    "0.5B": Model(0.494e9, 24, 896, 2 * 2 * 64),  # Qwen2.5
    "7B": Model(7.62e9, 28, 3584, 2 * 4 * 128),
    "32B": Model(32.8e9, 64, 5120, 2 * 8 * 128),
    "70B": Model(70.6e9, 80, 8192, 2 * 8 * 128),  # Llama 3
}


class Work(NamedTuple):
    """One iteration, by default the one that was measured.

    :param rows: R, the texts that a GPU writes at once.
    :param prompt: tokens.
    :param response: tokens.
    :param epochs: passes over a rollout.
    :param minibatches: steps of the optimiser in each.
    :param micro_batch_tokens: tokens of one forward and backward pass on a GPU.
    """

    rows: int = 64
    prompt: int = 128
    response: int = 256
    epochs: int = 2
    minibatches: int = 4
    micro_batch_tokens: int = 4096

    @property
    def tokens(self) -> int:
        """Of a rollout, for each GPU, prompts included."""
        return self.rows * (self.prompt + self.response)

    @property
    def passes(self) -> int:
        """Forward and backward passes of an update, on each GPU."""
        return self.epochs * self.minibatches * -(-self.tokens // (self.minibatches * self.micro_batch_tokens))


class Overheads(NamedTuple):
    """Seconds of one GPU and its host that don't grow with the size of the matrices, as they were measured.

    :param step_layer: of a layer in a decode step, for all rows.
    :param step_row: of a row in a decode step: the environment, sampling, attention.
    :param pass_layer: of a layer in a forward and backward pass of an update, with its share of all that surrounds it.
    :param reference_layer: of a layer in a pass of the reference.
    """

    step_layer: float
    step_row: float
    pass_layer: float
    reference_layer: float


# The measurement packed texts into passes of so many tokens for the reference.
REFERENCE_TOKENS = 2048


def overheads(report: Mapping[str, object] | None = None, gpu: GPU | None = None) -> Overheads:
    """
    :param report: of ``benchmarks.gpu``; None: the committed one.
    :param gpu: what it ran on; None: an H200.
    :return: what is left of the measured seconds when the work of the matrices and of the memory is taken away.
    """
    gpu = gpu or GPU()
    parts = (json.loads(MEASURED.read_text()) if report is None else report)["parts"]
    rollouts, model, work = parts["throughput"]["figures"], MODELS["135M"], Work()

    def step(rows: int) -> float:
        speed = rollouts[f"135m, {rows} rows: ours, compiled"]["tokens_per_second"]["median"]
        return rows / speed - _read(model, rows, work, gpu)

    step_row = (step(512) - step(64)) / (512 - 64)
    ppo = parts["ppo"]["figures"]["ours, value head"]["parts"]
    update = ppo["update"]["median"] - work.epochs * _matrices(6, model, work.tokens, gpu)
    reference = ppo["reference"]["median"] - _matrices(2, model, work.tokens, gpu)
    return Overheads(
        step_layer=(step(64) - 64 * step_row) / model.layers,
        step_row=step_row,
        pass_layer=update / work.passes / model.layers,
        reference_layer=reference / (work.tokens / REFERENCE_TOKENS) / model.layers,
    )


def _read(model: Model, rows: int, work: Work, gpu: GPU) -> float:
    """Seconds in which a decode step reads all weights, and the keys and values of texts that are half written."""
    cached = rows * (work.prompt + work.response / 2) * model.layers * model.kv * BYTES
    return (model.parameters * BYTES + cached) / (MEMORY_SHARE * gpu.bandwidth)


def _matrices(products: int, model: Model, tokens: float, gpu: GPU) -> float:
    """Seconds of 2 (forward) or 6 (forward and backward) operations for each parameter and token."""
    return products * model.parameters * tokens / (MATRIX_SHARE * gpu.flops)


class Prediction(NamedTuple):
    """Of one iteration on n GPUs.

    :param rollout: seconds in which the texts are written.
    :param fetch: seconds in which weights get to whoever writes (:meth:`FSDPEngine.unshard`, or an engine's update).
    :param fetched: bytes that each GPU gets then.
    :param learner: seconds of the reference's pass and of the update.
    :param tokens: response tokens of all GPUs.
    :param update_bytes: of each GPU during an update.
    :param rollout_bytes: of each GPU during a rollout.
    :param fits: whether both are within the memory.
    """

    rollout: float
    fetch: float
    fetched: float
    learner: float
    tokens: float
    update_bytes: float
    rollout_bytes: float
    fits: bool

    @property
    def in_turn(self) -> float:
        """Tokens per second if one waits for the other (lag 0)."""
        return self.tokens / (self.rollout + self.fetch + self.learner)

    @property
    def overlapped(self) -> float:
        """Tokens per second if as many GPUs again write the next rollout meanwhile (a lag of one rollout)."""
        return self.tokens / max(self.rollout + self.fetch, self.learner)


def predict(
    model: Model,
    n: int,
    cut_up: bool,
    adapter: bool = False,
    work: Work | None = None,
    gpu: GPU | None = None,
    over: Overheads | None = None,
) -> Prediction:
    """
    :param model: the model.
    :param n: GPUs.
    :param cut_up: whether the weights are cut up (:class:`agents.algorithms.fsdp_engine.FSDPEngine`).
    :param adapter: whether an adapter is trained, which is small beside the model; the model without it is the
        reference.
    :param work: of each GPU; None: as it was measured.
    :param gpu: each of them; None: an H200.
    :param over: None: what was measured.
    """
    work, gpu = work or Work(), gpu or GPU()
    over = over or overheads(gpu=gpu)
    all_weights, others = model.parameters * BYTES, (n - 1) / n
    link = LINK_SHARE * (gpu.link if n <= gpu.node else gpu.network)
    step = model.layers * over.step_layer + work.rows * over.step_row + _read(model, work.rows, work, gpu)
    reference = _matrices(2, model, work.tokens, gpu)
    reference += work.tokens / work.micro_batch_tokens * model.layers * over.reference_layer
    computed = work.epochs * _matrices(6, model, work.tokens, gpu) + work.passes * model.layers * over.pass_layer
    gradient = 0.0 if adapter else all_weights
    reduced = gradient / BYTES * REDUCED
    if cut_up:  # weights come for the forward and for the backward pass, gradients go after each, while others compute
        update = max(computed, work.passes * others * (2 * all_weights + reduced) / link)
    else:  # gradients are added up before each step, and nothing is computed meanwhile
        update = computed + work.epochs * work.minibatches * 2 * others * reduced / link
    fetched = others * all_weights if cut_up else 0.0
    share = 1 / n if cut_up else 1.0
    cache = work.rows * (work.prompt + work.response) * model.layers * model.kv * BYTES
    kept = work.micro_batch_tokens * model.layers * model.hidden * BYTES  # inputs of layers: gradient checkpointing
    # The gradient, two moments, and what an update is undone to: weights and moments. The reference, besides.
    update_bytes = share * all_weights + (share * 6 + 1) * gradient + kept
    rollout_bytes = all_weights + (share * all_weights if cut_up else 0.0) + (share * 2 + 1) * gradient + cache
    return Prediction(
        rollout=work.response * step,
        fetch=fetched / link,
        fetched=fetched,
        learner=reference + update,
        tokens=n * work.rows * work.response,
        update_bytes=update_bytes,
        rollout_bytes=rollout_bytes,
        fits=max(update_bytes, rollout_bytes) <= (1 - RESERVED) * gpu.memory,
    )


def of_processes(
    n: int, rollout: float, learner: float, tokens: int, steps: int, seconds: Mapping[str, float]
) -> dict[str, float]:
    """The same model for processes whose speeds by themselves are known.

    :param n: how many.
    :param rollout: tokens per second of one that writes by itself.
    :param learner: tokens per second of one that learns by itself.
    :param tokens: of a rollout.
    :param steps: of the optimiser, each after one forward and backward pass.
    :param seconds: what was measured of that which they do together: ``reduce``, the adding up of a gradient, before
        each step; or ``unshard``, the fetching of all weights, thrice a pass: forward, backward, and the gradient back.
    :return: tokens per second of all of them.
    """
    together = seconds.get("reduce", 0.0) + 3 * seconds.get("unshard", 0.0)
    return {"rollout": n * rollout, "learner": tokens / (tokens / (n * learner) + steps * together)}


# What the table has of each model: GPUs, whether weights are cut up, and whether an adapter is trained.
SHOWN = (
    (1, False, False),
    (1, False, True),
    *((n, cut_up, adapter) for n in (8, 64) for cut_up, adapter in ((False, False), (True, False), (True, True))),
)


def table() -> str:
    """
    :return: predictions in Markdown, for the sizes and numbers of GPUs that ``docs/scaling.md`` shows.
    """
    heads = ("model", "GPUs", "weights", "GB a GPU in update, rollout", "rollout, tokens/s", "learner, tokens/s")
    heads += ("fetched by a GPU a rollout", "in turn, tokens/s", "overlapped")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name in list(MODELS)[1:]:
        for n, cut_up, adapter in SHOWN:
            found = predict(MODELS[name], n, cut_up, adapter, Work(micro_batch_tokens=16384))
            how = ("cut up" if cut_up else "replicated" if n > 1 else "one process") + (", LoRA" if adapter else "")
            memory = f"{_rounded(found.update_bytes / 1e9)}, {_rounded(found.rollout_bytes / 1e9)}"
            numbers = [f"{memory}: too much", *["–"] * 5]
            if found.fits:
                speeds = (found.tokens / found.rollout, found.tokens / found.learner, found.in_turn, found.overlapped)
                rollout, learner, *both = map(_rounded, speeds)
                fetch = f"{_rounded(found.fetched / 1e9)} GB, {found.fetch:.1g} s" if cut_up else "–"
                numbers = [memory, rollout, learner, fetch, *both]
            elif n > 1 and not cut_up:
                continue  # as much as with one
            lines.append(f"| {' | '.join([name, str(n), how, *numbers])} |")
    return "\n".join(lines)


def _rounded(number: float) -> str:
    """Two digits: no more is known."""
    return f"{float(f'{number:.2g}'):,g}"


if __name__ == "__main__":
    print(table())
