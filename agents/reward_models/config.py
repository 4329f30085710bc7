"""What the training of a reward model is made of, as data: the options of ``textrlhf reward-model``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agents.state.arguments import check_number
from text_env.settings import check_integer


@dataclass
class RewardModelConfig:
    """Train a reward model on preferences."""

    preferences: str = "builtin"
    """'builtin', a file (.jsonl, .json, .csv, .parquet) with the columns chosen, rejected and optionally prompt,
    a directory of datasets' save_to_disk, or the hub name of a data set."""
    base: str = "builtin"
    """The model that training starts from: 'builtin', or a directory or hub name
    of a language model, an encoder or a classifier."""
    out: Path = Path("runs/reward_model")
    """The directory that is written. It must be empty or not exist."""
    epochs: float = 1.0
    """The number of passes over the training pairs."""
    learning_rate: float | None = None
    """The highest learning rate, between a warm-up of 3 % of the steps and a cosine decay. By default 1e-4, as in TRL,
    and 5e-4 for the base 'builtin', which is so small that it learns next to nothing with 1e-4."""
    batch_size: int = 32
    """The number of pairs of an update."""
    micro_batch_size: int | None = None
    """The number of pairs of a forward pass, a divisor of batch_size; by default batch_size."""
    weight_decay: float = 0.1
    """The weight decay of AdamW."""
    lora_r: int | None = None
    """The rank of a LoRA adapter on all linear layers, which is merged at the end.
    By default there is none, and all weights are trained."""
    max_length: int = 1024
    """The length of the longest text, in tokens. Pairs with a longer text are left out,
    and so are pairs with more tokens than the base has positions."""
    dtype: str = "float32"
    """The floating-point type of the weights in training."""
    save_dtype: str | None = None
    """The floating-point type of the weights on disk; by default that of training.
    The saved config names `dtype` in any case, and the model is loaded in it."""
    bf16: bool = False
    """Compute matrix products in bfloat16. The weights keep their type."""
    gradient_checkpointing: bool = False
    """Use less memory and more time."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', …"""
    seed: int = 0
    """The seed of all random generators."""
    max_pairs: int | None = None
    """Train on at most this many pairs, drawn at random; by default on all.
    With the same seed, fewer pairs are a subset of more."""
    held_out: float = 0.05
    """The share of pairs that are held out for measuring, if the preferences have no split of their own."""
    max_malformed: float = 0.01
    """The largest share of malformed rows that is accepted. They are left out."""
    n_normalisation_texts: int = 1024
    """The number of texts of the policy whose scores are normalised to mean 0 and standard deviation 1.
    0 leaves the scores as they are."""
    policy: str | None = None
    """The language model that writes these texts; by default the base, which must then be a language model."""
    prompts: str | None = None
    """The prompts of these texts, as in training; by default the prompts of the training pairs."""
    max_new_tokens: int = 48
    """The response budget of these texts, in tokens."""
    progress: bool = True
    """Show progress bars."""

    def check(self) -> None:
        """Refuse what no training can be made of; nothing is loaded for this. Sizes of batches and shares of pairs are
        checked where they are used, which is before training too.

        :raises ValueError: if a number is out of range.
        """
        check_number("epochs", self.epochs, above=0)
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, least=0)
        for name in ("max_length", "max_new_tokens"):
            check_integer(name, getattr(self, name), 1)
        if self.lora_r is not None:
            check_integer("lora_r", self.lora_r, 1)
        if self.max_pairs is not None:
            check_integer("max_pairs", self.max_pairs, 0)
        check_number("weight_decay", self.weight_decay, least=0)
        check_integer("n_normalisation_texts", self.n_normalisation_texts, 0)
