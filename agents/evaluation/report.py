"""An evaluation as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table


def evaluation_table(result: dict[str, Any], prompts: str) -> Table:
    """
    :param result: what :func:`agents.evaluation.evaluate.evaluate` says.
    :param prompts: what the prompts are called.
    :return: the figures of both writers side by side.
    """
    other = result["compared_with"]
    table = Table(
        *("", other, "policy", "change" if other == "reference" else "difference", "win rate"),
        title=f"{result['episodes']} episodes each, prompts: {escape(prompts)}",
        caption="In brackets: 95 % intervals. Win rate: how often the policy's text scores higher than the other's for "
        "the same prompt; ties count half.",
    )
    for name, after in result["policy"].items():
        before, compared = result[other][name], result["comparison"].get(name)
        change, win_rate = f"{after - before:+.3f}", ""
        if compared is not None:
            change += " [{:.2f}, {:.2f}]".format(*compared["difference_interval"])
            percent = [100 * rate for rate in (compared["win_rate"], *compared["win_rate_interval"])]
            win_rate = "{:.0f}% [{:.0f}, {:.0f}]".format(*percent)
        table.add_row(escape(name), f"{before:.3f}", f"{after:.3f}", change, win_rate)
    gain = result["score_gain_std"]
    table.add_row("score gain (std)", "", "", "–" if gain is None else f"{gain:+.3f}", style="bold")
    kl_of_other = f"{result['kl_against']:.2f}" if other == "against" else ""
    table.add_row("KL (nats/episode)", kl_of_other, f"{result['kl']:.2f}", "", style="bold")
    return table


def texts_table(result: dict[str, Any]) -> Table:
    """
    :param result: an evaluation with texts.
    :return: what both wrote for each prompt, with the scores.
    """
    other = result["compared_with"]
    table = Table(*(("before", "after") if other == "reference" else (other, "policy")), show_lines=True)
    for pair in result["texts"]:
        prompt = f"[bold]{escape(pair['prompt'])}[/bold]"
        texts = (pair[other], pair["policy"])
        table.add_row(*(f"[dim]{t['score']:+.2f}[/dim] {prompt}{escape(t['completion'])}" for t in texts))
    return table
