"""A server that speaks as much of vLLM's protocol as this package uses, and samples from a real model by transformers.

It is no imitation of a model: whatever it answers was sampled, and its log-probabilities are those of the distribution
that it was sampled from. What the real server answers is recorded in ``tests/rollouts/vllm_protocol.json``.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from agents.models.adapter import quiet_peft


class StandIn:
    """The state of one server.

    :param model: the model that it is started with.
    :param max_model_len: of its contexts.
    :param raw: whether its log-probabilities are those before temperature and masks, as vLLM's are by default.
    :param distort: a number by which every log-probability that it says is wrong.
    """

    def __init__(
        self, model: PreTrainedModel, max_model_len: int = 128, raw: bool = False, distort: float = 0.0
    ) -> None:
        self.started_with = model
        self.max_model_len = max_model_len
        self.raw = raw
        self.distort = distort
        self.url = ""
        self.asked: list[tuple[str, Any]] = []  # path and body of each request, but the completions
        self.completions: list[dict[str, Any]] = []
        self.dies_after: int | None = None  # so many completions
        self.cut_off: list[str] = []  # the paths of requests that it was at when it died
        self.lives = 0
        self.seconds = 0.0  # that a completion takes at least
        self.lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """Come (back) to life, with the weights of the start."""
        self.model: Any = copy.deepcopy(self.started_with)
        self.adapters: dict[str, Any] = {}
        self.dies_after = None
        self.lives += 1

    @property
    def is_dead(self) -> bool:
        return self.dies_after is not None and len(self.completions) >= self.dies_after

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and answer."""
        if path == "/v1/completions":
            with self.lock:
                return self._complete(body)
        if path == "/metrics":
            return 200, f"# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds {self.lives}\n"
        self.asked.append((path, body))
        if path == "/v1/models":
            adapters = [{"id": name, "parent": "base", "max_model_len": None} for name in self.adapters]
            return 200, {"data": [{"id": "base", "parent": None, "max_model_len": self.max_model_len}, *adapters]}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            # Not by `from_pretrained`, which two threads can't call at a time. Tied weights are there once.
            weights = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
            assert set(self.model.load_state_dict(weights, strict=False).missing_keys) <= {"lm_head.weight"}
            return 200, {"results": [None]}
        if path == "/v1/load_lora_adapter":
            base = copy.deepcopy(self.started_with)
            with quiet_peft():
                self.adapters[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"]).eval()
            return 200, "Success"
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return 200, "Success"
        return (200, "") if path == "/reset_prefix_cache" else (404, {"detail": "Not Found"})

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(self.seconds)
        model = self.adapters.get(body["model"], self.model if body["model"] == "base" else None)
        if model is None:
            return 404, {"error": {"message": f"The model {body['model']!r} does not exist.", "code": 404}}
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            return 400, {"error": {"message": "too long", "code": 400}}
        if "seed" in body:  # no question to the server itself
            self.completions.append(body)
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        ids, log_probs = list(body["prompt"]), []
        ends = body.get("stop_token_ids", [])
        for step in range(body["max_tokens"]):
            raw = model(torch.tensor([ids])).logits[0, -1].float()
            logits = raw / body.get("temperature", 1.0)
            if (allowed := body.get("allowed_token_ids")) is not None:
                logits[[token for token in range(len(logits)) if token not in set(allowed)]] = -torch.inf
            for token, bias in body.get("logit_bias", {}).items():
                logits[int(token)] += bias
            if step < body.get("min_tokens", 0):
                logits[ends] = -torch.inf
            said = (raw if self.raw else logits).log_softmax(dim=-1)
            token = int(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))
            ids.append(token)
            log_probs.append(float(said[token]) + self.distort)
            if token in ends and step >= body.get("min_tokens", 0):
                break
        written = ids[len(body["prompt"]) :]
        choice: dict[str, Any] = {"index": 0, "logprobs": {"token_logprobs": log_probs}}
        if body.get("return_token_ids"):
            choice["token_ids"] = written
        return 200, {"object": "text_completion", "model": body["model"], "choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        self.close_connection = True
        if self.stand_in.is_dead:
            return
        life = self.stand_in.lives
        status, answer = self.stand_in.answer(self.path, body)
        if self.stand_in.is_dead or self.stand_in.lives != life:
            self.stand_in.cut_off.append(self.path)
            return
        said = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(stand_in: StandIn) -> Iterator[StandIn]:
    """Within it, the server is there, at ``stand_in.url``."""
    handler = type("Handler", (_Handler,), {"stand_in": stand_in})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
