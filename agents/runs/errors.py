"""An error as a line for the terminal."""

from __future__ import annotations

import errno

import gymnasium as gym
import yaml
from safetensors import SafetensorError

from text_env.rewards import RewardError

# What a user can do something about. Anything else may be a mistake in the program.
EXPECTED = (
    *(ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError),
    *(RewardError, SafetensorError, yaml.YAMLError, gym.error.Error),
)


def described(error: BaseException) -> tuple[str, str]:
    """
    :param error: the error.
    :return: what kind of error it is, and a line about it, with what can be done.
    """
    message = " ".join(str(error).split())
    notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    name = type(error).__name__
    # PyTorch's errors are not imported for this: it would take seconds before a typing error is answered.
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in message:
        hint = "Use smaller micro-batches (--algo-kwargs micro_batch_tokens 2048), a smaller --n-episodes, or --lora-r."
        return "Out of memory", f"{message.rstrip('.') or 'there is none left'}. {hint}{notes}"
    if getattr(error, "errno", None) == errno.ENOSPC or "StorageFull" in message:
        hint = "Free some space. What was saved before is still there."
        return "Disk full", f"{message.rstrip('.')}. {hint}{notes}"
    if not isinstance(error, EXPECTED):
        notes += " (With --debug, the command says where this happened.)"
    return name, (message or "no message") + notes
