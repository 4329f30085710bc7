"""Token generation as a Gymnasium environment: ``gym.make("TextRLHF-v0")``."""

from gymnasium.envs.registration import register

from text_env.env import TextEnv
from text_env.episodes import NO_ACTION
from text_env.rewards import Normalized, RewardError, SequenceClassifierReward, WeightedSum, make_reward
from text_env.vector_env import TextVectorEnv

__all__ = [
    "NO_ACTION",
    "Normalized",
    "RewardError",
    "SequenceClassifierReward",
    "TextEnv",
    "TextVectorEnv",
    "WeightedSum",
    "make_reward",
]

# No max_episode_steps: TimeLimit would cut from outside, where the score is never paid. The budget is the task's own.
register(
    id="TextRLHF-v0",
    entry_point="text_env.env:TextEnv",
    vector_entry_point="text_env.vector_env:TextVectorEnv",
)
