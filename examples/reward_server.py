"""Serve a reward over HTTP: one machine scores what others train on.

    pip install "textrlhf[server]"
    python examples/reward_server.py --reward sentiment --port 8000
    textrlhf train --reward http://127.0.0.1:8000/score

The server can be stopped and started again while a training runs: the training waits for a minute and a half.
"""

from __future__ import annotations

import argparse
import math
import threading
from typing import Any

import uvicorn
from fastapi import Body, FastAPI, HTTPException

from text_env.rewards import FinishedTexts, RewardError, make_reward, score_where_it_applies


def make_app(reward: str) -> FastAPI:
    """
    :param reward: the name of a reward, as ``textrlhf train --reward`` takes it.
    :return: the application, which answers ``POST /score``.
    """
    app, judge = FastAPI(), make_reward(reward)
    one_at_a_time = threading.Lock()  # rewards need not bear several threads

    @app.post("/score")
    def score(
        prompts: list[Any] = Body(),  # noqa: B008
        completions: list[Any] = Body(),  # noqa: B008
        completion_ids: list[list[int]] = Body(),  # noqa: B008
        columns: dict[str, list[Any]] = Body({}),  # noqa: B008
    ) -> dict[str, list[float | None]]:
        try:
            texts = FinishedTexts.from_keywords(prompts, completions, completion_ids, **columns)
            with one_at_a_time:
                scores = score_where_it_applies(judge, texts)
        except RewardError as error:  # to be asked again would not help
            raise HTTPException(422, str(error)) from error
        return {"scores": [None if math.isnan(number) else number for number in scores.tolist()]}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve a reward over HTTP.")
    parser.add_argument("--reward", default="sentiment")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    uvicorn.run(make_app(arguments.reward), host=arguments.host, port=arguments.port)
