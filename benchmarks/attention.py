"""Ways to compute the attention of a decode step: one query a text, on keys and values of some dozens of columns.

    python -m benchmarks.attention

Processor time of one thread, which does not count what other programs do meanwhile, in turns. The layers are more than
the processor's cache holds, as in a rollout.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.decode_step import one_thread

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def fused(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """PyTorch's fused kernel, which is what the policy uses.

    :param query: [R, KV, G, head_dim].
    :param keys: [R, KV, C, head_dim].
    :param values: [R, KV, C, head_dim].
    :return: [R, KV, G, head_dim].
    """
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values)


def products(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Batched products; as :func:`fused`."""
    scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ values


def sums(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sums of products; as :func:`fused`."""
    scores = (query[:, :, :, None] * keys[:, :, None]).sum(dim=-1) * query.shape[-1] ** -0.5
    return (scores.softmax(dim=-1)[..., None] * values[:, :, None]).sum(dim=3)


def sums_by_column(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sums of products where columns are outermost; as :func:`fused`, but keys and values are [C, R, KV, head_dim]."""
    groups = []
    for group in query.unbind(2):
        scores = (group * keys).sum(dim=-1) * query.shape[-1] ** -0.5
        groups.append((scores.softmax(dim=0)[..., None] * values).sum(dim=0))
    return torch.stack(groups, dim=2)


@functools.cache
def _compiled() -> Way:
    return torch.compile(sums, dynamic=True)


WAYS: dict[str, Way] = {
    "fused kernel": fused,
    "batched products": products,
    "sums of products": sums,
    "the same, compiled": lambda *tensors: _compiled()(*tensors),
    "columns outermost": sums_by_column,
}


@torch.no_grad()
def milliseconds(
    columns: int, rows: int, kv_heads: int, groups: int, head_dim: int, repeats: int, ways: Sequence[str]
) -> dict[str, float]:
    """
    :param columns: C.
    :param rows: R, the number of texts.
    :param kv_heads: the number of heads of keys and values.
    :param groups: the number of query heads for each of them.
    :param head_dim: the size of a head.
    :param repeats: the number of rounds.
    :param ways: keys of :data:`WAYS`.
    :return: the median of the processor time of a layer, by way.
    """
    n_layers, spare = 8, 16
    query = torch.randn(rows, kv_heads, groups, head_dim)
    by_row = [torch.randn(2, rows, kv_heads, columns + spare, head_dim)[:, :, :, :columns] for _ in range(n_layers)]
    by_column = [layer.permute(0, 3, 1, 2, 4).contiguous() for layer in by_row]
    layers = {way: by_column if way == "columns outermost" else by_row for way in ways}
    expected = fused(query, *by_row[0])
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways:  # the first call compiles
        torch.testing.assert_close(WAYS[way](query, *layers[way][0]), expected, rtol=1e-3, atol=1e-4)
    for number in range(repeats):
        for way in ways if number % 2 else reversed(ways):
            start = time.thread_time()
            for keys, values in layers[way]:
                WAYS[way](query, keys, values)
            taken[way].append((time.thread_time() - start) / n_layers * 1e3)
    return {way: float(np.median(seconds)) for way, seconds in taken.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: of the command line; by default the process's.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[16, 24, 40, 128, 256])
    parser.add_argument("--rows", type=int, default=64, help="texts")
    parser.add_argument("--kv-heads", type=int, default=4, help="heads of keys and values")
    parser.add_argument("--groups", type=int, default=1, help="query heads for each of them")
    parser.add_argument("--head-dim", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    args = parser.parse_args(arguments)
    table = Table("columns", *args.ways, title="milliseconds of processor time, one layer")
    with one_thread():
        for columns in args.columns:
            figures = milliseconds(
                columns, args.rows, args.kv_heads, args.groups, args.head_dim, args.repeats, args.ways
            )
            table.add_row(str(columns), *(f"{figures[way]:.2f}" for way in args.ways))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
