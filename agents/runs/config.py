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

from agents.runs.yaml_values import hints_of, mapping, read_mapping, typed
from agents.state.arguments import check_number
from agents.state.schedules import LearningRate
from text_env.settings import EpisodeSettings, check_integer
from text_env.shaping import PotentialShaping
from text_env.vector_env import TextVectorEnv, plain, wrapped_error
from text_env.wrappers import CONTINUOUS_ID


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

    def check(self) -> None:
        """As the base class does; a group size that is left to the algorithm is not checked.

        :raises ValueError: if a number is out of range.
        """
        check_integer("shaping_every", self.shaping_every, 1)
        EpisodeSettings.check(self if self.group_size is not None else dataclasses.replace(self, group_size=1))

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
    """Of everything random."""
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
    """Of the policy and its reference, in sampling and in training."""
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
    """'auto', 'cpu', 'cuda', …"""
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

    def check(self) -> None:
        """Refuse what no run can be made of. Nothing is loaded for this, and nothing written.

        :raises ValueError: if a number is out of range.
        """
        for name, least in (("total_timesteps", 1), ("sample_every", 1), ("n_samples", 1), ("checkpoint_every", 0)):
            check_integer(name, getattr(self, name), least)
        for name in ("n_episodes", "batch_size", "n_epochs", "lora_r"):  # None: the algorithm's number, or no adapter
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if self.n_episodes is not None and self.batch_size is not None and self.batch_size > self.n_episodes:
            raise ValueError(
                f"Expected batch_size, the episodes of a minibatch, to be at most n_episodes={self.n_episodes}, those "
                f"of the rollout; got {self.batch_size}."
            )
        check_number("kl_coef", self.kl_coef, least=0)
        check_number("temperature", self.temperature, above=0)
        check_integer("lora_alpha", self.lora_alpha, 1)
        if self.kl_target is not None:
            check_number("kl_target", self.kl_target, above=0)
        if self.missing_eos_penalty is not None:
            check_number("missing_eos_penalty", self.missing_eos_penalty, least=0)
        LearningRate(0.0 if self.learning_rate is None else self.learning_rate, self.lr_schedule, self.lr_warmup)
        self.env.check()


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
    """
    :param given: arguments from the command line, each value as YAML.
    :return: the values.
    :raises ValueError: if one is not YAML.
    """
    values = {}
    for name, value in given.items():
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"Expected {name} to be YAML, as `0.1`, `null` or `[1, 2]` are; got {value!r}.") from error
        if isinstance(read, str):  # YAML 1.1 reads 1e-4 as a string; where a string is a number, the number is meant
            with contextlib.suppress(ValueError):
                read = float(read)
        values[name] = read
    return values


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
    :raises ValueError: for a key that doesn't exist, naming those that do, and for a value of another type.
    """
    values = read_mapping(path)
    env = mapping(f"{path}: env", values.pop("env", None))
    own = _typed_fields(path, values, TrainConfig)
    return TrainConfig(env=EnvConfig(**_typed_fields(path, env, EnvConfig)), **own)


def _typed_fields(path: Path, values: dict[str, Any], cls: type[Any]) -> dict[str, Any]:
    """The values as the fields of the class want them."""
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := set(values) - known:
        raise ValueError(f"{path}: unknown {sorted(unknown)}; {cls.__name__} has {sorted(known)}.")
    hints, found = hints_of(cls), {}
    wider = hints_of(EpisodeSettings) if issubclass(cls, EpisodeSettings) else {}
    for name, value in values.items():
        # Python takes more than the command line does: rewards with weights, several stop strings, lists of prompts.
        hint = (
            wider[name] if name in wider and isinstance(value, list | dict) and name != "reward_kwargs" else hints[name]
        )
        value = typed(f"{path}: {name}", value, hint)
        if name in ("algo_kwargs", "reward_kwargs"):  # strings on the command line, which are read as YAML later
            value = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in value.items()}
        found[name] = value
    return found
