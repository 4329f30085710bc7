"""The language model, the reward model, the preference pairs and the prompts that ship with the package.

This module holds paths and loads no models. ``README.md`` beside this file says what they are and how they were made.
"""

import json
from pathlib import Path

_HERE = Path(__file__).resolve().parent

LANGUAGE_MODEL: Path = _HERE / "language_model"
"""A Hugging Face directory: a Llama-shaped causal language model with its tokenizer."""
ARITHMETIC_MODEL: Path = _HERE / "arithmetic"
"""A Hugging Face directory: a Llama-shaped causal language model that writes calculations out, with its tokenizer."""
REWARD_MODEL: Path = _HERE / "reward_model"
"""A Hugging Face directory: a sequence classifier with one output. ``reward_mean`` and ``reward_std`` in its
``config.json`` are the mean and the standard deviation of the output on texts of the language model before any
training with the reward; score = (logit - mean) / std."""
PREFERENCES: Path = _HERE / "preferences.jsonl.gz"
"""The pairs that the reward model was trained on: gzipped JSON lines with prompt, chosen, rejected, split."""

_PROMPTS = _HERE / "prompts.jsonl"


def prompts(split: str = "train") -> list[str]:
    """Read the built-in prompts: the first words of film reviews, neutral in sentiment.

    :param split: ``"train"``, or ``"eval"`` for the held-out prompts.
    :return: the prompts, each without a space at its end.
    :raises ValueError: if there is no such split.
    """
    records = [json.loads(line) for line in _PROMPTS.read_text(encoding="utf-8").splitlines()]
    known = list(dict.fromkeys(record["split"] for record in records))
    if split not in known:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(map(repr, known))}")
    return [record["prompt"] for record in records if record["split"] == split]
