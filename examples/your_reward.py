"""Your own prompts and reward, on the built-in model or on one of yours.

python -m examples.your_reward
python -m examples.your_reward --model HuggingFaceTB/SmolLM2-135M-Instruct --save runs/mine/policy
"""

from __future__ import annotations

import argparse

from agents import PPO, make_vec_env
from agents.rollouts.sampling import sample_texts

OPENINGS = ["The film", "This movie", "I think the film", "In this drama,"]
WORDS = ["music", "story", "ending", "acting"]
# What the reward is given beside a prompt are the other columns of its row.
PROMPTS = [{"prompt": opening, "word": word} for opening in OPENINGS for word in WORDS]


def reward(prompts: list[str], completions: list[str], word: list[str], **columns: object) -> list[float]:
    """
    :return: for each text 1 if the word is in it, less a little for each of its characters.
    """
    return [float(wanted in text) - len(text) / 500 for wanted, text in zip(word, completions, strict=True)]


def main(model: str = "builtin", total_timesteps: int = 40_000, n_episodes: int = 64, save: str = "") -> list[float]:
    """
    :param model: the language model.
    :param total_timesteps: the number of tokens that are generated for training.
    :param n_episodes: the number of texts of a rollout.
    :param save: a directory for the trained policy; empty: it is not saved.
    :return: the mean score of one text for each prompt, before and after.
    """
    env_kwargs = {
        "tokenizer": model,
        "prompts": PROMPTS,
        "reward": reward,
        "metrics": {"sentiment": "sentiment"},  # looked at, never trained on
        "max_prompt_tokens": None,  # as many as the longest prompt has
        "max_new_tokens": 40,
    }
    env = make_vec_env("TextRLHF-v0", n_envs=n_episodes, env_kwargs=env_kwargs)
    ppo = PPO("CausalLMPolicy", env, n_episodes=n_episodes, policy_kwargs={"model": model}, seed=0, verbose=1)
    means = []
    for _ in ("before", "after"):
        if means:
            ppo.learn(total_timesteps)  # a timestep is a token
        texts = sample_texts(ppo.policy, env.vector_env, list(env.vector_env.prompts))
        means.append(sum(text["score"] for text in texts) / len(texts))
        for text in texts[:4]:
            print(f"{text['score']:+.2f} {text['prompt']}{text['completion']}")
    print(f"mean score: {means[0]:.2f} before, {means[1]:.2f} after")
    if save:
        ppo.policy.save_pretrained(save)  # a plain Hugging Face directory
    return means


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--total-timesteps", type=int, default=40_000)
    parser.add_argument("--save", default="")
    main(**vars(parser.parse_args()))
