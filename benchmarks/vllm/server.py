"""A server of vLLM as a process, started as docs/engines.md says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
"""The interpreter that benchmarks/vllm/install.sh makes."""
STARTING_SECONDS = 600.0
"""How long a server may take until it answers; two or three minutes are usual on two cores."""
ESTABLISHED = "01"  # in /proc/net/tcp


class Server:
    """A server that can be killed, and started again at the same address.

    :param model: the directory of a model.
    :param log: the file that its output is appended to.
    :param max_model_len: the number of tokens of the longest text, prompt included.
    :param options: further options of its command line.
    :param threads: the number of its threads.
    """

    def __init__(self, model: Path, log: Path, max_model_len: int, options: tuple[str, ...] = (), threads: int = 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [
            *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.resolve())),
            *("--served-model-name", "base", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "float32", "--max-model-len", str(max_model_len)),
            *("--logprobs-mode", "processed_logprobs", "--enforce-eager", *options),
        ]
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
        }
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, without waiting for it."""
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                cwd=self.log.parent,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def wait(self) -> float:
        """Wait until it answers.

        :return: the seconds that took.
        :raises RuntimeError: if it has ended instead.
        :raises TimeoutError: if it takes too long.
        """
        assert self.process is not None
        start = time.monotonic()
        while time.monotonic() < start + STARTING_SECONDS:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server has ended: {self.log.read_text(errors='replace')[-2000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return time.monotonic() - start
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise TimeoutError(f"The server at {self.url} did not answer within {STARTING_SECONDS:g} seconds: {self.log}.")

    def kill(self) -> None:
        """End it and the processes that it has started, at once."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def open_requests(url: str) -> int:
    """
    :param url: the address of a server on this machine.
    :return: the number of connections to it that are open (Linux): as many requests it has not answered yet.
    """
    port = urllib.parse.urlsplit(url).port
    connections = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(remote.endswith(f":{port:04X}") and state == ESTABLISHED for _, _, remote, state, *_ in connections)


def untied(model: Path, directory: Path) -> Path:
    """Copy a model such that its head is a matrix of its own, if it shares that with the embedding.

    On CPUs vLLM 0.32 packs the head's weights once, when it starts. ``reload_weights`` packs them again where the file
    has a matrix for the head, and leaves a shared one as it was.

    :param model: the directory of a model.
    :param directory: where the copy goes, together with the tokenizer; left alone if it is there already.
    :return: the directory of the model to serve.
    """
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    head = loaded.get_output_embeddings()
    if head.weight is not loaded.get_input_embeddings().weight:
        return model
    if not (directory / "tokenizer_config.json").exists():
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        loaded.config.tie_word_embeddings = False
        loaded.save_pretrained(directory)
        AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return directory


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """
    :param server: a server.
    :return: a context manager, within which it runs.
    """
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def version() -> str:
    """
    :return: the version of vLLM in its environment.
    """
    [found] = (PYTHON.parent.parent / "lib").glob("python*/site-packages/vllm*.dist-info")
    return found.name.removesuffix(".dist-info").replace("-", " ")
