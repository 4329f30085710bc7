"""A Hugging Face causal language model as a Stable-Baselines3 policy, and algorithms that train it."""

from agents.algorithms.a2c import A2C
from agents.algorithms.engine import Engine
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.models.distribution import TokenDistribution
from agents.models.reference import Reference
from agents.models.reference_top_p import ReferenceTopP
from agents.objectives.kl import AdaptiveKL, FixedKL
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.policies.maskable import MaskableCausalLMPolicy
from agents.policies.token_features import TokenFeatures
from agents.policies.trpo import TRPOCausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeBuffer, EpisodeSamples
from agents.rollouts.sb3_vec_env import TextVecEnv, make_vec_env
from agents.state.schedules import LearningRate

__all__ = [
    "A2C",
    "GRPO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "AdaptiveKL",
    "CausalLMPolicy",
    "Engine",
    "EpisodeBuffer",
    "EpisodeSamples",
    "FixedKL",
    "LearningRate",
    "MaskableCausalLMPolicy",
    "OnPolicyAlgorithm",
    "Reference",
    "ReferenceTopP",
    "TRPOCausalLMPolicy",
    "TextVecEnv",
    "TokenDistribution",
    "TokenFeatures",
    "make_vec_env",
]
