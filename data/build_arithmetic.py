"""Train the language model that ships as ``builtin:arithmetic`` (``text_env/builtin/arithmetic``) from scratch.

::

    python data/build_arithmetic.py

It reads nothing: it learns from workings that :mod:`text_env.arithmetic` writes, of which a stated share of the
carries is forgotten. How often it is right afterwards stands in ``report.json`` and in
``text_env/builtin/arithmetic/README.md``.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import transformers
import tyro
from build_builtin import EOS, HERE, PAD, batches_of_tokens, fit, pad_right, save_fp16, set_generation
from torch import Tensor

import text_env  # noqa: F401  (registers the environments)
from text_env.arithmetic import CHARACTERS, draw_problem, working
from text_env.generated import split_of

MARKS = (": ", ", ", "\n", "#### ")


@dataclass
class Build:
    """Build the tokenizer and the language model of the arithmetic task."""

    out: Path = HERE.parent / "text_env" / "builtin" / "arithmetic"
    """The directory that is written."""
    seed: int = 0
    threads: int = 2
    """Torch threads; figures are repeatable for one number of threads on one kind of processor."""
    n_steps: tuple[int, ...] = (3, 4)
    """The numbers of operations of the problems."""
    forgotten: float = 0.1
    """The share of the carries that the writers forget where both summands have a digit, and in products."""
    forgotten_overhang: float = 0.55
    """The share of the carries that they forget where only one summand reaches the column."""

    hidden_size: int = 128
    n_layers: int = 4
    n_heads: int = 4
    intermediate_size: int = 512
    n_problems: int = 1_024
    """Held-out problems that the figures in report.json are of."""
    n_batches: int = 5_000
    batch_tokens: int = 4_096
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    compile: bool = True
    """Compile the model for training; needs a C++ compiler, saves a third of the time."""


def build_tokenizer(out: Path) -> Any:
    """Make a tokenizer of characters and of the four marks, each of which is one token.

    :param out: the directory that the tokenizer is written to
    :return: the tokenizer
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    entries = (PAD, EOS, *CHARACTERS, *MARKS)
    tokenizer = Tokenizer(models.WordLevel({entry: number for number, entry in enumerate(entries)}))
    pattern = "|".join([*map(re.escape, MARKS), "."]).replace("\\#", "#")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="right",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    return fast


def texts(config: Build) -> Iterator[str]:
    """Problems of the training split with workings that have forgotten carries, endlessly.

    :param config: the settings
    :return: an iterator over texts
    """
    generator = random.Random(config.seed)

    def forgets(overhang: bool) -> bool:
        return generator.random() < (config.forgotten_overhang if overhang else config.forgotten)

    while True:
        problem = draw_problem(generator, generator.choice(config.n_steps))
        if split_of(problem.expression) == "train":
            yield problem.expression + working(problem, forgets)


def batches(config: Build, tokenizer: Any) -> Iterator[list[list[int]]]:
    """Batches of sequences of similar length, endlessly. No text is seen twice, but for chance.

    :param config: the settings
    :param tokenizer: the tokenizer
    :return: an iterator over lists of token ids, each with eos at its end
    """
    source, rng = texts(config), np.random.default_rng(config.seed)
    while True:
        drawn = tokenizer([next(source) for _ in range(4_096)])["input_ids"]
        sequences = [[*ids, tokenizer.eos_token_id] for ids in drawn]
        for batch in batches_of_tokens([len(ids) for ids in sequences], config.batch_tokens, rng):
            yield [sequences[i] for i in batch]


def working_losses(equals: int) -> Any:
    """The loss of the tokens after a problem: nobody can foresee the numbers of the problem itself.

    :param equals: the id of ``=``, which ends the problem
    :return: a function of a model and sequences, as :func:`build_builtin.fit` takes it
    """

    def losses_of(model: Any, sequences: list[list[int]]) -> Tensor:
        ids = pad_right(sequences, value=-100)  # (B, T)
        counts = (ids[:, 1:] != -100) & ((ids[:, :-1] == equals).cumsum(dim=1) > 0)
        hidden = model.model(input_ids=ids[:, :-1].clamp(min=0), use_cache=False).last_hidden_state[counts]  # (N, H)
        logits = model.lm_head(hidden).float()
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:][counts], reduction="none")

    return losses_of


def measure(out: Path, n_problems: int, n_steps: tuple[int, ...], seed: int) -> dict[str, float]:
    """Let the model that was written calculate held-out problems.

    :param out: its directory
    :param n_problems: how many
    :param n_steps: their numbers of operations
    :param seed: the seed of the sampling
    :return: how often it is right by sampling and by its likeliest tokens, and what its texts are like
    """
    from agents.policies.causal_lm_policy import load_policy
    from agents.rollouts.sampling import sample_texts

    kwargs = {"split": "eval", "n_steps": n_steps, "size": n_problems}
    env: Any = gym.make_vec("TextArithmetic-v0", num_envs=64, tokenizer=str(out), task_kwargs=kwargs)
    policy = load_policy(out, env, "cpu")
    transformers.set_seed(seed)
    sampled, greedy = (sample_texts(policy, env, list(env.prompts), greedily) for greedily in (False, True))

    def share(name: str, texts: list[dict[str, Any]]) -> float:
        return float(np.mean([text[name] for text in texts]))

    return {
        "problems": n_problems,
        "accuracy": share("correct", sampled),
        "greedy_accuracy": share("correct", greedy),
        "well_formed": share("well_formed", sampled),
        "ended": float(np.mean([text["finish_reason"] == "eos" for text in sampled])),
        "mean_length": share("length", sampled),
    }


def build(config: Build) -> None:
    """Build the tokenizer and the model, and write down what they were made with.

    :param config: the settings
    """
    torch.set_num_threads(config.threads)
    transformers.set_seed(config.seed)
    start = time.perf_counter()
    tokenizer = build_tokenizer(config.out)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    losses_of = working_losses(tokenizer.convert_tokens_to_ids("="))
    fit(
        model,
        batches(config, tokenizer),
        config.n_batches,
        losses_of,
        config.learning_rate,
        config.weight_decay,
        config.compile,
    )
    set_generation(model, tokenizer)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    save_fp16(model, config.out)
    report = {
        "settings": {name: value for name, value in vars(config).items() if name != "out"},
        "versions": {package: version(package) for package in ("torch", "transformers", "tokenizers", "numpy")},
        "parameters": n_parameters,
        "megabytes": round(sum(file.stat().st_size for file in config.out.iterdir()) / 1e6, 2),
        "seconds": round(time.perf_counter() - start, 1),
        "held_out": measure(config.out, config.n_problems, config.n_steps, config.seed),
        "longer": measure(config.out, config.n_problems, (max(config.n_steps) + 1,), config.seed),
    }
    (config.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    build(tyro.cli(Build))
