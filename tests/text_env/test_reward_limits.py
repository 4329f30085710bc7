"""Rewards that hang, fail now and then, or sit behind HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest

from text_env import TextEnv, reward_limits
from text_env.imports import is_object_name
from text_env.rewards import FinishedTexts, HttpReward, Limits, RewardError, make_reward, score

TEXTS = FinishedTexts(["a", "b"], ["c", "dd"], [[1], [2, 3]], {"answer": [1, 2]})
LATE = "no answer within reward_timeout=0.1 seconds"


def hangs(**_: Any) -> list[float]:
    time.sleep(5)
    return [0.0, 0.0]


async def hangs_asynchronously(**_: Any) -> list[float]:
    await asyncio.sleep(5)
    return [0.0, 0.0]


def hangs_while_it_is_read(**_: Any) -> Iterator[float]:
    yield 0.0
    time.sleep(5)


@pytest.fixture
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_limits, "FIRST_WAIT", 0.05)


@pytest.mark.parametrize("reward", [hangs, hangs_asynchronously, hangs_while_it_is_read])
def test_a_reward_that_hangs_is_an_error_that_names_it_and_the_time(reward: Any) -> None:
    with pytest.raises(RewardError, match=f"Reward {reward.__name__!r} raised TimeoutError: {LATE}"):
        score(make_reward(reward, Limits(0.1)), TEXTS)


def test_in_a_weighted_sum_the_part_that_hangs_is_named() -> None:
    with pytest.raises(RewardError, match=f"Reward 'hangs' raised TimeoutError: {LATE}"):
        score(make_reward({"length(9)": 1.0, hangs: 0.5}, Limits(0.1)), TEXTS)


@pytest.mark.usefixtures("_no_waits")
def test_a_flaky_reward_is_tried_again_with_lists_of_its_own() -> None:
    seen = []

    def flaky(prompts: list[str], **_: Any) -> list[float]:
        seen.append(list(prompts))
        prompts.clear()
        if len(seen) < 3:
            raise OSError("away")
        return [1.0, 2.0]

    assert score(make_reward(flaky, Limits(retries=2)), TEXTS).tolist() == [1.0, 2.0]
    assert seen == [["a", "b"]] * 3
    seen.clear()
    with pytest.raises(RewardError, match=r"raised OSError: away\. It was tried 2 times"):
        score(make_reward(flaky, Limits(retries=1)), TEXTS)


@pytest.mark.usefixtures("_no_waits")
@pytest.mark.parametrize("returned", [[1.0], [np.nan, 1.0]])
def test_a_wrong_answer_is_no_reason_to_ask_again(returned: list[float]) -> None:
    calls = []
    with pytest.raises(RewardError, match="must return"):
        score(make_reward(lambda **_: calls.append(1) or returned, Limits(retries=5)), TEXTS)
    assert len(calls) == 1


@pytest.mark.parametrize("wrong", [{"reward_timeout": 0}, {"reward_timeout": "3"}, {"reward_retries": -1}])
def test_limits_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Expected {next(iter(wrong))} to be"):
        TextEnv(**wrong)


# Over HTTP


class Server:
    """A server in a thread. ``answers`` are the next statuses and bodies; after them it gives the texts' lengths."""

    def __init__(self, port: int = 0) -> None:
        self.received: list[Any] = []
        self.answers: list[tuple[int, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                batch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.received.append(batch)
                scores = json.dumps({"scores": [len(text) for text in batch["completions"]]})
                status, body = outer.answers.pop(0) if outer.answers else (200, scores)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/score"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def die(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.die()


def test_a_batch_goes_to_the_server_and_its_scores_come_back(server: Server) -> None:
    assert score(make_reward(f"0.5*{server.url}+length(2)"), TEXTS).tolist() == [0.0, 0.0]
    assert server.received == [
        {
            "prompts": ["a", "b"],
            "completions": ["c", "dd"],
            "completion_ids": [[1], [2, 3]],
            "columns": {"answer": [1, 2]},
        }
    ]


@pytest.mark.usefixtures("_no_waits")
def test_a_server_may_die_and_come_back_in_the_middle_of_a_run(server: Server) -> None:
    reward, port = make_reward(server.url), server.port
    server.answers = [(503, "busy")]
    assert score(reward, TEXTS).tolist() == [1.0, 2.0]
    server.die()
    returned: list[Server] = []
    timer = threading.Timer(0.3, lambda: returned.append(Server(port)))
    timer.start()
    assert score(reward, TEXTS).tolist() == [1.0, 2.0]
    timer.join()
    assert len(returned[0].received) == 1
    returned[0].die()
    server._server.shutdown = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [(422, "no such column", "answered with status 422: 'no such column'"), (200, "<html>", "but answered '<html>'")],
)
def test_an_answer_that_will_not_change_is_an_error_at_once(
    server: Server, status: int, body: str, message: str
) -> None:
    server.answers = [(status, body)]
    with pytest.raises(RewardError, match=message):
        score(make_reward(server.url), TEXTS)
    assert len(server.received) == 1


@pytest.mark.parametrize("address", ["http://", "http://h:99999/x", "http://me:secret@h/x", "http://h/a b"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="Expected the address of a reward"):
        HttpReward(address)


def test_an_address_names_no_code_and_a_plus_in_it_is_written_otherwise() -> None:
    assert not is_object_name("http://host:8000/score")
    with pytest.raises(ValueError, match="write \\+ as %2B"):
        make_reward("http://host/a*b")


def test_the_example_serves_a_reward_by_name() -> None:
    pytest.importorskip("uvicorn")
    fastapi = pytest.importorskip("fastapi")
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("reward_server", Path(__file__).parents[2] / "examples" / "reward_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    app = module.make_app("length(2)")
    assert isinstance(app, fastapi.FastAPI)
    [endpoint] = [route.endpoint for route in app.routes if getattr(route, "path", "") == "/score"]
    assert endpoint(["a"], ["b"], [[1, 2]], {}) == {"scores": [-1.0]}
