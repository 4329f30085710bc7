"""Train on a Ray cluster: several learners, or one learner beside servers of vLLM that write its texts.

    pip install ray
    python examples/ray_train.py --learners 8 --gpus 1 -- --algo grpo --n-episodes 256 --run-dir /shared/runs/mine
    python examples/ray_train.py --learners 8 --gpus 1 --fsdp -- --n-episodes 256 --run-dir /shared/runs/mine
    python examples/ray_train.py --servers 2 --serve "python -m vllm.entrypoints.openai.api_server --model MODEL" \\
        --gpus 1 -- --model MODEL --run-dir /shared/runs/mine

What follows `--` goes to `textrlhf train`. Ray finds the machines and starts the programs there, and that is all:
learners find each other as they do under `torchrun`, and servers are given to the learner by `--rollouts`. All machines
need the packages, and must see the directory of the run (servers also that of temporary files). Only the learners have
been run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence

import ray


class Program:
    """An actor: a program on one machine of the cluster, with the GPUs that Ray has given to it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def address(self) -> tuple[str, int]:
        """
        :return: of this machine, with a port that is free.
        """
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), int(free.getsockname()[1])

    def start(self, command: Sequence[str], variables: dict[str, str]) -> None:
        """
        :param command: what to run.
        :param variables: of its environment.
        """
        self._process = subprocess.Popen(command, env={**os.environ, **variables})

    def wait(self, ready: str | None = None) -> int:
        """Wait for the end of the program, or until it answers.

        :param ready: a URL, which the program answers when it is ready; None: its end is waited for.
        :return: its exit status; 0 as soon as it is ready.
        """
        assert self._process is not None
        while ready is not None and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(ready, timeout=5):  # it may not listen yet
                return 0
            time.sleep(1)
        return self._process.wait()

    def stop(self) -> None:
        """End the program, if it has not ended."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def train(options: argparse.Namespace) -> int:
    """Start servers and learners, and wait until the learners have ended.

    :param options: of the command line.
    :return: the largest exit status of a learner.
    :raises RuntimeError: if a server does not start.
    """
    program = ray.remote(Program).options(num_gpus=options.gpus, num_cpus=options.cpus)
    servers = [program.remote() for _ in range(options.servers)]
    learners = [program.remote() for _ in range(options.learners)]
    try:
        urls = [serve(server, options) for server in servers]
        arguments = [*(["--rollouts", ",".join(urls)] if urls else []), *options.arguments]
        host, port = ray.get(learners[0].address.remote())
        for rank, learner in enumerate(learners):
            variables = {"RANK": rank, "WORLD_SIZE": len(learners), "MASTER_ADDR": host, "MASTER_PORT": port}
            variables |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}  # Ray shows each program its own GPUs only
            if options.fsdp:
                variables |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": 2}
            command = [options.python, "-m", "agents.cli", "train", *arguments]
            ray.get(learner.start.remote(command, {name: str(value) for name, value in variables.items()}))
        # If one dies, the others find out and end by themselves.
        return max(abs(status) for status in ray.get([learner.wait.remote() for learner in learners]))
    finally:
        ray.get([of.stop.remote() for of in (*servers, *learners)])


def serve(server: ray.actor.ActorHandle, options: argparse.Namespace) -> str:
    """
    :param server: where it runs.
    :param options: of the command line.
    :return: the URL of a server that is ready.
    """
    host, port = ray.get(server.address.remote())
    command = [*shlex.split(options.serve), "--host", host, "--port", str(port)]
    # It takes new weights and new adapters from whoever can reach it.
    allowed = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    ray.get(server.start.remote(command, allowed))
    url = f"http://{host}:{port}"
    if status := ray.get(server.wait.remote(f"{url}/health")):
        raise RuntimeError(f"Expected a server at {url}, but it ended with {status}: its output says why.")
    return url


def main(arguments: Sequence[str] | None = None) -> int:
    """
    :param arguments: of the command line; by default the process's.
    :return: the exit status.
    """
    parser = argparse.ArgumentParser(description="Train on a Ray cluster.")
    parser.add_argument("--learners", type=int, default=1, help="processes that learn")
    parser.add_argument("--servers", type=int, default=0, help="programs that write the texts")
    parser.add_argument("--serve", default="", metavar="COMMAND", help="of a server; --host and --port are added")
    parser.add_argument("--gpus", type=float, default=0, help="of each process")
    parser.add_argument("--cpus", type=float, default=1, help="of each process")
    parser.add_argument("--fsdp", action="store_true", help="cut the weights up between the learners")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the packages")
    parser.add_argument("--address", default=None, help="of the cluster; by default one is found or started")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="-- and the options of `textrlhf train`")
    options = parser.parse_args(arguments)
    options.arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    ray.init(address=options.address, log_to_driver=True)
    try:
        return train(options)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
