"""What ``python -m benchmarks.gpu`` can be told, and what it does where it isn't told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

Part = Literal["tests", "precision", "determinism", "throughput", "profile", "ppo", "demo"]
Shape = Literal["135m", "0.5b", "2m", "tiny"]


class Stage(NamedTuple):
    """Something that is measured in one go.

    :param part: what it belongs to.
    :param which: its number within that part.
    :param seconds: how long it may take of ``FULL_MINUTES``.
    """

    part: Part
    which: int
    seconds: float


FULL_MINUTES = 9.5
ORDER = (
    Stage("precision", 0, 45),
    Stage("throughput", 0, 230),
    Stage("ppo", 0, 120),
    Stage("throughput", 1, 70),
    Stage("tests", 0, 90),
    Stage("throughput", 2, 130),
    Stage("demo", 0, 100),
    Stage("profile", 0, 70),
    Stage("determinism", 0, 40),
    Stage("throughput", 3, 130),
    Stage("throughput", 4, 130),
    Stage("demo", 1, 120),
)
"""What matters most comes first: the limits add up to more than there is, and what is last is left out first."""
PARTS: tuple[Part, ...] = tuple(dict.fromkeys(stage.part for stage in ORDER))


@dataclass
class Options:
    """What this machine's accelerator makes of rollouts, updates and a whole training, beside its peers; without one,
    what its processor does, on smaller models.
    """

    out: Path = Path("benchmarks/results/gpu")
    """The directory of the report, whose files are named after the device and what is measured otherwise."""
    parts: tuple[Part, ...] = PARTS
    """What is measured; in which order, and how long each may take, is fixed."""
    minutes: float = FULL_MINUTES
    """The time for everything. What doesn't fit is left out, and the report says so."""
    device: Literal["cuda", "cpu"] | None = None
    """By default CUDA if there is any; CUDA_VISIBLE_DEVICES chooses among several GPUs."""
    models: tuple[Shape, ...] | None = None
    """Shapes of random Llamas; by default 135m and 0.5b on CUDA and 2m elsewhere."""
    rows: tuple[int, ...] | None = None
    """How many texts are written side by side, for updates a multiple of 4; by default 64 and 512 on CUDA, else 16."""
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

    def stages(self) -> list[Stage]:
        """
        :return: what is to be measured, in its order, each with the seconds that it may take.
        """
        models, rows = self.models or (), self.rows or ()
        numbers = {"throughput": len(models) * len(rows) + 1, "demo": 2 if self.device and "cuda" in self.device else 1}
        known = [stage for stage in ORDER if stage.which < numbers.get(stage.part, 1)]
        more = [Stage("throughput", which, 130) for which in range(5, numbers["throughput"])]
        factor = self.minutes / FULL_MINUTES
        return [stage._replace(seconds=factor * stage.seconds) for stage in [*known, *more] if stage.part in self.parts]
