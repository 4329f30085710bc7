"""The engine of several processes that share the weights as well as the episodes: PyTorch's FSDP2 (``fully_shard``).

During an update every process keeps a part of each weight, of its gradient and of the optimiser's state. A layer is put
together when it is computed, in all processes at once; its gradient is added up and cut up as soon as it is there.

Between updates every process has all weights in one piece, in the policy of the training, which knows nothing of this:
it writes texts from its memo, is evaluated and is saved, as in a single process, and waits for nobody. FSDP works on a
copy of that policy, since it makes every forward pass of a module a meeting of all processes. For a token of each text
all weights would have to be sent around (``benchmarks/scale_out`` measures it). Of the two policies one has weights
and the other has none but this process's part: :meth:`FSDPEngine.shard` and :meth:`FSDPEngine.unshard` hand them over.
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from agents.algorithms.accelerate_engine import AccelerateEngine, reduced_in, together
from agents.algorithms.engine import Engine
from agents.algorithms.gradient import is_out_of_memory
from agents.algorithms.snapshot import local
from agents.policies.causal_lm_policy import CausalLMPolicy

# Optimisers that treat every number of a weight by itself, so that a part of a weight is as good as all of it.
ELEMENTWISE = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")


class FSDPEngine(AccelerateEngine):
    """One of several processes, each of which has a part of every weight during an update.

    :param policy: the policy that is trained, with its optimiser, which has not made a step yet. From here on its
        optimiser changes the parts of the weights.
    :raises ValueError: if the processes have policies of different shapes, or if something is asked for that can't be
        had with parts of weights.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:
        settings = settings_of_launch()
        _check(policy)
        super().__init__(policy)
        self._buckets = {}  # gradients are reduced layer by layer
        self._whole = dict(policy.named_parameters())
        self._policy = policy
        self.policy = _cut_up(policy, self._n, settings)
        self._parts: dict[str, DTensor] = dict(self.policy.named_parameters())  # type: ignore[arg-type]
        names = {id(parameter): name for name, parameter in self._whole.items()}
        for group in policy.optimizer.param_groups:
            group["params"] = [self._parts[names[id(parameter)]] for parameter in group["params"]]
        # With an adapter the reference is the same model, whose head an exact KL divergence needs during an update.
        head = policy.lm.model.get_output_embeddings()
        self._kept = set() if policy.lm.adapter is None else set(head.parameters())
        # From the start where they will be after every update: matrix products round as their memory is aligned.
        self.unshard()

    @classmethod
    def seed(cls, seed: int | None) -> int | None:
        # Every process loads the weights. transformers would leave those of the others empty, for Accelerate to fill.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        return super().seed(seed)

    # ---- where the weights are ------------------------------------------------------------------------------------

    @torch.no_grad()
    def shard(self) -> None:
        self._policy.clear_cache()
        for name, part in self._parts.items():
            whole = self._whole[name]
            local(part).copy_(_own(whole, part))  # somebody may have loaded others
            if whole not in self._kept:
                # Of the same shape, without memory, and of no use to anybody who asks or saves this policy now.
                whole.data = whole.new_full((), torch.nan).expand(whole.shape)

    @torch.no_grad()
    def unshard(self) -> None:
        with together():
            for name, part in self._parts.items():
                self._whole[name].data = cast(DTensor, part.detach()).full_tensor()

    @torch.no_grad()
    def optimizer_state(self) -> dict[str, Any]:
        state = super().optimizer_state()
        gathered: dict[int, dict[str, Any]] = {}
        with together():
            for index, moments in state["state"].items():
                # One after the other, so that no device holds more than one of them in one piece.
                whole = {name: _on_host(x) for name, x in moments.items()}
                if self.rank == 0:
                    gathered[index] = whole
        return {**state, "state": gathered}

    @torch.no_grad()
    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        parts = self._trained()
        cut = {
            index: {name: _like(parts[index], x) for name, x in moments.items()}
            for index, moments in state["state"].items()
        }
        super().load_optimizer_state({**state, "state": cut})

    # ---- the gradient ---------------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        with together(surely=False):
            Engine.backward(self, loss, last)  # which FSDP reduces

    def give_up(self, error: BaseException) -> None:
        """The others are computing the same layers and can't be told, so the training ends."""
        if not is_out_of_memory(error):
            raise error
        raise MemoryError(
            f"An update ran out of memory: {error} With weights that are cut up all processes compute a part of a "
            "minibatch together, so it can't be begun anew in smaller ones. Go on from the last checkpoint with a "
            "smaller micro_batch_tokens."
        ) from error

    def norm(self) -> torch.Tensor:
        measured = super().norm()
        if isinstance(measured, DTensor):
            with together():
                measured = measured.full_tensor()
        self._measured = measured
        return measured


class _Root(nn.Module):
    """What FSDP knows of a policy: its parts, and one way to call any of its methods.

    :param policy: the policy.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:
        super().__init__()
        self.lm, self.critic, self.value_head = policy.lm, policy.critic, policy.value_head

    def forward(self, call: Callable[[], Any]) -> Any:
        """
        :param call: a method of the policy, with its arguments.
        :return: what it returns.
        """
        return call()


def settings_of_launch() -> FullyShardedDataParallelPlugin:
    """
    :return: what ``accelerate launch`` has been told of FSDP, in Accelerate's own form.
    :raises ValueError: if that is something else than FSDP2, or asks for what is not supported.
    """
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(
            "Expected FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`, or FSDP_VERSION=2), got version "
            f"{version}."
        )
    settings = FullyShardedDataParallelPlugin()
    for name, asked_for, instead in (
        ("offload_params", isinstance(settings.cpu_offload, CPUOffloadPolicy), "more processes"),
        ("activation_checkpointing", settings.activation_checkpointing, "--gradient-checkpointing of the training"),
        ("min_num_params", settings.min_num_params, "the layers of the model, which are the default"),
        ("ignored_modules", settings.ignored_modules, "all modules"),
    ):
        if asked_for:
            raise ValueError(f"Expected FSDP without fsdp_{name}, which is not supported here: take {instead}.")
    return settings


def _check(policy: CausalLMPolicy) -> None:
    if policy.lm.compile_forward:
        raise ValueError(
            "Expected compile_forward=False with FSDP, got True: a compiled forward pass doesn't put weights together."
        )
    kind = type(policy.optimizer)
    if not (kind.__module__.startswith("torch.optim.") and kind.__name__ in ELEMENTWISE):
        raise ValueError(
            f"Expected one of PyTorch's optimisers {', '.join(ELEMENTWISE)} with FSDP, got {kind.__qualname__}, which "
            "may need a weight in one piece."
        )


def _cut_up(policy: CausalLMPolicy, n: int, settings: FullyShardedDataParallelPlugin) -> CausalLMPolicy:
    """A copy of a policy, with the same optimiser, of whose weights each of ``n`` processes has a part."""
    shared = (policy.optimizer, policy.lm.distribution, policy.constructor_arguments, policy.tokenizer)
    policy = copy.deepcopy(policy, {id(one): one for one in shared})
    mesh = init_device_mesh(policy.lm.device.type, (n,))
    precision = MixedPrecisionPolicy(reduce_dtype=reduced_in(policy.lm.model.dtype))
    layers = set(settings.transformer_cls_names_to_wrap or policy.lm.model._no_split_modules or ())
    # What is inside comes first. The value head has a dtype of its own.
    inner = [part for part in reversed([*policy.modules()]) if type(part).__name__ in layers]
    root = _Root(policy)
    for part in (*inner, policy.value_head, root):
        # What is outside of the layers is needed again at once, when the backward pass begins.
        again = settings.reshard_after_forward and part is not root
        whole: FSDPModule = fully_shard(part, mesh=mesh, reshard_after_forward=again, mp_policy=precision)
        whole.set_gradient_divide_factor(1.0)  # the gradients are added up
        whole.set_force_sum_reduction_for_comms(True)
    # FSDP warns of results that are views, since changing them in place would go wrong. Nobody does that to a policy's.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDP_Root\) returned a view tensor", UserWarning)
    for name in ("evaluate", "evaluate_critic"):
        setattr(policy, name, functools.partial(_called, root, getattr(policy, name)))
    return policy


def _called(root: _Root, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with together(surely=False):
        return root(functools.partial(method, *args, **kwargs))


def _own(whole: torch.Tensor, part: DTensor) -> torch.Tensor:
    """This process's part of a tensor, as FSDP cuts: along the first dimension, the last ones may get less or none."""
    chunks = whole.chunk(part.device_mesh.size())
    rank = part.device_mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else whole[:0]


def _on_host(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _like(part: DTensor, value: Any) -> Any:
    """A moment, cut up like its weight. What is no such moment, such as a number of steps, is the same for all."""
    if not isinstance(value, torch.Tensor) or value.shape != part.shape:
        return value
    own = _own(value, part).to(part.device, copy=True)
    return DTensor.from_local(own, part.device_mesh, part.placements, shape=part.shape, stride=part.stride())
