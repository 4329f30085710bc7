"""A memo of continuations: what a backend has written, handed out one token at a time.

To the loop between policy and environment it looks like a policy, a function of contexts. It remembers of each context
how it goes on, and asks the backend where it doesn't know. So an episode costs one request, unless the backend stopped
before the environment says that the text has ended: then the rest is one more request. What was written beyond the end
of a text is never asked for.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import torch

from agents.models.contexts import Contexts
from agents.rollouts.backend import Continuation, Request, RolloutBackend, Sampling

T = TypeVar("T")
# Continuations by the context that they follow.
Known = dict[bytes, deque[Continuation]]


class Continuations:
    """Writes what a backend has written.

    :param backend: the backend.
    :param sampling: how it must sample.
    """

    def __init__(self, backend: RolloutBackend, sampling: Sampling) -> None:
        self._backend = backend
        self._sampling = sampling
        self._known: Known = defaultdict(deque)
        self._ahead: Future[list[Continuation]] | None = None  # of contexts that nobody has asked about yet
        self._ahead_of: list[bytes] = []
        self.versions: list[int] = []  # of the weights that the tokens handed out were sampled from

    def write(self, contexts: Contexts, deterministic: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next token of each context, as ``CausalLMPolicy.write`` returns it.

        :param contexts: B contexts.
        :param deterministic: must be False, since a backend samples.
        :return: tokens int64 [B]; values [B, 1], which are 0, since a backend knows of none; log-probabilities float64
            [B], in nats.
        :raises ValueError: if ``deterministic``, or if the backend answered with something else than continuations.
        :raises ConnectionError: if nobody is there to write.
        """
        if deterministic:
            raise ValueError("Expected deterministic=False: a backend samples. Let the policy itself write greedily.")
        keys = _keys(contexts)
        left = {key: len(self._known[key]) for key in keys}
        missing = []
        for row, key in enumerate(keys):
            left[key] -= 1
            if left[key] < 0:
                missing.append(row)
        if missing:
            requests = _requests(contexts, missing)
            self._remember([keys[row] for row in missing], self._backend.write(requests, self._sampling))
        tokens, log_probs = np.zeros(len(keys), np.int64), np.zeros(len(keys))
        for row, key in enumerate(keys):
            continuation = self._known[key].popleft()
            if not self._known[key]:
                del self._known[key]
            tokens[row], log_probs[row] = continuation.token_ids[0], continuation.log_probs[0]
            self.versions.append(continuation.version)
            if len(continuation.token_ids) > 1:
                rest = Continuation(continuation.token_ids[1:], continuation.log_probs[1:], continuation.version)
                self._known[key + tokens[row].tobytes()].append(rest)
        return torch.from_numpy(tokens), torch.zeros(len(keys), 1), torch.from_numpy(log_probs)

    def write_ahead(self, contexts: Contexts) -> None:
        """Let the backend continue contexts about which nobody has asked yet, while something else is being done.

        :param contexts: B contexts.
        """
        requests = _requests(contexts, range(len(contexts.length)))
        self._ahead_of = _keys(contexts)
        self._ahead = in_background(lambda: self._backend.write(requests, self._sampling))

    def begin(self) -> None:
        """Begin a rollout: forget what was left over of the one before, and take in what was written ahead, for which
        this waits.

        :raises ConnectionError: if nobody was there to write ahead.
        """
        self._known.clear()
        self.versions.clear()
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._remember(self._ahead_of, ahead.result())

    def state(self) -> dict[str, Any]:
        """What was written ahead, for which this waits.

        :return: a tree for :mod:`agents.state.checkpoint`; empty if nothing was written ahead, or could be: then it is
            written when somebody asks for it.
        """
        if self._ahead is None or self._ahead.exception() is not None:
            return {}
        written = self._ahead.result()
        contexts = [np.frombuffer(key, np.int64) for key in self._ahead_of]
        return {
            "contexts": torch.from_numpy(np.concatenate(contexts)),
            "context_lengths": list(map(len, contexts)),
            "token_ids": torch.from_numpy(np.concatenate([one.token_ids for one in written])),
            "log_probs": torch.from_numpy(np.concatenate([one.log_probs for one in written])),
            "lengths": [len(one.token_ids) for one in written],
            "versions": [one.version for one in written],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """
        :param state: what :meth:`state` returned.
        """
        self._ahead = None
        if state:
            contexts, token_ids, log_probs = (
                np.split(state[name].numpy(), np.cumsum(state[lengths])[:-1])
                for name, lengths in (
                    ("contexts", "context_lengths"),
                    ("token_ids", "lengths"),
                    ("log_probs", "lengths"),
                )
            )
            self._ahead_of = [context.tobytes() for context in contexts]
            self._ahead = Future()
            self._ahead.set_result(list(map(Continuation, token_ids, log_probs, state["versions"])))

    def _remember(self, keys: list[bytes], written: Sequence[Continuation]) -> None:
        for key, continuation in zip(keys, written, strict=True):
            tokens, log_probs = continuation.token_ids, continuation.log_probs
            n_tokens = self._sampling.n_tokens
            right = len(tokens) == len(log_probs) and np.isfinite(log_probs).all()
            if len(tokens) == 0 or not right or tokens.min() < 0 or tokens.max() >= n_tokens:
                raise ValueError(
                    f"Expected a backend to write at least one token after {np.frombuffer(key, np.int64).tolist()}, "
                    f"between 0 and {n_tokens - 1}, with finite log-probabilities, got {tokens.tolist()} with "
                    f"{log_probs.tolist()}."
                )
            self._known[key].append(continuation)


def in_background(call: Callable[[], T]) -> Future[T]:
    """Call a function in a thread of its own, which keeps no process alive.

    :param call: the function.
    :return: its result, or what it raises, as soon as that is known.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="textrlhf rollouts", daemon=True).start()
    return future


def _keys(contexts: Contexts) -> list[bytes]:
    return [ids[:length].tobytes() for ids, length in zip(contexts.input_ids, contexts.length, strict=True)]


def _requests(contexts: Contexts, rows: Sequence[int]) -> list[Request]:
    """Requests for these contexts. Their seeds are drawn from the generator that the policy samples with."""
    seeds = torch.randint(2**31 - 1, (len(rows),)).tolist()
    return [
        Request(contexts.input_ids[row, : contexts.length[row]].tolist(), int(contexts.step[row]), seed)
        for row, seed in zip(rows, seeds, strict=True)
    ]
