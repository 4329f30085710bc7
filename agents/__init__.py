"""The learners: a Hugging Face causal language model as an SB3 policy, and algorithms that train it."""

from agents.a2c import A2C
from agents.constraints import ReferenceTopP
from agents.episode_buffer import EpisodeBuffer, EpisodeSamples
from agents.grpo import GRPO
from agents.maskable_policy import MaskableCausalLMPolicy
from agents.on_policy import OnPolicyAlgorithm
from agents.policy import CausalLMPolicy
from agents.ppo import PPO
from agents.reference import AdaptiveKL, FixedKL, Reference
from agents.reinforce import REINFORCE
from agents.rloo import RLOO
from agents.sb3_vec_env import TextVecEnv, make_vec_env
from agents.token_features import TokenFeatures

__all__ = [
    "A2C",
    "GRPO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "AdaptiveKL",
    "CausalLMPolicy",
    "EpisodeBuffer",
    "EpisodeSamples",
    "FixedKL",
    "MaskableCausalLMPolicy",
    "OnPolicyAlgorithm",
    "Reference",
    "ReferenceTopP",
    "TextVecEnv",
    "TokenFeatures",
    "make_vec_env",
]
