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

from benchmarks.gpu.models import SHAPES, classifier, llama
from benchmarks.models import PROMPT_TOKENS, gpt2_4m, gpt2_classifier, word_prompts, words
from benchmarks.peers.turns import Turns


class TakeTurns(TrainerCallback):
    """Stops the trainer between its iterations."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._turns.wait()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._turns.done()
        self._turns.wait()


def main() -> None:
    turns = Turns()
    parser = argparse.ArgumentParser()
    for name in ("episodes", "minibatches", "epochs", "response", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--shape", choices=SHAPES, help="a random Llama of this shape in place of the small GPT-2")
    parser.add_argument("--prompt", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.shape is None:
        tokenizer, prompts = words(), word_prompts(args.prompt)
        model, reward_model, value_model = gpt2_4m(), gpt2_classifier(seed=1), gpt2_classifier(seed=2)
    else:
        vocabulary = SHAPES[args.shape]["vocab_size"]
        tokenizer, prompts = words(vocabulary=vocabulary), word_prompts(args.prompt, vocabulary)
        device, positions = torch.device(args.device), args.prompt + args.response + 2
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = llama(args.shape, positions, device, dtype)
        reward_model, value_model = (classifier(args.shape, positions, device, dtype, seed) for seed in (1, 2))
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
            use_cpu=args.device == "cpu",
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
            reward_model=reward_model,
            value_model=value_model,
            train_dataset=datasets.Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]}),
            callbacks=[TakeTurns(turns)],
        )
        trainer.train()


if __name__ == "__main__":
    main()
