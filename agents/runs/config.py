"""What a training run is made of, as data: the command line's options and ``config.yaml``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import tyro
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm

from agents.algorithms.a2c import A2C
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.state.arguments import argument_defaults
from text_env.imports import import_object, is_object_name
from text_env.settings import EpisodeSettings
from text_env.shaping import PotentialShaping
from text_env.vector_env import TextVectorEnv, plain, wrapped_error
from text_env.wrappers import CONTINUOUS_ID

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


# A field of the environment's settings is declared again here only where the command line takes less than Python does
# (names, no live objects), or where None leaves the choice to the model or the algorithm. All others are inherited
# together with their help texts.
@dataclass(frozen=True)
class EnvConfig(EpisodeSettings):
    """The environment of a run, as data."""

    tokenizer: str | None = None  # type: ignore[assignment]
    """Name or directory; by default the model's."""
    prompts: str = "builtin"
    """'builtin', 'builtin:eval', a file (.jsonl, .json, .csv, .txt) or 'module:function'."""
    reward: str = "builtin"
    """'builtin', 'sentiment', a classifier's name, 'module:function', a sum ('builtin+0.5*sentiment')."""
    constraint: str | None = None
    """'module:function' that says which tokens may follow a context."""
    stop: str | None = None
    """A string that ends the text."""
    group_size: int | None = None  # type: ignore[assignment]
    """So many episodes in a row share a prompt; by default what the algorithm needs: 4 for RLOO and GRPO, else 1."""
    metrics: tyro.conf.Suppress[Mapping[str, Any] | None] = None
    """Further scores besides `gold`; only from Python and YAML."""
    shaping: str | None = None
    """A potential, named as a reward is: pays every token of training for what it promises, and leaves the optimum."""
    reward_kwargs: dict[str, str] = field(default_factory=dict)
    """For the classifiers among the rewards, for example `--reward-kwargs batch_size 64 dtype bfloat16`."""
    env: str = "TextRLHF-v0"
    """Registered name."""
    gold: str | None = "sentiment"
    """A second score, measured and logged as gold_score, never trained on."""
    shaping_every: int = 1
    """Ask the potential after so many tokens."""

    def make(self, num_envs: int, model: str, gamma: float | None = None, **overrides: Any) -> TextVectorEnv:
        """
        :param num_envs: rows.
        :param model: the model whose tokenizer is used, if none is named.
        :param gamma: the discount of the algorithm that learns in the environment, which shaping must share; None:
            nothing learns, so nothing is shaped.
        :param overrides: keyword arguments of the environment that differ.
        :return: the vector environment.
        :raises ValueError: if ``env`` names an environment in wrappers, which the learners would not see.
        """
        options = {option.name: getattr(self, option.name) for option in dataclasses.fields(EpisodeSettings)}
        gold = {"gold_score": self.gold} if self.gold else {}
        shaping = None
        if self.shaping is not None and gamma is not None:
            shaping = PotentialShaping(self.shaping, gamma, self.shaping_every)
        options.update(
            tokenizer=self.tokenizer or model,
            metrics={**(self.metrics or {}), **gold} or None,
            shaping=shaping,
            reward_kwargs=parsed(self.reward_kwargs),
        )
        options.update(overrides)
        if options["group_size"] is None:  # nobody has asked for groups
            options["group_size"] = 1
        if self.env.rpartition(":")[2] == CONTINUOUS_ID:
            # Before the wrapper compares its embeddings' tokenizer with the model's, which would be beside the point.
            raise ValueError(f"env={self.env!r}: {wrapped_error('VectorEmbeddingAction')}")
        env = gym.make_vec(self.env, num_envs=num_envs, **options)
        try:
            return plain(env)
        except ValueError as error:
            raise ValueError(f"env={self.env!r}: {error}") from error


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
    """The highest one; by default, like the sizes below, what the algorithm's class says."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How it goes on: constant, or down to 0 at the end, in a straight line or as half a cosine wave."""
    lr_warmup: float = 0.0
    """The part of the run (0.1: a tenth) in which it first rises from 0."""
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
    `PPO.load(path, env=...)` goes on exactly. 0: none."""
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
        raise ValueError(
            f"Expected {name!r} to be a subclass of agents.algorithms.on_policy.OnPolicyAlgorithm, got {found!r}."
        )
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


def parsed(given: dict[str, str]) -> dict[str, Any]:
    """Arguments from the command line, where each value is YAML."""
    return {name: _number(yaml.safe_load(value)) for name, value in given.items()}


def dump_config(config: Any) -> str:
    """
    :param config: a dataclass of this module.
    :return: all of it as YAML.
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
