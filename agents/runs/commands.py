"""The commands of the command line: their options, and how ``--help`` shows them.

The options of ``train`` are in ``config.py``, those of ``reward-model`` beside the training that they are for, those of
``report``, ``watch``, ``play`` and ``push`` in ``look_commands.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from agents.evaluation.right_answers import check_samples
from agents.reward_models.config import RewardModelConfig
from agents.runs.config import EnvConfig, TrainConfig
from agents.runs.look_commands import PlayConfig, PushConfig, ReportConfig, WatchConfig, check_writable
from agents.state.arguments import check_number
from text_env.settings import check_integer


@dataclass
class ResumeConfig:
    """Go on with a run that was stopped. Everything else is in its config.yaml."""

    resume: Path
    """The directory of the run."""
    total_timesteps: int | None = None
    """The number of tokens to generate in all, if the run is to become longer."""
    trust: bool = False
    """Import what the run's config.yaml names as 'module:object', which runs code, and let its task run answers.
    Without it both are refused, since a run may come from somebody else."""
    progress: bool = True
    """Show a progress bar, unless the run was started without."""

    def check(self) -> None:
        """
        :raises ValueError: if a number is out of range.
        """
        if self.total_timesteps is not None:
            check_integer("total_timesteps", self.total_timesteps, 1)


@dataclass
class EvaluateConfig:
    """Compare a policy with its reference, or with another policy, on held-out prompts if there are some."""

    policy: str
    """The directory of a run or of a policy, or the name of any model."""
    reference: str | None = None
    """The model that the policy is compared with, and by which KL divergence and perplexity are measured.
    By default it is the model that the policy's run started from."""
    against: str | None = None
    """Another policy to compare with, in place of the reference."""
    reward: str | None = None
    """The reward; by default that of the policy's run."""
    gold: str | None = None
    """A second score; by default that of the policy's run."""
    prompts: str | None = None
    """The prompts. By default the held-out ones of the policy's run or of `--task`, or else 'builtin:eval'. A file of
    your own has no held-out part: without this option it is the prompts that the run was trained on, which is said."""
    task: str | None = None
    """A task with a right answer; by default that of the policy's run."""
    task_kwargs: dict[str, str] = field(default_factory=dict)
    """Arguments of the task in place of those of the run, for example `--task-kwargs n_steps 5`."""
    max_new_tokens: int | None = None
    """The response budget, in tokens; by default that of the policy's run."""
    episodes: int = 256
    """The number of texts of each of the two models, for the same prompts."""
    samples_per_prompt: int = 1
    """The least number of texts of a prompt. There are as many prompts as have enough."""
    pass_at_k: list[int] | None = None
    """For tasks with a right answer: the numbers k of attempts of which one, or the majority, is to be right; at most
    `--samples-per-prompt`. By default 1 and that number."""
    texts: int = 0
    """The number of texts of both that are shown side by side, with their scores."""
    temperature: float = 1.0
    """The temperature of both models; 1 evaluates the models themselves."""
    json: Path | None = None
    """A file to which the results are written as JSON."""
    seed: int = 0
    """The seed of the prompts, the texts and the intervals."""
    trust: bool = False
    """Import what the run's config.yaml names as 'module:object', which runs code, and let its task run answers.
    Without it both are refused, since a run may come from somebody else. What is named on the command line is always
    used."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', …"""
    dtype: str = "float32"
    """The floating-point type of the weights."""

    def check(self) -> None:
        """Refuse what can't be evaluated or written; nothing is loaded for this.

        :raises ValueError: if a number is out of range.
        :raises OSError: if ``json`` can't be written.
        """
        check_integer("episodes", self.episodes, 1)
        check_samples(self.episodes, self.samples_per_prompt, self.pass_at_k or ())
        check_integer("texts", self.texts, 0)
        check_number("temperature", self.temperature, above=0)
        if self.max_new_tokens is not None:
            check_integer("max_new_tokens", self.max_new_tokens, 1)
        if self.json is not None:
            check_writable("--json", self.json)


@dataclass
class CriticConfig:
    """Ask whether a critic is any good: compare its values with what really follows.

    The policy writes texts for prompts, held-out ones if there are some, and writes on several times from states along
    each of them.
    docs/ppo.md says what the figures mean.
    """

    policy: Path
    """The directory of a run, or of the policy in it."""
    prompts: str | None = None
    """The prompts; by default the held-out ones of the run, or else those that it was trained on."""
    texts: int = 32
    """The number of texts."""
    positions: int = 6
    """The number of states along each text, the first one included."""
    branches: int = 8
    """The number of times that the policy writes on from each state."""
    plot: Path | None = None
    """The picture; by default critic.png in the directory that is given."""
    json: Path | None = None
    """A file to which the results are written as JSON."""
    seed: int = 0
    """The seed of the prompts, the texts and the intervals."""
    trust: bool = False
    """Import what the run's config.yaml names as 'module:object', which runs code, and let its task run answers.
    Without it both are refused, since a run may come from somebody else. What is named on the command line is always
    used."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', …"""
    dtype: str = "float32"
    """The floating-point type of the weights."""

    def check(self) -> None:
        """Refuse what can't be examined or written; nothing is loaded for this.

        :raises ValueError: if a number is out of range.
        :raises OSError: if ``plot`` or ``json`` can't be written.
        """
        for name in ("texts", "positions", "branches"):
            check_integer(name, getattr(self, name), 2)
        if self.plot is not None or self.policy.is_dir():  # else there is no critic, which is the better message
            check_writable("--plot", self.picture())
        if self.json is not None:
            check_writable("--json", self.json)

    def picture(self) -> Path:
        """
        :return: the file of the picture.
        """
        return self.policy / "critic.png" if self.plot is None else self.plot


@dataclass
class SampleConfig:
    """Let a policy write texts.

    The reward's score stands behind each, or why there is none.
    """

    policy: str
    """The directory of a run or of a policy, or the name of any model."""
    prompt: list[str]
    """One or more prompts."""
    n: int = 1
    """The number of texts for each prompt."""
    reward: str | None = None
    """The reward that scores the texts; by default that of the policy's run."""
    task: str | None = None
    """The task that the prompts are problems of; by default that of the policy's run. It says how long a text may be.
    Texts are not judged, since the right answers of these prompts are unknown."""
    task_kwargs: dict[str, str] = field(default_factory=dict)
    """Arguments of the task in place of those of the run, for example `--task-kwargs n_steps 5`."""
    greedy: bool = False
    """Choose the most probable token instead of sampling one."""
    temperature: float = 1.0
    """The temperature of the policy's distribution."""
    max_new_tokens: int | None = None
    """The response budget, in tokens; by default that of the policy's run."""
    seed: int = 0
    """The seed of the texts."""
    trust: bool = False
    """Import what the run's config.yaml names as 'module:object', which runs code, and let its task run answers.
    Without it texts are not scored by such a reward, and anything else of the kind is refused, since a run may come
    from somebody else. What is named on the command line is always used."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', …"""
    dtype: str = "float32"
    """The floating-point type of the weights."""

    def check(self) -> None:
        """
        :raises ValueError: if a number is out of range.
        """
        check_integer("n", self.n, 1)
        check_number("temperature", self.temperature, above=0)
        if self.max_new_tokens is not None:
            check_integer("max_new_tokens", self.max_new_tokens, 1)


@dataclass
class DoctorConfig:
    """Examine a model, with its prompts and its reward, before it is trained.

    The options are those of ``train``, with the same meaning. The model writes a few texts, and in a minute or so each
    check says what it found and what to do. The exit status is 1 if there is a problem. docs/reliability.md lists the
    checks.
    """

    model: str | None = None
    """'builtin', 'builtin:arithmetic', a directory, a hub name, a GGUF file, or the directory of a PEFT adapter. By
    default it is the task's own model, or else 'builtin'."""
    env: Annotated[EnvConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: EnvConfig(gold=None))
    algo: str = "ppo"
    """The algorithm that is to train the model, which says how much memory it takes."""
    critic: str | None = None
    """The critic of that training: 'head', 'copy' or a reward model; by default that of the algorithm."""
    temperature: float = 1.0
    """The temperature of the policy's distribution."""
    lora_r: int | None = None
    """The rank of a LoRA adapter; by default there is none."""
    lora_alpha: int = 16
    """The scale of the adapter, whose output is multiplied by lora_alpha / lora_r."""
    lora_target_modules: str = "all-linear"
    """The layers with an adapter: 'all-linear', or names separated by commas."""
    texts: int = 16
    """The number of texts that the model writes."""
    tokens: int = 48
    """The most tokens of such a text, if `--max-new-tokens` allows more."""
    json: Path | None = None
    """A file to which the findings are written as JSON."""
    seed: int = 0
    """The seed of the texts."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', …"""
    dtype: str = "float32"
    """The floating-point type of the weights."""
    autocast: str | None = None
    """The floating-point type of matrix products, such as 'bfloat16'; by default that of the weights."""

    def check(self) -> None:
        """Refuse what can't be examined or written; nothing is loaded for this.

        :raises ValueError: if a number is out of range.
        :raises OSError: if ``json`` can't be written.
        """
        check_integer("texts", self.texts, 2)
        check_integer("tokens", self.tokens, 1)
        self.run().check()
        if self.json is not None:
            check_writable("--json", self.json)

    def run(self) -> TrainConfig:
        """
        :return: the training that is meant.
        """
        names = {option.name for option in fields(TrainConfig)}
        return TrainConfig(**{name: value for name, value in vars(self).items() if name in names})


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

    def check(self) -> None:
        """
        :raises ValueError: if a number is out of range.
        """
        check_integer("total_timesteps", self.total_timesteps, 1)
        check_integer("episodes", self.episodes, 1)


class Command(NamedTuple):
    """What ``--help`` says of a command.

    :param options: the dataclass of its options.
    :param groups: the headings of the options, and which options stand below each.
    :param examples: command lines.
    """

    options: type[Any]
    groups: dict[str, tuple[str, ...]]
    examples: tuple[str, ...]


# The options of the environment, which `train` and `doctor` share.
PROMPTS_AND_TEXTS = (
    *("task", "task_kwargs", "env", "prompts", "tokenizer", "chat_template", "max_prompt_tokens", "overlong_prompts"),
    *("max_new_tokens", "min_new_tokens", "stop", "eos_token_ids", "constraint", "group_size"),
)
REWARDS = ("reward", "gold", "reward_kwargs", "reward_timeout", "reward_retries", "shaping", "shaping_every")

COMMANDS = {
    "train": Command(
        TrainConfig,
        {
            "The run": ("algo", "model", "total_timesteps", "run_dir", "seed", "progress"),
            "Prompts and texts": PROMPTS_AND_TEXTS,
            "Rewards": (*REWARDS, "missing_eos_penalty"),
            "KL to the reference": ("kl_coef", "kl_target", "kl_estimator"),
            "Optimisation": (
                *("learning_rate", "lr_schedule", "lr_warmup", "n_episodes", "batch_size", "n_epochs", "algo_kwargs"),
            ),
            "Who writes": ("rollouts", "max_lag"),
            "The model": (
                *("temperature", "critic", "lora_r", "lora_alpha", "lora_target_modules"),
                *("device", "dtype", "autocast", "decode", "compile_forward", "gradient_checkpointing", "optimizer"),
            ),
            "What is written down": (
                *("sample_every", "n_samples", "checkpoint_every", "keep", "best"),
                *("track", "track_project"),
            ),
        },
        (
            "textrlhf train --total-timesteps 60000 --run-dir runs/mine",
            "textrlhf train --task arithmetic --task-kwargs n_steps 3 --run-dir runs/sums",
            "textrlhf train --algo grpo --model path/to/model --prompts prompts.jsonl --reward my_rewards:brevity",
            "textrlhf train --model path/to/model --lora-r 16 --dtype bfloat16 --kl-target 6",
            "textrlhf train --model path/to/model --rollouts http://localhost:8000 --max-lag 1",
            "textrlhf train --config runs/mine/config.yaml --run-dir runs/again --seed 1",
            "textrlhf train --resume runs/mine",
        ),
    ),
    "evaluate": Command(
        EvaluateConfig,
        {
            "Who is compared": ("policy", "reference", "against"),
            "On what": (
                *("prompts", "task", "task_kwargs", "episodes", "samples_per_prompt", "pass_at_k"),
                *("reward", "gold", "max_new_tokens", "temperature", "seed", "trust"),
            ),
            "What comes out": ("texts", "json"),
            "The model": ("device", "dtype"),
        },
        (
            "textrlhf evaluate --policy runs/mine/policy --texts 5",
            "textrlhf evaluate --policy runs/mine/policy --against runs/other/policy --json evaluation.json",
            "textrlhf evaluate --policy runs/sums/policy --prompts sums.jsonl --samples-per-prompt 8 --pass-at-k 1 4 8",
            "textrlhf evaluate --policy builtin:arithmetic --reference builtin:arithmetic --task arithmetic",
        ),
    ),
    "critic": Command(
        CriticConfig,
        {
            "What is examined": ("policy", "prompts", "texts", "positions", "branches", "seed", "trust"),
            "What comes out": ("plot", "json"),
            "The model": ("device", "dtype"),
        },
        ("textrlhf critic --policy runs/mine", "textrlhf critic --policy runs/mine/policy --json critic.json"),
    ),
    "sample": Command(
        SampleConfig,
        {
            "What is written": ("policy", "prompt", "n", "reward", "task", "task_kwargs", "max_new_tokens", "trust"),
            "How": ("greedy", "temperature", "seed", "device", "dtype"),
        },
        (
            'textrlhf sample --policy runs/mine/policy --prompt "The movie" "I loved" --n 3',
            'textrlhf sample --policy builtin:arithmetic --task arithmetic --prompt "(72+60+880+26)*7="',
        ),
    ),
    "doctor": Command(
        DoctorConfig,
        {
            "What is examined": ("model", "algo", "critic", "temperature", "seed"),
            "Prompts and texts": PROMPTS_AND_TEXTS,
            "Rewards": REWARDS,
            "LoRA": ("lora_r", "lora_alpha", "lora_target_modules"),
            "How": ("texts", "tokens", "device", "dtype", "autocast"),
            "What comes out": ("json",),
        },
        (
            "textrlhf doctor --model path/to/model --prompts prompts.jsonl --reward my_rewards:brevity",
            "textrlhf doctor --model path/to/model --lora-r 16 --dtype bfloat16 --json findings.json",
        ),
    ),
    "reward-model": Command(
        RewardModelConfig,
        {
            "What it learns": ("preferences", "base", "out", "held_out", "max_malformed", "max_pairs", "max_length"),
            "Optimisation": (
                *("epochs", "learning_rate", "batch_size", "micro_batch_size", "weight_decay", "lora_r", "seed"),
            ),
            "Normalisation of the score": ("n_normalisation_texts", "policy", "prompts", "max_new_tokens"),
            "The model": ("device", "dtype", "save_dtype", "bf16", "gradient_checkpointing", "progress"),
        },
        (
            "textrlhf reward-model --preferences pairs.jsonl --base path/to/model --out runs/my_reward",
            "textrlhf train --reward runs/my_reward",
        ),
    ),
    "report": Command(
        ReportConfig,
        {"What is shown": ("runs", "title"), "What comes out": ("out",)},
        (
            "textrlhf report runs/mine",
            "textrlhf report runs/ppo-0 runs/ppo-1 runs/grpo-0 runs/grpo-1 --out compared.html",
        ),
    ),
    "watch": Command(
        WatchConfig,
        {"What is shown": ("run", "texts"), "How": ("once", "every")},
        ("textrlhf watch runs/mine", "textrlhf watch runs/mine --once"),
    ),
    "play": Command(
        PlayConfig,
        {
            "Who writes": ("model", "prompt", "task", "task_kwargs", "max_new_tokens", "reward", "trust"),
            "How": ("top", "temperature", "seed", "device", "dtype"),
        },
        (
            'textrlhf play runs/mine/policy --prompt "The movie"',
            "textrlhf play builtin:arithmetic --task arithmetic",
        ),
    ),
    "push": Command(
        PushConfig,
        {"What is sent, and where": ("run", "repo", "private", "message")},
        ("textrlhf push runs/mine my-name/film-critic",),
    ),
    "demo": Command(
        DemoConfig,
        {"Options": ("run_dir", "total_timesteps", "episodes", "seed")},
        ("textrlhf demo",),
    ),
}
