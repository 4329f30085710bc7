"""What a run of the throughput benchmark measures, and how thoroughly."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.models import Subject, subject

Figures = dict[str, dict[str, Any]]


class Plan:
    """What is to be measured, and how thoroughly.

    :param args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.models: list[str] = args.models
        self.only: list[str] = args.only
        self.device = torch.device(args.device)
        self.threads: int = args.threads
        self.quick: bool = args.quick
        self.repeats: int = args.repeats or (5 if args.quick else 11)
        # A few of these take a minute each.
        self.slow_repeats: int = args.repeats or 5
        self.episodes: int = args.episodes
        self.response: int = args.response
        self.growth_episodes = min(16, self.episodes) if args.quick else self.episodes
        self.process_pairs = 1 if args.quick else 3

    def subject(self, name: str, device: torch.device | None = None) -> Subject:
        """
        :param name: of a model.
        :param device: another than the plan's.
        """
        return subject(name, device or self.device)._replace(episodes=self.episodes, response=self.response)

    def wants(self, *keys: str) -> bool:
        """Whether one of these is asked for."""
        return not self.only or any(key in self.only for key in keys)
