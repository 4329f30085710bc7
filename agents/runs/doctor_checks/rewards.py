"""Checks of the reward: a score should be that of a text, whatever stands beside it in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from agents.runs.doctor_checks.patient import Finding, Patient
from text_env.finished_texts import FinishedTexts
from text_env.rewards import reward_name, score

TOLERANCE = 0.01
"""How much of the scores' standard deviation a score may move by: what classifiers round off is less."""


def scores(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether scores are finite, and differ from text to text.
    """
    values, name = _scores(patient), reward_name(patient.reward)
    if np.ptp(values) == 0:
        return Finding(
            "warning",
            f"All {len(values)} texts score {values[0]:.4g} by {name!r}: there is nothing to learn from.",
            "Take a reward that tells such texts apart, an easier task, or a model that sometimes succeeds.",
        )
    return Finding(
        "ok",
        f"{len(values)} texts score from {values.min():.3g} to {values.max():.3g} by {name!r}, {values.mean():.3g} on "
        "average.",
    )


def repeatability(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether the same texts get the same scores again.
    """
    moved = _moved(_scores(patient), _scores(patient))
    if moved > 0:
        return Finding(
            "warning",
            f"The same batch scores otherwise when it is asked for again, by {moved:.1e} standard deviations.",
            "If this is no sampling of your own, look for dropout, or for state that the reward keeps.",
        )
    return Finding("ok", "The same texts get the same scores again.")


def batch_order(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether a score depends on the place of its text in the batch.
    """
    texts = patient.written.texts
    backwards = list(reversed(range(len(texts.prompts))))
    return _compared(patient, "the order of the batch", _scores(patient, backwards)[backwards])


def batch_size(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether a score depends on the other texts of the batch.
    """
    alone = [_scores(patient, [index])[0] for index in range(len(patient.written.texts.prompts))]
    return _compared(patient, "the size of the batch", np.array(alone))


def _compared(patient: Patient, of: str, others: np.ndarray) -> Finding:
    values = _scores(patient)
    moved = _moved(values, others)
    if moved <= TOLERANCE:
        return Finding("ok", f"Scores do not depend on {of}.")
    if _moved(values, _scores(patient)) > 0:
        return Finding(
            "warning",
            f"Whether scores depend on {of} can't be told, since they change by themselves.",
            "Look at the finding on repeatability first.",
        )
    return Finding(
        "problem",
        f"Scores depend on {of}, by up to {moved:.2g} standard deviations.",
        "Score each text by itself: no normalisation over the batch, and padding that is masked.",
    )


def _scores(patient: Patient, index: Sequence[int] | None = None) -> np.ndarray:
    texts = patient.written.texts
    return score(patient.reward, texts if index is None else _taken(texts, index))


def _taken(texts: FinishedTexts, index: Sequence[int]) -> FinishedTexts:
    """These of the texts, in this order."""
    return replace(
        texts,
        prompts=[texts.prompts[i] for i in index],
        completions=[texts.completions[i] for i in index],
        completion_ids=[texts.completion_ids[i] for i in index],
        columns={name: [values[i] for i in index] for name, values in texts.columns.items()},
        messages=None if texts.messages is None else [texts.messages[i] for i in index],
    )


def _moved(values: np.ndarray, others: np.ndarray) -> float:
    """The largest difference, in standard deviations of the scores; what float32 can't tell apart is no difference."""
    difference = np.abs(values - others)
    difference[difference <= 1e-6 * np.maximum(1, np.abs(values))] = 0
    return float(difference.max() / (values.std() or 1.0))
