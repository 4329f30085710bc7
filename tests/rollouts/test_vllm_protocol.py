"""The client beside what a real server of vLLM was asked and answered (``benchmarks/vllm/record.py`` recorded it)."""

from __future__ import annotations

import json
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.vllm import scenario
from benchmarks.vllm.server import PYTHON, Server, running, untied

RECORDED = json.loads((Path(__file__).parent / "vllm_protocol.json").read_text())


@contextmanager
def played_back(exchanges: list[dict[str, Any]], directory: str) -> Iterator[tuple[str, dict[str, deque[Any]]]]:
    """A server that knows no other requests than these, and answers each as often as it was recorded."""
    known: dict[str, deque[Any]] = defaultdict(deque)
    for exchange in exchanges:
        known[_key(exchange["method"], exchange["path"], exchange["asked"])].append(exchange)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self._answer(json.loads(text.replace(directory, "DIRECTORY")))

        def _answer(self, asked: Any) -> None:
            waiting = known[_key(self.command, self.path, asked)]
            exchange = waiting.popleft() if waiting else {"status": 400, "answer": f"never recorded: {asked}"}
            answer = exchange["answer"]
            said = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(exchange["status"])
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", known
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _key(method: str, path: str, asked: Any) -> str:
    return json.dumps([method, path, asked], sort_keys=True)


def check(parts: list[list[scenario.Written]]) -> None:
    """What must hold of the texts, whichever they are."""
    assert [len(part) for part in parts] == [4, 4, 4]
    ends = []
    for version, part in enumerate(parts, 1):
        for request, continuation, log_probs in part:
            tokens = continuation.token_ids.tolist()
            assert continuation.version == version
            assert np.abs(continuation.log_probs - log_probs).max() < 1e-4
            # Every text goes on to its end, or to the last token of its budget.
            ends.append(tokens[-1] == 1)
            assert 1 not in tokens[:-1]
            assert len(tokens) == 12 - request.step or ends[-1] or version == 3
            if version == 3:
                assert len(tokens) >= 4 - request.step
                assert max(tokens) < 14
    assert any(ends)


def test_the_client_asks_what_the_real_server_was_asked_and_understands_what_it_answered(tmp_path: Path) -> None:
    with played_back(RECORDED["exchanges"], str(tmp_path)) as (url, known):
        check(list(scenario.play(url, tmp_path)))
    assert {key: len(waiting) for key, waiting in known.items() if waiting} == {}
    assert RECORDED["server"].startswith("vllm")


def test_a_request_that_was_never_recorded_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenario, "NAME", "another")
    with (
        played_back(RECORDED["exchanges"], str(tmp_path)) as (url, _),
        pytest.raises(ValueError, match="never recorded"),
    ):
        list(scenario.play(url, tmp_path))


@pytest.mark.skipif(not PYTHON.exists(), reason="needs benchmarks/vllm/install.sh")
def test_a_real_server_writes_under_the_weights_that_it_is_sent(tmp_path: Path) -> None:
    server = Server(
        untied(scenario.MODEL, tmp_path / "untied"),
        tmp_path / "vllm.log",
        scenario.MAX_MODEL_LEN,
        scenario.SERVER_OPTIONS,
    )
    (tmp_path / "weights").mkdir()
    with running(server):
        check(list(scenario.play(server.url, tmp_path / "weights")))
