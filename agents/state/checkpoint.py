"""Save and resume between two iterations: safetensors and JSON, nothing that runs code on load.

No episode is running between two iterations, so weights, optimiser, counters and the state of every random generator
are all there is; a resumed run goes on as the run that was never stopped.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from agents.state.arguments import argument_defaults

if TYPE_CHECKING:
    from agents.algorithms.on_policy import OnPolicyAlgorithm

COUNTERS = ("num_timesteps", "_total_timesteps", "_n_updates", "_current_progress_remaining")


def save(model: OnPolicyAlgorithm, path: str | Path) -> None:
    """
    :param model: the algorithm, between two iterations (elsewhere the running rollout is lost).
    :param path: directory; replaced as a whole, so that a kill at any moment leaves the old one or the new one.
    """
    directory = _directory(path)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model.policy, str(partial / "policy.safetensors"))
    assert model.reference is not None
    if not model.reference.shares_base:
        save_model(model.reference.lm, str(partial / "reference.safetensors"))
    optimizer = model.policy.optimizer.state_dict()
    tensors = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, state in optimizer["state"].items()
        for name, value in state.items()
    }
    generators = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, partial / "optimizer.safetensors")
    save_file(generators, partial / "generators.safetensors")
    state = {
        "algorithm": f"{type(model).__module__}:{type(model).__qualname__}",
        "arguments": _plain_arguments(model),
        "policy_kwargs": {name: _written(value) for name, value in model.policy_kwargs.items()},
        "param_groups": [{k: v for k, v in g.items() if _is_plain(v)} for g in optimizer["param_groups"]],
        "counters": {name: getattr(model, name) for name in (*COUNTERS, *model.state_attributes)},
        "kl_coef_now": model.kl.coef,
        "latest_episodes": list(model.ep_info_buffer or []),
        "generators": {
            "python": random.getstate(),
            "numpy": _numpy_state(),
            "env": [generator.bit_generator.state for generator in model.vector_env.np_random],
        },
    }
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    # A directory cannot be replaced in one go; while neither is in its place, `load` takes the previous one.
    if directory.exists():
        shutil.rmtree(_previous(directory), ignore_errors=True)
        os.replace(directory, _previous(directory))
    os.replace(partial, directory)
    shutil.rmtree(_previous(directory), ignore_errors=True)


def load(cls: type[OnPolicyAlgorithm], path: str | Path, env: Any, device: Any = "auto", **kwargs: Any) -> Any:
    """
    :param cls: the algorithm's class.
    :param path: directory that :func:`save` wrote.
    :param env: as for the constructor.
    :param device: where to.
    :param kwargs: arguments that should differ, and those
        that cannot be written down (live models, schedules).
    :return: the algorithm; ``learn(..., reset_num_timesteps=False)`` goes on.
    :raises FileNotFoundError: if there is no checkpoint.
    :raises ValueError: without an environment, or if a live
        object of the saved run isn't given again.
    """
    directory = _directory(path)
    if not directory.exists() and _previous(directory).exists():
        directory = _previous(directory)
    if not (directory / "state.json").exists():
        raise FileNotFoundError(f"Expected a checkpoint directory with state.json, found none at {directory}.")
    if env is None:
        raise ValueError("Expected env: a checkpoint holds no environment. Pass load(path, env=...).")
    state = json.loads((directory / "state.json").read_text())
    arguments = {**state["arguments"], **kwargs}
    arguments["policy_kwargs"] = {**state["policy_kwargs"], **(kwargs.get("policy_kwargs") or {})}
    for given, example in ((arguments, "{}=..."), (arguments["policy_kwargs"], "policy_kwargs={{'{}': ...}}")):
        if missing := [name for name, value in given.items() if isinstance(value, str) and value == _NOT_PLAIN]:
            raise ValueError(
                f"{missing} can't be written down and must be given again: load(path, env, "
                f"{example.format(missing[0])})."
            )
    model = cls("CausalLMPolicy", env, device=device, **arguments)
    load_model(model.policy, str(directory / "policy.safetensors"))
    model.policy.clear_cache()
    if (directory / "reference.safetensors").exists():
        assert model.reference is not None
        load_model(model.reference.lm, str(directory / "reference.safetensors"))
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(directory / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        states.setdefault(int(index), {})[name] = tensor
    groups = model.policy.optimizer.state_dict()["param_groups"]
    merged = [{**group, **saved} for group, saved in zip(groups, state["param_groups"], strict=True)]
    model.policy.optimizer.load_state_dict({"state": states, "param_groups": merged})
    for name, value in state["counters"].items():
        setattr(model, name, value)
    model.kl.coef = state["kl_coef_now"]
    model.ep_info_buffer = deque(state["latest_episodes"], maxlen=model._stats_window_size)
    # Otherwise `learn` would do it, and seed the environment's generators anew.
    model._last_obs = model.env.reset()  # type: ignore[assignment,union-attr]
    generators = load_file(directory / "generators.safetensors")
    torch.set_rng_state(generators["torch"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    version, internal, gauss = state["generators"]["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["generators"]["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    for generator, saved in zip(model.vector_env.np_random, state["generators"]["env"], strict=True):
        generator.bit_generator.state = saved
    return model


_NOT_PLAIN = "<not written down>"


def _directory(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix == ".zip" else path


def _previous(directory: Path) -> Path:
    return directory.with_name(directory.name + ".previous")


def _plain_arguments(model: OnPolicyAlgorithm) -> dict[str, Any]:
    """The constructor's arguments, which the algorithms keep as attributes of the same names."""
    skipped = {"policy", "env", "policy_kwargs", "device", "reference", "stats_window_size"}
    names = sorted(set(argument_defaults(type(model))) - skipped)
    if lost := [name for name in names if not hasattr(model, name)]:
        raise ValueError(
            f"Expected {type(model).__name__} to keep its arguments {lost} as attributes of the same names, which is "
            "what a checkpoint writes down."
        )
    arguments = {name: _written(getattr(model, name)) for name in names}
    arguments["stats_window_size"] = model._stats_window_size
    if model.reference_was_given:
        arguments["reference"] = _NOT_PLAIN
    return arguments


def _numpy_state() -> list[Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return [name, np.asarray(keys).tolist(), *rest]


def _written(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return value if _is_plain(value) else _NOT_PLAIN


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
