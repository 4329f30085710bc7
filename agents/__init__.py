"""The learners: a Hugging Face causal language model as an SB3 policy, and algorithms that train it.

A public name is imported when it is first asked for: PyTorch and transformers take seconds to import, and the command
line answers ``--help`` without them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and mypy read; at run time the table below says where each name comes from
    from agents.algorithms.a2c import A2C as A2C
    from agents.algorithms.dapo import DAPO as DAPO
    from agents.algorithms.engine import Engine as Engine
    from agents.algorithms.grpo import GRPO as GRPO
    from agents.algorithms.on_policy import OnPolicyAlgorithm as OnPolicyAlgorithm
    from agents.algorithms.ppo import PPO as PPO
    from agents.algorithms.reinforce import REINFORCE as REINFORCE
    from agents.algorithms.rloo import RLOO as RLOO
    from agents.algorithms.vineppo import VinePPO as VinePPO
    from agents.models.distribution import TokenDistribution as TokenDistribution
    from agents.models.reference import Reference as Reference
    from agents.models.reference_constraints import ReferenceMinP as ReferenceMinP
    from agents.models.reference_constraints import ReferenceTopK as ReferenceTopK
    from agents.models.reference_constraints import ReferenceTopP as ReferenceTopP
    from agents.objectives.kl import AdaptiveKL as AdaptiveKL
    from agents.objectives.kl import FixedKL as FixedKL
    from agents.policies.causal_lm_policy import CausalLMPolicy as CausalLMPolicy
    from agents.policies.maskable import MaskableCausalLMPolicy as MaskableCausalLMPolicy
    from agents.policies.token_features import TokenFeatures as TokenFeatures
    from agents.policies.trpo import TRPOCausalLMPolicy as TRPOCausalLMPolicy
    from agents.rollouts.episode_buffer import EpisodeBuffer as EpisodeBuffer
    from agents.rollouts.episode_buffer import EpisodeSamples as EpisodeSamples
    from agents.rollouts.sb3_vec_env import TextVecEnv as TextVecEnv
    from agents.rollouts.sb3_vec_env import make_vec_env as make_vec_env
    from agents.state.schedules import LearningRate as LearningRate

_HOMES = {
    "A2C": "agents.algorithms.a2c",
    "DAPO": "agents.algorithms.dapo",
    "Engine": "agents.algorithms.engine",
    "GRPO": "agents.algorithms.grpo",
    "OnPolicyAlgorithm": "agents.algorithms.on_policy",
    "PPO": "agents.algorithms.ppo",
    "REINFORCE": "agents.algorithms.reinforce",
    "RLOO": "agents.algorithms.rloo",
    "VinePPO": "agents.algorithms.vineppo",
    "TokenDistribution": "agents.models.distribution",
    "Reference": "agents.models.reference",
    "ReferenceMinP": "agents.models.reference_constraints",
    "ReferenceTopK": "agents.models.reference_constraints",
    "ReferenceTopP": "agents.models.reference_constraints",
    "AdaptiveKL": "agents.objectives.kl",
    "FixedKL": "agents.objectives.kl",
    "CausalLMPolicy": "agents.policies.causal_lm_policy",
    "MaskableCausalLMPolicy": "agents.policies.maskable",
    "TokenFeatures": "agents.policies.token_features",
    "TRPOCausalLMPolicy": "agents.policies.trpo",
    "EpisodeBuffer": "agents.rollouts.episode_buffer",
    "EpisodeSamples": "agents.rollouts.episode_buffer",
    "TextVecEnv": "agents.rollouts.sb3_vec_env",
    "make_vec_env": "agents.rollouts.sb3_vec_env",
    "LearningRate": "agents.state.schedules",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'agents' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
