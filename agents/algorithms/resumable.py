"""Saving and loading the state of an algorithm between two iterations.

No episode is unfinished between two iterations, so the state consists of weights, optimiser, counters and the states of
all random generators. A resumed run continues exactly as if it had not been stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from stable_baselines3.common.base_class import BaseAlgorithm

from agents.algorithms.engine import Engine
from agents.algorithms.environments import check_facts, environment_facts, spaces_of
from agents.algorithms.found import check_found
from agents.algorithms.ranges import SCHEDULES
from agents.models.adapter import REFERENCE
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

# The attributes of every algorithm that change while training: SB3's, the loop's own number of iterations,
# and how many updates were undone.
COUNTERS = (
    *("num_timesteps", "_total_timesteps", "_n_updates", "_current_progress_remaining"),
    *("_iterations", "bad_updates", "bad_updates_in_a_row"),
)
# Arguments that are no data, or that the state holds in another form.
NOT_KEPT = frozenset({"policy", "env", "policy_kwargs", "device", "reference", "stats_window_size"})


class Resumable(BaseAlgorithm):
    """An algorithm that can be saved and loaded.

    It must keep the arguments of its constructor as attributes of the same names. ``state_attributes`` names the
    numbers that change while training, besides those of every algorithm.
    """

    policy: CausalLMPolicy
    reference: Reference | None
    reference_was_given: bool
    kl: KLController
    engine: Engine

    state_attributes: ClassVar[tuple[str, ...]] = ()
    # Arguments of the constructor whose attribute changes while training: given to load, they set it.
    given_anew: ClassVar[Mapping[str, str]] = {"kl_coef": "kl_coef"}

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """Write :meth:`state` to a directory of safetensors and JSON files, none of which holds code. Of several
        processes all must call this, and the first writes.

        :param path: the directory; an ending ``.zip``, which SB3's callbacks add, is dropped. It is replaced as a
            whole, so that a process that is killed at any moment leaves either the old one or the new one.
        :param exclude: not used; part of SB3's signature.
        :param include: not used; part of SB3's signature.
        :raises FloatingPointError: if a weight, or another number of the state, is NaN or infinite.
        :raises FileExistsError: if there is something else than a checkpoint at the path, which is left as it is.
        :raises OSError: if the files can't be written; the checkpoint that was there is as it was.
        """
        state = self.state()
        if self.engine.rank == 0:
            checkpoint.save(path, state, finite=True)

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
        :param env: the environment, as for the constructor, with the settings that it had; None: what is loaded can
            only ``predict``.
        :param device: the device of the algorithm.
        :param policy: the class of the policy that was saved, or its name.
        :param kwargs: arguments of the constructor that should differ from the saved ones, and those that can't be
            saved (live objects, schedules other than ``LearningRate``, ``"module:function"`` names, addresses of
            servers).
        :return: the algorithm as it was saved.
        :raises FileNotFoundError: if there is no checkpoint.
        :raises CheckpointError: if its files are not as they were written. It is a ValueError.
        :raises ValueError: if there is something else at the path; if an algorithm or a policy of another class was
            saved; if an argument that can't be saved is missing; or if the environment is another.
        """
        check_found(path, cls.__name__)
        state = checkpoint.load(path)
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
        if env is None:
            return cls._without_environment(state, policy, policy_kwargs, device)
        arguments = arguments_again(state["arguments"], live["arguments"], kwargs, "{}=...")
        for name in SCHEDULES:
            if isinstance(arguments.get(name), dict):
                arguments[name] = LearningRate.from_json(arguments[name])
        model = cls(policy, env, device=device, policy_kwargs=policy_kwargs, **arguments)
        if "reference" in kwargs:  # one that is given keeps its own weights
            state = {name: value for name, value in state.items() if name != "reference"}
        model.load_state(state)
        # What is given counts, and not what the state says of the same.
        for argument, attribute in cls.given_anew.items():
            if argument in kwargs:
                setattr(model, attribute, kwargs[argument])
        if kwargs.get("seed") is not None:
            model.set_random_seed(kwargs["seed"])
            model._last_obs = model._text_env.reset()  # which seeds the environment, and draws its next prompts
        for group in model.policy.optimizer.param_groups:
            group.update({k: v for k, v in (given.get("optimizer_kwargs") or {}).items() if k in group})
        return model

    @classmethod
    def _without_environment(
        cls, state: dict[str, Any], policy: Any, policy_kwargs: dict[str, Any], device: Any
    ) -> Self:
        """An algorithm that holds the policy of a checkpoint, and nothing to train it in."""
        facts = state["environment"]
        if facts["constraint"] is not None and "constraint" not in policy_kwargs:
            raise ValueError(
                f"Expected the constraint {facts['constraint']}, under which the policy was trained and which no "
                "checkpoint holds: give env=..., or policy_kwargs={'constraint': ...}."
            )
        model = cls.__new__(cls)
        BaseAlgorithm.__init__(
            model, policy, None, 0.0, policy_kwargs=policy_kwargs, device=device, support_multi_env=True
        )
        model.observation_space, model.action_space = spaces_of(facts)
        model._setup_lr_schedule()
        known = {"eos_token_id": facts["eos_token_ids"], "min_new_tokens": facts["min_new_tokens"]}
        model.policy = model.policy_class(  # type: ignore[assignment]
            model.observation_space, model.action_space, model.lr_schedule, **{**known, **policy_kwargs}
        )
        _load_weights(model.policy, state["policy"])
        model.policy.to(model.device)
        for name in COUNTERS:
            setattr(model, name, state["counters"][name])
        return model

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """As SB3's, for an environment of the same settings.

        :param env: the SB3 environment that ``make_vec_env`` returns.
        :param force_reset: as SB3's.
        :raises ValueError: if this was loaded without an environment, or its settings are others.
        """
        before = self._text_env
        if isinstance(env, TextVecEnv):
            check_facts(environment_facts(before.vector_env), env.vector_env)
        super().set_env(env, force_reset)

    def state(self) -> dict[str, Any]:
        """The state of the algorithm. In the middle of a rollout, it is the state in which this rollout is lost. Of
        several processes all must call this at the same time, since it holds the generators of each.

        :return: a tree for :mod:`agents.state.checkpoint`. Its tensors are not copies, so training changes them.
        """
        facts = environment_facts(self._text_env.vector_env)
        generators, *others = self.engine.gather(generator_states(self._text_env.vector_env.np_random))
        arguments = kept_arguments(self, set(argument_defaults(type(self))) - NOT_KEPT)
        arguments["stats_window_size"] = self._stats_window_size
        for name in SCHEDULES:
            if isinstance(arguments.get(name), LearningRate):
                arguments[name] = arguments[name].to_json()
        arguments, live = written_down(arguments)
        policy_kwargs, live_policy_kwargs = written_down(self.policy_kwargs)
        if self.reference_was_given:
            live.append("reference")
        optimizer = self.engine.optimizer_state()
        state = {
            "algorithm": class_name(type(self)),
            "policy_class": class_name(self.policy_class),
            "arguments": arguments,
            "policy_kwargs": policy_kwargs,
            "given_again": {"arguments": live, "policy_kwargs": live_policy_kwargs},
            "environment": facts,
            "counters": {name: getattr(self, name) for name in (*COUNTERS, *self.state_attributes)},
            "kl": {"coef": self.kl.coef},
            "latest_episodes": list(self.ep_info_buffer or []),
            "policy": self.policy.state_dict(),
            "optimizer": {
                "state": {str(index): moments for index, moments in optimizer["state"].items()},
                "param_groups": [{k: v for k, v in g.items() if is_plain(v)} for g in optimizer["param_groups"]],
            },
            "generators": generators,
        }
        if others:
            state["other_generators"] = {str(rank): states for rank, states in enumerate(others, 1)}
        assert self.reference is not None
        if not self.reference.shares_base:  # otherwise its weights are among the policy's
            state["reference"] = self.reference.lm.state_dict()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Set the state of an algorithm of the same class with the same arguments. Nothing is set but the attributes
        that this class lists, whatever the state contains. Where the number of processes is another than it was,
        processes that are new keep the random generators that they have.

        :param state: what :meth:`state` returned, copied or read from a checkpoint.
        :raises ValueError: if its counters are others, or if its environment had other settings or another number of
            rows.
        """
        counters = (*COUNTERS, *self.state_attributes)
        if set(state["counters"]) != set(counters):
            raise ValueError(
                f"Expected the counters {sorted(counters)} of {type(self).__name__}, got {sorted(state['counters'])}: "
                "another version of it has written them. Load them with that version."
            )
        check_facts(state["environment"], self._text_env.vector_env)
        _load_weights(self.policy, state["policy"])
        self.policy.clear_cache()
        assert self.reference is not None
        if "reference" in state and not self.reference.shares_base:
            self.reference.lm.load_state_dict(state["reference"])
        saved = state["optimizer"]
        groups = zip(self.policy.optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
        self.engine.load_optimizer_state(
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
        generators = {"0": state["generators"], **state.get("other_generators", {})}
        if (own := generators.get(str(self.engine.rank))) is not None:  # more processes than before have new ones
            set_generator_states(own, self._text_env.vector_env.np_random)

    @property
    def _text_env(self) -> TextVecEnv:
        if self.env is None:
            raise ValueError(
                f"Expected an environment, but this {type(self).__name__} was loaded without one, which is enough for "
                "predict alone: use load(path, env=...)."
            )
        assert isinstance(self.env, TextVecEnv)
        return self.env


def _load_weights(policy: CausalLMPolicy, weights: Mapping[str, Any]) -> None:
    """
    :param policy: the policy, whose weights are set.
    :param weights: those of a checkpoint. A policy that is no reference's base has no use for the frozen copy of its
        adapter that was saved with it.
    """
    own = policy.state_dict().keys()
    policy.load_state_dict({n: w for n, w in weights.items() if n in own or f".{REFERENCE}." not in n})


def _short(name: str) -> str:
    """The last part of the name of a class."""
    return name.replace(":", ".").rpartition(".")[2]
