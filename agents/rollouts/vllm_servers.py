"""Servers of vLLM as a backend: token ids in, token ids and log-probabilities out, over HTTP.

A server is vLLM's own (``python -m vllm.entrypoints.openai.api_server``); nothing of this package runs in it, and vLLM
need not be installed here. ``docs/engines.md`` says how one is started. These requests are used:

- ``GET /v1/models``: which model is served, and how long its contexts may be.
- ``GET /metrics``: when the server was started, so that one that has lost its weights is noticed.
- ``POST /v1/completions``, with token ids for a prompt: one request a text, each with its own seed.
- ``POST /collective_rpc`` with ``reload_weights`` and ``POST /reset_prefix_cache``: new weights, out of a directory.
- ``POST /v1/load_lora_adapter`` and ``POST /v1/unload_lora_adapter``: a new adapter, out of a directory.

A server that dies is tried again a few times and then left out. Its unfinished texts are written by the others, from
their beginning; so are those at which a server fails that answers all else. Whenever there are new weights, or nobody
is left, those that were left out are asked whether they are back, and given the weights before they write again. If
nobody comes back in time, the error says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from http.client import HTTPException
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import save_file
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential
from transformers.utils import logging as transformers_logging

from agents.models.adapter import ADAPTER
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.backend import Continuation, Request, Sampling
from agents.rollouts.continuations import in_background
from text_env.http_reward import QUOTED
from text_env.imports import is_address

logger = logging.getLogger(__name__)

WAITS = (0.5, 1.0)
"""Seconds before a server at which a request has failed is asked again whether it takes the weights, after the first
time. Then it is left out."""
TRIES = 4
"""How often a text is asked for, of whichever server, until it is clear that servers fail because of it."""
MOST_REQUESTS = 256
"""The number of texts that all servers together write at a time. What is more waits here and not in a server."""
GREETING_SECONDS = 10.0
"""How long a server may take to say which model it has."""
FORBIDDEN = -100.0
"""The bias of a logit that must not be sampled, the lowest that vLLM takes; its exponential is 4e-44."""
LARGEST_ANSWER = 2**26
"""The number of characters of the longest answer that is read."""
HINTS = {
    "/collective_rpc": "Start the server with VLLM_SERVER_DEV_MODE=1 in its environment, or train an adapter.",
    "/v1/load_lora_adapter": "Start the server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment and with "
    "--enable-lora and --max-lora-rank of at least the adapter's rank.",
}
"""What to do when a server refuses a request, by the path."""


class NoServerLeft(ConnectionError):
    """None of the servers answers any more."""


class VllmServers:
    """One or several servers of vLLM that serve the same model.

    :param urls: their addresses, such as ``"http://localhost:8000"``; several in one string are separated by commas.
    :param directory: where weights are written for the servers to read, which therefore must all see it. None: a
        temporary directory (in ``TMPDIR``, if that is set).
    :param timeout: seconds without a byte from a server after which a request ends. A text must be written in that
        time.
    :param patience: seconds that a server may take to come back if there is no other.
    :raises ValueError: if an address is none.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        directory: str | Path | None = None,
        timeout: float = 600.0,
        patience: float = 600.0,
    ) -> None:
        addresses = [url.strip().rstrip("/") for url in (urls.split(",") if isinstance(urls, str) else urls)]
        if not addresses or not all(map(is_address, addresses)) or len(set(addresses)) < len(addresses):
            raise ValueError(
                "Expected the addresses of servers of vLLM, each once, such as 'http://localhost:8000' or "
                f"'http://one:8000,http://two:8000', got {urls!r}."
            )
        self.name = f"textrlhf-{uuid.uuid4().hex[:8]}"  # of the adapters, since others may use the same servers
        self._patience = patience
        self._servers = [_Server(address, timeout) for address in addresses]
        self._directory = Path(tempfile.mkdtemp(prefix="textrlhf-") if directory is None else directory)
        if directory is None:
            weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._weights: _Weights | None = None
        self._numbers = count(1)  # of the weights that have been written
        self._lock = threading.Lock()  # over who writes what
        self._waits = False  # whether nobody is there, which has been said
        self._slots = threading.BoundedSemaphore(MOST_REQUESTS)

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Continuation]:
        """As the protocol says.

        :param requests: the contexts.
        :param sampling: how to sample.
        :return: their continuations.
        :raises ValueError: if a server says that a request is wrong, or answers with something else than asked for.
        :raises NoServerLeft: if nobody is there to write.
        """
        if self._weights is None:
            raise ValueError("Expected take_weights() before write(): what the servers were started with is not known.")
        body = sampling_parameters(sampling)
        with self._lock:
            for server in self._servers:
                if server.is_live and server.was_restarted():
                    self._load(server)
        futures = [in_background(partial(self._text, request, sampling, body)) for request in requests]
        return [future.result() for future in futures]

    def take_weights(self, policy: CausalLMPolicy, version: int) -> None:
        """As the protocol says.

        :param policy: the policy.
        :param version: the number of its weights.
        :raises ValueError: if a server refuses them.
        :raises NoServerLeft: if nobody is there to take them.
        """
        # Not by their version, which is the same again if a training goes on from an earlier state, or another begins.
        directory = self._directory / f"{self.name}-{next(self._numbers)}"
        before, self._weights = self._weights, _saved(policy, version, directory)
        with self._lock:
            for loaded in [in_background(partial(self._load, server)) for server in self._servers]:
                loaded.result()
        self._done(self._server())  # waits, if there is none
        if before is not None:
            shutil.rmtree(before.directory, ignore_errors=True)

    def _text(self, request: Request, sampling: Sampling, body: dict[str, Any]) -> Continuation:
        """The continuation of one context, by whichever server gets it done."""
        assert self._weights is not None
        body = {**body, "prompt": request.token_ids, "seed": request.seed}
        body["max_tokens"] = sampling.max_new_tokens - request.step
        if request.step < sampling.min_new_tokens:
            body["min_tokens"] = sampling.min_new_tokens - request.step
        failed: list[tuple[_Server, str]] = []
        with self._slots:
            while len(failed) < TRIES:
                server = self._server([at for at, _ in failed])
                loads = server.loads
                try:
                    server.check(sampling)
                    answer = server.ask("/v1/completions", {"model": self._weights.name or server.model, **body})
                    return _continuation(answer, server.url, self._weights.version)
                except _Unreachable as error:
                    failed.append((server, str(error)))
                    self._look_after(server, loads)
                finally:
                    self._done(server)
        raise NoServerLeft(f"A text could not be written in {TRIES} attempts: {'; '.join(said for _, said in failed)}.")

    def _server(self, failed: Sequence[_Server] = ()) -> _Server:
        """The server with the least to do, to which one more text is counted.

        :param failed: servers that have failed at this text, which are asked again only if there are no others. One
            that fails at once has nothing to do, and would get it again and again.
        :return: the server.
        :raises NoServerLeft: if there is none.
        """

        def pick() -> _Server:
            with self._lock:
                if not any(server.is_live for server in self._servers):
                    for server in self._servers:
                        self._load(server)
                live = [server for server in self._servers if server.is_live]
                if not live:
                    causes = "; ".join(f"{server.url}: {server.cause}" for server in self._servers)
                    message = f"No server of vLLM answers ({causes}). Start one at its address."
                    if self._patience and not self._waits:
                        logger.warning("%s This waits for it, for %g s at the longest.", message, self._patience)
                    self._waits = True
                    raise NoServerLeft(message)
                self._waits = False
                least = min(live, key=lambda server: (failed.count(server), server.busy))
                least.busy += 1
                return least

        return Retrying(
            retry=retry_if_exception_type(NoServerLeft),
            stop=stop_after_delay(self._patience),
            wait=wait_exponential(0.5, max=10),
            reraise=True,
        )(pick)

    def _done(self, server: _Server) -> None:
        with self._lock:
            server.busy -= 1

    def _look_after(self, server: _Server, loads: int) -> None:
        """A request has failed. The server may have been started anew, so it writes again only with the weights.

        :param server: the server.
        :param loads: how often it had been given weights before the request.
        """
        with server.lock:
            if not server.is_live or server.loads != loads:  # for another request somebody has done so already
                return
            for wait in (0.0, *WAITS):
                time.sleep(wait)
                self._load(server)
                if server.is_live:
                    return
            logger.warning("%s is left out, and its texts are written by others: %s", server.url, server.cause)

    def _load(self, server: _Server) -> None:
        """Give a server the weights, and let it write if it takes them."""
        assert self._weights is not None
        with server.lock:
            try:
                server.load(self._weights)
            except _Unreachable as error:
                server.is_live, server.cause = False, str(error)


class _Weights(NamedTuple):
    """Weights in a directory.

    :param directory: the directory.
    :param version: their number.
    :param name: the name of the adapter that they are; None: they are a whole model's.
    """

    directory: Path
    version: int
    name: str | None


def _saved(policy: CausalLMPolicy, version: int, directory: Path) -> _Weights:
    """Write the weights of a policy to a new directory."""
    directory.mkdir(parents=True)
    adapter = policy.lm.adapter
    if adapter is not None:
        adapter.wrapper.save_pretrained(str(directory), selected_adapters=[ADAPTER])
        return _Weights(directory, version, directory.name)
    model = policy.lm.model
    with _no_progress_bar():
        model.save_pretrained(directory)
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        # Tied weights are saved once. A server whose head is a matrix of its own needs them twice.
        name = next(name for name, module in model.named_modules() if module is head)
        save_file({f"{name}.weight": head.weight.detach().clone()}, directory / "head.safetensors")
        index = directory / "model.safetensors.index.json"
        if index.exists():
            content = json.loads(index.read_text())
            content["weight_map"][f"{name}.weight"] = "head.safetensors"
            index.write_text(json.dumps(content))
    return _Weights(directory, version, None)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Within it, transformers shows none: a file of weights is written in every iteration."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class _Unreachable(ConnectionError):
    """A server does not answer, or answers that it can't at the moment."""


class _Server:
    """One server, and what is known of it.

    :param url: its address.
    :param timeout: seconds without a byte after which a request ends.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url
        self._timeout = timeout
        self.model = ""  # what it calls the model that it was started with
        self.lock = threading.RLock()  # over its weights
        self.loads = 0  # how often it was given weights
        self.is_live = False  # whether it may write
        self.cause = "not asked yet"  # why not
        self.busy = 0  # the number of texts that it is writing
        self._adapter: str | None = None  # the latest one that it was given
        self._started: str | None = None  # when it was started, as it said when it was given weights
        self._longest = 0  # the number of tokens of the longest text that it can write, prompt included
        self._says_what_was_sampled = False  # whether its log-probabilities are those after temperature and masks

    def load(self, weights: _Weights) -> None:
        """Give the server weights, upon which it may write.

        :param weights: the weights.
        :raises _Unreachable: if it does not answer.
        :raises ValueError: if it refuses.
        """
        was_live, self.is_live = self.is_live, False
        self._started = self._start()  # before the weights: if it is started anew meanwhile, it gets them twice
        answer = self.ask("/v1/models", seconds=GREETING_SECONDS)
        with _as_vllm_says(self.url, "the models that it serves", answer):
            models = [(str(model["id"]), model.get("parent"), model["max_model_len"]) for model in answer["data"]]
            [(self.model, _, self._longest), *_] = [model for model in models if not model[1]]
            adapters = [name for name, parent, _ in models if parent]
        if weights.name is None:
            path = {"weights_path": str(weights.directory)}
            self.ask("/collective_rpc", {"method": "reload_weights", "kwargs": path})
            self.ask("/reset_prefix_cache", {})
        else:
            if weights.name not in adapters:
                self.ask("/v1/load_lora_adapter", {"lora_name": weights.name, "lora_path": str(weights.directory)})
            if self._adapter in adapters and self._adapter != weights.name:
                self.ask("/v1/unload_lora_adapter", {"lora_name": self._adapter})
            self._adapter = weights.name
        if not was_live:  # it may have been started anew, with other options
            only = {"model": self.model, "prompt": [0], "max_tokens": 1, "logprobs": 0, "allowed_token_ids": [1]}
            answer = self.ask("/v1/completions", only)
            with _as_vllm_says(self.url, "logprobs", answer):
                [choice] = answer["choices"]
                self._says_what_was_sampled = abs(choice["logprobs"]["token_logprobs"][0]) < 1e-3
        self.loads += 1
        self.is_live = True

    def was_restarted(self) -> bool:
        """
        :return: whether the server has been started anew since it was given weights, so that it has those of its start.
            A server that doesn't say when it was started, or doesn't answer, has not.
        """
        try:
            return self._start() not in (None, self._started)
        except _Unreachable:  # which is noticed when it is asked for a text
            return False

    def _start(self) -> str | None:
        """When the server was started, or None if it doesn't say."""
        try:
            said = self.ask("/metrics", seconds=GREETING_SECONDS)
        except ValueError:
            return None
        found = re.search(r"^process_start_time_seconds (\S+)", str(said), re.MULTILINE)
        return found and found[1]

    def check(self, sampling: Sampling) -> None:
        """
        :param sampling: how to sample.
        :raises ValueError: if the server, as it was started, can't do that.
        """
        if self._longest < sampling.max_length:
            raise ValueError(
                f"Expected {self.url} to write texts of {sampling.max_length} tokens, prompt included; it was started "
                f"for {self._longest}. Start it with --max-model-len {sampling.max_length}."
            )
        changed = sampling.temperature != 1 or sampling.min_new_tokens or sampling.allowed is not None
        if not self._says_what_was_sampled and (changed or sampling.n_logits > sampling.n_tokens):
            raise ValueError(
                f"Expected {self.url} to answer with the log-probabilities of the distribution that it samples from, "
                "after temperature, minimum length and constraint. Start it with --logprobs-mode processed_logprobs."
            )

    def ask(self, path: str, body: dict[str, Any] | None = None, seconds: float | None = None) -> Any:
        """One request.

        :param path: what is asked for.
        :param body: the JSON object that is posted; None: nothing is posted.
        :param seconds: as ``timeout``, which holds if it is None.
        :return: the answer, as JSON if it is JSON.
        :raises _Unreachable: if the server does not answer, answers with a status of 500 or more, or does not know an
            adapter that it was given, as after it was started anew.
        :raises ValueError: if it refuses the request.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=seconds or self._timeout) as response:
                said = response.read(LARGEST_ANSWER + 1).decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(QUOTED).decode("utf-8", "replace")
            message = f"{self.url}{path} answered with status {error.code}: {said!r}"
            if error.code >= 500 or (error.code == 404 and path == "/v1/completions"):
                raise _Unreachable(message) from error
            raise ValueError(f"{message}. {HINTS.get(path, '')}".strip()) from error
        except (OSError, HTTPException) as error:
            raise _Unreachable(f"{self.url}{path}: {error!r}") from error
        if len(said) > LARGEST_ANSWER:
            raise ValueError(f"Expected {self.url}{path} to answer with at most {LARGEST_ANSWER:,} bytes.")
        try:
            return json.loads(said) if said[:1] in ("{", "[") else said
        except json.JSONDecodeError as error:  # as when a server ends while it answers
            raise _Unreachable(f"{self.url}{path} has broken off its answer: {said[-QUOTED:]!r}") from error


@contextlib.contextmanager
def _as_vllm_says(url: str, what: str, answer: Any) -> Iterator[None]:
    """Within it an answer is read, and one that is put in another way is an error that says so.

    :param url: of the server.
    :param what: what it should have answered with.
    :param answer: what it did answer with.
    :raises ValueError: if the answer hasn't what is looked for.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected {url} to answer with {what}, as vLLM does from 0.10.2 on; got {str(answer)[:QUOTED]!r}."
        ) from error


def sampling_parameters(sampling: Sampling) -> dict[str, Any]:
    """What every completion asks for. All that a server could have defaults for is said.

    :param sampling: how to sample.
    :return: parameters of ``/v1/completions``.
    """
    parameters: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # The environment says which tokens end a text, and not the server's files.
        "ignore_eos": True,
        "stop_token_ids": list(sampling.eos_token_ids),
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
        "skip_special_tokens": False,
    }
    if sampling.stop:
        parameters |= {"stop": list(sampling.stop), "include_stop_str_in_output": True}
    if sampling.allowed is not None:
        parameters["allowed_token_ids"] = list(sampling.allowed)
    elif sampling.n_logits > sampling.n_tokens:  # logits that stand for no token
        parameters["logit_bias"] = {str(token): FORBIDDEN for token in range(sampling.n_tokens, sampling.n_logits)}
    return parameters


def _continuation(answer: Any, url: str, version: int) -> Continuation:
    """What a completion says."""
    with _as_vllm_says(url, "token_ids and logprobs", answer):
        [choice] = answer["choices"]
        token_ids = np.array(choice["token_ids"], dtype=np.int64)
        log_probs = np.array(choice["logprobs"]["token_logprobs"], dtype=np.float64)
    return Continuation(token_ids, log_probs, version)
