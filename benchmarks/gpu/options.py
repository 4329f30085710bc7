"""What ``python -m benchmarks.gpu`` can be told, and what it does where it isn't told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Part = Literal["tests", "precision", "determinism", "throughput", "profile", "ppo", "demo"]
Shape = Literal["135m", "0.5b", "2m", "tiny"]

SHARES: dict[Part, float] = {
    "tests": 0.15,
    "precision": 0.08,
    "determinism": 0.08,
    "throughput": 0.4,
    "profile": 0.12,
    "ppo": 0.15,
    "demo": 0.25,
}
"""The parts in their order, and how much of the time each may take; what one leaves over belongs to the others."""


@dataclass
class Options:
    """What this machine's accelerator makes of rollouts, updates and a whole training, beside its peers; without one,
    what its processor does, on smaller models.
    """

    out: Path = Path("benchmarks/results/gpu")
    """The directory of the report, whose files are named after the device."""
    parts: tuple[Part, ...] = tuple(SHARES)
    """What is measured, in this order. Each part has a process of its own and a share of the time."""
    minutes: float = 9.5
    """The time for everything. What doesn't fit is left out, and the report says so."""
    device: str | None = None
    """'cuda', 'cpu', …; by default CUDA if there is any."""
    models: tuple[Shape, ...] | None = None
    """Shapes of random Llamas; by default 135m and 0.5b on CUDA and 2m elsewhere."""
    rows: tuple[int, ...] | None = None
    """How many texts are written side by side; by default 64 and 512 on CUDA and 16 elsewhere."""
    prompt: int | None = None
    """Tokens of a prompt; by default 128 on CUDA and 16 elsewhere."""
    response: int | None = None
    """Tokens of a response; by default 256 on CUDA and 32 elsewhere."""
    repeats: int = 5
    """Timed rounds, as far as the time allows."""
    demo_tokens: int = 80_000
    """Tokens that the demo is trained with."""
    quick: bool = False
    """Everything once, on the first model and with few tokens, to see whether it works."""

    def resolved(self) -> Options:
        """
        :return: the same with nothing left open.
        """
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        cuda = torch.device(device).type == "cuda"
        changes: dict[str, object] = {"device": device}
        defaults: dict[str, object] = {
            "models": ("135m", "0.5b") if cuda else ("2m",),
            "rows": (64, 512) if cuda else (16,),
            "prompt": 128 if cuda else 16,
            "response": 256 if cuda else 32,
        }
        if self.quick:
            defaults |= {"models": ("135m",) if cuda else ("2m",), "rows": (64,) if cuda else (8,), "response": 32}
            changes |= {"repeats": 1, "demo_tokens": min(self.demo_tokens, 4_000)}
        changes |= {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
