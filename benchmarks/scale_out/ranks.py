"""What one process of a measurement does. ``python -m benchmarks.scale_out`` starts them, one by itself or several."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.algorithms.accelerate_engine import AccelerateEngine
from agents.algorithms.engine import Engine, launched
from agents.algorithms.fsdp_engine import FSDPEngine
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.snapshot import local, trained
from agents.rollouts.collector import collect_episodes
from agents.state import checkpoint
from benchmarks.models import gpt2_4m, word_prompts, words
from benchmarks.scale_out.trainings import SharedA2C, SharedGRPO, SharedPPO
from benchmarks.timing import alternate, seconds_of
from text_env.vector_env import TextVectorEnv

ENGINES = {"Engine": Engine, "AccelerateEngine": AccelerateEngine, "FSDPEngine": FSDPEngine}
ALGORITHMS: dict[str, tuple[type[OnPolicyAlgorithm], dict[str, Any], int]] = {
    "ppo": (SharedPPO, {"n_epochs": 2, "normalize_advantage": True}, 1),
    "grpo": (SharedGRPO, {"n_epochs": 2}, 4),
    "a2c": (SharedA2C, {"normalize_advantage": True}, 1),
}
UPDATES = 3
MINIBATCHES = 4


def even_and_long(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that tells texts apart: the share of even tokens, and a little for each token."""
    return [float(np.mean([token % 2 == 0 for token in ids])) + 0.01 * len(ids) for ids in completion_ids]


def new(algorithm: type[OnPolicyAlgorithm], options: dict[str, Any], group: int = 1, **more: Any) -> Any:
    """
    :param algorithm: its class.
    :param options: ``engine``, a name of :data:`ENGINES`, and the sizes ``episodes`` and ``response``.
    :param group: the number of texts of each prompt.
    :param more: arguments of the algorithm.
    :return: the algorithm on a random GPT-2 of 4 million parameters in float32, whose texts fill the budget, before any
        training.
    """
    env = TextVectorEnv(
        options["episodes"] // launched()[1],
        tokenizer=words(),
        prompts=word_prompts(),
        reward=even_and_long,
        max_prompt_tokens=16,
        max_new_tokens=options["response"],
        group_size=group,
        chat_template=False,
    )
    return type(algorithm.__name__, (algorithm,), {"engine_class": ENGINES[options["engine"]]})(
        "CausalLMPolicy",
        env,
        n_episodes=options["episodes"],
        batch_size=options["episodes"] // MINIBATCHES,
        learning_rate=1e-4,
        seed=0,
        device="cpu",
        policy_kwargs={"model": gpt2_4m()},
        **more,
    )


def weights(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Train on texts that begin by themselves in different places, and write the weights down.

    :param options: as for :func:`new`.
    :param directory: where they go.
    :return: of each algorithm, how long the texts of its last rollout were in this process.
    """
    lengths = {}
    for name, (algorithm, kwargs, group) in ALGORITHMS.items():
        model = new(algorithm, options, group, micro_batch_tokens=8 * options["response"], **kwargs)
        for update in range(UPDATES):
            model.learn(1, reset_num_timesteps=not update, log_interval=0)
        checkpoint.save(directory / f"{name}_{launched()[0]}", {"weights": model.policy.state_dict()})
        lengths[name] = model.buffer.lengths.tolist()
    return lengths


def memory(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    """
    :param options: as for :func:`new`.
    :param directory: not used.
    :return: how many bytes this process holds: just before the last step of an update, and during a rollout.
    """
    model = new(PPO, options, n_epochs=1)
    step, during = model.engine.step, {}

    def step_and_look() -> None:
        during["update"] = held(model)
        step()

    model.engine.step = step_and_look
    model.learn(1)
    during["rollout"] = held(model)
    return during


def held(model: PPO) -> dict[str, int]:
    """
    :param model: an algorithm.
    :return: the bytes of what is trained, by what they are. Memory that has several names counts once.
    """
    policies = (model.policy, model.engine.policy)
    parameters = {id(p): p for policy in policies for p in policy.parameters()}.values()
    states = model.policy.optimizer.state.values()
    kinds = {
        "weights": list(parameters),
        "gradient": [p.grad for p in trained(model.policy) if p.grad is not None],
        "moments": [x for state in states for x in state.values() if isinstance(x, torch.Tensor)],
    }
    return {kind: _bytes([local(x) for x in tensors]) for kind, tensors in kinds.items()}


def _bytes(tensors: list[torch.Tensor]) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def speed(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    """
    :param options: as for :func:`new`, and the number of ``iterations`` that count.
    :param directory: not used.
    :return: tokens per second of rollouts and of the learner, over all processes; and of several processes the seconds
        of what they do together.
    """
    model = new(PPO, options, n_epochs=1)
    logged: list[tuple[float, float]] = []
    for iteration in range(1 + options["iterations"]):  # the first one is slower
        model.learn(1, reset_num_timesteps=not iteration, log_interval=0)
        now = model.logger.name_to_value
        logged.append((now["time/tokens_per_second"], now["time/update_tokens_per_second"]))
    rollout, learner = np.median(logged[1:], axis=0).tolist()
    together = {}
    engine = model.engine
    if isinstance(engine, FSDPEngine):
        together = {"shard": engine.shard, "unshard": engine.unshard}
    elif isinstance(engine, AccelerateEngine):
        together = {"reduce": engine._reduce}
        for parameter in trained(model.policy):  # an update has let go of them
            parameter.grad = torch.zeros_like(parameter)
    seconds = {name: [seconds_of(do)[0] for _ in range(5)] for name, do in together.items()}
    return {
        "rollout": rollout,
        "learner": learner,
        "seconds": {name: float(np.median(times)) for name, times in seconds.items()},
    }


def decode(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    """
    :param options: as for :func:`new`, and the number of ``iterations`` that count.
    :param directory: not used.
    :return: tokens per second of this process when all weights are fetched before a rollout, and when FSDP fetches them
        for each token of all texts.
    """
    model = new(PPO, options, n_epochs=1)
    engine, share = model.engine, options["episodes"] // launched()[1]
    cut_up, evaluate = engine.policy, engine.policy.evaluate
    cut_up.write = functools.partial(evaluate.func, *evaluate.args[:-1], cut_up.write)  # by way of FSDP, as `evaluate`

    def written_by(policy: Any) -> int:
        policy.clear_cache()
        return sum(episode["length"] for episode in collect_episodes(policy, model.vector_env, share, model.buffer))

    def at_once() -> int:
        engine.unshard()
        return written_by(model.policy)

    def for_each_token() -> int:
        return written_by(cut_up)

    speeds = alternate({"at_once": at_once, "for_each_token": for_each_token}, options["iterations"])
    return {name: float(np.median(of)) for name, of in speeds.items()}


JOBS = {job.__name__: job for job in (weights, memory, speed, decode)}


def main(jobs: str, directory: Path, options: dict[str, Any]) -> None:
    """
    :param jobs: names of :data:`JOBS`, with commas.
    :param directory: where their results go, a file for each process.
    :param options: of the jobs.
    """
    torch.set_num_threads(1)
    results = {job: JOBS[job](options, directory) for job in jobs.split(",")}
    (directory / f"rank_{launched()[0]}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
