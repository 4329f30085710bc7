"""Our PPO, one iteration a turn: the counterpart of ``benchmarks/peers/trl_ppo.py``, with the same settings."""

from __future__ import annotations

import argparse
import tempfile

import torch

from agents.algorithms.ppo import PPO
from benchmarks.models import PROMPT_TOKENS, gpt2_4m, gpt2_classifier, word_prompts, words
from benchmarks.peers.turns import Turns
from text_env.rewards import SequenceClassifierReward
from text_env.vector_env import TextVectorEnv


def main() -> None:
    turns = Turns()
    parser = argparse.ArgumentParser()
    for name in ("episodes", "minibatches", "epochs", "response", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--separate-critic", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = words()
    with tempfile.TemporaryDirectory() as directory:
        gpt2_classifier(seed=1).save_pretrained(directory)
        words().save_pretrained(directory)
        # By name, as a user would give it: the texts are tokenised again for the reward model.
        reward = SequenceClassifierReward(directory, device="cpu")
    env = TextVectorEnv(
        args.episodes,
        tokenizer=tokenizer,
        prompts=word_prompts(),
        reward=reward,
        max_prompt_tokens=PROMPT_TOKENS,
        max_new_tokens=args.response,
    )
    algorithm = PPO(
        "CausalLMPolicy",
        env,
        learning_rate=1e-5,
        n_episodes=args.episodes,
        batch_size=args.episodes // args.minibatches,
        n_epochs=args.epochs,
        kl_coef=0.05,
        device="cpu",
        seed=0,
        policy_kwargs={"model": gpt2_4m(), "separate_critic": args.separate_critic},
    )
    first = True
    while True:
        turns.wait()
        algorithm.learn(args.episodes * args.response, reset_num_timesteps=first)
        first = False
        turns.done(tokens=algorithm.buffer.n_tokens)


if __name__ == "__main__":
    main()
