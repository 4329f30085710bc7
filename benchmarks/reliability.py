"""What runs and their checkpoints survive: damaged files, strange algorithms and environments, processes that die, full
disks.

python -m benchmarks.reliability [PART ...] --json FILE

Parts, all of them by default:

damages       every damage of ``benchmarks.faults`` to the newest checkpoint of a run: refused, by the name of the file,
              and the checkpoint before it is taken
strangers     checkpoints loaded by another algorithm, and in other environments: refused, by the name of what differs
killed        SIGKILL before every call by which a save changes files: the old checkpoint or the new one loads
limited       no file grows beyond n bytes, for all multiples of --step up to the largest file: the old one loads, and
              no half is left
system-calls  the same by strace: SIGKILL before every system call by which files are opened or changed, and "no space
              left" from each on that writes, makes directories, links or renames
sigkill       SIGKILL at random moments of ``textrlhf train``, then ``train --resume``: the end is the same, bit for bit
soak          half an hour of ``textrlhf train``: the resident memory at the end beside that of minute three

After each part its figures are written, in place of those that the file has of it already; the others stay.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config

from agents.algorithms.a2c import A2C
from agents.algorithms.dapo import DAPO
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.algorithms.vineppo import VinePPO
from benchmarks.faults import at_every_system_call, examine_damages, killed_at_every_call, too_large_at_every_size
from benchmarks.kills import kill_runs
from benchmarks.provenance import provenance
from benchmarks.soak import soak
from text_env.constraints import ForbiddenTokens
from text_env.vector_env import TextVectorEnv

ALGORITHMS: tuple[type[OnPolicyAlgorithm], ...] = (PPO, A2C, REINFORCE, RLOO, GRPO, DAPO, VinePPO)


def make_env(**settings: Any) -> TextVectorEnv:
    """
    :param settings: settings that differ from the usual ones.
    :return: an environment of short texts.
    """
    return TextVectorEnv(4, **{"max_prompt_tokens": 16, "max_new_tokens": 4, "group_size": 2, **settings})


def make_run(algorithm: type[OnPolicyAlgorithm] = PPO) -> OnPolicyAlgorithm:
    """
    :param algorithm: the class of the algorithm.
    :return: an algorithm with a random model of a few thousand weights.
    """
    env = make_env()
    sizes = {"vocab_size": env.episodes.vocabulary, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 32}
    policy_kwargs = {"model": GPT2Config(**sizes, bos_token_id=None, eos_token_id=env.eos_token_ids[0])}
    return algorithm("CausalLMPolicy", env, policy_kwargs=policy_kwargs, n_episodes=4, seed=0, device="cpu")


def examine_run(work: Path, flips: int) -> dict[str, Any]:
    """
    :param work: an empty directory.
    :param flips: the number of flipped bits in each file.
    :return: what :func:`benchmarks.faults.examine_damages` says of checkpoints of PPO, one iteration apart.
    """
    run = make_run()

    def save(number: int, path: Path) -> None:
        run.learn(1, reset_num_timesteps=number == 1)
        run.save(path)

    return examine_damages(work, save, flips)


def examine_strangers(work: Path) -> dict[str, Any]:
    """
    :param work: an empty directory.
    :return: the number of cases, and those that were accepted or whose error doesn't name what differs.
    """
    model = {"model": make_run().policy_kwargs["model"]}
    cases: list[tuple[str, str, Callable[[], Any]]] = []
    for saver in ALGORITHMS:
        make_run(saver).save(work / saver.__name__)
        for loader in ALGORITHMS:
            if loader is not saver:
                load = partial(loader.load, work / saver.__name__, make_env(), policy_kwargs=model, device="cpu")
                cases.append((f"{saver.__name__} by {loader.__name__}", f"use {saver.__name__}.load", load))
    for name, value in (
        ("max_prompt_tokens", 17),
        ("max_new_tokens", 5),
        ("min_new_tokens", 2),
        ("stop", "."),
        ("constraint", ForbiddenTokens([5])),
        ("reward", "length(4)"),
        ("group_size", 4),
    ):
        load = partial(PPO.load, work / "PPO", make_env(**{name: value}), policy_kwargs=model, device="cpu")
        cases.append((name, f"{name} was ", load))
    wrong = []
    for case, named, load in cases:
        try:
            load()
            wrong.append(f"{case}: accepted")
        except ValueError as error:
            if named not in str(error):
                wrong.append(f"{case}: {error}")
    return {"cases": len(cases), "wrong": wrong}


def measure(
    parts: Sequence[str], work: Path, flips: int, step: int, kills: int = 50, minutes: float = 30.0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    :param parts: names of parts.
    :param work: an empty directory.
    :param flips: the number of flipped bits in each file.
    :param step: limits of file sizes are multiples of this, in bytes.
    :param kills: the number of kills of a whole run.
    :param minutes: the length of the soak.
    :return: each part with its figures, as soon as it is measured.
    """
    measured: dict[str, Callable[[Path], dict[str, Any]]] = {
        "damages": lambda path: examine_run(path, flips),
        "strangers": examine_strangers,
        "killed": killed_at_every_call,
        "limited": lambda path: too_large_at_every_size(path, step),
        "system-calls": lambda path: {
            "killed": at_every_system_call(path / "killed", killed=True),
            "disk full": at_every_system_call(path / "full", killed=False),
        },
        "sigkill": lambda path: kill_runs(path, kills),
        "soak": lambda path: soak(path, minutes),
    }
    for part in parts:
        (work / part).mkdir()
        yield part, measured[part](work / part)


PARTS = ("damages", "strangers", "killed", "limited", "system-calls", "sigkill", "soak")


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--flips", type=int, default=24, help="flipped bits in each file")
    parser.add_argument("--step", type=int, default=16, help="limits of file sizes are multiples of this, in bytes")
    parser.add_argument("--kills", type=int, default=50, help="kills of a whole run")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the soak")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"Expected parts among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}.")
    origin = provenance("benchmarks.reliability", args)
    with tempfile.TemporaryDirectory() as work:
        measured = (options.parts or PARTS, Path(work), options.flips, options.step, options.kills, options.minutes)
        for part, figures in measure(*measured):
            print(part, json.dumps(figures, indent=1), flush=True)
            if options.json is not None:
                before = json.loads(options.json.read_text()) if options.json.exists() else {}
                results = {**before, part: {**origin, "figures": figures}}
                options.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # processes are forked
    sys.exit(main())
