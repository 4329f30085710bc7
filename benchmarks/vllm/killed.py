"""A server that is killed while it writes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.backend import Continuation, Request, RolloutBackend, Sampling
from agents.rollouts.continuations import in_background
from benchmarks.vllm.server import Server, open_requests

WRITING = 0.2  # seconds of writing before the kill


class KilledWhileWriting:
    """A backend whose only server is killed once in the middle of its writing, and started again at once.

    :param backend: the backend, at lag 0, so that it is given weights before each rollout.
    :param server: its server.
    :param rollout: the rollout in which the server is killed, from 1.
    """

    def __init__(self, backend: RolloutBackend, server: Server, rollout: int) -> None:
        self._backend, self._server, self._rollout = backend, server, rollout
        self._rollouts = 0
        self.cut_off = 0  # the number of requests that the server was at when it was killed; 0: it was not

    def take_weights(self, policy: CausalLMPolicy, version: int) -> None:
        self._rollouts += 1
        self._backend.take_weights(policy, version)

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Continuation]:
        if self._rollouts != self._rollout or self.cut_off:
            return self._backend.write(requests, sampling)
        written = threading.Event()
        killed = in_background(partial(self._kill, written))
        try:
            return self._backend.write(requests, sampling)
        finally:
            written.set()
            killed.result()

    def _kill(self, written: threading.Event) -> None:
        while not written.wait(WRITING):
            if cut_off := open_requests(self._server.url):
                self._server.kill()
                self.cut_off = cut_off
                self._server.start()
                return
