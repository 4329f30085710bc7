"""Saving and loading the state of an algorithm between two iterations.

No episode is unfinished between two iterations, so the state consists of weights, optimiser, counters and the states of
all random generators. A resumed run continues exactly as if it had not been stopped.
"""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar, Self

from stable_baselines3.common.base_class import BaseAlgorithm

from agents.models.reference import Reference
from agents.objectives.kl import KLController
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.sb3_vec_env import TextVecEnv
from agents.state import checkpoint
from agents.state.arguments import (
    argument_defaults,
    arguments_again,
    class_name,
    is_plain,
    kept_arguments,
    written_down,
)
from agents.state.generators import generator_states, set_generator_states
from agents.state.schedules import LearningRate

# The attributes of SB3's algorithms that change while training.
COUNTERS = ("num_timesteps", "_total_timesteps", "_n_updates", "_current_progress_remaining")
# Arguments that are no data, or that the state holds in another form.
NOT_KEPT = frozenset({"policy", "env", "policy_kwargs", "device", "reference", "stats_window_size"})


class Resumable(BaseAlgorithm):
    """An algorithm that can be saved and loaded.

    It must keep the arguments of its constructor as attributes of the same names. ``state_attributes`` names the
    numbers that change while training, besides SB3's counters.
    """

    policy: CausalLMPolicy
    reference: Reference | None
    reference_was_given: bool
    kl: KLController

    state_attributes: ClassVar[tuple[str, ...]] = ()

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """Write :meth:`state` to a directory of safetensors and JSON files, none of which holds code.

        :param path: the directory; an ending ``.zip``, which SB3's callbacks add, is dropped. It is replaced as a
            whole, so that a process that is killed at any moment leaves either the old one or the new one.
        :param exclude: not used; part of SB3's signature.
        :param include: not used; part of SB3's signature.
        """
        checkpoint.save(path, self.state())

    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: Any,
        env: Any = None,
        device: Any = "auto",
        policy: str | type[CausalLMPolicy] = "CausalLMPolicy",
        **kwargs: Any,
    ) -> Self:
        """Load what :meth:`save` wrote. Training continues with ``learn(..., reset_num_timesteps=False)``.

        :param path: the directory.
        :param env: the environment, as for the constructor; required.
        :param device: the device of the algorithm.
        :param policy: the class of the policy that was saved, or its name.
        :param kwargs: arguments of the constructor that should differ from the saved ones, and those that can't be
            saved (live objects, schedules other than ``LearningRate``, ``"module:function"`` names).
        :return: the algorithm as it was saved.
        :raises FileNotFoundError: if there is no checkpoint.
        :raises ValueError: without an environment; if an algorithm or a policy of another class was saved; or if an
            argument that can't be saved is missing.
        """
        state = checkpoint.load(path)
        if env is None:
            raise ValueError("Expected env: a checkpoint holds no environment. Pass load(path, env=...).")
        saved, ours = state["algorithm"], class_name(cls)
        if saved != ours:
            raise ValueError(
                f"Expected a checkpoint of {ours}, got one that was written by {saved}: use "
                f"{_short(saved)}.load(path, env=...)."
            )
        given_class = cls.policy_aliases.get(policy, policy) if isinstance(policy, str) else policy
        saved, ours = state["policy_class"], given_class if isinstance(given_class, str) else class_name(given_class)
        if saved != ours:
            raise ValueError(
                f"Expected the policy class that the checkpoint was written with, {saved}, got {ours}: use "
                f"load(path, env=..., policy={_short(saved)})."
            )
        live = state["given_again"]
        given = kwargs.pop("policy_kwargs", None) or {}
        policy_kwargs = arguments_again(
            state["policy_kwargs"], live["policy_kwargs"], given, "policy_kwargs={{'{}': ...}}"
        )
        arguments = arguments_again(state["arguments"], live["arguments"], kwargs, "{}=...")
        if isinstance(arguments.get("learning_rate"), dict):
            arguments["learning_rate"] = LearningRate.from_json(arguments["learning_rate"])
        model = cls(policy, env, device=device, policy_kwargs=policy_kwargs, **arguments)
        model.load_state(state)
        return model

    def state(self) -> dict[str, Any]:
        """The state of the algorithm. In the middle of a rollout, it is the state in which this rollout is lost.

        :return: a tree for :mod:`agents.state.checkpoint`. Its tensors are not copies, so training changes them.
        """
        arguments = kept_arguments(self, set(argument_defaults(type(self))) - NOT_KEPT)
        arguments["stats_window_size"] = self._stats_window_size
        if isinstance(self.learning_rate, LearningRate):
            arguments["learning_rate"] = self.learning_rate.to_json()
        arguments, live = written_down(arguments)
        policy_kwargs, live_policy_kwargs = written_down(self.policy_kwargs)
        if self.reference_was_given:
            live.append("reference")
        optimizer = self.policy.optimizer.state_dict()
        state = {
            "algorithm": class_name(type(self)),
            "policy_class": class_name(self.policy_class),
            "arguments": arguments,
            "policy_kwargs": policy_kwargs,
            "given_again": {"arguments": live, "policy_kwargs": live_policy_kwargs},
            "counters": {name: getattr(self, name) for name in (*COUNTERS, *self.state_attributes)},
            "kl": {"coef": self.kl.coef},
            "latest_episodes": list(self.ep_info_buffer or []),
            "policy": self.policy.state_dict(),
            "optimizer": {
                "state": {str(index): moments for index, moments in optimizer["state"].items()},
                "param_groups": [{k: v for k, v in g.items() if is_plain(v)} for g in optimizer["param_groups"]],
            },
            "generators": generator_states(self._text_env.vector_env.np_random),
        }
        assert self.reference is not None
        if not self.reference.shares_base:  # otherwise its weights are among the policy's
            state["reference"] = self.reference.lm.state_dict()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Set the state of an algorithm of the same class with the same arguments. Nothing is set but the attributes
        that this class lists, whatever the state contains.

        :param state: what :meth:`state` returned, copied or read from a checkpoint.
        :raises ValueError: if its counters are others, or if its environment had another number of rows.
        """
        counters = (*COUNTERS, *self.state_attributes)
        if set(state["counters"]) != set(counters):
            raise ValueError(
                f"Expected the counters {sorted(counters)} of {type(self).__name__}, got {sorted(state['counters'])}: "
                "another version of it has written them. Load them with that version."
            )
        self.policy.load_state_dict(state["policy"])
        self.policy.clear_cache()
        assert self.reference is not None
        if not self.reference.shares_base:
            self.reference.lm.load_state_dict(state["reference"])
        optimizer, saved = self.policy.optimizer, state["optimizer"]
        groups = zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
        optimizer.load_state_dict(
            {
                "state": {int(index): moments for index, moments in saved["state"].items()},
                "param_groups": [{k: before.get(k, v) for k, v in now.items()} for now, before in groups],
            }
        )
        for name in counters:
            setattr(self, name, state["counters"][name])
        self.kl.coef = state["kl"]["coef"]
        self.ep_info_buffer = deque(state["latest_episodes"], maxlen=self._stats_window_size)
        # Otherwise `learn` would reset the environment, and seed its generators again.
        self._last_obs = self._text_env.reset()
        set_generator_states(state["generators"], self._text_env.vector_env.np_random)

    @property
    def _text_env(self) -> TextVecEnv:
        assert isinstance(self.env, TextVecEnv)
        return self.env


def _short(name: str) -> str:
    """The last part of the name of a class."""
    return name.replace(":", ".").rpartition(".")[2]
