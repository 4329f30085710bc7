"""A task with a right answer, made of a function that poses problems: sums of four numbers.

python -m examples.own_task
textrlhf train --task examples.own_task:sums --model builtin:arithmetic --run-dir runs/sums
textrlhf evaluate --policy runs/sums/policy --trust
"""

from __future__ import annotations

import random

from agents import RLOO, make_vec_env
from agents.rollouts.sampling import sample_texts
from text_env import GeneratedPrompts, Task


def sums(largest: int = 99) -> Task:
    """
    :param largest: the largest number in a sum.
    :return: the task.
    """

    def pose(number: int) -> dict[str, object]:  # the same problem whenever it is asked for the same number
        generator = random.Random(number)
        terms = [generator.randint(1, largest) for _ in range(4)]
        return {"prompt": "+".join(map(str, terms)) + "=", "answer": sum(terms)}

    return Task(
        "sums",
        lambda split: GeneratedPrompts(pose, split),
        "correct(extract='hash')",  # the number after ####, 1 or 0
        settings={"max_prompt_tokens": 16, "max_new_tokens": 160, "tokenizer": "builtin:arithmetic"},
    )


def main(total_timesteps: int = 60_000, n_episodes: int = 64, n_problems: int = 128) -> list[float]:
    """
    :param total_timesteps: the number of tokens that are generated for training.
    :param n_episodes: the number of texts of a rollout.
    :param n_problems: the number of held-out problems.
    :return: the shares of held-out problems that are solved, before and after.
    """
    task, rows = sums(), min(n_episodes, 64)
    env = make_vec_env("TextRLHF-v0", n_envs=rows, env_kwargs={"task": task, "group_size": 4})
    held_out = make_vec_env("TextRLHF-v0", n_envs=rows, env_kwargs={"task": task, "task_kwargs": {"split": "eval"}})
    rloo = RLOO(
        "CausalLMPolicy", env, n_episodes=n_episodes, policy_kwargs={"model": "builtin:arithmetic"}, seed=0, verbose=1
    )
    problems = [held_out.vector_env.prompts[number] for number in range(n_problems)]
    shares = []
    for _ in ("before", "after"):
        if shares:
            rloo.learn(total_timesteps)
        texts = sample_texts(rloo.policy, held_out.vector_env, problems)
        shares.append(sum(text["score"] for text in texts) / len(texts))
    print(f"{texts[0]['prompt']}{texts[0]['completion']}")
    print(f"right: {shares[0]:.0%} before, {shares[1]:.0%} after")
    return shares


if __name__ == "__main__":
    main()
