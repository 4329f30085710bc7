"""Long texts: how their rollouts slow down, what attention takes of them, and how much memory the memo needs."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from agents.models.prefix_cache import PrefixCache
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
        # A rollout takes a minute, beside which a first one for warming up would change nothing.
        speeds = alternate(sides, max(1, plan.slow_repeats // 2), warmup=0)
        figures[key] = speed_ratio(
            speeds["ours"],
            speeds["generate"],
            ">= 1.5",
            f"Rollout through TextVectorEnv.step ÷ generate(); gpt2-4m, prompt 8, response {response} fixed, "
            f"{plan.episodes} rows.",
        )
    return figures


def growing_texts(plan: Plan) -> Figures:
    """Tokens per second, share of attention and memory of texts of 1,024 and 4,096 tokens, on a tiny model."""
    seconds: dict[int, list[float]] = {}
    shares: dict[str, float] = {}
    bytes_a_token: dict[str, float] = {}
    rows = min(ROWS, plan.episodes)
    for times in GROWN:
        response = times * plan.response
        model = tiny_gpt2(VOCABULARY, 0, n_positions=PROMPT_TOKENS + response).to(plan.device)
        model.config.eos_token_id, model.config.pad_token_id = VOCABULARY - 2, VOCABULARY - 1
        what = Subject(model, words(), word_prompts(), True, rows, response)
        ours = rollout.Ours(what)
        memo = ours.policy._actor_memo
        assert memo is not None
        speeds = alternate({"ours": ours}, max(1, plan.slow_repeats // 2), warmup=0)["ours"]
        seconds[times] = [1 / speed for speed in speeds]
        # The blocks of the latest rollout are there until the next one.
        bytes_a_token[str(response)] = stored_bytes(memo) / (rows * (PROMPT_TOKENS + response - 1))
        shares[str(response)] = share_of_attention(ours, response)
    short, long = (seconds[times] for times in GROWN)
    config: Any = model.config
    least = 2 * config.n_layer * config.n_embd * model.dtype.itemsize
    lengths = f"response {GROWN[1] * plan.response} ÷ response {GROWN[0] * plan.response}"
    return {
        "growth_1024_4096": entry(
            [a / b for a, b in zip(long, short, strict=True)],
            long,
            short,
            "s/token",
            "",
            f"Seconds per token of a rollout, {lengths}; a GPT-2 of one layer of width 32, {rows} rows. Attention "
            "reads four times as much; its share is that of the last eight steps.",
            share_of_attention=shares,
        ),
        "memo_bytes_per_token": entry(
            [bytes_a_token[str(GROWN[1] * plan.response)] / least],
            list(bytes_a_token.values()),
            [float(least)],
            "B/token",
            "<= 1.3",
            "Bytes that the memo holds per token of the contexts in it at the end of a rollout ÷ the keys and values "
            f"themselves, 2 × layers × width × bytes of a number; response {GROWN[1] * plan.response}.",
            by_response=bytes_a_token,
        ),
    }


def stored_bytes(memo: PrefixCache) -> int:
    """
    :param memo: a memo.
    :return: the bytes of the keys and values that are allocated.
    """
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
