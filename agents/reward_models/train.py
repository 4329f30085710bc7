"""Training a reward model on preferences: ``textrlhf reward-model`` trains a sequence classifier with TRL's
``RewardTrainer``.

The loss is that of Bradley and Terry, −log σ(margin), where the margin of a pair is the score of the chosen text minus
that of the rejected one (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155). The result is a plain Hugging Face
directory that the environment takes as its reward, with ``reward_model.json``, ``calibration.png`` and ``margins.png``
in addition to the weights. All measurements are made as the environment scores, by a :class:`SequenceClassifierReward`
of that directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from stable_baselines3.common.utils import get_device, set_random_seed
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from agents.models.pretrained import add_lora, resolve_dtype
from agents.policies.causal_lm_policy import load_policy
from agents.reward_models.config import RewardModelConfig
from agents.reward_models.report import describe_margins, plot_calibration, plot_margins
from agents.rollouts.sampling import sample_texts
from agents.state.devices import check_device
from text_env.builtin import LANGUAGE_MODEL
from text_env.chat_templates import apply_chat_template
from text_env.classifier_reward import SequenceClassifierReward, pool_by_attention_mask
from text_env.preferences import Preference, Preferences, load_preferences
from text_env.pretrained_files import load_pretrained, not_loaded
from text_env.prompts import Prompts, load_prompts
from text_env.tokenization import Message, base_of_adapter, load_tokenizer, pretrained_name
from text_env.vector_env import TextVectorEnv

RawPrompt = str | list[Message]

console = Console(emoji=False)


def train_reward_model(config: RewardModelConfig, preferences: Any = None) -> dict[str, Any]:
    """Train, measure and save a reward model.

    :param config: the configuration.
    :param preferences: live preferences, as :func:`text_env.preferences.load_preferences` takes them, in place of those
        that ``config`` names.
    :return: what ``reward_model.json`` holds: ``settings``, ``versions``, ``pairs``, ``held_out`` and ``train`` (see
        :func:`agents.reward_models.report.describe_margins`), ``annotator_ceiling``, ``normalisation``, ``parameters``,
        ``seconds``.
    :raises FileExistsError: if the directory is not empty.
    :raises ValueError: if preferences, base or policy can't be used. This is found out before training.
    :raises ImportError: without the ``reward`` extra.
    :raises FloatingPointError: if training has diverged.
    """
    start = time.perf_counter()
    _check(config)
    if config.learning_rate is None:
        config = dataclasses.replace(config, learning_rate=5e-4 if config.base == "builtin" else 1e-4)
    spec = config.preferences if preferences is None else preferences
    pairs = load_preferences(spec, config.max_malformed, held_out=config.held_out, seed=config.seed)
    set_random_seed(config.seed)  # a new head starts at random
    model, tokenizer = load_base(config.base, config.dtype, pairs.conversational)
    if config.progress:
        if pairs.n_malformed:
            console.print(f"Left out {pairs.n_malformed} malformed rows: {escape('; '.join(pairs.malformed))}")
        if tokenizer.chat_template and not pairs.conversational:
            console.print("The pairs are plain texts: use this reward in environments with chat_template=False.")
    order = np.random.default_rng(config.seed).permutation(len(pairs.train))[: config.max_pairs]
    longest = min(config.max_length, _positions(model.config), tokenizer.model_max_length)
    train, columns = fitting([pairs.train[i] for i in order], tokenizer, longest)
    held_out, _ = fitting(pairs.held_out, tokenizer, longest)
    if not train or not held_out:
        raise ValueError(
            f"Expected pairs of at most {longest} tokens (max_length, or what the base holds) to train with and to "
            f"hold out, got {len(train)} and {len(held_out)}: raise max_length, or choose another base."
        )
    # For the pairs that are left, and before training, since an error here should not cost hours.
    texts = sample_policy_texts(config, dataclasses.replace(pairs, train=train))
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in dataclasses.asdict(config).items()}
    report: dict[str, Any] = {
        "settings": settings | ({} if preferences is None else {"preferences": f"a {type(preferences).__name__}"}),
        "versions": {package: version(package) for package in ("torch", "transformers", "trl", "datasets", "numpy")},
        "pairs": {
            "train": len(train),
            "held_out": len(held_out),
            "split_by": pairs.split_by,
            "conversational": pairs.conversational,
            "malformed": pairs.n_malformed,
            "first_malformed": pairs.malformed,
            "overlong": len(order) - len(train) + len(pairs.held_out) - len(held_out),
        },
        "annotator_ceiling": _annotator_ceiling() if spec == "builtin" else None,
        "parameters": model.num_parameters(),
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.out.parent, prefix=f".{config.out.name}-") as scratch:
        directory, began = Path(scratch) / "model", time.perf_counter()
        model = run_trainer(config, model, tokenizer, columns, Path(scratch) / "trainer")
        seconds = {"training": time.perf_counter() - began}
        save_classifier(model, tokenizer, directory, config.save_dtype)
        del model  # the model is measured as it was saved, not as it is in memory
        report |= measure_reward_model(config, directory, train[: len(held_out)], held_out, texts)
        report["seconds"] = {**seconds, "all": time.perf_counter() - start}
        (directory / "reward_model.json").write_text(json.dumps(report, indent=2) + "\n")
        if config.out.exists():
            config.out.rmdir()
        directory.rename(config.out)  # so a directory of this name is always complete
    return report


def measure_reward_model(
    config: RewardModelConfig,
    directory: Path,
    train: Sequence[Preference],
    held_out: Sequence[Preference],
    texts: tuple[list[RawPrompt], list[str]] | None,
) -> dict[str, Any]:
    """Measure the saved model, normalise its scores, and write plots to its directory.

    :param config: the configuration of the training.
    :param directory: the directory of the classifier.
    :param train: some of the pairs that it was trained on.
    :param held_out: the pairs that were held out.
    :param texts: prompts and completions of the policy, by which scores are normalised; None: they are not normalised.
    :return: the entries ``held_out``, ``train`` and ``normalisation`` of the report.
    :raises FloatingPointError: if a score is not finite, or if all texts of the policy have the same score.
    """
    reward = SequenceClassifierReward(directory, batch_size=2 * _micro_batch(config), device=config.device)
    margins = pair_margins(reward, held_out, config.progress)
    report: dict[str, Any] = {"held_out": describe_margins(margins)}
    report["train"] = describe_margins(pair_margins(reward, train, config.progress))
    report["normalisation"] = None
    if texts is not None:
        scores = _scores(reward, *texts, "policy's texts", config.progress)
        mean, std = float(scores.mean()), float(scores.std())
        if not std > 0:
            raise FloatingPointError(f"All {len(scores)} texts of the policy score {mean}: nothing to divide by.")
        _edit_config(directory, reward_mean=mean, reward_std=std)
        policy = config.policy or config.base
        report["normalisation"] = {"policy": policy, "texts": len(scores), "mean": mean, "std": std}
    plot_calibration(report["held_out"]["calibration"], directory / "calibration.png")
    plot_margins(margins, directory / "margins.png")
    return report


def _check(config: RewardModelConfig) -> None:
    """Check what can be checked before anything is loaded."""
    config.check()
    check_device(config.device)
    if config.out.exists() and not (config.out.is_dir() and not any(config.out.iterdir())):
        raise FileExistsError(f"{config.out} holds something already; choose another --out, or remove it.")
    _micro_batch(config)
    try:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'Training a reward model needs TRL and datasets: pip install "textrlhf[reward]" ({error})'
        ) from error


def _annotator_ceiling() -> float:
    report = json.loads((LANGUAGE_MODEL.parent / "report.json").read_text())
    return float(report["preferences"]["eval"]["annotator_ceiling"])


# ---- the pairs as tokens -------------------------------------------------------------------------------------------


def pair_tokens(tokenizer: Any, pairs: Sequence[Preference]) -> dict[str, list[list[int]]]:
    """Tokenise pairs in the same way as the environment does for scoring, for TRL's trainer.

    The trainer would append EOS to plain texts, but the environment scores prompt and completion as they are, whether
    the text ended by itself or was cut off. Conversations are written in the chat template, which adds all special
    tokens.

    :param tokenizer: the reward model's tokenizer.
    :param pairs: N pairs, either all of plain texts or all of conversations.
    :return: the columns ``chosen_ids`` and ``rejected_ids``, N lists of token ids each.
    :raises ValueError: if the chat template rejects a conversation.
    """
    templated = bool(pairs) and not isinstance(pairs[0].prompt, str)
    columns = {}
    for side in ("chosen", "rejected"):
        texts = [_text(tokenizer, pair.prompt, getattr(pair, side)) for pair in pairs]
        columns[f"{side}_ids"] = tokenizer(texts, add_special_tokens=not templated)["input_ids"] if texts else []
    return columns


def _text(tokenizer: Any, prompt: RawPrompt, completion: str) -> str:
    if isinstance(prompt, str):
        return prompt + completion
    try:
        messages = [*prompt, {"role": "assistant", "content": completion}]
        return apply_chat_template(tokenizer, [messages])[0]
    except Exception as error:  # a template is a program and may raise anything
        raise ValueError(f"The chat template of the base refuses {messages!r}: {error}") from error


def fitting(
    pairs: Sequence[Preference], tokenizer: Any, longest: int
) -> tuple[list[Preference], dict[str, list[list[int]]]]:
    """Leave out pairs that are too long.

    :param pairs: pairs.
    :param tokenizer: the reward model's tokenizer.
    :param longest: the length of the longest text, in tokens.
    :return: the pairs of which neither text is longer, and their columns, as :func:`pair_tokens` returns them.
    """
    columns = pair_tokens(tokenizer, pairs)
    fits = [max(map(len, sides)) <= longest for sides in zip(*columns.values(), strict=True)]
    return (
        [pair for pair, fit in zip(pairs, fits, strict=True) if fit],
        {name: [ids for ids, fit in zip(column, fits, strict=True) if fit] for name, column in columns.items()},
    )


# ---- model, training, saving ---------------------------------------------------------------------------------------


def load_base(base: str, dtype: str, conversational: bool) -> tuple[PreTrainedModel, Any]:
    """Load the model that training starts from.

    :param base: ``"builtin"``, a directory or a hub name.
    :param dtype: the floating-point type of the weights.
    :param conversational: whether the tokenizer must have a chat template.
    :return: a classifier with one label, whose head is new unless the base has one of this form; and its tokenizer,
        which has a pad token. A classifier made from a decoder judges a text by the last token that the attention mask
        covers.
    :raises ValueError: if there is no such model, or if its tokenizer can't be used.
    """
    name = str(LANGUAGE_MODEL) if base == "builtin" else base
    if base_of_adapter(name) is not None:
        raise ValueError(
            f"Expected base to be a whole model; {base!r} is an adapter: merge it into its own base first."
        )
    try:
        with _quiet():  # transformers reports a language model's head as unexpected and the new one as missing
            tokenizer = load_pretrained(AutoTokenizer, name)
            model: PreTrainedModel = load_pretrained(
                AutoModelForSequenceClassification,
                name,
                new_head=True,
                num_labels=1,
                dtype=resolve_dtype(dtype),
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError) as error:
        raise ValueError(
            "Expected base to be 'builtin', a directory or a hub name of a model that transformers' "
            f"AutoModelForSequenceClassification takes; got {base!r}, {not_loaded(base, str(error))}"
        ) from error
    if conversational and not tokenizer.chat_template:
        raise ValueError(
            f"Expected the tokenizer of base {base!r} to have a chat template, since the preferences are "
            "conversations; it has none: choose an instruct model, or set tokenizer.chat_template and save it."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"Expected the tokenizer of base {base!r} to have a pad or an eos token; it has none.")
        tokenizer.pad_token = tokenizer.eos_token
    # Whoever loads the directory without the environment pads with the tokenizer's pad token.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    # The pad token may be EOS, with which most conversations end: transformers would judge these by the token before.
    pool_by_attention_mask(model)
    for name in ("reward_mean", "reward_std"):  # a reward model whose training goes on has them
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model, tokenizer


def run_trainer(
    config: RewardModelConfig, model: PreTrainedModel, tokenizer: Any, columns: dict[str, Any], scratch: Path
) -> PreTrainedModel:
    """Train a classifier with TRL.

    :param config: the configuration.
    :param model: the classifier, which is trained in place.
    :param tokenizer: its tokenizer.
    :param columns: what :func:`pair_tokens` returned.
    :param scratch: a directory for TRL's files.
    :return: the trained classifier, with the adapter merged if there was one.
    """
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import RewardConfig, RewardTrainer  # type: ignore[attr-defined]

    trained: Any = model
    if config.lora_r is not None:
        lora = {"r": config.lora_r, "lora_alpha": 2 * config.lora_r, "target_modules": "all-linear"}
        trained = add_lora(model, {**lora, "task_type": "SEQ_CLS"})  # so that the head is trained as well
    micro, rate = _micro_batch(config), config.learning_rate
    assert rate is not None
    n_steps = int(np.ceil(len(columns["chosen_ids"]) / config.batch_size) * config.epochs)
    on_cpu = get_device(config.device).type == "cpu"
    # Since 5.2x transformers uses the first name, and warns of the second.
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next(name for name in names if name in RewardConfig.__dataclass_fields__)
    checkpointing: dict[str, Any] = {name: config.gradient_checkpointing}  # TRL's own default is True
    trainer = RewardTrainer(
        model=trained,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(columns),
        args=RewardConfig(
            output_dir=str(scratch),
            num_train_epochs=config.epochs,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=config.batch_size // micro,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(0.03 * n_steps),
            weight_decay=config.weight_decay,
            max_length=None,  # overlong pairs have been left out
            seed=config.seed,
            use_cpu=on_cpu,
            bf16=config.bf16,
            **checkpointing,
            dataloader_pin_memory=not on_cpu,
            report_to="none",
            save_strategy="no",
            logging_steps=max(1, n_steps // 10),
            disable_tqdm=not config.progress,
        ),
    )
    if not config.progress:
        trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model if trained is model else trained.merge_and_unload()


def save_classifier(model: PreTrainedModel, tokenizer: Any, directory: Path, dtype: str | None) -> None:
    """Write a plain Hugging Face directory.

    :param model: the classifier. If it is saved in another floating-point type, its weights are rounded in place.
    :param tokenizer: its tokenizer.
    :param directory: the directory, which is created.
    :param dtype: the floating-point type of the weights on disk; None: that of the model. The config names the model's
        type in any case, and the model is loaded in it.
    """
    own = str(model.dtype).removeprefix("torch.")
    if dtype is not None:
        model.to(dtype=resolve_dtype(dtype))  # type: ignore[call-arg]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _edit_config(directory, dtype=own)


def _edit_config(directory: Path, **entries: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2) + "\n")


def _micro_batch(config: RewardModelConfig) -> int:
    micro = config.batch_size if config.micro_batch_size is None else config.micro_batch_size
    if micro < 1 or config.batch_size % micro:
        raise ValueError(f"Expected micro_batch_size to be a divisor of batch_size={config.batch_size}, got {micro}.")
    return micro


def _positions(config: PretrainedConfig) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return 2**31 if positions is None else int(positions)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


# ---- the policy's texts --------------------------------------------------------------------------------------------


def sample_policy_texts(config: RewardModelConfig, pairs: Preferences) -> tuple[list[RawPrompt], list[str]] | None:
    """Let the policy that the reward is for write texts, by whose scores the reward is normalised.

    :param config: the configuration, which names the policy, the prompts and their number.
    :param pairs: the preferences, whose prompts are used if ``config`` names none.
    :return: prompts and completions; None if no texts are configured.
    :raises ValueError: if there is no language model, or no prompt that fits, to sample from.
    """
    n = config.n_normalisation_texts
    if n < 1:
        return None
    hint = "or pass n_normalisation_texts=0 to leave the scores as they are"
    name = config.policy
    if name is None:
        base = str(LANGUAGE_MODEL) if config.base == "builtin" else config.base
        architecture = (load_pretrained(AutoConfig, base).architectures or [None])[0]
        if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            raise ValueError(
                f"Expected policy to name the language model whose texts normalise the score, since the base "
                f"{config.base!r} is none ({architecture}): name one, {hint}."
            )
        name = config.base
    given: list[RawPrompt] = [pair.prompt for pair in pairs.train]
    if config.prompts is not None:
        given = [row["prompt"] for row in load_prompts(config.prompts)]
        if pairs.conversational:
            given = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in given]
        elif not isinstance(given[0], str):
            raise ValueError(f"Expected prompts to be texts, as those of the pairs; {config.prompts!r} has messages.")
    tokenizer = load_tokenizer(name)
    place, options = pretrained_name(base_of_adapter(name) or name)
    longest = _positions(load_pretrained(AutoConfig, place, **options)) - config.max_new_tokens
    rows = [{"prompt": prompt} for prompt in given if prompt]
    if not rows:
        raise ValueError(f"Expected prompts to sample from, since the pairs have none: name some with prompts, {hint}.")
    made = Prompts(rows, tokenizer, 2**31, chat_template=pairs.conversational)
    lengths = {i: len(prompt.token_ids) for i, prompt in enumerate(made) if len(prompt.token_ids) <= longest}
    if not lengths:
        raise ValueError(
            f"Expected prompts of at most {longest} tokens to sample from, since the policy's positions must hold "
            f"max_new_tokens={config.max_new_tokens} more; all {len(rows)} are longer: make that smaller, {hint}."
        )
    set_random_seed(config.seed)  # loading the base may have used random numbers, for a new head
    drawn = np.random.default_rng(config.seed).choice(list(lengths), size=n)
    env = TextVectorEnv(
        min(64, n),
        tokenizer=tokenizer,
        prompts=[rows[i] for i in drawn],
        reward=_unscored,
        max_prompt_tokens=max(lengths[i] for i in drawn),
        max_new_tokens=config.max_new_tokens,
        chat_template=pairs.conversational,
    )
    prompts = [rows[i]["prompt"] for i in drawn]
    policy = load_policy(name, env, config.device, config.dtype)
    completions: list[str] = []
    for first in tqdm(range(0, n, 256), desc="policy's texts", disable=not config.progress):
        infos = sample_texts(policy, env, prompts[first : first + 256])
        completions += [info["completion"] for info in infos]
    return prompts, completions


def _unscored(completions: Sequence[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


# ---- scores ----------------------------------------------------------------------------------------------------


def pair_margins(reward: Any, pairs: Sequence[Preference], progress: bool = False) -> NDArray[np.float64]:
    """
    :param reward: the reward that scores the texts.
    :param pairs: N pairs.
    :param progress: whether to show a progress bar.
    :return: the score of each chosen text minus that of the rejected one, float64 [N].
    :raises FloatingPointError: if a score is not finite.
    """
    prompts = [pair.prompt for pair in pairs]
    chosen = _scores(reward, prompts, [pair.chosen for pair in pairs], "chosen texts", progress)
    return chosen - _scores(reward, prompts, [pair.rejected for pair in pairs], "rejected texts", progress)


def _scores(
    reward: Any, prompts: Sequence[RawPrompt], completions: Sequence[str], what: str, progress: bool
) -> NDArray[np.float64]:
    scores: list[float] = []
    for first in tqdm(range(0, len(prompts), 256), desc=what, disable=not progress):
        part = slice(first, first + 256)
        scores += reward(prompts=prompts[part], completions=completions[part])
    if not np.isfinite(scores).all():
        raise FloatingPointError("The trained model's scores are not finite: lower the learning rate.")
    return np.array(scores)
