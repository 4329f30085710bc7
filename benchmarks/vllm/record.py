"""Record what a real server of vLLM is asked and what it answers, for tests that have none.

    benchmarks/vllm/install.sh
    python -m benchmarks.vllm.record --out tests/rollouts/vllm_protocol.json

The scenario is that of ``benchmarks/vllm/scenario.py``. The file holds every exchange, and how far the
log-probabilities of the server were from those of the policy.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.provenance import today
from benchmarks.vllm import scenario
from benchmarks.vllm.server import Server, running, untied, version


@dataclass
class Options:
    """Record a server of vLLM."""

    out: Path
    """The file of the exchanges."""
    log: Path = Path("runs/vllm.log")
    """The output of the server."""


class _Recorder(BaseHTTPRequestHandler):
    """Hands requests on to a server, and writes them down with what it answers."""

    server_url: str
    exchanges: list[dict[str, Any]]
    directory: str

    def do_GET(self) -> None:
        self._hand_on(None)

    def do_POST(self) -> None:
        self._hand_on(self.rfile.read(int(self.headers["Content-Length"])))

    def _hand_on(self, body: bytes | None) -> None:
        request = urllib.request.Request(
            f"{self.server_url}{self.path}", body, {"Content-Type": "application/json"}, method=self.command
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                status, said = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, said = error.code, error.read()
        asked = json.loads(body.decode().replace(self.directory, "DIRECTORY")) if body is not None else None
        try:
            answer = json.loads(said.decode().replace(self.directory, "DIRECTORY"))
        except ValueError:
            answer = said.decode()
        self.exchanges.append(
            {"method": self.command, "path": self.path, "asked": asked, "status": status, "answer": _timeless(answer)}
        )
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: Any) -> None:
        pass


def _timeless(answer: Any) -> Any:
    """An answer without the moment at which it was given."""
    if isinstance(answer, dict):
        return {name: _timeless(value) for name, value in answer.items() if name != "created"}
    return list(map(_timeless, answer)) if isinstance(answer, list) else answer


def main(options: Options) -> int:
    """
    :param options: the settings.
    :return: the exit status, 0.
    """
    options.log.parent.mkdir(parents=True, exist_ok=True)
    model = untied(scenario.MODEL, options.log.parent / "untied")
    server = Server(model, options.log.resolve(), scenario.MAX_MODEL_LEN, scenario.SERVER_OPTIONS)
    with running(server), tempfile.TemporaryDirectory() as directory:
        exchanges: list[dict[str, Any]] = []
        members = {"server_url": server.url, "exchanges": exchanges, "directory": directory}
        recorder = ThreadingHTTPServer(("127.0.0.1", 0), type("Recorder", (_Recorder,), members))
        threading.Thread(target=recorder.serve_forever, daemon=True).start()
        parts = list(scenario.play(f"http://127.0.0.1:{recorder.server_port}", Path(directory)))
        recorder.shutdown()
        recorder.server_close()
    differences = [np.abs(w.continuation.log_probs - w.log_probs).max() for part in parts for w in part]
    report = {
        "what": "python -m benchmarks.vllm.record",
        "date": today(),
        "server": version(),
        "largest_log_prob_difference": float(max(differences)),
        "exchanges": exchanges,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(exchanges)} exchanges, log-probabilities within {max(differences):.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
