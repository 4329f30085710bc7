"""The small language model, reward model and prompts that ship with the package: where they are."""

import json
from pathlib import Path

_HERE = Path(__file__).parent
LANGUAGE_MODEL = _HERE / "language_model"
REWARD_MODEL = _HERE / "reward_model"
PREFERENCES = _HERE / "preferences.jsonl.gz"


def prompts(split: str = "train") -> list[str]:
    """
    :param split: ``"train"`` or ``"eval"``. :return: opening words.
    """
    rows = [json.loads(line) for line in (_HERE / "prompts.jsonl").read_text().splitlines()]
    known = sorted({row["split"] for row in rows})
    if split not in known:
        raise ValueError(f"Expected split to be one of {known}, got {split!r}.")
    return [row["prompt"] for row in rows if row["split"] == split]
