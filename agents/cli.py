"""The command line: ``textrlhf train | evaluate | sample | reward-model | demo``.

This module only parses options and prints results. The work is done by ``agents.runs``, ``agents.evaluation`` and
``agents.reward_models``.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from stable_baselines3.common.utils import set_random_seed
from transformers.utils import logging as transformers_logging

from agents.evaluation.evaluate import evaluate
from agents.policies.causal_lm_policy import CausalLMPolicy, load_policy
from agents.reward_models.report import report_table
from agents.reward_models.train import RewardModelConfig, train_reward_model
from agents.rollouts.sampling import sample_texts
from agents.runs.config import EnvConfig, TrainConfig, load_config, resolved
from agents.runs.train import train
from text_env.prompts import Prompts
from text_env.rewards import RewardError
from text_env.tokenization import load_tokenizer

console = Console(emoji=False)  # texts of a model are printed as they are

# What the demo must reach on held-out prompts. Otherwise the training has not worked.
MIN_SCORE_GAIN_STD, MIN_GOLD_GAIN, MAX_KL, MIN_DISTINCT_RATIO = 1.5, 0.4, 15.0, 0.5


@dataclass
class EvaluateConfig:
    """Compare a policy with its reference, or with another policy, on held-out prompts."""

    policy: str
    """The directory of a trained policy, or the name of any model."""
    reference: str | None = None
    """The model that the policy is compared with, and by which KL divergence and perplexity are measured.
    By default it is the model that the policy's run started from."""
    against: str | None = None
    """Another policy to compare with, in place of the reference."""
    reward: str | None = None
    """The reward; by default that of the policy's run."""
    gold: str | None = None
    """A second score; by default that of the policy's run."""
    prompts: str = "builtin:eval"
    """The held-out prompts."""
    max_new_tokens: int | None = None
    """The response budget, in tokens; by default that of the policy's run."""
    episodes: int = 256
    """The number of texts of each of the two models, for the same prompts."""
    texts: int = 0
    """The number of texts of both that are shown side by side."""
    temperature: float = 1.0
    """The temperature of both models; 1 evaluates the models themselves."""
    json: Path | None = None
    """A file to which the results are written as JSON."""
    seed: int = 0
    """The seed of the prompts, the texts and the intervals."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', …"""
    dtype: str = "float32"
    """The floating-point type of the weights."""


@dataclass
class SampleConfig:
    """Let a policy write texts."""

    policy: str
    """The directory of a trained policy, or the name of any model."""
    prompt: list[str]
    """One or more prompts."""
    n: int = 1
    """The number of texts for each prompt."""
    greedy: bool = False
    """Choose the most probable token instead of sampling one."""
    temperature: float = 1.0
    """The temperature of the policy's distribution."""
    max_new_tokens: int = 48
    """The response budget, in tokens."""
    seed: int = 0
    """The seed of the texts."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', …"""
    dtype: str = "float32"
    """The floating-point type of the weights."""


@dataclass
class DemoConfig:
    """Train PPO on the built-in model, and show that it has learned."""

    run_dir: Path = Path("runs/demo")
    """The directory of the run. An existing run there is replaced if it is a demo."""
    seed: int = 0
    """The seed of the training and the evaluation."""
    total_timesteps: int = 80_000
    """The number of tokens to generate."""
    episodes: int = 256
    """The number of texts that are evaluated, of the policy before training and after it."""


def run_evaluate(config: EvaluateConfig) -> int:
    """Run ``textrlhf evaluate``.

    :param config: the options.
    :return: the exit status.
    """
    result = evaluate_policy(config)
    print_evaluation(result, config.prompts)
    print_pairs(result)
    if config.json is not None:
        config.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def evaluate_policy(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a policy in the environment of its run, except for what the options change.

    :param config: the options.
    :return: what :func:`agents.evaluation.evaluate.evaluate` returns.
    :raises ValueError: if no reference is given, and the policy belongs to no run that names one.
    """
    run = run_of(config.policy)
    env_config = run.env if run is not None else EnvConfig()
    given = {name: getattr(config, name) for name in ("reward", "gold", "max_new_tokens")}
    env_config = dataclasses.replace(env_config, **{name: value for name, value in given.items() if value is not None})
    if config.reference is None and run is None:
        raise ValueError(f"{config.policy!r} belongs to no run that says what it started from: pass --reference.")
    return _evaluate(config, env_config, config.reference or run.model)  # type: ignore[union-attr]


def run_sample(config: SampleConfig) -> int:
    """Run ``textrlhf sample``.

    :param config: the options.
    :return: the exit status.
    """
    run = run_of(config.policy)
    env_config = run.env if run is not None else EnvConfig()
    longest = _longest(config.prompt, env_config, config.policy)
    env_config = dataclasses.replace(env_config, max_new_tokens=config.max_new_tokens, max_prompt_tokens=longest)
    prompts = [prompt for prompt in config.prompt for _ in range(config.n)]
    env = env_config.make(len(prompts), config.policy, prompts=prompts)
    set_random_seed(config.seed)
    policy = load_policy(config.policy, env, config.device, config.dtype, config.temperature)
    for info in sample_texts(policy, env, prompts, config.greedy):
        console.print(
            f"[bold]{escape(info['prompt'])}[/bold]{escape(info['completion'])}",
            f"[dim]({info['score']:+.2f})[/dim]",
            soft_wrap=True,
        )
    return 0


def run_train(config: TrainConfig) -> int:
    """Run ``textrlhf train``.

    :param config: the options.
    :return: the exit status.
    """
    config = resolved(config)
    train(config)
    console.print(f"Wrote {config.run_dir}/: policy/, learning_curve.png, progress.csv, samples.jsonl, config.yaml")
    return 0


def run_reward_model(config: RewardModelConfig) -> int:
    """Run ``textrlhf reward-model``.

    :param config: the options.
    :return: the exit status.
    """
    console.print(report_table(train_reward_model(config)))
    console.print(
        f"Wrote {config.out}/: use it as --reward {config.out}; reward_model.json, calibration.png, margins.png"
    )
    return 0


def run_demo(config: DemoConfig) -> int:
    """Run ``textrlhf demo``.

    :param config: the options.
    :return: the exit status: 0 if the policy has learned, else 1.
    :raises FileExistsError: if the directory holds another run than a demo.
    """
    changeable: dict[str, Any] = {
        "run_dir": config.run_dir,
        "seed": config.seed,
        "total_timesteps": config.total_timesteps,
    }
    settings = resolved(TrainConfig(**changeable))
    if (config.run_dir / "config.yaml").exists():
        if dataclasses.replace(load_config(config.run_dir / "config.yaml"), **changeable) != settings:
            raise FileExistsError(f"{config.run_dir} holds a run that is no demo's; choose another --run-dir.")
        shutil.rmtree(config.run_dir)
    console.print("Training PPO on the built-in language model; the reward is the built-in reward model.")
    start = time.perf_counter()
    train(settings)
    console.print(f"Trained in {time.perf_counter() - start:.0f} s. Now {config.episodes} texts on held-out prompts.\n")
    question = EvaluateConfig(policy=str(config.run_dir / "policy"), episodes=config.episodes, seed=config.seed)
    result = _evaluate(question, settings.env, settings.model)
    print_evaluation(result, question.prompts)
    (config.run_dir / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    _print_texts(config.run_dir / "samples.jsonl")
    before, after = result["reference"], result["policy"]
    checks = {
        f"score rose by at least {MIN_SCORE_GAIN_STD} standard deviations": (result["score_gain_std"] or 0.0)
        >= MIN_SCORE_GAIN_STD,
        f"gold score rose by at least {MIN_GOLD_GAIN}": after["gold_score"] - before["gold_score"] >= MIN_GOLD_GAIN,
        f"KL under {MAX_KL:g} nats per episode": result["kl"] < MAX_KL,
        "distinct-2 above half of the start": after["distinct_2"] > MIN_DISTINCT_RATIO * before["distinct_2"],
    }
    for claim, holds in checks.items():
        console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {claim}")
    return 0 if all(checks.values()) else 1


def run_of(policy: str) -> TrainConfig | None:
    """
    :param policy: the name or directory of a policy.
    :return: the configuration of the run that the directory belongs to; None if there is none.
    """
    if not Path(policy).is_dir():  # the name of a model
        return None
    path = Path(policy).resolve().parent / "config.yaml"
    return load_config(path) if path.exists() else None


def print_evaluation(result: dict[str, Any], prompts: str) -> None:
    """Print an evaluation as a table.

    :param result: what :func:`evaluate_policy` returned.
    :param prompts: the name of the prompts.
    """
    other = result["compared_with"]
    table = Table(
        *("", other, "policy", "change" if other == "reference" else "difference", "win rate"),
        title=f"{result['episodes']} episodes each, prompts: {escape(prompts)}",
        caption="In brackets: 95 % intervals. Win rate: how often the policy's text scores higher than the other's for "
        "the same prompt; ties count half.",
    )
    for name, after in result["policy"].items():
        before, compared = result[other][name], result["comparison"].get(name)
        change, win_rate = f"{after - before:+.3f}", ""
        if compared is not None:
            change += " [{:.2f}, {:.2f}]".format(*compared["difference_interval"])
            percent = [100 * rate for rate in (compared["win_rate"], *compared["win_rate_interval"])]
            win_rate = "{:.0f}% [{:.0f}, {:.0f}]".format(*percent)
        table.add_row(escape(name), f"{before:.3f}", f"{after:.3f}", change, win_rate)
    gain = result["score_gain_std"]
    table.add_row("score gain (std)", "", "", "–" if gain is None else f"{gain:+.3f}", style="bold")
    kl_of_other = f"{result['kl_against']:.2f}" if other == "against" else ""
    table.add_row("KL (nats/episode)", kl_of_other, f"{result['kl']:.2f}", "", style="bold")
    console.print(table)


def print_pairs(result: dict[str, Any]) -> None:
    """Print the texts of an evaluation, if it has any: what both models wrote for each prompt, with the scores.

    :param result: what :func:`evaluate_policy` returned.
    """
    if "texts" not in result:
        return
    other = result["compared_with"]
    table = Table(*(("before", "after") if other == "reference" else (other, "policy")), show_lines=True)
    for pair in result["texts"]:
        prompt = f"[bold]{escape(pair['prompt'])}[/bold]"
        texts = (pair[other], pair["policy"])
        table.add_row(*(f"[dim]{t['score']:+.2f}[/dim] {prompt}{escape(t['completion'])}" for t in texts))
    console.print(table)


def _longest(prompts: Any, env_config: EnvConfig, model: str) -> int:
    """The length of the longest of these prompts, in tokens."""
    tokenizer = load_tokenizer(env_config.tokenizer or model)
    encoded = Prompts(prompts, tokenizer, sys.maxsize, chat_template=env_config.chat_template)
    return max(len(prompt.token_ids) for prompt in encoded)


def _evaluate(config: EvaluateConfig, env_config: EnvConfig, reference: str) -> dict[str, Any]:
    if env_config.overlong_prompts == "error":  # held-out prompts may be longer than those of the training
        env_config = dataclasses.replace(
            env_config, max_prompt_tokens=_longest(config.prompts, env_config, config.policy)
        )
    # As many prompts as texts, even if the policy was trained on groups of texts.
    env = env_config.make(min(64, config.episodes), config.policy, prompts=config.prompts, group_size=1)
    set_random_seed(config.seed)

    def load(name: str) -> CausalLMPolicy:
        return load_policy(name, env, config.device, config.dtype, config.temperature)

    against = None if config.against is None else load(config.against)
    return evaluate(load(config.policy), load(reference), env, config.episodes, against, config.seed, config.texts)


def _print_texts(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = rows[-1]["timesteps"]
    for title, when in (("Before", rows[0]["timesteps"]), ("After", last)):
        console.print(f"\n[bold]{title}[/bold]")
        for row in (row for row in rows if row["timesteps"] == when):
            console.print(
                f" [dim]{row['score']:+.2f}[/dim] [bold]{escape(row['prompt'])}[/bold]{escape(row['completion'])}",
                soft_wrap=True,
            )
    console.print()


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "train": (TrainConfig, run_train),
    "evaluate": (EvaluateConfig, run_evaluate),
    "sample": (SampleConfig, run_sample),
    "reward-model": (RewardModelConfig, run_reward_model),
    "demo": (DemoConfig, run_demo),
}


def _split_config(option: str) -> list[str]:
    """``--config=FILE`` as two arguments. Any other argument is returned as it is."""
    return option.split("=", 1) if option.startswith("--config=") else [option]


def main(args: Sequence[str] | None = None) -> int:
    """The entry point of the command ``textrlhf``.

    :param args: the arguments; None: those of the process.
    :return: the exit status.
    """
    args = list(sys.argv[1:] if args is None else args)
    transformers_logging.disable_progress_bar()  # loading small models takes too short to need one
    if not args or args[0] not in COMMANDS:
        for name, (config_type, _) in COMMANDS.items():
            console.print(f"  textrlhf {name:12} {(config_type.__doc__ or '').splitlines()[0]}", highlight=False)
        console.print("`textrlhf COMMAND --help` lists its options.", highlight=False)
        asked = bool(args) and args[0] in ("-h", "--help")
        return 0 if asked else 2
    command, *rest = args
    config_type, function = COMMANDS[command]
    try:
        default = None
        if command == "train":
            rest = [part for option in rest for part in _split_config(option)]
            if "--config" in rest:
                at = rest.index("--config")
                if at + 1 == len(rest):
                    raise ValueError("--config needs a YAML file after it.")
                default = load_config(Path(rest[at + 1]))
                rest = rest[:at] + rest[at + 2 :]
        return function(tyro.cli(config_type, args=rest, default=default, prog=f"textrlhf {command}"))
    except (ValueError, TypeError, OSError, ImportError, RewardError, FloatingPointError, gym.error.Error) as error:
        console.print(f"[red]{type(error).__name__}[/red]: {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
