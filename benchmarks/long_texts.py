"""Long texts: how their rollouts slow down, what attention takes of them, and how much memory the memo needs."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks import rollout
from benchmarks.models import PROMPT_TOKENS, VOCABULARY, Subject, gpt2_4m, tiny_gpt2, word_prompts, words
from benchmarks.plan import Figures, Plan
from benchmarks.timing import alternate, entry, speed_ratio

ROWS = 16  # of the tiny model
GROWN = (32, 128)  # times the response budget: 1,024 and 4,096 tokens


def sixty_four_rows(plan: Plan) -> Figures:
    """Tokens per second of a rollout of long texts, many at once."""
    figures: Figures = {}
    for times, name in ((8, "256"), (32, "1024")):
        key = f"rollout_vs_generate_{name}"
        if not plan.wants(key):
            continue
        response = times * plan.response
        model = gpt2_4m(n_positions=PROMPT_TOKENS + response).to(plan.device)
        if plan.device.type == "cuda":
            model = model.to(torch.bfloat16)
        what = Subject(model, words(), word_prompts(), False, plan.episodes, response)
        ours = rollout.Ours(what)
        sides = {"ours": ours, "generate": rollout.generate(what, ours.env, ends=False)}
        # A rollout of the longer ones takes a minute, beside which warming up would change nothing.
        speeds = alternate(sides, max(1, plan.slow_repeats // 2), warmup=int(name == "256"))
        figures[key] = speed_ratio(
            speeds["ours"],
            speeds["generate"],
            f"Rollout through TextVectorEnv.step ÷ generate(); gpt2-4m, prompt 8, response {response} fixed, "
            f"{plan.episodes} rows.",
        )
    return figures


def growing_texts(plan: Plan) -> Figures:
    """Tokens per second, share of attention and memory of texts of 1,024 and 4,096 tokens, on a tiny model."""
    sides: dict[int, rollout.Ours] = {}
    rows = min(ROWS, plan.episodes)
    for response in (times * plan.response for times in GROWN):
        model = tiny_gpt2(VOCABULARY, 0, n_positions=PROMPT_TOKENS + response).to(plan.device)
        model.config.eos_token_id, model.config.pad_token_id = VOCABULARY - 2, VOCABULARY - 1
        what = Subject(model, words(), word_prompts(), True, rows, response)
        sides[response] = rollout.Ours(what)
    speeds = alternate({str(response): ours for response, ours in sides.items()}, max(1, plan.slow_repeats // 2))
    short, long = ([1 / speed for speed in speeds[str(response)]] for response in sides)
    # The blocks of the latest rollout are there until the next one.
    bytes_a_token = {str(n): stored_bytes(ours) / (rows * (PROMPT_TOKENS + n - 1)) for n, ours in sides.items()}
    config: Any = model.config
    least = 2 * config.n_layer * config.n_embd * model.dtype.itemsize
    lengths = "response {1} ÷ response {0}".format(*sides)
    return {
        "growth_1024_4096": entry(
            [a / b for a, b in zip(long, short, strict=True)],
            long,
            short,
            "s/token",
            f"Seconds per token of a rollout, {lengths}; a GPT-2 of one layer of width 32, {rows} rows. Attention "
            "reads four times as much; its share is that of the last eight steps.",
            share_of_attention={str(response): share_of_attention(ours, response) for response, ours in sides.items()},
        ),
        "memo_bytes_per_token": entry(
            [list(bytes_a_token.values())[-1] / least],
            list(bytes_a_token.values()),
            [float(least)],
            "B/token",
            "Bytes that the memo holds per token of the contexts in it at the end of a rollout ÷ the keys and values "
            f"themselves, 2 × layers × width × bytes of a number; response {GROWN[1] * plan.response}.",
            by_response=bytes_a_token,
        ),
    }


def stored_bytes(ours: rollout.Ours) -> int:
    """
    :param ours: a rollout.
    :return: the bytes of the keys and values that its memo has allocated.
    """
    memo = ours.policy._actor_memo
    assert memo is not None
    return sum(
        x.numel() * x.element_size()
        for block in memo._blocks
        for layer in block.layers
        for x in (layer.keys, layer.values)
    )


def share_of_attention(ours: rollout.Ours, response: int) -> float:
    """
    :param ours: a rollout.
    :param response: the number of tokens of each text in it.
    :return: the share of attention in the time of all of PyTorch's operators, in its last eight decode steps.
    """
    step, counted = ours.env.step, min(8, response - 2)
    last = schedule(wait=response - counted - 2, warmup=1, active=counted, repeat=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=last) as seen:

        def stepped(actions: Any) -> Any:
            seen.step()
            return step(actions)

        ours.env.step = stepped  # type: ignore[method-assign]
        ours()
    del ours.env.step
    events = [event for event in seen.key_averages() if event.key.startswith("aten::")]
    mine = [event.self_cpu_time_total for event in events if "attention" in event.key]
    return float(sum(mine) / sum(event.self_cpu_time_total for event in events))
