"""How fast this is, beside its peers: the table of `docs/performance.md`.

python -m benchmarks.throughput --quick     # into a file for each kind of processor, in benchmarks/results/
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from benchmarks import rollout, update
from benchmarks.decode_step import decode_steps
from benchmarks.long_texts import growing_texts, sixty_four_rows
from benchmarks.models import EPISODES, PEERS, RESPONSE, Subject, gpt2_4m, hazard_for, word_prompts, words
from benchmarks.peers.turns import Child
from benchmarks.plan import Figures, Plan
from benchmarks.provenance import machine, provenance
from benchmarks.timing import alternate, entry, reached, seconds_of, speed_ratio

MODELS = ("builtin", "gpt2-4m", "smollm2")
CRITICS = {False: "with a value head", True: "with a separate critic"}
BARE_CRITIC = {False: "", True: " by two decoders"}
ROOT = Path(__file__).parent.parent


def suffix_of(model: str) -> str:
    """
    :param model: its name.
    :return: what its keys end with.
    """
    return "" if model == "gpt2-4m" else f"_{model}"


def rollouts(plan: Plan) -> Figures:
    """Tokens per second of a rollout of fixed length, on each model."""
    figures: Figures = {}
    for name in plan.models:
        suffix = suffix_of(name)
        key, hand_key, share_key = f"rollout_vs_generate{suffix}", f"rollout_vs_hand_loop{suffix}", f"env_share{suffix}"
        if not plan.wants(key, hand_key, share_key):
            continue
        what = plan.subject(name)
        ours = rollout.Ours(what)
        sides: dict[str, Callable[[], int]] = {
            "ours": ours,
            "generate": rollout.generate(what, ours.env, ends=False),
            "hand": rollout.hand_loop(what, ours.env),
        }
        speeds = alternate(sides, plan.repeats if name != "smollm2" else plan.slow_repeats)
        length = f"{name}, prompt 8, response {plan.response} fixed, {plan.episodes} rows"
        figures[key] = speed_ratio(
            speeds["ours"], speeds["generate"], f"Rollout through TextVectorEnv.step ÷ generate(); {length}."
        )
        figures[hand_key] = speed_ratio(
            speeds["ours"],
            speeds["hand"],
            f"Rollout through TextVectorEnv.step ÷ a hand-written DynamicCache loop; {length}.",
        )
        counted = slice(-len(speeds["ours"]), None)
        figures[share_key] = entry(
            ours.env_shares[counted],
            ours.env_seconds[counted],
            ours.total_seconds[counted],
            "s",
            f"Share of rollout time inside TextVectorEnv.step, reward excluded (theirs: the rollout); {length}.",
        )
    return figures


def compiled(plan: Plan) -> Figures:
    """Rollouts with decode="compiled" beside those with "eager"."""
    figures: Figures = {}
    for name in plan.models:
        key = f"rollout_compiled_vs_eager{suffix_of(name)}"
        if not plan.wants(key):
            continue
        what = plan.subject(name)
        sides = {mode: rollout.Ours(what, decode=mode) for mode in ("compiled", "eager")}
        first, _ = seconds_of(sides["compiled"])
        speeds = alternate(dict(sides), plan.repeats if name != "smollm2" else plan.slow_repeats)
        figures[key] = speed_ratio(
            speeds["compiled"],
            speeds["eager"],
            f'Rollout with decode="compiled" ÷ with "eager"; {name}, prompt 8, response {plan.response} fixed, '
            f"{plan.episodes} rows.",
            seconds_of_first_rollout=first,
        )
    return figures


def mixed_subject(plan: Plan) -> Subject:
    """gpt2-4m, whose texts end after half the budget on average."""
    model = gpt2_4m(eos_hazard=hazard_for(plan.response / 2, plan.response)).to(plan.device)
    if plan.device.type == "cuda":
        model = model.to(torch.bfloat16)
    return Subject(model, words(), word_prompts(), False, plan.episodes, plan.response)


def varied(plan: Plan) -> Figures:
    """The same when texts end by themselves, after half the budget on average."""
    if "gpt2-4m" not in plan.models:
        return {}
    what = mixed_subject(plan)
    ours = rollout.Ours(what)
    # Lengths are drawn anew each time, so single ratios scatter: more of them.
    speeds = alternate({"ours": ours, "generate": rollout.generate(what, ours.env, ends=True)}, 2 * plan.repeats)
    figure = speed_ratio(
        speeds["ours"],
        speeds["generate"],
        "Rollout ÷ generate(), real tokens only, when EOS ends texts after half the budget on average; gpt2-4m.",
        mean_length=float(np.mean(ours.lengths)),
    )
    return {"rollout_vs_generate_varied": figure}


def long_texts(plan: Plan) -> Figures:
    """Tokens per second of a rollout of texts that are eight times as long, as tasks with right answers have them."""
    what = plan.subject("gpt2-4m")._replace(episodes=plan.growth_episodes, response=8 * plan.response)
    ours = rollout.Ours(what)
    speeds = alternate({"ours": ours, "generate": rollout.generate(what, ours.env, ends=False)}, plan.slow_repeats)
    figure = speed_ratio(
        speeds["ours"],
        speeds["generate"],
        f"Rollout through TextVectorEnv.step ÷ generate(); gpt2-4m, prompt 8, response {8 * plan.response} fixed, "
        f"{plan.growth_episodes} rows.",
    )
    return {"rollout_vs_generate_long": figure}


def updates(plan: Plan) -> Figures:
    """Action tokens per second of an update, on the small models, with a value head and with a critic of its own."""
    figures: Figures = {}
    for name in plan.models:
        for separate in (False, True):
            key = f"update_vs_bare{suffix_of(name)}{'_separate_critic' if separate else ''}"
            if name == "smollm2" or not plan.wants(key):
                continue
            what = plan.subject(name)
            algorithm = update.own_ppo(what, separate)
            sides = {"ours": update.update(algorithm), "bare": update.bare_passes(algorithm, what)}
            speeds = alternate(sides, plan.repeats)
            figures[key] = speed_ratio(
                speeds["ours"],
                speeds["bare"],
                f"PPO's whole update (4 minibatches, 2 epochs, optimiser steps included), {CRITICS[separate]}, ÷ bare "
                f"model(x).logits.log_softmax() and backward() on as many minibatches of the same texts"
                f"{BARE_CRITIC[separate]}, no optimiser step; {name}.",
            )
    return figures


def mixed_updates(plan: Plan) -> Figures:
    """Action tokens per second of an update on texts of different lengths."""
    what = mixed_subject(plan)
    algorithm = update.own_ppo(what)
    sides = {"ours": update.update(algorithm), "bare": update.bare_passes(algorithm, what)}
    speeds = alternate(sides, plan.repeats)
    figure = speed_ratio(
        speeds["ours"],
        speeds["bare"],
        "PPO's whole update ÷ bare model(x).logits.log_softmax() and backward() on as many minibatches of the same "
        "texts, each padded to its longest, when EOS ends texts after half the budget on average; gpt2-4m.",
    )
    return {"update_vs_bare_mixed": figure}


def stock(plan: Plan) -> Figures:
    """Unmodified SB3 PPO with our policy, also with our buffer, and with a policy that knows none of our tricks."""
    what = plan.subject("gpt2-4m")
    sides = {
        "ours": update.stock_ppo(what, update.CausalLMPolicy),
        "buffer": update.stock_ppo(what, update.CausalLMPolicy, rollout_buffer_class=update.EpisodeBuffer),
        "plain": update.stock_ppo(what, update.PlainPolicy),
    }
    speeds = alternate(sides, plan.slow_repeats, warmup=1)
    figure = speed_ratio(
        speeds["ours"],
        speeds["plain"],
        "One iteration of unmodified stable_baselines3.PPO with CausalLMPolicy ÷ with the same policy without memo, "
        "one forward per transition; gpt2-4m.",
    )
    with_buffer = speed_ratio(
        speeds["buffer"],
        speeds["plain"],
        "The same with rollout_buffer_class=EpisodeBuffer on our side, whose minibatches are whole episodes; gpt2-4m.",
    )
    return {"stock_ppo_speedup": figure, "stock_ppo_episode_buffer_speedup": with_buffer}


def growth(plan: Plan) -> Figures:
    """What twice the response costs."""
    what = plan.subject("gpt2-4m")._replace(episodes=plan.growth_episodes)
    long, short = (update.iteration(what._replace(response=times * plan.response)) for times in (8, 4))
    speeds = alternate({"256": long, "128": short}, plan.slow_repeats)
    seconds = {response: [1 / speed for speed in speeds[response]] for response in speeds}
    figure = entry(
        [a / b for a, b in zip(seconds["256"], seconds["128"], strict=True)],
        seconds["256"],
        seconds["128"],
        "s/episode",
        f"Seconds per episode (rollout and update), response {8 * plan.response} ÷ response {4 * plan.response}; "
        f"gpt2-4m, {plan.growth_episodes} episodes an iteration.",
    )
    return {"growth_128_256": figure}


def memory(plan: Plan) -> Figures:
    """Bytes of a stored rollout."""
    what = plan.subject("gpt2-4m", torch.device("cpu"))
    short, long = (update.buffer_bytes(what._replace(response=response)) for response in (56, 1016))
    figure = entry(
        [max(short[0], long[0])],
        [short[0]],
        [short[1]],
        "B/token",
        "Bytes that EpisodeBuffer keeps per generated token, the larger of response 56 and 1016 "
        "(ours, theirs: at 56, theirs being SB3's DictRolloutBuffer).",
        by_response={"56": short[0], "1016": long[0]},
        stock_by_response={"56": short[1], "1016": long[1]},
    )
    return {"buffer_bytes_per_token": figure}


def trl(plan: Plan) -> Figures:
    """One PPO iteration beside TRL's, each in its own process, in turns."""
    if plan.device.type != "cpu":
        return {}
    settings = {
        "episodes": plan.episodes,
        "minibatches": update.MINIBATCHES,
        "epochs": update.EPOCHS,
        "response": plan.response,
        "threads": plan.threads,
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    own = [sys.executable, "-m", "benchmarks.own_ppo", *options]
    commands = {
        "trl": [str(PEERS / "bin" / "python"), "-m", "benchmarks.peers.trl_ppo", *options],
        "ours": own,
        "separate": [*own, "--separate-critic"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(plan.process_pairs):
        children = {name: Child(command, ROOT) for name, command in commands.items()}
        for turn in range(-1, plan.slow_repeats):  # the first one is warm-up
            for name in children if turn % 2 else reversed(children):
                answer = children[name].turn()
                if turn >= 0:
                    seconds[name].append(answer["seconds"])
                if turn == plan.slow_repeats - 1:
                    peaks[name].append(answer["peak_bytes"] / 2**20)
        for child in children.values():
            child.stop()
    same = (
        f"{plan.episodes} episodes, prompt 8, response {plan.response}, {update.MINIBATCHES} minibatches, "
        f"{update.EPOCHS} epochs, fp32, reward model of the policy's size; gpt2-4m"
    )
    figures: Figures = {}
    for key, side, critic in (
        ("trl_ppo_vs_ours", "ours", "a value head"),
        ("trl_ppo_vs_ours_separate_critic", "separate", "a separate critic like TRL's"),
    ):
        ratios = [a / b for a, b in zip(seconds["trl"], seconds[side], strict=True)]
        what = f"One PPO iteration, TRL 1.12.0's time ÷ ours with {critic}; {same}."
        figures[key] = entry(ratios, seconds[side], seconds["trl"], "s/iteration", what)
    rss_ratios = [a / b for a, b in zip(peaks["ours"], peaks["trl"], strict=True)]
    figures["rss_vs_trl"] = entry(
        rss_ratios,
        peaks["ours"],
        peaks["trl"],
        "MiB",
        f"Peak resident memory of that run, ours ÷ TRL's, interpreter and imports taken off both; {same}.",
        separate_critic=float(np.median(peaks["separate"])),
    )
    return figures


SECTIONS: dict[Callable[[Plan], Figures], tuple[str, ...]] = {
    memory: ("buffer_bytes_per_token",),
    rollouts: tuple(
        f"{key}{suffix}"
        for key in ("rollout_vs_generate", "rollout_vs_hand_loop", "env_share")
        for suffix in ("", "_builtin", "_smollm2")
    ),
    compiled: tuple(f"rollout_compiled_vs_eager{suffix_of(name)}" for name in MODELS),
    varied: ("rollout_vs_generate_varied",),
    decode_steps: tuple(
        f"decode_step_{mode}_vs_products{suffix}" for mode in ("eager", "compiled") for suffix in ("", "_builtin")
    ),
    long_texts: ("rollout_vs_generate_long",),
    sixty_four_rows: ("rollout_vs_generate_256", "rollout_vs_generate_1024"),
    growing_texts: ("growth_1024_4096", "memo_bytes_per_token"),
    updates: tuple(
        f"update_vs_bare{suffix}{critic}" for suffix in ("", "_builtin") for critic in ("", "_separate_critic")
    ),
    mixed_updates: ("update_vs_bare_mixed",),
    growth: ("growth_128_256",),
    trl: ("trl_ppo_vs_ours", "trl_ppo_vs_ours_separate_critic", "rss_vs_trl"),
    stock: ("stock_ppo_speedup", "stock_ppo_episode_buffer_speedup"),
}
KEYS = [key for keys in SECTIONS.values() for key in keys]
GOALS = {
    "buffer_bytes_per_token": "<= 64",
    "rollout_vs_generate": ">= 1.8",
    "rollout_vs_generate_builtin": ">= 1.4",
    "rollout_vs_generate_smollm2": ">= 1.5",
    "rollout_vs_generate_varied": ">= 2.2",
    **dict.fromkeys(("rollout_vs_generate_long", "rollout_vs_generate_256", "rollout_vs_generate_1024"), ">= 1.5"),
    "rollout_vs_hand_loop": ">= 1.1",
    "env_share": "<= 0.05",
    **dict.fromkeys(SECTIONS[decode_steps], "<= 1.3"),
    "memo_bytes_per_token": "<= 1.3",
    **dict.fromkeys(SECTIONS[updates], ">= 1.1"),
    "update_vs_bare_mixed": ">= 1.4",
    "growth_128_256": "<= 2.3",
    "trl_ppo_vs_ours": ">= 2.5",
    "trl_ppo_vs_ours_separate_critic": ">= 1.5",
    "rss_vs_trl": "<= 0.5",
    **dict.fromkeys(SECTIONS[stock], ">= 10"),
}
"""Stated for a CPU and two threads. No file holds them, since a goal may change after something was measured."""
NEED_PEERS = {key for key in KEYS if "trl" in key or "smollm2" in key}


def show(figures: Figures, device: torch.device, console: Console) -> None:
    """Print the table.

    :param figures: by key.
    :param device: where they were measured.
    :param console: where.
    """
    table = Table("figure", "value", "low–high", "goal", "ours", "theirs", "unit", "repeats")
    for key, figure in figures.items():
        goal = GOALS.get(key, "") if device.type == "cpu" else ""
        colour = {True: "green", False: "red", None: "white"}[reached(figure["value"], goal)]
        table.add_row(
            key,
            f"[{colour}]{figure['value']:.3g}[/]",
            f"{figure['low']:.3g}–{figure['high']:.3g}",
            goal,
            f"{figure['ours']:,.4g}",
            f"{figure['theirs']:,.4g}",
            figure["unit"],
            str(figure["repeats"]),
        )
    console.print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats: all keys in at most half an hour")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=KEYS, default=[], metavar="KEY", help=", ".join(KEYS))
    parser.add_argument("--json", type=Path, help="where the figures go, if not beside the results of this processor")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of torch; the goals are stated for 2")
    parser.add_argument("--repeats", type=int, help="fewer, to try something out")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="fewer, to try something out; a multiple of 4")
    parser.add_argument("--response", type=int, default=RESPONSE, help="fewer tokens, likewise")
    args = parser.parse_args(arguments)
    update.minibatch(args.episodes)  # an error now, and not after half an hour
    sizes = ("threads", "repeats", "episodes", "response")
    if args.json is None and any(getattr(args, name) != parser.get_default(name) for name in sizes):
        parser.error(f"what is tried with other {', '.join(sizes)} than usual needs a file of its own: --json FILE")
    return args


def file_for(device: torch.device) -> Path:
    """
    :param device: where something is measured.
    :return: the file of the figures of its kind of processor and its widest instructions, which are never averaged over
        kinds.
    """
    here = machine(device)
    kind = f"{here['cpu']} {here['instructions']}" if device.type == "cpu" else here["device"]
    name = re.sub(r"\(R\)|\(TM\)|Processor|CPU.* ", " ", kind)
    return ROOT / "benchmarks" / "results" / f"throughput-{'-'.join(name.lower().split())}.json"


def before(file: Path, device: torch.device) -> dict[str, Any]:
    """
    :param file: where the figures go.
    :param device: where they are measured.
    :return: the figures that are there, each with the commit and the command that measured it. Those of another
        processor are of no use beside these, and are an error.
    """
    here = {name: value for name, value in machine(device).items() if name != "load_at_start"}
    report: dict[str, Any] = {"machine": here, "figures": {}}
    if file.exists():
        report = json.loads(file.read_text())
        there = report["machine"]
        kinds = [tuple(one.get(name) for name in ("cpu", "instructions", "device")) for one in (here, there)]
        if kinds[0] != kinds[1]:
            raise SystemExit(
                f"Expected {file} to have figures of this machine {kinds[0]}, got some of {kinds[1]}: take another "
                "name."
            )
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: of the command line; by default the process's.
    """
    args = parse(arguments)
    plan = Plan(args)
    torch.set_num_threads(plan.threads)
    torch.manual_seed(0)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    console = Console(width=140)
    wanted = {section: keys for section, keys in SECTIONS.items() if plan.wants(*keys)}
    keys = set(plan.only or KEYS)
    if "smollm2" not in plan.models:
        keys = {key for key in keys if "smollm2" not in key}
    if keys & NEED_PEERS and not (PEERS / "smollm2" / "tokenizer_config.json").exists():
        console.print("Making .venv-peers (once) …")
        subprocess.run(["make", "peers"], cwd=ROOT, check=True)
    how = {**provenance("benchmarks.throughput", arguments, plan.device), "threads": torch.get_num_threads()}
    how["load_at_start"] = how.pop("machine")["load_at_start"]  # the file says the rest once, for all figures
    file = args.json or file_for(plan.device)
    report = before(file, plan.device)
    file.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for section in wanted:
        console.print(f"[{time.perf_counter() - start:4.0f} s] {section.__name__}: {(section.__doc__ or '').strip()}")
        figures = section(plan)
        report["figures"] |= {key: {**how, **figure} for key, figure in figures.items() if plan.wants(key)}
        # After each section: an interrupted run is not lost.
        file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    show(report["figures"], plan.device, console)


if __name__ == "__main__":
    main()
