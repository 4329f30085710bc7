"""Token generation as a Gymnasium environment: ``gym.make("TextRLHF-v0")``.

``"TextArithmetic-v0"`` poses calculations, whose answers are right or wrong.
``"TextRLHFContinuous-v0"`` is ``"TextRLHF-v0"`` for algorithms with continuous (Box) actions.
"""

import warnings

from gymnasium.envs.registration import register

from text_env.answers import Verifier
from text_env.constraints import AllowedTokens, Constraint, Contexts, ForbiddenTokens, MinimumLength
from text_env.env import TextEnv
from text_env.episodes import NO_ACTION
from text_env.generated import GeneratedPrompts
from text_env.namesake import complaint
from text_env.rewards import Normalized, RewardError, SequenceClassifierReward, WeightedSum, make_reward
from text_env.settings import EpisodeSettings
from text_env.shaping import PotentialShaping
from text_env.streams import TokenStream
from text_env.task_names import make_task
from text_env.tasks import Task
from text_env.text_rewards import FormatReward, LengthPenalty, OverlongPenalty
from text_env.vector_env import TextVectorEnv
from text_env.wrappers import CONTINUOUS_ID, ENTRY_POINT, NO_POINT, EmbeddingAction, VectorEmbeddingAction

__all__ = [
    "NO_ACTION",
    "NO_POINT",
    "AllowedTokens",
    "Constraint",
    "Contexts",
    "EmbeddingAction",
    "EpisodeSettings",
    "ForbiddenTokens",
    "FormatReward",
    "GeneratedPrompts",
    "LengthPenalty",
    "MinimumLength",
    "Normalized",
    "OverlongPenalty",
    "PotentialShaping",
    "RewardError",
    "SequenceClassifierReward",
    "Task",
    "TextEnv",
    "TextVectorEnv",
    "TokenStream",
    "VectorEmbeddingAction",
    "Verifier",
    "WeightedSum",
    "make_reward",
    "make_task",
]

# No max_episode_steps: TimeLimit would cut episodes from outside, and the score would never be paid. The response
# budget, which is part of the task, takes its place.
register(
    id="TextRLHF-v0",
    entry_point="text_env.env:TextEnv",
    vector_entry_point="text_env.vector_env:make_vector_env",
)
register(
    id="TextArithmetic-v0",
    entry_point="text_env.env:TextEnv",
    vector_entry_point="text_env.vector_env:make_vector_env",
    kwargs={"task": "arithmetic"},
)
register(
    id=CONTINUOUS_ID,
    entry_point=ENTRY_POINT,
    vector_entry_point="text_env.wrappers:make_vector_env",
)

if (_message := complaint()) is not None:
    warnings.warn(_message, stacklevel=2)
