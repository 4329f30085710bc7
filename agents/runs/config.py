"""The configuration of a training run as data, for the command line and for ``config.yaml``."""

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

from agents.runs.not_scored import NotScored
from agents.runs.yaml_values import hints_of, mapping, read_mapping, typed
from agents.state.arguments import check_number
from agents.state.schedules import LearningRate
from text_env.imports import names_from
from text_env.reward_names import parse_sum
from text_env.settings import EpisodeSettings, check_integer
from text_env.shaping import PotentialShaping
from text_env.task_names import make_task, model_of_task, said_by_name
from text_env.tasks import Task
from text_env.vector_env import TextVectorEnv, plain, wrapped_error
from text_env.wrappers import CONTINUOUS_ID

LEXICON = "sentiment"
KEYWORDS = ("algo_kwargs", "reward_kwargs", "task_kwargs")


# A field of the environment's settings is declared again here only if the command line accepts less than Python does
# (names and no live objects), or if None leaves the choice to the model or the algorithm. All others are inherited,
# together with their help texts.
@dataclass(frozen=True)
class EnvConfig(EpisodeSettings):
    """The environment of a run, as data."""

    task: str | None = None
    """A task with a right answer: 'arithmetic', 'reasoning_gym:NAME', a file with a column `answer`, or
    'module:object'. It says what prompts, reward and budgets are where they are left at their defaults."""
    task_kwargs: dict[str, str] = field(default_factory=dict)
    """Arguments of the task, each value as YAML, for example `--task-kwargs n_steps "[3, 4]" size 1000`."""
    tokenizer: str | None = None  # type: ignore[assignment]
    """A directory or a hub name; by default the model's tokenizer."""
    prompts: str = "builtin"
    """'builtin', 'builtin:eval', a file (.jsonl, .json, .csv, .txt) or 'module:function'."""
    reward: str = "builtin"
    """'builtin', 'sentiment', 'correct' (the right answer), 'format', 'length(budget=64)', 'overlong(64, 16)', the
    directory or hub name of a classifier, 'module:function', the address of a server ('http://host:8000/score'), or a
    weighted sum of these ('builtin+0.5*sentiment')."""
    constraint: str | None = None
    """'module:function', a function that decides which tokens may follow a context."""
    stop: str | None = None
    """A string that ends the text."""
    group_size: int | None = None  # type: ignore[assignment]
    """The number of consecutive episodes that share a prompt.
    By default it is what the algorithm needs, 4 for RLOO, GRPO and DAPO and 1 for the others."""
    metrics: tyro.conf.Suppress[Mapping[str, Any] | None] = None
    """Further scores besides `gold`. They can be set only in Python and YAML."""
    shaping: str | None = None
    """A potential, named in the same way as a reward. Each token of training is paid for the change of the potential.
    This does not change which policy is best."""
    reward_kwargs: dict[str, str] = field(default_factory=dict)
    """Arguments of the classifiers among the rewards, for example `--reward-kwargs batch_size 64 dtype bfloat16`."""
    env: str = "TextRLHF-v0"
    """The registered name of the environment."""
    gold: str | None = "auto"
    """A second score, named in the same way as a reward, which is logged as gold_score and never trained on.
    By default ('auto') it is 'sentiment', a lexicon, beside the built-in reward or a sum with it, and there is none
    beside another. A task has none unless another than 'sentiment' is named."""
    shaping_every: int = 1
    """The number of tokens after which the potential is computed again."""

    def check(self) -> None:
        """As the base class does; a group size that is left to the algorithm is not checked.

        :raises ValueError: if a number is out of range.
        """
        check_integer("shaping_every", self.shaping_every, 1)
        EpisodeSettings.check(self if self.group_size is not None else dataclasses.replace(self, group_size=1))

    def held_out(self) -> EnvConfig:
        """
        :return: the same environment with the prompts that are held out; with those of the training if there are none.
        """
        if self.has_task:
            return dataclasses.replace(self, task_kwargs={**self.task_kwargs, "split": "eval"})
        builtin = _plain_name(self.prompts) == _plain_name(EnvConfig.prompts)
        return dataclasses.replace(self, prompts="builtin:eval") if builtin else self

    def prompt_set(self, trained: EnvConfig | None) -> dict[str, Any]:
        """
        :param trained: the environment of the run that is evaluated in this one; None: no run is known.
        :return: ``prompt_set``, the name of the prompts, and ``trained_on``, whether the run was trained on them.
        """
        if self.has_task and self.prompts == EnvConfig.prompts:  # the task's own, of which a part is held out
            return {"prompt_set": self.made_task().name, "trained_on": False}
        same = trained is not None and _plain_name(trained.prompts) == _plain_name(self.prompts)
        return {"prompt_set": str(self.prompts), "trained_on": same}

    def for_evaluation(self, prompts: str | None = None) -> EnvConfig:
        """
        :param prompts: the name of other prompts; None: those that are held out.
        :return: the same environment with these prompts, which may be longer than those of the training.
        """
        config = self.held_out()
        if prompts is not None:
            config = dataclasses.replace(config, prompts=prompts)
        left = config.max_prompt_tokens == EnvConfig.max_prompt_tokens
        # A task says how long its own prompts can be; else the first ones would, and longer ones would be replaced.
        left_to_task = left and config.has_task and prompts is None
        if config.overlong_prompts == "error" and not left_to_task:
            config = dataclasses.replace(config, max_prompt_tokens=None)
        return config

    def model(self) -> str:
        """
        :return: the name of the model that the task was made for; without one, ``"builtin"``.
        """
        return model_of_task(*self._task()) or "builtin"

    def made_task(self) -> Task:
        """
        :return: the task that the environment poses.
        :raises ValueError: if there is none, and for the reasons of :func:`text_env.task_names.make_task`.
        """
        task, kwargs = self._task()
        return make_task(task, **{name: value for name, value in kwargs.items() if name != "split"})

    def gold_reward(self) -> str | None:
        """
        :return: the name of the second score; None: there is none.
        """
        if self.gold != EnvConfig.gold:  # runs wrote down "sentiment" beside every task when it was the default
            return None if self.gold == LEXICON and self.has_task else self.gold
        # The lexicon is what the built-in reward has learned; of what another one rewards it says nothing.
        return LEXICON if _with_builtin(self.reward) and not self.has_task else None

    def unjudged(self, why: str = "nothing is judged here") -> dict[str, Any]:
        """
        :param why: what the final infos give as the reason.
        :return: arguments of :meth:`make` with which nothing judges the texts: all scores are 0, without metrics.
        """
        judge: dict[str, Any] = {"reward": NotScored(why), "metrics": None}
        if self.has_task:
            judge |= {"task": dataclasses.replace(self.made_task(), metrics={}), "task_kwargs": None}
        return judge

    @property
    def has_task(self) -> bool:
        """Whether the environment poses a task, by ``task`` or by the registered name."""
        return self._task()[0] is not None

    def _task(self) -> tuple[Any, dict[str, Any]]:
        """The task (None: there is none) and its arguments, with those that the registered name stands for."""
        given = parsed(self.task_kwargs)
        if self.task is not None:
            return self.task, given
        said = said_by_name(self.env)
        return said.get("task"), {**(said.get("task_kwargs") or {}), **given}

    def make(self, num_envs: int, model: str, gamma: float | None = None, **overrides: Any) -> TextVectorEnv:
        """Make the environment of a run.

        :param num_envs: the number of rows.
        :param model: the model whose tokenizer is used if no tokenizer is configured.
        :param gamma: the discount of the algorithm that learns in the environment, which shaping must use too; None:
            nothing learns in it, so rewards are not shaped.
        :param overrides: keyword arguments of the environment that differ from the configuration.
        :return: the vector environment.
        :raises ValueError: if an option is out of range, or if ``env`` names an environment with wrappers, which the
            algorithms would ignore.
        """
        said_by_name(self.env)  # which refuses to import the module in front of an untrusted name
        options = {option.name: getattr(self, option.name) for option in dataclasses.fields(EpisodeSettings)}
        gold = self.gold_reward()
        shaping = None
        if self.shaping is not None and gamma is not None:
            shaping = PotentialShaping(self.shaping, gamma, self.shaping_every)
        options.update(
            tokenizer=self.tokenizer or model,
            metrics={**(self.metrics or {}), **({"gold_score": gold} if gold else {})} or None,
            shaping=shaping,
            reward_kwargs=parsed(self.reward_kwargs),
            task_kwargs=self._task()[1],
        )
        for name in ("task", "task_kwargs"):  # whatever the registered name says
            if not options[name]:
                del options[name]
        if self.has_task:  # which says what is left at its default
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            left = {name for name in options if name != "tokenizer" and getattr(self, name) == defaults[name]}
            options = {name: value for name, value in options.items() if name not in left - {"task", "metrics"}}
        options.update(overrides)
        if options.get("group_size") is None:  # neither the configuration nor an algorithm asks for groups
            options["group_size"] = 1
        if self.env.rpartition(":")[2] == CONTINUOUS_ID:
            # Checked here, since the wrapper would first complain that its embeddings have another tokenizer.
            raise ValueError(f"env={self.env!r}: {wrapped_error('VectorEmbeddingAction')}")
        env = gym.make_vec(self.env, num_envs=num_envs, **options)
        try:
            return plain(env)
        except ValueError as error:
            raise ValueError(f"env={self.env!r}: {error}") from error


def _with_builtin(reward: Any) -> bool:
    """Whether it is the built-in reward, or a weighted sum with it."""
    names = reward if isinstance(reward, Mapping) else []
    if isinstance(reward, str):
        with contextlib.suppress(ValueError):  # which whoever makes the reward says better
            names = parse_sum(reward)
    return any(str(name).partition("(")[0] == "builtin" for name in names)


def _plain_name(prompts: Any) -> Any:
    """Prompts by a name under which they are compared."""
    if prompts == "builtin:train":
        prompts = "builtin"
    return Path(prompts) if isinstance(prompts, str) else prompts


@dataclass
class TrainConfig:
    """Train a language model by reinforcement learning.

    ``--config FILE.yaml`` sets the defaults of all other options, which override it. What the file names as
    'module:object' is imported, so read a file that comes from somebody else before you train with it.

    ``--resume RUN_DIR``, in place of all other options, goes on with a run that was stopped, exactly as if it had not
    been. ``--total-timesteps`` beside it makes the run longer; ``--trust`` imports what its config.yaml names as
    'module:object', which runs code, and lets its task run answers.
    """

    algo: str = "ppo"
    """'ppo', 'a2c', 'reinforce', 'rloo', 'grpo', 'dapo', 'vineppo', or 'module:Class' for another algorithm."""
    model: str | None = None
    """'builtin', 'builtin:arithmetic', a directory, a hub name, a GGUF file, or the directory of a PEFT adapter, which
    is trained on. By default it is the task's own model, or else 'builtin'."""
    env: Annotated[EnvConfig, tyro.conf.arg(name="")] = field(default_factory=EnvConfig)
    total_timesteps: int = 60_000
    """The number of tokens to generate."""
    run_dir: Path | None = None
    """The directory of all results, by default runs/<algorithm>. It must not hold a run yet."""
    seed: int = 0
    """The seed of all random generators."""
    learning_rate: float | None = None
    """The highest learning rate; by default that of the algorithm."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What follows the warm-up: a constant learning rate, or one that falls to 0 at the end of the run,
    in a straight line or as half a cosine wave."""
    lr_warmup: float = 0.0
    """The share of the run (0.1: a tenth) in which the learning rate rises from 0."""
    n_episodes: int | None = None
    """The number of episodes of a rollout; by default that of the algorithm."""
    batch_size: int | None = None
    """The number of episodes of a minibatch; by default that of the algorithm."""
    n_epochs: int | None = None
    """The number of passes over a rollout; by default that of the algorithm."""
    kl_coef: float | None = None
    """β, the coefficient of the KL penalty; by default that of the algorithm, which is 0.04 for all but DAPO's 0.
    With 0 the KL divergence is measured without a penalty."""
    kl_target: float | None = None
    """A KL divergence in nats per episode. β is adapted to hold it; by default β is constant."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """The estimator of the KL divergence at each token for the penalty.
    k1 is the log-ratio; k2 and k3 have another gradient; exact is the sum over the vocabulary, with less noise
    (docs/ppo.md)."""
    missing_eos_penalty: float | None = None
    """A number that is subtracted from the reward of texts that the response budget has cut off."""
    algo_kwargs: dict[str, str] = field(default_factory=dict)
    """Further arguments of the algorithm, for example `--algo-kwargs clip_range 0.1 gae_lambda 0.9`."""
    temperature: float = 1.0
    """The temperature of the policy's distribution, in rollouts, updates and the reference."""
    critic: str | None = None
    """What the critic is. 'head': a linear head on the policy's decoder, which takes the least memory; 'copy': a
    decoder of its own that starts as the policy's; else the reward model that it starts as, 'builtin', a directory or
    a hub name. By default the algorithm chooses: PPO takes the reward model if the reward is one, else a copy, and with
    LoRA a head; all others take a head."""
    rollouts: str = "local"
    """Who writes the texts: 'local', the policy itself, or servers of vLLM by their addresses, 'http://host:8000' or
    several with commas in between, which are sent its weights (docs/engines.md)."""
    max_lag: int = 0
    """How many updates old the weights of the servers may be. From 1 on, the next texts are written while the latest
    ones are learned from."""
    lora_r: int | None = None
    """The rank of a LoRA adapter; by default there is none, and all weights are trained."""
    lora_alpha: int = 16
    """The scale of the adapter, whose output is multiplied by lora_alpha / lora_r."""
    lora_target_modules: str = "all-linear"
    """The layers with an adapter: 'all-linear', or names separated by commas ('q_proj,v_proj', which costs less)."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', …"""
    dtype: str = "float32"
    """The floating-point type of the weights."""
    autocast: str | None = None
    """The floating-point type of matrix products, such as 'bfloat16'; by default that of the weights."""
    decode: str = "auto"
    """How texts are written: 'eager'; 'compiled', or on CUDA captured into graphs; 'auto': so on CUDA alone."""
    compile_forward: bool = False
    """Run whole sequences through torch.compile."""
    gradient_checkpointing: bool = False
    """Compute layers once more in the backward pass instead of keeping what is inside them: less memory, more time."""
    optimizer: str | None = None
    """The optimiser by its name in transformers: 'adamw_torch', 'adafactor', 'adamw_8bit' and 'paged_adamw_8bit' with
    bitsandbytes, 'adamw_torch_8bit' with torchao, …; by default Adam."""
    checkpoint_every: int | None = None
    """The number of iterations between two checkpoints; 0: there are none. By default the next one is written when
    that costs less than 2 % of the time, and after half an hour at the latest. The end of a run always is one."""
    keep: int = 2
    """The number of checkpoints that are kept, the newest ones."""
    best: str | None = None
    """A metric of progress.csv, such as 'objective/scores'. Of all checkpoints that are written, the one after which
    this metric was highest is kept besides. It needs checkpoints."""
    sample_every: int = 5
    """The number of iterations between two entries of samples.jsonl."""
    n_samples: int = 6
    """The number of prompts in samples.jsonl: held-out ones, or the first of your own file, which has none."""
    track: Literal["wandb", "trackio", "mlflow"] | None = None
    """A tracker that shows the run as well: 'wandb', 'trackio' or 'mlflow' (pip install "textrlhf[wandb]" and so
    on). Where it keeps its runs, and who you are there, it is told in its own way, such as by WANDB_MODE or
    MLFLOW_TRACKING_URI (docs/plugs.md)."""
    track_project: str = "textrlhf"
    """The tracker's project, for MLflow the experiment."""
    progress: bool = True
    """Show a progress bar."""

    def check(self) -> None:
        """Refuse what no run can be made of. Nothing is loaded for this, and nothing written.

        :raises ValueError: if a number is out of range.
        """
        for name, least in (("total_timesteps", 1), ("sample_every", 1), ("n_samples", 1), ("keep", 1)):
            check_integer(name, getattr(self, name), least)
        if self.checkpoint_every is not None:
            check_integer("checkpoint_every", self.checkpoint_every, 0)
        if self.best is not None and self.checkpoint_every == 0:
            raise ValueError(
                f"Expected checkpoints of which the best by {self.best!r} is kept; got best together with "
                "checkpoint_every=0, with which there are none. Leave out one of the two."
            )
        check_integer("max_lag", self.max_lag, 0)
        for name in ("n_episodes", "batch_size", "n_epochs", "lora_r"):  # None: the algorithm's number, or no adapter
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if self.n_episodes is not None and self.batch_size is not None and self.batch_size > self.n_episodes:
            raise ValueError(
                f"Expected batch_size, the episodes of a minibatch, to be at most n_episodes={self.n_episodes}, those "
                f"of the rollout; got {self.batch_size}."
            )
        if self.kl_coef is not None:
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
    :param config: a configuration.
    :return: the arguments of ``peft.LoraConfig``; None if there is no adapter.
    """
    if config.lora_r is None:
        return None
    targets = config.lora_target_modules
    return {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "target_modules": targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
    }


# What `critic` says where it names no reward model, and what `CausalLMPolicy` calls it.
CRITICS: dict[str, bool] = {"head": False, "copy": True}


def separate_critic(critic: str) -> bool | str:
    """
    :param critic: the option.
    :return: the argument of ``CausalLMPolicy`` that it stands for.
    """
    return CRITICS.get(critic, critic)


def critic_name(separate: bool | str | Path) -> str:
    """
    :param separate: the argument ``separate_critic`` of ``CausalLMPolicy``.
    :return: the option ``critic`` that stands for it.
    """
    return next((name for name, kind in CRITICS.items() if kind is separate), str(separate))


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
    :return: all of its fields as YAML.
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


def names_from_run(path: Path, run: TrainConfig, options: Any) -> contextlib.AbstractContextManager[None]:
    """While this lasts, objects that only the configuration of a run names are imported only with ``--trust``, and so
    with what else :func:`text_env.imports.names_from` refuses.

    :param path: the ``config.yaml`` of the run.
    :param run: what :func:`load_config` read there.
    :param options: the options of a command. Those that are fields of a run too override them; ``trust`` is one more.
    :return: see :func:`text_env.imports.names_from`.
    """
    fields = {**vars(run), **vars(run.env)}
    given = {name: value for name, value in vars(options).items() if name in fields}
    return names_from(path, fields, given, options.trust)


def _typed_fields(path: Path, values: dict[str, Any], cls: type[Any]) -> dict[str, Any]:
    """The values as the fields of the class want them."""
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := set(values) - known:
        raise ValueError(f"{path}: unknown {sorted(unknown)}; {cls.__name__} has {sorted(known)}.")
    hints, found = hints_of(cls), {}
    wider = hints_of(EpisodeSettings) if issubclass(cls, EpisodeSettings) else {}
    for name, value in values.items():
        # Python takes more than the command line does: rewards with weights, several stop strings, lists of prompts.
        hint = wider[name] if name in wider and isinstance(value, list | dict) and name not in KEYWORDS else hints[name]
        value = typed(f"{path}: {name}", value, hint)
        if name in KEYWORDS:  # strings on the command line, which are read as YAML later
            value = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in value.items()}
        found[name] = value
    return found
