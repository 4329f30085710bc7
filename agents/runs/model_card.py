"""The model card of a run: ``README.md`` beside the weights, which says what the model is and where it comes from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from agents.runs.run_files import RunFiles, read_run

CARD = "README.md"
EVALUATION = "evaluation.json"
"""What ``textrlhf evaluate --json RUN/evaluation.json`` writes into the directory of a run, and the demo by itself."""
MOST_TEXTS = 3
NONE = "–"  # in place of a figure of texts to which it does not apply
FIGURES = {"objective/scores": "score", "objective/gold_score": "gold score", "objective/kl": "KL (nats a text)"}
OTHERS = {"reference": ("its reference", "reference"), "against": ("another model", "another model")}
"""What an evaluation compares with: how it is called in a sentence, and at the head of a column."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(directory: Path) -> Path:
    """Write the card of a run's policy, from the files of the run. An earlier card is replaced.

    :param directory: the directory of the run.
    :return: the card, ``policy/README.md``.
    :raises OSError: if there is no run, or it has no policy.
    :raises ValueError: if a file of the run is not what a run writes.
    """
    path = directory / "policy" / CARD
    text = card(read_run(directory), _evaluation(directory / EVALUATION))
    path.write_text(text, encoding="utf-8", errors="replace")  # JSON can hold halves of characters
    return path


def card(run: RunFiles, evaluation: dict[str, Any] | None = None) -> str:
    """
    :param run: the run.
    :param evaluation: what :func:`agents.evaluation.evaluate.evaluate` returned, if the policy has been evaluated.
    :return: the card: metadata as YAML, and Markdown. What the run's files say is never Markdown of its own.
    """
    model = str(run.config.get("model"))
    algo = str(run.config.get("algo"))
    data = ModelCardData(
        # A path on somebody's disk is no name of a model on the Hub.
        base_model=model if HUB_NAME.fullmatch(model) and not Path(model).exists() else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["textrlhf", "reinforcement-learning", "rlhf", algo.rpartition(":")[2].lower()],
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {"code": code_span, "block": code_block, "figure": _figure}
    last = max((row["timesteps"] for row in run.samples), default=0)
    text = environment.get_template("model_card.md").render(
        name=run.directory.absolute().name,
        algo=algo,
        run=run,
        figures=[
            (label, f"{values[0]:.3g}", f"{values[-1]:.3g}")
            for label, (_, values) in ((label, run.curve(column)) for column, label in FIGURES.items())
            if len(values)
        ],
        evaluation=None if evaluation is None else _told(evaluation),
        texts=[row for row in run.samples if row["timesteps"] == last][:MOST_TEXTS],
        config=(run.directory / "config.yaml").read_text(encoding="utf-8"),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def code_span(value: Any) -> str:
    """
    :param value: anything.
    :return: it in a line, as Markdown's code, which ends nowhere inside of it and splits no table.
    """
    text = " ".join(str(value).split()).replace("|", "¦") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def code_block(text: str) -> str:
    """
    :param text: some lines.
    :return: them indented, as a block of Markdown's code.
    """
    return "\n".join(f"    {line}" for line in text.splitlines())


def _evaluation(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    other = found.get("compared_with") if isinstance(found, dict) else None
    if other not in [*OTHERS] or not all(isinstance(found.get(writer), dict) for writer in ("policy", other)):
        raise ValueError(f"Expected {path} to be what `textrlhf evaluate --json` writes; got something else.")
    return found


def _told(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An evaluation as the template shows it."""
    other = evaluation["compared_with"]
    ours, theirs = evaluation["policy"], evaluation[other]
    rows = [(name, _figure(ours.get(name)), _figure(theirs.get(name))) for name in dict.fromkeys([*ours, *theirs])]
    in_a_sentence, at_the_head = OTHERS[other]
    rate = evaluation.get("win_rate")
    return {
        **{name: _count(evaluation.get(name)) for name in ("episodes", "prompts")},
        "prompt_set": evaluation.get("prompt_set"),
        "other": in_a_sentence,
        "head": at_the_head,
        "trained_on": bool(evaluation.get("trained_on")),
        "rows": [row for row in rows if row[1:] != (NONE, NONE)],
        "kl": _figure(evaluation.get("kl")),
        "win_rate": f"{100 * rate:.0f} %" if _is_number(rate) else "",
    }


def _figure(value: Any) -> str:
    return f"{value:.3g}" if _is_number(value) else NONE


def _count(value: Any) -> str:
    return str(value) if _is_number(value) else NONE


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
