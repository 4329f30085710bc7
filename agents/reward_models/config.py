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
    """'builtin', a file (.jsonl, .json, .csv, .parquet) with chosen, rejected and perhaps prompt, a directory of
    datasets' save_to_disk, or a data set's hub name."""
    base: str = "builtin"
    """What it starts from: 'builtin', a directory or a hub name of a language model, an encoder or a classifier."""
    out: Path = Path("runs/reward_model")
    """The directory that is written; must not hold anything yet."""
    epochs: float = 1.0
    """Passes over the training pairs."""
    learning_rate: float | None = None
    """At its highest: 3 % of the steps warm up, then it falls as a cosine. By default 1e-4, as in TRL, but 5e-4 for the
    base 'builtin', which is so small that it learns next to nothing at that."""
    batch_size: int = 32
    """Pairs of an update."""
    micro_batch_size: int | None = None
    """Pairs of a forward pass, a divisor of that; by default all of them."""
    weight_decay: float = 0.1
    """AdamW's."""
    lora_r: int | None = None
    """Rank of a LoRA adapter on all linear layers, merged at the end; by default every weight is trained."""
    max_length: int = 1024
    """Pairs with a text of more tokens are left out, as are those that the base has too few positions for."""
    dtype: str = "float32"
    """Of the weights in training."""
    save_dtype: str | None = None
    """Of the weights on disk, if another; the model still says that it is to be loaded in `dtype`."""
    bf16: bool = False
    """Matrix products in bfloat16, weights in theirs."""
    gradient_checkpointing: bool = False
    """Less memory, more time."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', …"""
    seed: int = 0
    """Of everything random."""
    max_pairs: int | None = None
    """Train on so many pairs, drawn at random: the first so many of the same order for the same seed."""
    held_out: float = 0.05
    """The share of pairs to measure with, if the preferences have no split of their own."""
    max_malformed: float = 0.01
    """The share of malformed rows to put up with; they are left out."""
    n_normalisation_texts: int = 1024
    """Texts of the policy whose scores get mean 0 and standard deviation 1; 0 leaves the scores as they are."""
    policy: str | None = None
    """Whose texts these are; by default the base's, which is then a language model."""
    prompts: str | None = None
    """For these texts, as in training; by default the prompts of the training pairs."""
    max_new_tokens: int = 48
    """Response budget of these texts, in tokens."""
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
        check_number("weight_decay", self.weight_decay, least=0)
        check_integer("n_normalisation_texts", self.n_normalisation_texts, 0)
