"""A training run, from its configuration to the directory of its results, and on from there after it was stopped.

The directory holds ``config.yaml``, ``progress.csv``, TensorBoard events, ``samples.jsonl`` (texts for fixed prompts,
every few iterations), ``episodes.jsonl`` (a few episodes of the training, token by token), ``checkpoints/``,
``learning_curve.png`` and ``policy/`` (a plain Hugging Face directory with a model card). Of several processes
(``torchrun``, ``accelerate launch``) the first writes all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from stable_baselines3.common.callbacks import BaseCallback

from agents.algorithms.engine import launched
from agents.algorithms.environments import default_rows
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.models.pretrained import resolve_dtype
from agents.rollouts.source import LOCAL
from agents.runs.algorithms import OWN_OPTIONS, algorithm_named, discount, resolved
from agents.runs.checkpoints import Checkpoints, TakePart
from agents.runs.commands import ResumeConfig
from agents.runs.config import (
    TrainConfig,
    critic_name,
    dump_config,
    load_config,
    lora_kwargs,
    names_from_run,
    parsed,
    separate_critic,
)
from agents.runs.hints import resume_command
from agents.runs.logs import ProgressTable, keep_lines, replace_text, run_logger
from agents.runs.model_card import write_card
from agents.runs.recording import (
    CHECKPOINTS,
    SampleTexts,
    check_directory,
    plot_learning_curve,
    remove_start,
)
from agents.runs.stopping import StopOnSignal, Stopped, take_every
from agents.runs.token_records import RecordEpisodes
from agents.runs.trackers import Tracker, check_tracker
from agents.state.arguments import argument_defaults, class_name
from agents.state.checkpoint import Tree
from agents.state.devices import check_device
from agents.state.history import CheckpointHistory
from agents.state.lock import locked
from agents.state.replacing import replacing
from agents.state.schedules import LearningRate


def train(config: TrainConfig) -> OnPolicyAlgorithm:
    """Train as configured, and write all results to the run directory.

    A training that fails before its first update has learned nothing: it takes its files away again, so that it can be
    started once more in the same directory. Later, whatever ends it leaves a policy and, unless there are to be none,
    a checkpoint.

    :param config: the configuration.
    :return: the trained algorithm.
    :raises FileExistsError: if the directory holds a run already.
    :raises ValueError: if an option is unknown or out of range; nothing is loaded before that is known.
    :raises Stopped: after SIGINT or SIGTERM.
    """
    config = resolved(config)
    directory = config.run_dir
    assert directory is not None
    if launched()[0]:
        return _learn_along(config, new_algorithm(config))
    check_directory(directory)
    model = new_algorithm(config)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with locked(directory):
            check_directory(directory)  # while the model was being made, another training may have begun here
            return _learn(config, directory, model, config.progress)
    finally:
        with contextlib.suppress(OSError):  # only a start that failed leaves nothing in it
            directory.rmdir()


def resume(options: ResumeConfig) -> OnPolicyAlgorithm:
    """Go on with a run from its newest checkpoint that is intact, and with what it has logged until then. The run ends
    as it would have if it had not been stopped, with the same weights, bit for bit on the CPU.

    A run that was stopped before its first checkpoint begins anew. In a run that is made longer, a learning rate that
    falls to 0 at the end jumps to where it would be in the longer run.

    :param options: the directory of the run, and its new length.
    :return: the trained algorithm.
    :raises FileNotFoundError: if there is no run.
    :raises UntrustedNameError: if its ``config.yaml`` names code, and ``options.trust`` is False.
    :raises ValueError: if the run would be shorter, if it has no checkpoints by its own choice, or if all of them are
        damaged.
    :raises Stopped: after SIGINT or SIGTERM.
    """
    directory, path = options.resume, options.resume / "config.yaml"
    if not path.exists():
        raise FileNotFoundError(f"Expected the directory of a run, which has a config.yaml; found none in {directory}.")
    config = dataclasses.replace(load_config(path), run_dir=directory)
    total = options.total_timesteps or config.total_timesteps
    if total < config.total_timesteps:
        raise ValueError(
            f"Expected total_timesteps to be at least the run's own {config.total_timesteps}, got {total}."
        )
    if config.checkpoint_every == 0:
        raise ValueError(
            f"Expected a run with checkpoints; {directory} was trained with --checkpoint-every 0. Start it again, or "
            f"go on from its weights in a new run: textrlhf train --model {directory / 'policy'}."
        )
    rank, _ = launched()
    with contextlib.nullcontext() if rank else locked(directory), names_from_run(path, config, options):
        config = resolved(config)
        history = CheckpointHistory(directory / CHECKPOINTS, config.keep)
        state = history.newest()[1] if history.timesteps() else None
        for _, reason in history.damaged:
            warnings.warn(f"{reason} The checkpoint before it is taken.", stacklevel=2)
        config = dataclasses.replace(config, total_timesteps=total)
        if rank:
            return _learn_along(config, new_algorithm(config), state)
        progress = config.progress and options.progress
        return _learn(config, directory, new_algorithm(config), progress, resumed=True, state=state)


def new_algorithm(config: TrainConfig) -> OnPolicyAlgorithm:
    """The algorithm of a run in its environment, before any training.

    :param config: the configuration, resolved.
    :return: the algorithm.
    :raises ValueError: if an option is unknown or out of range; nothing is loaded before that is known.
    :raises ImportError: if the package of a tracker isn't installed.
    """
    check_device(config.device)
    resolve_dtype(config.dtype)
    check_tracker(config.track)
    algorithm = algorithm_named(config.algo)
    known = set(argument_defaults(algorithm)) - OWN_OPTIONS
    if unknown := set(config.algo_kwargs) - known:
        raise ValueError(
            f"Unknown algo_kwargs {sorted(unknown)}; {algorithm.__name__} takes {sorted(known)}, and "
            f"{sorted(OWN_OPTIONS)} are options of their own."
        )
    assert config.model is not None
    assert config.n_episodes is not None
    assert config.n_epochs is not None
    assert config.kl_coef is not None
    assert config.env.group_size is not None
    rows = default_rows(config.n_episodes, config.env.group_size, at_once=config.rollouts != LOCAL)
    env = config.env.make(rows, config.model, discount(config))
    assert config.learning_rate is not None
    policy_kwargs: dict[str, Any] = {
        "model": config.model,
        "dtype": config.dtype,
        "autocast": config.autocast,
        "decode": config.decode,
        "compile_forward": config.compile_forward,
        "gradient_checkpointing": config.gradient_checkpointing,
        "temperature": config.temperature,
        "lora": lora_kwargs(config),
    }
    if config.critic is not None:
        policy_kwargs["separate_critic"] = separate_critic(config.critic)
    if config.optimizer is not None:
        policy_kwargs["optimizer_class"] = config.optimizer
    return algorithm(
        "CausalLMPolicy",
        env,
        learning_rate=LearningRate(config.learning_rate, config.lr_schedule, config.lr_warmup),
        n_episodes=config.n_episodes,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        kl_coef=config.kl_coef,
        kl_target=config.kl_target,
        kl_estimator=config.kl_estimator,
        missing_eos_penalty=config.missing_eos_penalty,
        rollouts=config.rollouts,
        max_lag=config.max_lag,
        policy_kwargs=policy_kwargs,
        seed=config.seed,
        device=config.device,
        **parsed(config.algo_kwargs),
    )


def save_policy(model: OnPolicyAlgorithm, directory: Path) -> None:
    """Write the policy of an algorithm. An earlier one is replaced as a whole.

    :param model: the algorithm.
    :param directory: a plain Hugging Face directory.
    """
    with replacing(directory) as partial:
        model.policy.save_pretrained(partial)


def _learn(
    config: TrainConfig,
    directory: Path,
    model: OnPolicyAlgorithm,
    progress: bool,
    resumed: bool = False,
    state: Tree | None = None,
) -> OnPolicyAlgorithm:
    """Train to the end of the run, or until something ends it, and write down what there is then.

    :param config: the configuration.
    :param directory: the directory of the run.
    :param model: the algorithm, before any training.
    :param progress: whether this process shows a progress bar; the configuration says whether the run has one.
    :param resumed: whether there may be files of an earlier process.
    :param state: the state that the algorithm goes on from; None: it begins.
    """
    config = dataclasses.replace(config, critic=critic_name(model.policy_kwargs.get("separate_critic", False)))
    before = set(directory.iterdir())
    samples = SampleTexts(directory / "samples.jsonl", config)
    episodes = RecordEpisodes(directory / "episodes.jsonl", config)
    done = _go_on(model, state)  # now, since making whatever was made before may have drawn random numbers
    replace_text(directory / "config.yaml", dump_config(config))  # from here on there is a run that can be resumed
    model.set_logger(run_logger(directory, done if resumed else None))
    # The texts at a checkpoint are written after it, and so once more.
    keep_lines(directory / "samples.jsonl", lambda row: row["timesteps"] < done)
    # The episodes are written before it: their rollout is not in it.
    keep_lines(directory / "episodes.jsonl", lambda row: row["timesteps"] <= done)
    table = cast(ProgressTable, model.logger.output_formats[0])
    tracker = None if config.track is None else Tracker(directory, config, table)
    if tracker is not None:
        model.logger.output_formats.append(tracker)
    stop = StopOnSignal()
    callbacks: list[BaseCallback] = [stop, samples]
    checkpoints = None
    if config.checkpoint_every != 0:
        history = CheckpointHistory(directory / CHECKPOINTS, config.keep)
        every, known = config.checkpoint_every, None if state is None else done
        checkpoints = Checkpoints(history, table, every, config.best, known)
        callbacks = [checkpoints, *callbacks]
    callbacks = [episodes, *callbacks]

    def write_down(cause: BaseException | None = None) -> None:
        steps: list[Callable[[], object]] = [model.logger.close]
        if cause is None or model._n_updates or len(table):
            saved = [] if checkpoints is None else [checkpoints.save]
            policy, picture = lambda: save_policy(model, directory / "policy"), lambda: plot_learning_curve(directory)
            steps = [*saved, policy, *steps, picture, lambda: write_card(directory)]
        elif not resumed:
            steps.append(lambda: remove_start(directory, before))
        take_every(steps, cause)
        if cause is not None and checkpoints is not None and (checkpoints.timesteps is not None or resumed):
            cause.add_note(f"`{resume_command(directory)}` goes on from {checkpoints.timesteps or 0} tokens.")

    with stop:
        try:
            if tracker is not None:
                tracker.begin()
            remaining = max(0, config.total_timesteps - done)
            model.learn(remaining, callbacks, progress_bar=progress, reset_num_timesteps=state is None)
        except BaseException as error:
            if not (isinstance(error, Stopped) and error.at_once):
                write_down(error)
            raise
        write_down()
    return model


def _learn_along(config: TrainConfig, model: OnPolicyAlgorithm, state: Tree | None = None) -> OnPolicyAlgorithm:
    """What :func:`_learn` is for a process that writes nothing.

    :param config: the configuration.
    :param model: the algorithm, before any training.
    :param state: the state that the algorithm goes on from; None: it begins.
    """
    done = _go_on(model, state)
    with StopOnSignal() as stop:
        callbacks: list[BaseCallback] = [stop] if config.checkpoint_every == 0 else [TakePart(), stop]
        model.learn(max(0, config.total_timesteps - done), callbacks, reset_num_timesteps=state is None)
    return model


def _go_on(model: OnPolicyAlgorithm, state: Tree | None) -> int:
    """
    :param model: the algorithm, before any training.
    :param state: the state that it goes on from; None: it begins.
    :return: the tokens that it has seen.
    """
    if state is not None:
        if (saved := state["algorithm"]) != (ours := class_name(type(model))):
            raise ValueError(f"Expected the config.yaml of the run to name its algorithm {saved}, got {ours}.")
        model.load_state(state)
    done = model.engine.gather(model.num_timesteps)
    if len(set(done)) > 1:
        raise ValueError(
            f"Expected all processes to go on from the same checkpoint, got one after {done} tokens: let all of them "
            "see the same directory."
        )
    return done[0]
