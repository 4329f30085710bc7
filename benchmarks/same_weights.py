"""Does this commit train to the same weights as another one?

    python -m benchmarks.same_weights BASE

checks BASE out beside this tree, trains PPO, A2C, REINFORCE, RLOO, GRPO, Stable-Baselines3's own PPO and the run of the
demo for three iterations in both, with the same seed, and compares the policies' weights after each iteration: equal to
the last bit, or how far apart. Only public names are used, so that any two commits can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ITERATIONS = 3
CLOSE = 1e-5
"""How far apart weights may be after the first iteration that differs, where a forward pass has another shape."""


# ---- in either tree ------------------------------------------------------------------------------------------------


def learners(seed: int) -> dict[str, Callable[[], tuple[Any, int]]]:
    """
    :param seed: seed of every learner.
    :return: for each name a function that makes the learner and says how many tokens are at least ``ITERATIONS``.
    """
    import stable_baselines3 as sb3

    from agents import A2C, GRPO, PPO, REINFORCE, RLOO, CausalLMPolicy, make_vec_env

    def ours(algorithm: type[Any], **kwargs: Any) -> Callable[[], tuple[Any, int]]:
        def make() -> tuple[Any, int]:
            options = {"n_episodes": 16, "seed": seed, "device": "cpu", **kwargs}
            return algorithm("CausalLMPolicy", "TextRLHF-v0", policy_kwargs={"model": "builtin"}, **options), 10**9

        return make

    def stock() -> tuple[Any, int]:
        env = make_vec_env("TextRLHF-v0", n_envs=8)
        kwargs: dict[str, Any] = {"n_steps": 16, "batch_size": 64, "n_epochs": 2, "learning_rate": 1e-4}
        policy_kwargs = {"model": "builtin"}
        return sb3.PPO(CausalLMPolicy, env, policy_kwargs=policy_kwargs, seed=seed, device="cpu", **kwargs), 10**9

    return {
        "ppo": ours(PPO, batch_size=8, n_epochs=2),
        "a2c": ours(A2C),
        "reinforce": ours(REINFORCE),
        "rloo": ours(RLOO),
        "grpo": ours(GRPO),
        "sb3-ppo": stock,
    }


def train(name: str, out: Path, iterations: int, seed: int) -> None:
    """Train one learner and leave its weights after each iteration.

    :param name: one of :func:`learners`.
    :param out: directory for ``<name>-<iteration>.safetensors``.
    :param iterations: how many.
    :param seed: seed of the learner.
    """
    from safetensors.torch import save_file
    from stable_baselines3.common.callbacks import BaseCallback

    class Weights(BaseCallback):
        iteration = 0

        def _on_step(self) -> bool:
            return self.iteration <= iterations

        def _on_rollout_start(self) -> None:
            if self.iteration:
                state = {key: x.detach().clone() for key, x in self.model.policy.state_dict().items()}
                save_file(state, out / f"{name}-{self.iteration}.safetensors")
            self.iteration += 1

    learner, tokens = learners(seed)[name]()
    learner.learn(tokens, callback=Weights())


def demo(out: Path, iterations: int, seed: int) -> None:
    """Run what ``textrlhf demo`` trains, a few iterations of it, and leave the weights.

    :param out: directory for ``demo-<iterations>.safetensors``.
    :param iterations: how many.
    :param seed: seed of the run.
    """
    from agents.cli import main

    run = out / "demo"
    # A rollout is 64 texts of at most 48 tokens; they end by themselves at about 41.
    tokens = 64 * 48 * (iterations - 1)
    options = ["--total-timesteps", str(tokens), "--seed", str(seed), "--device", "cpu", "--no-progress"]
    assert main(["train", "--run-dir", str(run), *options]) == 0
    (run / "policy" / "model.safetensors").rename(out / f"demo-{iterations}.safetensors")


def worker(names: list[str], out: Path, iterations: int, seed: int, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)  # with several the order of additions, and the last digits, depend on the machine
    for name in names:
        if name == "demo":
            demo(out, iterations, seed)
        else:
            train(name, out, iterations, seed)


# ---- both trees ----------------------------------------------------------------------------------------------------


def compare(base: Path, ours: Path, names: list[str], iterations: int) -> dict[str, dict[str, float]]:
    """
    :param base: directory of the other tree's weights.
    :param ours: directory of this tree's.
    :param names: of the learners.
    :param iterations: how many there were, of which a demo leaves the last one's weights alone.
    :return: for each learner the largest difference of any weight after each iteration.
    :raises FileNotFoundError: if one of them has left no weights.
    """
    from safetensors.torch import load_file

    found: dict[str, dict[str, float]] = {}
    for name in names:
        for iteration in range(iterations if name == "demo" else 1, iterations + 1):
            before, after = (load_file(tree / f"{name}-{iteration}.safetensors") for tree in (base, ours))
            assert before.keys() == after.keys(), sorted(before.keys() ^ after.keys())
            difference = max(float((before[key].double() - after[key].double()).abs().max()) for key in before)
            found.setdefault(name, {})[str(iteration)] = difference
    return found


def verdict(differences: dict[str, float]) -> str:
    """
    :param differences: of one learner, by iteration, the first one first.
    :return: in words.
    """
    # What comes after the first difference says little: a token that flips changes everything after it.
    first = next(filter(None, differences.values()), 0.0)
    return "the same bits" if not first else "close" if first <= CLOSE else "different"


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--learners", nargs="+", default=["ppo", "a2c", "reinforce", "rloo", "grpo", "sb3-ppo", "demo"])
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, nargs=2, default=[1, 1], help="of the other commit, and of this tree")
    parser.add_argument("--json", type=Path, help="write the differences here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.worker is not None:
        worker(options.learners, options.worker, options.iterations, options.seed, options.threads[0])
        return 0
    if options.iterations < 1:
        parser.error(f"Expected at least one iteration, got {options.iterations}.")
    from benchmarks.commits import ROOT, checked_out, commit_of, run_in  # which the other tree may not have
    from benchmarks.provenance import provenance

    origin = provenance("benchmarks.same_weights", args)
    commit = commit_of(options.base)
    with checked_out(commit) as other, tempfile.TemporaryDirectory() as scratch:
        directories = []
        for tree, threads in zip((other, ROOT), map(str, options.threads), strict=True):
            out = Path(scratch) / f"weights-{len(directories)}"
            out.mkdir()
            directories.append(out)
            # This file runs in both, but each on its own packages.
            command = [str(Path(__file__).resolve()), commit, "--worker", str(out), "--learners", *options.learners]
            command += ["--iterations", str(options.iterations), "--seed", str(options.seed)]
            run_in(tree, [*command, "--threads", threads, threads])
        differences = compare(*directories, options.learners, options.iterations)
    for name, values in differences.items():
        print(f"{name:10} {verdict(values):14} {', '.join(f'{i}: {x:.1e}' for i, x in sorted(values.items()))}")
    if options.json is not None:
        given = {name: getattr(options, name) for name in ("learners", "iterations", "seed", "threads")}
        result = {**origin, "base": commit, **given, "differences": differences}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if any(verdict(values) == "different" for values in differences.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
