"""Train a policy with TRL 1.12.0's PPO, RLOO or GRPO, on the task and with the settings of our own runs. Runs in
``.venv-peers``.

python -m benchmarks.peers.trl_train --algorithm ppo --model DIR --reward-model DIR --prompts FILE.json --out DIR

Writes ``policy/`` (a plain Hugging Face directory), ``train.json`` and ``curve.json`` (one entry a rollout).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.peers.classifier import RewardModule, Scorer, normalized_classifier

PPO_EPISODES = 64  # of a rollout
BATCH_EPISODES = 16  # of a minibatch of PPO, and of the whole rollout of the others
GROUP = 4  # texts of a prompt, for RLOO and GRPO


class BudgetSpent(Exception):
    """Ends a training: PPO's loop heeds no ``should_training_stop``."""


class Record(TrainerCallback):
    """Counts tokens and scores as texts are scored, writes the curve, and ends the training after the last rollout.

    :param total_timesteps: tokens of responses, EOS included.
    """

    def __init__(self, total_timesteps: int) -> None:
        self.total_timesteps = total_timesteps
        self.tokens = 0
        self.curve: list[dict[str, float]] = []
        self._score = self._mean_length = 0.0

    def rollout(self, scores: torch.Tensor, tokens: int) -> None:
        """
        :param scores: [E], of all texts of a rollout.
        :param tokens: of all their responses.
        """
        self.tokens += tokens
        self._score, self._mean_length = float(scores.mean()), tokens / len(scores)

    def remaining(self, _: int) -> float:
        """
        :return: how much of the budget is left, 1 → 0. Used as learning-rate schedule: ours counts tokens as well.
        """
        return max(0.0, 1 - self.tokens / self.total_timesteps)

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """All three log once a rollout, after its update."""
        # Nats an episode; RLOO and GRPO log the mean over tokens (GRPO's by the estimator k3).
        kl = logs["objective/kl"] if "objective/kl" in logs else logs["kl"] * self._mean_length
        self.curve.append({"tokens": self.tokens, "score": self._score, "kl": kl})
        if self.tokens >= self.total_timesteps:
            raise BudgetSpent


def adam(parameters: list[torch.nn.Parameter], record: Record, learning_rate: float) -> tuple[Any, Any]:
    """
    :return: optimiser and schedule, as our runs have them.
    """
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, eps=1e-5, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, record.remaining)


def make_ppo(
    args: argparse.Namespace,
    common: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    record: Record,
) -> PPOTrainer:
    value_model = normalized_classifier(args.reward_model)  # from the reward model, as in TRL's own examples
    parameters = [*model.parameters(), *value_model.parameters()]
    optimizer, schedule = adam(parameters, record, args.learning_rate)

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, common["max_grad_norm"])

    optimizer.register_step_pre_hook(clip)  # PPO's loop doesn't, whatever max_grad_norm says; the other trainers do
    token_ids = tokenizer(prompts)["input_ids"]
    columns = max(map(len, token_ids))
    score = Scorer(args.reward_model)

    class CountingRewardModule(RewardModule):
        def backbone(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
            output = super().backbone(input_ids, attention_mask, **kwargs)
            record.rollout(output.hidden_states[-1][:, -1, 0], int(attention_mask[:, columns:].sum()))
            return output

    return PPOTrainer(
        args=PPOConfig(
            **common,
            total_episodes=args.total_timesteps,  # never reached: a text has a token at least
            # A whole rollout in one "device batch" and no accumulation: with accumulation, TRL would step the
            # optimiser once a rollout instead of once a minibatch.
            per_device_train_batch_size=PPO_EPISODES,
            gradient_accumulation_steps=1,
            local_rollout_forward_batch_size=PPO_EPISODES,
            num_mini_batches=PPO_EPISODES // BATCH_EPISODES,
            num_ppo_epochs=4,
            response_length=args.max_new_tokens,
            stop_token="eos",
            temperature=1.0,
            kl_coef=args.kl_coef,
            kl_estimator="k1",
            cliprange=0.2,
            cliprange_value=0.2,
            vf_coef=0.1,
            gamma=1.0,
            lam=0.95,
            whiten_rewards=False,
            num_sample_generations=0,
        ),
        processing_class=tokenizer,
        model=model,
        ref_model=copy.deepcopy(model),
        reward_model=CountingRewardModule(score, tokenizer),
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": token_ids}),
        # As wide as the longest prompt always, so that it is known where responses begin.
        data_collator=DataCollatorWithPadding(tokenizer, padding="max_length", max_length=columns),
        optimizers=(optimizer, schedule),
        callbacks=[record],
    )


def make_grouped(
    args: argparse.Namespace,
    common: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    record: Record,
) -> RLOOTrainer | GRPOTrainer:
    score = Scorer(args.reward_model)

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        scores = score([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
        record.rollout(scores, sum(map(len, completion_ids)))
        return scores.tolist()

    trainer, config = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}[args.algorithm]
    return trainer(
        model=model,  # the reference is loaded from its directory again
        reward_funcs=reward,
        args=config(
            **common,
            max_steps=args.total_timesteps,  # never reached
            per_device_train_batch_size=BATCH_EPISODES,
            gradient_accumulation_steps=1,  # a rollout is one batch, and one gradient step
            num_generations=GROUP,
            max_completion_length=args.max_new_tokens,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=args.kl_coef,
            disable_dropout=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[record],
        optimizers=adam(list(model.parameters()), record, args.learning_rate),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--algorithm", choices=["ppo", "rloo", "grpo"], required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reward-model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="a JSON list of strings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--kl-coef", type=float, default=0.04)
    parser.add_argument("--total-timesteps", type=int, default=80_000, help="response tokens; the last rollout ends")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    prompts: list[str] = json.loads(args.prompts.read_text())
    record = Record(args.total_timesteps)
    make = make_ppo if args.algorithm == "ppo" else make_grouped
    with tempfile.TemporaryDirectory() as directory:
        common = {
            "output_dir": directory,
            "seed": args.seed,
            "max_grad_norm": 1.0,
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        trainer = make(args, common, model, tokenizer, prompts, record)
        trainer.remove_callback(PrinterCallback)
        wall, cpu = time.perf_counter(), time.process_time()
        with contextlib.suppress(BudgetSpent):
            trainer.train()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu

    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out / "policy")
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out / "policy")  # not left-padding, as it came
    result = {
        "tokens": record.tokens,
        "seconds": wall,
        "cpu_seconds": cpu,
        "versions": {name: version(name) for name in ("trl", "transformers", "accelerate", "torch")},
    }
    (args.out / "train.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.out / "curve.json").write_text(json.dumps(record.curve, indent=1) + "\n")


if __name__ == "__main__":
    main()
