"""TRL's PPO trainer, one iteration a turn. Runs in ``.venv-peers``.

python -m benchmarks.peers.trl_ppo --episodes 64 --minibatches 4 --epochs 2 --response 32
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import torch
from transformers import TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.models import gpt2_4m, gpt2_classifier, word_prompts, words
from benchmarks.peers.turns import Turns


class TakeTurns(TrainerCallback):
    """Stops the trainer between its iterations."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._turns.wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._turns.done()
        self._turns.wait()


def main() -> None:
    turns = Turns()
    parser = argparse.ArgumentParser()
    for name in ("episodes", "minibatches", "epochs", "response", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = words()
    model = gpt2_4m()
    with tempfile.TemporaryDirectory() as directory:
        config = PPOConfig(
            output_dir=directory,
            total_episodes=args.episodes * 100_000,  # the benchmark says when to stop
            # A whole rollout in one "device batch" and no accumulation: with accumulation, TRL would step the
            # optimiser once a rollout instead of once a minibatch.
            per_device_train_batch_size=args.episodes,
            gradient_accumulation_steps=1,
            num_mini_batches=args.minibatches,
            num_ppo_epochs=args.epochs,
            response_length=args.response,
            temperature=1.0,
            kl_coef=0.05,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            bf16=False,
            gradient_checkpointing=False,  # TRL's default would cost it time
            use_cpu=True,
            num_sample_generations=0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=model,
            ref_model=copy.deepcopy(model),
            reward_model=gpt2_classifier(seed=1),
            value_model=gpt2_classifier(seed=2),
            train_dataset=datasets.Dataset.from_dict({"input_ids": tokenizer(word_prompts())["input_ids"]}),
            callbacks=[TakeTurns(turns)],
        )
        trainer.train()


if __name__ == "__main__":
    main()
