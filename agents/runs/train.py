"""A training run, from its configuration to the directory of its results.

The directory holds ``config.yaml``, ``progress.csv``, TensorBoard events, ``samples.jsonl`` (texts for fixed held-out
prompts, every few iterations), ``learning_curve.png`` and ``policy/`` (a plain Hugging Face directory).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from agents.algorithms.environments import default_rows
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.models.pretrained import resolve_dtype
from agents.runs.algorithms import OWN_OPTIONS, algorithm_named, discount, resolved
from agents.runs.config import TrainConfig, critic_name, dump_config, lora_kwargs, parsed, separate_critic
from agents.runs.recording import Checkpoint, SampleTexts, check_directory, plot_learning_curve, remove_start
from agents.state.arguments import argument_defaults
from agents.state.devices import check_device
from agents.state.schedules import LearningRate


def train(config: TrainConfig) -> OnPolicyAlgorithm:
    """Train as configured, and write all results to the run directory.

    A training that fails before its first update has learned nothing: it takes its files away again, so that it can be
    started once more in the same directory.

    :param config: the configuration.
    :return: the trained algorithm.
    :raises FileExistsError: if the directory holds a run already.
    :raises ValueError: if an option is unknown or out of range; nothing is loaded before that is known.
    """
    config = resolved(config)
    directory = config.run_dir
    assert directory is not None
    check_directory(directory)
    check_device(config.device)
    resolve_dtype(config.dtype)
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
    env = config.env.make(default_rows(config.n_episodes, config.env.group_size), config.model, discount(config))
    assert config.learning_rate is not None
    policy_kwargs: dict[str, Any] = {
        "model": config.model,
        "dtype": config.dtype,
        "autocast": config.autocast,
        "compile_forward": config.compile_forward,
        "temperature": config.temperature,
        "lora": lora_kwargs(config),
    }
    if config.critic is not None:
        policy_kwargs["separate_critic"] = separate_critic(config.critic)
    model = algorithm(
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
        policy_kwargs=policy_kwargs,
        seed=config.seed,
        device=config.device,
        **parsed(config.algo_kwargs),
    )
    config = dataclasses.replace(config, critic=critic_name(model.policy_kwargs.get("separate_critic", False)))
    callbacks: list[BaseCallback] = [SampleTexts(directory / "samples.jsonl", config)]
    if config.checkpoint_every:
        callbacks.append(Checkpoint(directory / "checkpoint", config.checkpoint_every))
    directory.mkdir(parents=True, exist_ok=True)
    model.set_logger(configure(str(directory), ["csv", "tensorboard"]))
    (directory / "config.yaml").write_text(dump_config(config))
    finished = False
    try:
        model.learn(config.total_timesteps, callback=callbacks, progress_bar=config.progress)
        finished = True
    finally:  # an error of the reward, or Ctrl-C, must not lose what was learned until then
        model.logger.close()
        if finished or model._n_updates or (directory / "progress.csv").read_text():
            model.policy.save_pretrained(directory / "policy")
            plot_learning_curve(directory)
        else:
            remove_start(directory)
    return model
