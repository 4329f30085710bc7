"""A script for TRL's GRPOTrainer, ported. The reward function and the rows are as they were.

python -m examples.from_trl
"""

from __future__ import annotations

from agents import GRPO, make_vec_env
from agents.rollouts.sampling import sample_texts

# What a TRL script has:
#
#     dataset = Dataset.from_list(ROWS)
#     config = GRPOConfig(num_generations=8, max_completion_length=40, beta=0.04, learning_rate=3e-4,
#                         epsilon=0.2, loss_type="grpo", scale_rewards="group")
#     trainer = GRPOTrainer(model="path/to/model", reward_funcs=mentions, args=config, train_dataset=dataset)
#     trainer.train()

ROWS = [{"prompt": "The film", "word": "music"}, {"prompt": "This movie", "word": "story"}]


def mentions(prompts: list[str], completions: list[str], word: list[str], **kwargs: object) -> list[float]:
    """
    :return: for each text how often the word is in it, at most 2.
    """
    return [min(text.count(wanted), 2.0) for wanted, text in zip(word, completions, strict=True)]


def main(model: str = "builtin", total_timesteps: int = 30_000, n_episodes: int = 32) -> list[float]:
    """
    :param model: the language model.
    :param total_timesteps: the number of tokens that are generated for training.
    :param n_episodes: the number of texts of a rollout, in groups of 8.
    :return: the mean scores before and after.
    """
    env_kwargs = {
        "tokenizer": model,
        "prompts": ROWS,  # train_dataset
        "reward": mentions,  # reward_funcs
        "group_size": 8,  # num_generations
        "max_new_tokens": 40,  # max_completion_length
        "max_prompt_tokens": None,
    }
    env = make_vec_env("TextRLHF-v0", n_envs=n_episodes, env_kwargs=env_kwargs)
    grpo = GRPO(
        "CausalLMPolicy",
        env,
        learning_rate=3e-4,
        n_episodes=n_episodes,
        kl_coef=0.04,  # beta
        clip_range=0.2,  # epsilon
        loss_weighting="sequence",  # loss_type="grpo"
        scale_rewards=True,  # scale_rewards="group"
        policy_kwargs={"model": model},
        seed=0,
        verbose=1,
    )
    means = []
    for _ in ("before", "after"):
        if means:
            grpo.learn(total_timesteps)
        texts = sample_texts(grpo.policy, env.vector_env, list(env.vector_env.prompts) * 16)
        means.append(sum(text["score"] for text in texts) / len(texts))
    print(f"mean score: {means[0]:.2f} before, {means[1]:.2f} after")
    return means


if __name__ == "__main__":
    main()
