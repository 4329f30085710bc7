"""Stable-Baselines3's own PPO trains a language model, with its own callback.

python -m examples.stock_sb3
"""

from __future__ import annotations

import stable_baselines3
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy

from agents import CausalLMPolicy, EpisodeBuffer, make_vec_env


def main(total_timesteps: int = 30_000, n_envs: int = 64, n_eval_episodes: int = 128) -> list[float]:
    """
    :param total_timesteps: the number of tokens that are generated for training.
    :param n_envs: the number of texts that are written at once.
    :param n_eval_episodes: the number of held-out texts before and after.
    :return: their mean scores.
    """
    env = make_vec_env("TextRLHF-v0", n_envs=n_envs, seed=0)
    held_out = make_vec_env("TextRLHF-v0", n_envs=n_envs, seed=1, env_kwargs={"prompts": "builtin:eval"})
    model = stable_baselines3.PPO(
        CausalLMPolicy,
        env,
        learning_rate=1e-4,
        n_steps=48,  # steps of each row a rollout: as many as a text has tokens at most
        batch_size=768,  # transitions, here tokens
        n_epochs=4,
        gamma=1.0,
        policy_kwargs={"model": "builtin"},
        # The two lines that SB3 needs for a KL penalty, and to read each text once for all of its tokens.
        rollout_buffer_class=EpisodeBuffer,
        rollout_buffer_kwargs={"reference": "builtin", "kl_coef": 0.04},
        seed=0,
        verbose=1,
    )
    means = []
    for _ in ("before", "after"):
        if means:
            every = EvalCallback(held_out, n_eval_episodes=n_eval_episodes, eval_freq=240, deterministic=False)
            model.learn(total_timesteps, callback=every)
        means.append(float(evaluate_policy(model, held_out, n_eval_episodes, deterministic=False)[0]))
    print(f"mean score: {means[0]:.2f} before, {means[1]:.2f} after")
    return means


if __name__ == "__main__":
    main()
