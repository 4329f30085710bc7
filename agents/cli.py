"""The command line: ``textrlhf train | evaluate | critic | sample | doctor | reward-model | demo``, and to look at runs
``textrlhf report | watch | play``, and ``push``.

This module only parses options and prints results. The work is done by ``agents.runs``, ``agents.evaluation`` and
``agents.reward_models``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from agents.evaluation.report import answers_table, evaluation_table, prompts_in_words, scored_text, texts_table
from agents.reward_models.config import RewardModelConfig
from agents.runs.commands import (
    COMMANDS,
    CriticConfig,
    DemoConfig,
    DoctorConfig,
    EvaluateConfig,
    ResumeConfig,
    SampleConfig,
)
from agents.runs.config import EnvConfig, TrainConfig, load_config, names_from_run
from agents.runs.errors import described
from agents.runs.look_commands import PlayConfig, PushConfig, ReportConfig, WatchConfig, policy_of
from agents.runs.usage import usage
from agents.state.lock import locked
from text_env.imports import UntrustedNameError
from text_env.rendering import printable
from text_env.tokenization import BUILTIN_MODELS

if TYPE_CHECKING:
    from agents.policies.causal_lm_policy import CausalLMPolicy
    from text_env.vector_env import TextVectorEnv

# Here stands only what imports in no time. PyTorch, transformers and Stable-Baselines3 take seconds, so each function
# imports what it needs of them: a typing error, and --help, are answered at once.

console = Console(emoji=False)  # texts of a model are printed as they are

# What the demo must reach on held-out prompts. Otherwise the training has not worked.
MIN_SCORE_GAIN_STD, MIN_GOLD_GAIN, MAX_KL, MIN_DISTINCT_RATIO = 1.5, 0.4, 15.0, 0.5


def run_evaluate(config: EvaluateConfig) -> int:
    """Run ``textrlhf evaluate``.

    :param config: the options.
    :return: the exit status.
    """
    config.check()
    result = evaluate_policy(config)
    print_evaluation(result)
    print_pairs(result)
    if config.json is not None:
        config.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def evaluate_policy(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a policy in the environment of its run, except for what the options change.

    :param config: the options.
    :return: what :func:`agents.evaluation.evaluate.evaluate` returns, and what
        :meth:`agents.runs.config.EnvConfig.prompt_set` says.
    :raises FileNotFoundError: if there is no such policy.
    :raises UntrustedNameError: if the run names code, and ``config.trust`` is False.
    :raises ValueError: if no reference is given, and the policy belongs to no run that names one.
    """
    against = None if config.against is None else policy_of(config.against)
    config = dataclasses.replace(config, policy=policy_of(config.policy), against=against)
    with run_of(config) as run:
        env_config = _changed(run.env if run is not None else EnvConfig(), config, "reward", "gold", *TASK_OPTIONS)
        reference = config.reference or (run.model if run is not None else None)
        if reference is None and not Path(config.policy).exists() and config.policy not in BUILTIN_MODELS:
            raise FileNotFoundError(
                f"There is no directory {config.policy!r}. If it is the name of a model on the hub, pass --reference "
                "as well, the model that it is compared with."
            )
        if reference is None:
            raise ValueError(f"{config.policy!r} belongs to no run that says what it started from: pass --reference.")
        return _evaluate(config, env_config, reference, None if run is None else run.env)


def run_critic(config: CriticConfig) -> int:
    """Run ``textrlhf critic``.

    :param config: the options.
    :return: the exit status.
    """
    config.check()
    from agents.evaluation.critic_report import critic_table, plot_critic
    from agents.runs.critic import examine_run

    result = examine_run(config)
    console.print(critic_table(result))
    console.print(prompts_in_words(result), highlight=False, markup=False, soft_wrap=True)
    plot_critic(result, config.picture(), str(config.policy))
    console.print(f"Wrote {config.picture()}", soft_wrap=True, highlight=False, markup=False)
    if config.json is not None:
        config.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def run_sample(config: SampleConfig) -> int:
    """Run ``textrlhf sample``.

    :param config: the options.
    :return: the exit status.
    """
    config.check()
    config = dataclasses.replace(config, policy=policy_of(config.policy))
    with run_of(config) as run:
        _sample(config, _changed(run.env if run is not None else EnvConfig(), config, "reward", *TASK_OPTIONS))
    return 0


def _sample(config: SampleConfig, env_config: EnvConfig) -> None:
    from stable_baselines3.common.utils import set_random_seed

    from agents.policies.causal_lm_policy import load_policy
    from agents.rollouts.sampling import sample_texts
    from agents.runs.not_scored import score_of
    from agents.state.devices import check_device

    check_device(config.device)
    # Only the score is shown.
    env_config = dataclasses.replace(env_config, max_prompt_tokens=None, gold=None, metrics=None)
    prompts = [prompt for prompt in config.prompt for _ in range(config.n)]
    judge = env_config.unjudged(UNKNOWN_ANSWER) if env_config.has_task else {}
    env = _env_to_write_in(env_config, len(prompts), config.policy, prompts=prompts, **judge)
    set_random_seed(config.seed)
    policy = load_policy(config.policy, env, config.device, config.dtype, config.temperature)
    for info in sample_texts(policy, env, prompts, config.greedy):
        text = (printable(info["prompt"]), "bold"), printable(info["completion"])
        console.print(Text.assemble(*text, " ", (f"({score_of(info)})", "dim")), soft_wrap=True)


def run_push(config: PushConfig) -> int:
    """Run ``textrlhf push``.

    :param config: the options.
    :return: the exit status.
    """
    config.check()
    from agents.runs.push import push

    address = push(config.run, config.repo, config.private, config.message)
    console.print(f"Pushed to {address}", soft_wrap=True, highlight=False, markup=False)
    return 0


def run_report(config: ReportConfig) -> int:
    """Run ``textrlhf report``.

    :param config: the options.
    :return: the exit status.
    """
    config.check()
    from agents.runs.report import write_report

    write_report(config.runs, config.file(), config.title)
    console.print(f"Wrote {config.file()}", soft_wrap=True, highlight=False, markup=False)
    return 0


def run_watch(config: WatchConfig) -> int:
    """Run ``textrlhf watch``.

    :param config: the options.
    :return: the exit status.
    """
    config.check()
    from agents.runs.watch import watch

    watch(config, console)
    return 0


def run_play(config: PlayConfig) -> int:
    """Run ``textrlhf play``.

    :param config: the options.
    :return: the exit status.
    """
    config.check()
    with run_of(config) as run:
        _play(config, run)
    return 0


def _play(config: PlayConfig, run: TrainConfig | None) -> None:
    from stable_baselines3.common.utils import set_random_seed

    from agents.policies.causal_lm_policy import VALUE_HEAD_FILE, load_policy
    from agents.runs.config import separate_critic
    from agents.runs.play import Play, play
    from agents.state.devices import check_device

    check_device(config.device)
    env_config = _changed(run.env if run is not None else EnvConfig(), config, "reward", *TASK_OPTIONS)
    given: dict[str, Any] = {}
    if config.prompt is not None:
        given = {"prompts": [config.prompt], "max_prompt_tokens": None}
        given |= env_config.unjudged(UNKNOWN_ANSWER) if env_config.has_task else {}
    env = _env_to_write_in(env_config, 1, config.policy, group_size=1, **given)
    set_random_seed(config.seed)
    has_critic = run is not None and (Path(config.policy) / VALUE_HEAD_FILE).exists()
    critic = separate_critic(run.critic or "head") if run is not None and has_critic else False
    policy = load_policy(config.policy, env, config.device, config.dtype, config.temperature, critic)
    if has_critic:
        policy.load_value_head(config.policy)
    play(Play(policy, env, config.seed), config.top, console)


def _env_to_write_in(env_config: EnvConfig, num_envs: int, model: str, **given: Any) -> TextVectorEnv:
    """The environment for texts that are shown, whether or not there is somebody to judge them."""
    from agents.runs.not_scored import score_where_possible

    try:
        env = env_config.make(num_envs, model, **given)
    except UntrustedNameError as error:  # perhaps of the reward alone, which writing doesn't need
        env = env_config.make(num_envs, model, **given, **env_config.unjudged("--trust would score it"))
        console.print(f"Texts are not scored. {escape(str(error))}", style="dim", highlight=False, soft_wrap=True)
    score_where_possible(env)
    return env


UNKNOWN_ANSWER = "the right answer of this prompt is unknown"
TASK_OPTIONS = ("max_new_tokens", "task", "task_kwargs")


def _changed(env_config: EnvConfig, config: EvaluateConfig | SampleConfig | PlayConfig, *names: str) -> EnvConfig:
    """The environment, except for those of the options that are given. With a task come its own prompts; the arguments
    of the run's task are for no other.
    """
    given: dict[str, Any] = {name: value for name in names if (value := getattr(config, name))}
    if "task" in given:
        kwargs = env_config.task_kwargs if given["task"] == env_config.task else {}
        given = {"prompts": EnvConfig.prompts, "task_kwargs": kwargs, **given}
    return dataclasses.replace(env_config, **given)


def run_train(config: TrainConfig) -> int:
    """Run ``textrlhf train``.

    :param config: the options.
    :return: the exit status.
    """
    config.check()
    from agents.runs.algorithms import resolved
    from agents.runs.train import train

    config = resolved(config)
    train(config)
    _print_written(config.run_dir)
    return 0


def run_resume(config: ResumeConfig) -> int:
    """Run ``textrlhf train --resume``.

    :param config: the options.
    :return: the exit status.
    """
    config.check()
    from agents.algorithms.engine import launched
    from agents.runs.train import resume

    model = resume(config)
    if model.num_timesteps > model._num_timesteps_at_start:
        _print_written(config.resume)
    elif not launched()[0]:
        console.print(
            f"{config.resume} was finished already, after {model.num_timesteps:,} tokens: nothing was trained. "
            "--total-timesteps makes it longer.",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    return 0


def _print_written(directory: Path | None) -> None:
    from agents.algorithms.engine import launched

    if launched()[0]:  # another process has written
        return
    files = "policy/, learning_curve.png, progress.csv, samples.jsonl, episodes.jsonl, config.yaml"
    wrote = f"Wrote {directory}/: {files}. `textrlhf report {directory}` makes a page of them."
    console.print(wrote, soft_wrap=True, highlight=False, markup=False)


def run_doctor(config: DoctorConfig) -> int:
    """Run ``textrlhf doctor``.

    :param config: the options.
    :return: the exit status: 1 if there is a problem, else 0.
    """
    config.check()
    from agents.runs.doctor import as_data, examine, findings_table

    findings = examine(config.run(), config.texts, config.tokens)
    console.print(findings_table(findings))
    result = as_data(findings)
    if config.json is not None:
        config.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["healthy"] else 1


def run_reward_model(config: RewardModelConfig) -> int:
    """Run ``textrlhf reward-model``.

    :param config: the options.
    :return: the exit status.
    """
    config.check()
    from agents.reward_models.report import report_table
    from agents.reward_models.train import train_reward_model

    console.print(report_table(train_reward_model(config)))
    console.print(
        f"Wrote {config.out}/: use it as --reward {config.out}; reward_model.json, calibration.png, margins.png",
        soft_wrap=True,
        highlight=False,
        markup=False,  # a name may have brackets
    )
    return 0


def run_demo(config: DemoConfig) -> int:
    """Run ``textrlhf demo``.

    :param config: the options.
    :return: the exit status: 0 if the policy has learned, else 1.
    :raises FileExistsError: if the directory holds another run than a demo.
    :raises DirectoryInUse: if another process writes there, such as a demo that is running.
    """
    config.check()
    from agents.runs.algorithms import resolved
    from agents.runs.recording import remove_run
    from agents.runs.train import train

    changeable: dict[str, Any] = {
        "run_dir": config.run_dir,
        "seed": config.seed,
        "total_timesteps": config.total_timesteps,
    }
    # The critic is the one that PPO would choose: named, since the config.yaml of a run names it.
    settings = resolved(TrainConfig(critic="builtin", **changeable))
    if (config.run_dir / "config.yaml").exists():
        with locked(config.run_dir):
            if dataclasses.replace(load_config(config.run_dir / "config.yaml"), **changeable) != settings:
                raise FileExistsError(f"{config.run_dir} holds a run that is no demo's; choose another --run-dir.")
            remove_run(config.run_dir)
    console.print("Training PPO on the built-in language model; the reward is the built-in reward model.")
    start = time.perf_counter()
    train(settings)
    console.print(f"Trained in {time.perf_counter() - start:.0f} s. Now {config.episodes} texts on held-out prompts.\n")
    with locked(config.run_dir):  # another demo must not replace what is being evaluated
        return _judged_demo(config, settings)


def _judged_demo(config: DemoConfig, settings: TrainConfig) -> int:
    """Evaluate the policy of a demo, and print whether it has learned."""
    question = EvaluateConfig(policy=str(config.run_dir / "policy"), episodes=config.episodes, seed=config.seed)
    result = _evaluate(question, settings.env, str(settings.model), settings.env)
    print_evaluation(result)
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


@contextlib.contextmanager
def run_of(config: EvaluateConfig | SampleConfig | PlayConfig) -> Iterator[TrainConfig | None]:
    """The run of a policy. While this lasts, what only the run names is imported only with ``--trust``.

    :param config: the options, of which ``policy`` is the name or directory of the policy.
    :return: the configuration of the run that the directory belongs to; None if there is none.
    """
    path = Path(config.policy).resolve().parent / "config.yaml"
    if not Path(config.policy).is_dir() or not path.exists():  # the name of a model, or a directory of its own
        yield None
        return
    run = load_config(path)
    with names_from_run(path, run, config):
        yield run


def print_evaluation(result: dict[str, Any]) -> None:
    """Print an evaluation as a table, and as a second one what it says of right answers.

    :param result: what :func:`evaluate_policy` returned.
    """
    console.print(evaluation_table(result))
    if "answers" in result:
        console.print(answers_table(result))


def print_pairs(result: dict[str, Any]) -> None:
    """Print the texts of an evaluation, if it has any: what both models wrote for each prompt, with the scores.

    :param result: what :func:`evaluate_policy` returned.
    """
    if "texts" in result:
        console.print(texts_table(result))


def _evaluate(
    config: EvaluateConfig, env_config: EnvConfig, reference: str, trained: EnvConfig | None
) -> dict[str, Any]:
    from stable_baselines3.common.utils import set_random_seed

    from agents.evaluation.evaluate import evaluate
    from agents.policies.causal_lm_policy import load_policy
    from agents.state.devices import check_device

    check_device(config.device)
    env_config = env_config.for_evaluation(config.prompts)
    # As many prompts as texts, even if the policy was trained on groups of texts.
    env = env_config.make(min(64, config.episodes), config.policy, group_size=1)
    set_random_seed(config.seed)

    def load(name: str) -> CausalLMPolicy:
        return load_policy(name, env, config.device, config.dtype, config.temperature)

    against = None if config.against is None else load(config.against)
    result = evaluate(
        load(config.policy),
        load(reference),
        env,
        config.episodes,
        against,
        config.seed,
        config.texts,
        config.samples_per_prompt,
        config.pass_at_k,
    )
    return {**result, **env_config.prompt_set(trained)}


def _print_texts(path: Path) -> None:
    with path.open() as file:  # by lines of the file: texts may hold other ends of lines, such as U+2028
        rows = [json.loads(line) for line in file]
    last = rows[-1]["timesteps"]
    for title, when in (("Before", rows[0]["timesteps"]), ("After", last)):
        console.print(f"\n[bold]{title}[/bold]")
        for row in (row for row in rows if row["timesteps"] == when):
            text = scored_text(f" {row['score']:+.2f}", row["prompt"], row["completion"])
            console.print(text, soft_wrap=True)
    console.print()


FUNCTIONS: dict[str, Callable[[Any], int]] = {
    "train": run_train,
    "evaluate": run_evaluate,
    "critic": run_critic,
    "sample": run_sample,
    "doctor": run_doctor,
    "reward-model": run_reward_model,
    "report": run_report,
    "watch": run_watch,
    "play": run_play,
    "push": run_push,
    "demo": run_demo,
}


def _split_option(option: str) -> list[str]:
    """``--config=FILE`` and ``--resume=RUN`` as two arguments. Any other argument is returned as it is."""
    return option.split("=", 1) if option.startswith(("--config=", "--resume=")) else [option]


def _overview() -> None:
    """Print the commands, a line each."""
    lines = [f"  textrlhf {name:12} {(c.options.__doc__ or '').splitlines()[0]}" for name, c in COMMANDS.items()]
    lines.append("`textrlhf COMMAND --help` explains its options; `textrlhf --version` says which release this is.")
    lines.append("With --debug, every command shows where an error happened.")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _version() -> str:
    with contextlib.suppress(PackageNotFoundError):
        return version("textrlhf")
    return "(not installed: run from a clone)"


def _without_command(args: Sequence[str]) -> int:
    """Answer a command line that doesn't begin with a command."""
    if args and args[0] == "--version":
        console.print(f"textrlhf {_version()}", highlight=False)
        return 0
    if args and args[0] not in ("-h", "--help"):
        near = difflib.get_close_matches(args[0], COMMANDS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        message = f"[red]There is no command {escape(repr(args[0]))}.[/red]{hint} The commands are:"
        console.print(message, highlight=False, soft_wrap=True)
    _overview()
    return 0 if args and args[0] in ("-h", "--help") else 2


def main(args: Sequence[str] | None = None) -> int:
    """The entry point of the command ``textrlhf``.

    :param args: the arguments; None: those of the process.
    :return: the exit status: 0, 1 for an error, 2 for a command line that can't be read, 130 after Ctrl-C and 143 after
        SIGTERM.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] not in COMMANDS:
        return _without_command(args)
    command, *rest = args
    options, groups, examples = COMMANDS[command]
    if {"-h", "--help"} & set(rest):
        console.print(usage(command, options, groups, examples), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(0)  # as tyro ends where it can't read an option, so that nothing after `main` runs
    debug = "--debug" in rest
    rest = [option for option in rest if option != "--debug"]
    try:
        default, function = None, FUNCTIONS[command]
        if command == "train":
            rest = [part for option in rest for part in _split_option(option)]
            if "--resume" in rest:
                options, function = ResumeConfig, run_resume
            elif "--config" in rest:
                at = rest.index("--config")
                if at + 1 == len(rest):
                    raise ValueError("--config needs a YAML file after it.")
                default = load_config(Path(rest[at + 1]))
                rest = rest[:at] + rest[at + 2 :]
        config = tyro.cli(options, args=rest, default=default, prog=f"textrlhf {command}")
        _quiet_transformers()
        return function(config)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            message = " ".join([str(error) or "Interrupted.", *getattr(error, "__notes__", ())])
            console.print(escape(message), highlight=False, soft_wrap=True)
            return 128 + getattr(error, "number", signal.SIGINT)  # as shells count
        kind, message = described(error)
        console.print(f"[red]{kind}[/red]: {escape(message)}", highlight=False, soft_wrap=True)
        return 1


def _quiet_transformers() -> None:
    """For models this small, loading is over before its progress bar is read."""
    from transformers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
