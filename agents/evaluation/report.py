"""An evaluation as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from text_env.rendering import printable


def prompts_in_words(result: dict[str, Any]) -> str:
    """
    :param result: an evaluation, or what the microscope says of a critic.
    :return: which prompts it was made with.
    """
    trained_on = ", which the run was trained on" if result.get("trained_on") else ""
    return f"prompts: {result['prompt_set']}{trained_on}"


def evaluation_table(result: dict[str, Any]) -> Table:
    """
    :param result: what :func:`agents.cli.evaluate_policy` returned.
    :return: the figures of both writers side by side.
    """
    other = result["compared_with"]
    table = Table(
        *("", other, "policy", "change" if other == "reference" else "difference", "win rate"),
        title=f"{result['episodes']} episodes each, {escape(prompts_in_words(result))}",
        caption="In brackets: 95 % intervals. Win rate: how often the policy's text scores higher than the other's for "
        "the same prompt; ties count half.",
    )
    for name in dict.fromkeys([*result["policy"], *result[other]]):
        before, after = (result[writer].get(name) for writer in (other, "policy"))  # None: none of its texts has it
        change = "" if before is None or after is None else f"{after - before:+.3f}"
        win_rate, compared = "", result["comparison"].get(name)
        if compared is not None:
            change += _interval(compared["difference_interval"])
            percent = [100 * rate for rate in (compared["win_rate"], *compared["win_rate_interval"])]
            win_rate = "{:.0f}% [{:.0f}, {:.0f}]".format(*percent)
        figures = ["–" if mean is None else f"{mean:z.3f}" for mean in (before, after)]
        table.add_row(escape(name), *figures, change, win_rate)
    gain = result["score_gain_std"]
    table.add_row("score gain (std)", "", "", "–" if gain is None else f"{gain:+.3f}", style="bold")
    kl_of_other = f"{result['kl_against']:.2f}" if other == "against" else ""
    table.add_row("KL (nats/episode)", kl_of_other, f"{result['kl']:z.2f}", "", style="bold")
    return table


def answers_table(result: dict[str, Any]) -> Table:
    """
    :param result: an evaluation of a task with a right answer.
    :return: how often both writers solve it.
    """
    other, answers = result["compared_with"], result["answers"]
    table = Table(
        *("", other, "policy", "change" if other == "reference" else "difference"),
        title=f"Right answers, at least {answers['samples_per_prompt']} texts for each of {result['prompts']} prompts",
        caption="pass@k: at least one of k texts is right. majority@k: the most frequent answer of k texts is right. "
        "Greedy accuracy: the likeliest text is right. Differences are in percentage points.",
    )
    for name in dict.fromkeys([*answers["policy"], *answers[other]]):
        compared, length = answers["comparison"].get(name), name.startswith("mean_length")
        scale, unit = (1, "") if length else (100, "%")  # lengths are in tokens, rates in percent
        figures = ((answers[who].get(name), answers["intervals"][who].get(name)) for who in (other, "policy"))
        cells = [
            "–" if mean is None else f"{scale * mean:.1f}{unit}{_interval(interval, scale, 1 - len(unit))}"
            for mean, interval in figures
        ]
        if compared is not None:
            cells.append(f"{100 * compared['difference']:+.1f}{_interval(compared['difference_interval'], 100, 0)}")
        table.add_row(name, *cells)
    return table


def _interval(ends: list[float] | None, scale: int = 1, digits: int = 2) -> str:
    return "" if ends is None else f" [{scale * ends[0]:.{digits}f}, {scale * ends[1]:.{digits}f}]"


def texts_table(result: dict[str, Any]) -> Table:
    """
    :param result: an evaluation with texts.
    :return: what both wrote for each prompt, with the scores.
    """
    other = result["compared_with"]
    table = Table(*(("before", "after") if other == "reference" else (other, "policy")), show_lines=True)
    for pair in result["texts"]:
        texts = (pair[other], pair["policy"])
        table.add_row(*(scored_text(f"{t['score']:+.2f}", pair["prompt"], t["completion"]) for t in texts))
    return table


def scored_text(score: str, prompt: str, completion: str) -> Text:
    """
    :param score: the score, in words.
    :param prompt: the prompt of a text.
    :param completion: what a model wrote after it.
    :return: them for the terminal, which obeys nothing that is in them.
    """
    return Text.assemble((score, "dim"), " ", (printable(prompt), "bold"), printable(completion))
