"""A training run: its configuration, and the directory that it leaves behind.

``config.yaml``, ``progress.csv``, TensorBoard events, ``samples.jsonl`` (fixed held-out prompts, texts every few
iterations), ``learning_curve.png``, ``policy/`` (a plain Hugging Face directory).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import gymnasium as gym
import numpy as np
import torch
import tyro
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from agents.a2c import A2C
from agents.checkpoint import argument_defaults
from agents.evaluation import sample_texts
from agents.grpo import GRPO
from agents.on_policy import OnPolicyAlgorithm, default_rows
from agents.ppo import PPO
from agents.reinforce import REINFORCE
from agents.rloo import RLOO
from text_env.names import import_object, is_object_name
from text_env.prompts import load_prompts
from text_env.shaping import PotentialShaping
from text_env.vector_env import TextVectorEnv

# Arguments of the algorithms that `TrainConfig` has fields for, or that are made from them.
OWN_OPTIONS = {
    *("policy", "env", "learning_rate", "n_episodes", "batch_size", "n_epochs", "kl_coef", "kl_target"),
    *("kl_estimator", "missing_eos_penalty", "policy_kwargs", "seed", "device", "reference"),
}

ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {
    "ppo": PPO,
    "a2c": A2C,
    "reinforce": REINFORCE,
    "rloo": RLOO,
    "grpo": GRPO,
}


@dataclass
class EnvConfig:
    """The environment, as ``gym.make_vec`` takes it."""

    env: str = "TextRLHF-v0"
    """Registered name."""
    tokenizer: str | None = None
    """Name or directory; by default the model's."""
    prompts: str = "builtin"
    """'builtin', 'builtin:eval', a file (.jsonl, .json, .csv, .txt) or 'module:function'."""
    reward: str = "builtin"
    """'builtin', 'sentiment', a classifier's name, 'module:function', a sum ('builtin+0.5*sentiment')."""
    gold: str | None = "sentiment"
    """A second score, measured and logged as gold_score, never trained on."""
    max_prompt_tokens: int = 16
    """Longest prompt, in tokens."""
    max_new_tokens: int = 48
    """Response budget, in tokens."""
    min_new_tokens: int = 0
    """EOS is not sampled before so many response tokens."""
    constraint: str | None = None
    """'module:function' that says which tokens may follow a context."""
    stop: str | None = None
    """A string that ends the text."""
    group_size: int | None = None
    """So many episodes in a row share a prompt; by default what the algorithm needs: 4 for RLOO and GRPO, else 1."""
    overlong_prompts: Literal["error", "truncate_left"] = "error"
    """What happens to a prompt that is too long."""
    chat_template: bool | None = None
    """Whether a string prompt is the user's turn in the tokenizer's chat template; by default if it has one."""
    reward_kwargs: dict[str, str] = field(default_factory=dict)
    """For the classifiers among the rewards, for example `--reward-kwargs batch_size 64 dtype bfloat16`."""
    shaping: str | None = None
    """A potential, named as a reward is: pays every token of training for what it promises, and leaves the optimum."""
    shaping_every: int = 1
    """Ask the potential after so many tokens."""

    def make(self, num_envs: int, model: str, gamma: float | None = None, **overrides: Any) -> TextVectorEnv:
        """
        :param num_envs: rows. :param model: whose tokenizer is used, if none is named.
        :param gamma: the discount of the algorithm that learns in it, which shaping must share; None: nothing learns,
            so nothing is shaped.
        :param overrides: keyword arguments of the environment that differ.
        :return: the vector environment.
        """
        options = dataclasses.asdict(self)
        name, gold, tokenizer = options.pop("env"), options.pop("gold"), options.pop("tokenizer")
        potential, every = options.pop("shaping"), options.pop("shaping_every")
        options.update(
            tokenizer=tokenizer or model,
            metrics={"gold_score": gold} if gold else None,
            shaping=None if potential is None or gamma is None else PotentialShaping(potential, gamma, every),
            reward_kwargs=_parsed(self.reward_kwargs),
        )
        options.update(overrides)
        if options["group_size"] is None:  # nobody has asked for groups
            options["group_size"] = 1
        return cast(TextVectorEnv, gym.make_vec(name, num_envs=num_envs, **options).unwrapped)


@dataclass
class TrainConfig:
    """Train a language model by reinforcement learning.

    ``--config FILE.yaml`` sets the defaults of all that follows; options override it.
    """

    algo: str = "ppo"
    """'ppo', 'a2c', 'reinforce', 'rloo', 'grpo', or 'module:Class' for an algorithm of your own."""
    model: str = "builtin"
    """'builtin', a directory, a hub name, a GGUF file, or a PEFT adapter's directory (which is trained on)."""
    env: Annotated[EnvConfig, tyro.conf.arg(name="")] = field(default_factory=EnvConfig)
    total_timesteps: int = 60_000
    """Tokens to generate."""
    run_dir: Path | None = None
    """Where everything goes, by default runs/<algorithm>; must not hold a run yet."""
    seed: int = 0
    learning_rate: float | None = None
    """At the start; by default, like the sizes below, what the algorithm's class says."""
    lr_schedule: Literal["constant", "linear"] = "linear"
    n_episodes: int | None = None
    """Episodes of a rollout."""
    batch_size: int | None = None
    """Episodes of a minibatch."""
    n_epochs: int | None = None
    """Passes over a rollout."""
    kl_coef: float = 0.04
    """β of the KL penalty; 0 measures the KL without penalising it."""
    kl_target: float | None = None
    """Nats per episode: β adapts to hold the KL there."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of each token's KL, for the penalty: k1 is the log-ratio; k2 and k3 have another gradient (docs/ppo.md)."""
    missing_eos_penalty: float | None = None
    """Taken off the reward of texts that the budget cut."""
    algo_kwargs: dict[str, str] = field(default_factory=dict)
    """Further arguments of the algorithm, for example `--algo-kwargs clip_range 0.1 gae_lambda 0.9`."""
    temperature: float = 1.0
    critic: str | None = None
    """A reward model that the critic starts as ('builtin', a directory, a hub name); by default the critic is a head on
    the policy."""
    lora_r: int | None = None
    """Rank of a LoRA adapter; by default every weight is trained."""
    lora_alpha: int = 16
    """Its scale: the adapter's output counts lora_alpha / lora_r."""
    lora_target_modules: str = "all-linear"
    """The layers that get one: 'all-linear', or names with commas ('q_proj,v_proj' costs less)."""
    device: str = "auto"
    dtype: str = "float32"
    """Of the weights."""
    autocast: str | None = None
    """'bfloat16': matrix products in that type, weights in theirs."""
    compile_forward: bool = False
    """Train through torch.compile."""
    checkpoint_every: int = 0
    """Iterations between two checkpoints, each in the place of the one before it: run_dir/checkpoint, from which
    `PPO.load(path, env=..., learning_rate=...)` goes on exactly. 0: none."""
    sample_every: int = 5
    """Iterations between two entries of samples.jsonl."""
    n_samples: int = 6
    """Held-out prompts in samples.jsonl."""
    progress: bool = True
    """Show a progress bar."""


def algorithm_named(name: str) -> type[OnPolicyAlgorithm]:
    """
    :param name: a known one, or ``"module:Class"``.
    :return: the class.
    :raises ValueError: naming the known ones.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if not is_object_name(name):
        raise ValueError(f"Expected algo to be one of {sorted(ALGORITHMS)} or 'module:Class', got {name!r}.")
    found = import_object(name)
    if isinstance(found, type) and issubclass(found, BaseAlgorithm) and not issubclass(found, OnPolicyAlgorithm):
        raise ValueError(
            f"{found.__name__} is Stable-Baselines3's: use it in Python, on agents.make_vec_env('TextRLHF-v0') or, for "
            "continuous actions, on 'TextRLHFContinuous-v0'. The README's table of what plugs in says with which "
            "policy."
        )
    if not (isinstance(found, type) and issubclass(found, OnPolicyAlgorithm)):
        raise ValueError(f"Expected {name!r} to be a subclass of agents.on_policy.OnPolicyAlgorithm, got {found!r}.")
    return found


def resolved(config: TrainConfig) -> TrainConfig:
    """
    :param config: may leave to the algorithm what None stands for.
    :return: the same with the algorithm's own numbers.
    """
    algorithm = algorithm_named(config.algo)
    defaults = argument_defaults(algorithm)
    own = ("learning_rate", "n_episodes", "batch_size", "n_epochs")
    if missing := sorted({*own, "kl_coef"} - set(defaults)):
        raise ValueError(
            f"Expected {algorithm.__name__}.__init__ to hand on **kwargs to OnPolicyAlgorithm; it doesn't take "
            f"{missing}."
        )
    changes: dict[str, Any] = {name: defaults[name] for name in own if getattr(config, name) is None}
    if config.env.group_size is None:
        changes["env"] = dataclasses.replace(config.env, group_size=algorithm.default_group_size)
    if config.run_dir is None:
        changes["run_dir"] = Path("runs") / config.algo.rpartition(":")[2].lower()
    return dataclasses.replace(config, **changes)


def train(config: TrainConfig) -> OnPolicyAlgorithm:
    """Train as configured and leave a complete run directory.

    :param config: everything. :return: the trained algorithm.
    :raises FileExistsError: if the directory holds a run already.
    """
    config = resolved(config)
    directory = config.run_dir
    assert directory is not None
    if (directory / "config.yaml").exists():
        raise FileExistsError(f"{directory} holds a run already; choose another --run-dir, or remove it.")
    algorithm = algorithm_named(config.algo)
    known = set(argument_defaults(algorithm)) - OWN_OPTIONS
    if unknown := set(config.algo_kwargs) - known:
        raise ValueError(
            f"Unknown algo_kwargs {sorted(unknown)}; {algorithm.__name__} takes {sorted(known)}, and "
            f"{sorted(OWN_OPTIONS)} are options of their own."
        )
    assert config.n_episodes is not None
    assert config.n_epochs is not None
    assert config.env.group_size is not None
    algo_kwargs = _parsed(config.algo_kwargs)
    gamma = algo_kwargs.get("gamma", argument_defaults(algorithm).get("gamma", 1.0))
    env = config.env.make(default_rows(config.n_episodes, config.env.group_size), config.model, gamma)
    rate = config.learning_rate
    assert rate is not None
    policy_kwargs: dict[str, Any] = {
        "model": config.model,
        "dtype": config.dtype,
        "autocast": config.autocast,
        "compile_forward": config.compile_forward,
        "temperature": config.temperature,
        "separate_critic": config.critic or False,
        "lora": lora_kwargs(config),
    }
    model = algorithm(
        "CausalLMPolicy",
        env,
        learning_rate=rate if config.lr_schedule == "constant" else lambda progress: rate * progress,
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
        **algo_kwargs,
    )
    callbacks: list[BaseCallback] = [SampleTexts(directory / "samples.jsonl", config)]
    if config.checkpoint_every:
        callbacks.append(Checkpoint(directory / "checkpoint", config.checkpoint_every))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(dump_config(config))
    model.set_logger(configure(str(directory), ["csv", "tensorboard"]))
    try:
        model.learn(config.total_timesteps, callback=callbacks, progress_bar=config.progress)
    finally:  # a reward that raises, or Ctrl-C, must not cost what was learned until then
        model.logger.close()
        model.policy.save_pretrained(directory / "policy")
        plot_learning_curve(directory)
    return model


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a string; where a string is a number, the number is meant."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def lora_kwargs(config: TrainConfig) -> dict[str, Any] | None:
    """
    :return: arguments of ``peft.LoraConfig``; None where every weight is trained.
    """
    if config.lora_r is None:
        return None
    targets = config.lora_target_modules
    return {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "target_modules": targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
    }


def _parsed(given: dict[str, str]) -> dict[str, Any]:
    """Arguments from the command line, where each value is YAML."""
    return {name: _number(yaml.safe_load(value)) for name, value in given.items()}


def dump_config(config: Any) -> str:
    """
    :param config: a dataclass of this module. :return: all of it as YAML.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return str(value) if isinstance(value, Path) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)


def load_config(path: Path) -> TrainConfig:
    """
    :param path: YAML, as ``config.yaml`` or a part of it; what is missing keeps its default.
    :raises ValueError: for a key that doesn't exist, naming those that do.
    """
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    env = values.pop("env", None) or {}
    for given, cls in ((values, TrainConfig), (env, EnvConfig)):
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(given) - known:
            raise ValueError(f"{path}: unknown {sorted(unknown)}; {cls.__name__} has {sorted(known)}.")
    values = {name: _number(value) for name, value in values.items()}
    if values.get("run_dir") is not None:
        values["run_dir"] = Path(values["run_dir"])
    for options, name in ((values, "algo_kwargs"), (env, "reward_kwargs")):
        if name in options:  # on the command line they are strings, which are read as YAML later
            options[name] = {k: v if isinstance(v, str) else json.dumps(v) for k, v in options[name].items()}
    return TrainConfig(env=EnvConfig(**env), **values)


class SampleTexts(BaseCallback):
    """Write texts for fixed held-out prompts to ``samples.jsonl`` at the start and every few iterations.

    :param path: the file. :param config: of the run.
    """

    def __init__(self, path: Path, config: TrainConfig) -> None:
        super().__init__()
        self._path = path
        self._every = config.sample_every
        self._iteration = 0
        # Files of the user's own have no held-out part: then the first prompts are watched.
        held_out = "builtin:eval" if config.env.prompts == "builtin" else config.env.prompts
        rows = load_prompts(held_out)[: config.n_samples]
        self._env = config.env.make(len(rows), config.model, prompts=rows)
        self._prompts = list(self._env.prompts)  # with their columns, which rewards may ask for

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._iteration % self._every == 0:
            self._write()
        self._iteration += 1

    def _on_training_end(self) -> None:
        self._write()

    def _write(self) -> None:
        policy = cast(OnPolicyAlgorithm, self.model).policy
        # The same random numbers every time, and none of the training's.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            infos = sample_texts(policy, self._env, self._prompts)
        with self._path.open("a") as file:
            for info in infos:
                row = {k: float(v) if isinstance(v, np.floating) else v for k, v in info.items()}
                file.write(json.dumps({"timesteps": self.num_timesteps, **row}, ensure_ascii=False) + "\n")


class Checkpoint(BaseCallback):
    """Save everything that goes on with a run, every few iterations; whatever happens later, the last one stays whole.

    :param path: the directory. :param every: iterations.
    """

    def __init__(self, path: Path, every: int) -> None:
        super().__init__()
        self._path = path
        self._every = every
        self._iterations = 0  # that are over

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._iterations and self._iterations % self._every == 0:
            self.model.save(self._path)
        self._iterations += 1


def plot_learning_curve(directory: Path) -> None:
    """Draw score, gold score and KL over tokens from ``progress.csv`` into ``learning_curve.png``.

    :param directory: of the run.
    """
    import matplotlib.figure

    if not (directory / "progress.csv").read_text():
        return  # not one iteration was finished
    table = np.genfromtxt(directory / "progress.csv", delimiter=",", names=True, deletechars="")
    table = np.atleast_1d(table)
    tokens = table["time/total_timesteps"]
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    lines = axes.plot(tokens, table["objective/scores"], color="tab:blue", label="score (trained on)")
    if "objective/gold_score" in (table.dtype.names or ()):
        lines += axes.plot(
            tokens, table["objective/gold_score"], color="tab:orange", label="gold score (only measured)"
        )
    axes.set_xlabel("tokens")
    axes.set_ylabel("score")
    axes.grid(alpha=0.3)
    right = axes.twinx()
    lines += right.plot(tokens, table["objective/kl"], color="tab:gray", linestyle="--", label="KL to the reference")
    right.set_ylabel("KL (nats per episode)")
    axes.legend(handles=lines, loc="upper left", framealpha=0.9)
    figure.savefig(directory / "learning_curve.png", dpi=120)
