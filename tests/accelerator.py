"""A simulated accelerator: a device of PyTorch's own, whose tensors lie on the CPU and can't be mixed with the CPU's.

It is for tests of what needs no real accelerator to be seen: tensors that were left on the host or brought there, how
often data is copied from one to the other, how often the host waits for the device, and how many kernels it launches.
Numbers are those of the CPU, bit by bit, and random numbers come from the CPU's generator. So what runs on the device
must end exactly as on the CPU.

PyTorch keeps one place for a device that it doesn't know, and lets Python fill it
(``torch.utils.backend_registration``). A tensor of the device is a :class:`DeviceTensor`, which holds a tensor of the
CPU; each operator of it ends in :func:`_run`, below autograd, where the operators of a GPU would launch their kernels.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simulated"
DEVICE = torch.device("privateuseone", 0)  # called "simulated" once it is registered

aten = torch.ops.aten

# The host must know a number, or a size that follows from numbers, before it can go on.
WAITS = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "unique_consecutive"}
)


@dataclass
class Counts:
    """What happened on the device.

    :param to_device: copies from the host to the device.
    :param to_host: copies from the device to the host, for each of which the host waits.
    :param waits: other times at which the host waited: for a number, or for the size of what a mask selects.
    :param kernels: the operators that launch a kernel, by name.
    :param places: the lines of the packages that asked for copies and waits, by what they asked for.
    """

    to_device: int = 0
    to_host: int = 0
    waits: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)

    @property
    def synchronizations(self) -> int:
        """The number of times at which the host waited for the device."""
        return self.to_host + self.waits

    def note(self, what: str) -> None:
        """
        :param what: ``"to_device"``, ``"to_host"`` or ``"waits"``.
        """
        setattr(self, what, getattr(self, what) + 1)
        self.places[f"{what} {_place()}"] += 1


_listeners: list[Counts] = []


@contextmanager
def counted() -> Iterator[Counts]:
    """Within it, what happens on the device is counted. Within one another, all of them count."""
    counts = Counts()
    _listeners.append(counts)
    try:
        yield counts
    finally:
        _listeners.remove(counts)


def _note(what: str) -> None:
    for counts in _listeners:
        counts.note(what)


def _place() -> str:
    """The innermost line of this repository, and the innermost one at all."""
    root, frame = str(Path(__file__).parents[1]), sys._getframe(1)
    innermost = ""
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if path != __file__ and "/torch/" not in path and not path.endswith("transfers.py"):
            innermost = innermost or f"{Path(path).name}:{frame.f_lineno} {frame.f_code.co_name}"
            if path.startswith(root) and "site-packages" not in path:
                return f"{Path(path).name}:{frame.f_lineno} {frame.f_code.co_name} < {innermost}"
        frame = frame.f_back
    return innermost


class DeviceTensor(torch.Tensor):
    """A tensor on the device.

    :param host: its contents.
    """

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=DEVICE,
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.host})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            _launch(aten.clone.default)
            copy = DeviceTensor(self.host.clone())
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copy, self.requires_grad) if is_parameter else copy
        copied: torch.Tensor = memo[id(self)]
        return copied

    # What a tensor of another device than the CPU does, and PyTorch refuses to do for a subclass.

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the contents of its arguments."""
    name = function.overloadpacket.__name__
    if name in ("copy_", "_copy_from", "_to_copy"):
        return _copy(function, name, args, kwargs)
    if name in ATTENTION:
        _launch(function)
        return tree_map_only(torch.Tensor, DeviceTensor, ATTENTION[name](*_host((args, kwargs))))
    _check(name, args, kwargs)
    if name in WAITS or (name in ("index", "index_put_", "index_put") and _has_mask(args[1])):
        _note("waits")
    if _launches(function):
        _launch(function)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": "cpu"}
    given = {id(tensor.host): tensor for tensor in tree_flatten((args, kwargs))[0] if isinstance(tensor, DeviceTensor)}
    host_args, host_kwargs = _host((args, kwargs))

    def on_device(host: torch.Tensor) -> torch.Tensor:
        """What an operator has changed in place is the same tensor afterwards."""
        return given[id(host)] if id(host) in given else DeviceTensor(host)

    return tree_map_only(torch.Tensor, on_device, function(*host_args, **host_kwargs))


def _host(tree: Any) -> Any:
    return tree_map_only(DeviceTensor, lambda tensor: tensor.host, tree)


def _launch(function: Any) -> None:
    for counts in _listeners:
        counts.kernels[str(function).removeprefix("aten.")] += 1


def _copy(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    if name == "_to_copy":
        source = args[0]
        device = source.device if kwargs.get("device") is None else torch.device(kwargs["device"])
        own = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking")}
        target = function(_host(source), **own)
        target = DeviceTensor(target) if device.type == NAME else target
    else:
        target, source = args[:2] if name == "copy_" else args[1::-1]
        _host(target).copy_(_host(source))
    ends = isinstance(source, DeviceTensor), isinstance(target, DeviceTensor)
    if all(ends):
        _launch(function)
    elif source.numel() == 0:
        pass
    elif source.dim() or ends[0] or name != "copy_":  # a number of the host travels with the kernel that writes it
        _note("to_host" if ends[0] else "to_device")
    return target


def _check(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """As on CUDA: only numbers may lie on the host, and what tensors are indexed with, which is then copied."""
    for number, arg in enumerate(args):
        for tensor in tree_flatten(arg)[0]:
            if not isinstance(tensor, torch.Tensor) or isinstance(tensor, DeviceTensor) or tensor.dim() == 0:
                continue
            if name in ("index", "index_put_", "index_put") and number == 1 and isinstance(args[0], DeviceTensor):
                _note("to_device")
                continue
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} was given one on {DEVICE} and one on cpu."
            )
    kinds = {type(value) for value in tree_flatten(kwargs)[0] if isinstance(value, torch.Tensor) and value.dim()}
    if kinds - {DeviceTensor, nn.Parameter}:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} was given one on cpu.")


@functools.cache
def _launches(function: Any) -> bool:
    """Whether an operator computes, and doesn't just give another view of its argument or some memory."""
    views = any(result.alias_info and not result.alias_info.is_write for result in function._schema.returns)
    return not (views or "empty" in function.__name__ or "_unsafe_view" in function.__name__)


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


# The CPU's fused attention under the names of the one that a device may bring along.


def _scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """PyTorch would choose the slow attention for a device that it doesn't know."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out: torch.Tensor = aten._scaled_dot_product_fused_attention_overrideable(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale
    )[0]
    return out


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    query, key, value, *rest = args
    bias, dropout, is_causal, _ = (*rest, *(None, 0.0, False, False)[len(rest) :])
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, is_causal, attn_mask=bias, scale=kwargs.get("scale")
    )
    nothing = torch.empty(0)
    return out, logsumexp, nothing, nothing, query.shape[2], key.shape[2], nothing, nothing, nothing


def _attention_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    grad_out, query, key, value, bias, _, out, logsumexp, *_ = args
    dropout, is_causal = args[12:14]
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, logsumexp, dropout, is_causal, attn_mask=bias, scale=kwargs.get("scale")
    )
    return *grads, None


ATTENTION: dict[str, Callable[..., tuple[Any, ...]]] = {
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
}


_available = False


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return _available

    def has_primary_context(self, _device: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


class _Module:
    """What is found as ``torch.simulated``. Random numbers are those of the CPU's generator."""

    def is_available(self) -> bool:
        return _available

    def device_count(self) -> int:
        return int(_available)

    def current_device(self) -> int:
        return 0

    def is_initialized(self) -> bool:
        return True

    def manual_seed_all(self, seed: int) -> None:
        """Nothing to do: there is no generator besides the CPU's."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_GUARD = _Guard()


def announce() -> None:
    """Let autograd know that there may be a device. It counts the devices at the first backward pass of the process,
    and never again.
    """
    torch._C._acc.register_python_privateuseone_device_guard(_GUARD)


@functools.cache
def _register() -> torch.library.Library:
    """Tell PyTorch of the device, once a process.

    :return: the operators that make tensors of it, which last as long as this object.
    """
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hooks(), device_guard=_GUARD)
    _foreach_supported_types.append(DeviceTensor)
    library = torch.library.Library("aten", "IMPL")
    for full_name in torch._C._dispatch_get_all_op_names():
        if full_name.startswith("aten::") and (made := _factory(full_name.removeprefix("aten::"))):
            library.impl(full_name.removeprefix("aten::"), made, "PrivateUse1")
    # `torch.tensor(..., device=)` comes here directly.
    library.impl("_copy_from", lambda *args, **kwargs: _run(aten._copy_from.default, args, kwargs), "PrivateUse1")
    library.impl("scaled_dot_product_attention", _scaled_dot_product_attention, "AutogradPrivateUse1")
    return library


def _factory(full_name: str) -> Callable[..., Any] | None:
    """An operator that makes a tensor of none; None: this one does something else."""
    name, _, overload = full_name.partition(".")
    try:
        operator = getattr(getattr(aten, name), overload or "default")
    except (AttributeError, RuntimeError):
        return None
    arguments, returns = operator._schema.arguments, operator._schema.returns
    types = [str(argument.type) for argument in arguments]
    makes_one = len(returns) == 1 and "Tensor" in str(returns[0].type) and not any("Tensor" in kind for kind in types)
    if not makes_one or not any(argument.name == "device" for argument in arguments):
        return None
    return lambda *args, **kwargs: _run(operator, args, {**kwargs, "device": DEVICE})


@contextmanager
def simulated_accelerator() -> Iterator[torch.device]:
    """Within it the device is there, and modules can be moved to it and back as to a GPU: their parameters stay the
    same objects. Outside of it PyTorch says that there is no accelerator.

    :return: the device.
    """
    global _available
    _register()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    _available = True
    try:
        yield DEVICE
    finally:
        _available = False
        torch.__future__.set_swap_module_params_on_conversion(before)
