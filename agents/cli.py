"""The command line: ``textrlhf train | evaluate | sample | reward-model | demo``. Thin; the work is in ``runs``,
``evaluation`` and ``reward_models``."""

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

# What the demo has to show on held-out prompts; below it, training has not worked.
MIN_SCORE_GAIN_STD, MIN_GOLD_GAIN, MAX_KL, MIN_DISTINCT_RATIO = 1.5, 0.4, 15.0, 0.5


@dataclass
class EvaluateConfig:
    """Compare a policy with its reference, or with another policy, on held-out prompts."""

    policy: str
    """Directory of a trained policy (or any model's name)."""
    reference: str | None = None
    """Measures KL and perplexity, and is what to compare with; by default the model that the run started from."""
    against: str | None = None
    """Another policy to compare with, instead of the reference."""
    reward: str | None = None
    """By default the run's."""
    gold: str | None = None
    """A second score; by default the run's."""
    prompts: str = "builtin:eval"
    """Held-out prompts."""
    max_new_tokens: int | None = None
    """Response budget, in tokens; by default the run's."""
    episodes: int = 256
    """Texts of each, for the same prompts."""
    texts: int = 0
    """Show so many texts of both side by side."""
    temperature: float = 1.0
    """Of policy and reference; 1 evaluates the models themselves."""
    json: Path | None = None
    """Write the figures here."""
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"


@dataclass
class SampleConfig:
    """Let a policy write."""

    policy: str
    """Directory or name of a model."""
    prompt: list[str]
    """Opening words, one or more."""
    n: int = 1
    """Texts for each prompt."""
    greedy: bool = False
    """The most probable token instead of a sampled one."""
    temperature: float = 1.0
    max_new_tokens: int = 48
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"


@dataclass
class DemoConfig:
    """Train PPO on the built-in model, and show that it learned."""

    run_dir: Path = Path("runs/demo")
    """An existing run there is replaced, if it is a demo's."""
    seed: int = 0
    total_timesteps: int = 80_000
    """Tokens to generate."""
    episodes: int = 256
    """Texts to evaluate, of the policy before and after."""


def run_evaluate(config: EvaluateConfig) -> int:
    result = evaluate_policy(config)
    print_evaluation(result, config.prompts)
    print_pairs(result)
    if config.json is not None:
        config.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def evaluate_policy(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate as the run that the policy belongs to was set up, where the question doesn't say otherwise.

    :param config: the question.
    :return: what :func:`agents.evaluation.evaluate.evaluate` says.
    :raises ValueError: if there is nothing to compare with.
    """
    run = run_of(config.policy)
    env_config = run.env if run is not None else EnvConfig()
    given = {name: getattr(config, name) for name in ("reward", "gold", "max_new_tokens")}
    env_config = dataclasses.replace(env_config, **{name: value for name, value in given.items() if value is not None})
    if config.reference is None and run is None:
        raise ValueError(f"{config.policy!r} belongs to no run that says what it started from: pass --reference.")
    return _evaluate(config, env_config, config.reference or run.model)  # type: ignore[union-attr]


def run_sample(config: SampleConfig) -> int:
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
    config = resolved(config)
    train(config)
    console.print(f"Wrote {config.run_dir}/: policy/, learning_curve.png, progress.csv, samples.jsonl, config.yaml")
    return 0


def run_reward_model(config: RewardModelConfig) -> int:
    console.print(report_table(train_reward_model(config)))
    console.print(
        f"Wrote {config.out}/: use it as --reward {config.out}; reward_model.json, calibration.png, margins.png"
    )
    return 0


def run_demo(config: DemoConfig) -> int:
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
    """The configuration of the run that a policy directory belongs to, if it does."""
    if not Path(policy).is_dir():  # a name, not a directory
        return None
    path = Path(policy).resolve().parent / "config.yaml"
    return load_config(path) if path.exists() else None


def print_evaluation(result: dict[str, Any], prompts: str) -> None:
    """Print an evaluation on these prompts as a table."""
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
    """Print the texts of an evaluation, if it has any: what both wrote for each prompt, with the scores."""
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
    """Tokens of the longest of these prompts."""
    tokenizer = load_tokenizer(env_config.tokenizer or model)
    encoded = Prompts(prompts, tokenizer, sys.maxsize, chat_template=env_config.chat_template)
    return max(len(prompt.token_ids) for prompt in encoded)


def _evaluate(config: EvaluateConfig, env_config: EnvConfig, reference: str) -> dict[str, Any]:
    if env_config.overlong_prompts == "error":  # held-out prompts may be longer than those of the training
        env_config = dataclasses.replace(
            env_config, max_prompt_tokens=_longest(config.prompts, env_config, config.policy)
        )
    # As many prompts as texts, however the policy was trained.
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
    """``--config=FILE`` as two arguments."""
    return option.split("=", 1) if option.startswith("--config=") else [option]


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    :param args: by default the process's.
    :return: exit status.
    """
    args = list(sys.argv[1:] if args is None else args)
    transformers_logging.disable_progress_bar()  # for models this small, loading is over before it is read
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
