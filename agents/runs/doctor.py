"""``textrlhf doctor``: the invariants on a user's own model, in words, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.markup import escape
from rich.table import Table

from agents.runs.algorithms import resolved
from agents.runs.config import TrainConfig
from agents.runs.doctor_checks import models, rewards, rollouts, texts
from agents.runs.doctor_checks.patient import Finding, Patient, StageFailed

CHECKS: dict[str, Callable[[Patient], Finding]] = {
    "end of text": texts.end_of_text,
    "pad token": texts.padding_token,
    "appended tokens": texts.appended_tokens,
    "chat template": texts.chat_template,
    "prompts": texts.prompts_fit,
    "model": models.loaded_model,
    "vocabulary": models.vocabulary,
    "context length": models.context_length,
    "padding": models.padding,
    "neighbours": models.neighbours,
    "LoRA": models.lora_targets,
    "memo": rollouts.memo,
    "decoding": rollouts.decoding,
    "first ratio": rollouts.first_ratio,
    "memory": models.memory,
    "speed": rollouts.speed,
    "scores": rewards.scores,
    "repeatability": rewards.repeatability,
    "batch order": rewards.batch_order,
    "batch size": rewards.batch_size,
}
"""What is examined, by name, in the order in which it is told."""

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}


def examine(run: TrainConfig, n_texts: int = 16, n_tokens: int = 48) -> dict[str, Finding]:
    """Examine a training before it starts.

    :param run: the training.
    :param n_texts: the number of texts that the model writes.
    :param n_tokens: the most tokens of such a text, if the budget of the training is larger.
    :return: what each check of :data:`CHECKS` found, by its name. What could not be made for them, such as the
        ``"policy"``, is a finding of its own.
    :raises ValueError: for an unknown algorithm, and for numbers that no training can be made of.
    """
    patient = Patient(resolved(run), n_texts, n_tokens)
    findings: dict[str, Finding] = {}
    for name, check in CHECKS.items():
        try:
            findings[name] = check(patient)
        except StageFailed as failed:
            if failed.stage not in findings:
                findings[failed.stage] = Finding("problem", str(failed), "Mend this first: other checks wait for it.")
            if failed.stage != name:
                findings[name] = Finding("skipped", f"Needs what could not be made: the {failed.stage}.")
        except Exception as error:  # whatever a model, a tokenizer or a reward of somebody's raises
            said = f"The check ended in {type(error).__name__}: {error}"
            findings[name] = Finding("problem", said, "What the error says; training would meet it as well.")
    return findings


def as_data(findings: dict[str, Finding]) -> dict[str, Any]:
    """
    :param findings: what :func:`examine` returned.
    :return: ``healthy``, whether there is no problem, and ``findings``, each with its name, as JSON can hold them.
    """
    listed = [{"check": name, **finding._asdict()} for name, finding in findings.items()]
    return {"healthy": all(finding.verdict != "problem" for finding in findings.values()), "findings": listed}


def findings_table(findings: dict[str, Finding]) -> Table:
    """
    :param findings: what :func:`examine` returned.
    :return: the findings for the terminal, a row each.
    """
    table = Table("check", "", "what was found, and what to do")
    for name, (verdict, found, advice) in findings.items():
        style = STYLES[verdict]
        told = escape(found) + (f"\n[{style}]→[/] {escape(advice)}" if advice else "")
        table.add_row(name, f"[{style}]{verdict}[/]", told)
    return table
