"""What a layer's call depends on beside its arguments.

A `LayerState` is a layer as it stood: for every module below it the class, training flag, hooks, every attribute
(scalings, active adapters, dropout, switches of a configuration), parameters and buffers by identity, address and
requires_grad, and the addresses of a quantised parameter's tables. `matches` compares it with the layer at a call:
dictionaries are compared as wholes, numbers by value and all else by identity. `environment` is what torch itself is
set to."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn

from fastft.compat.sharding_private import context_parallel_mesh
from fastft.compat.torch_private import CALL_HOOKS, SHARDED
from fastft.compat.transformers_private import FUNCTION, SWITCH
from fastft.swapping.swap import KEY

# of the layer itself: hooks run outside the captured call, and the switches are the activation policy's
_OUTSIDE = frozenset({n for n in nn.Module().__dict__ if "hook" in n} | {SWITCH, FUNCTION, KEY})
_SWITCHES = (SWITCH, FUNCTION)
_attributes = operator.attrgetter("__dict__")
_COPIED = (dict, list, set)


class _Anything:
    """Equal to whatever it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


_ANYTHING = _Anything()


class _SameTensors:
    """Equal to a table of tensors that holds the same objects under the same names."""

    def __init__(self, table: dict[str, torch.Tensor | None]):
        self.table = dict(table)

    def __eq__(self, other: object) -> bool:
        mine = self.table
        return isinstance(other, dict) and len(other) == len(mine) and all(other.get(n) is t for n, t in mine.items())

    __hash__ = None  # type: ignore[assignment]


def _kept(name: str, value: Any) -> Any:
    """An attribute as it is now: containers are copied, as they may change in place."""
    if name in ("_parameters", "_buffers") and any(t is not None and t.numel() < 2 for t in value.values()):
        return _SameTensors(value)  # (larger ones are told apart by identity, or cannot be compared)
    kind = type(value)
    if kind in _COPIED or (isinstance(value, dict) and kind.__module__ == "collections"):
        return value.copy()
    return value


def _as_it_is(thing: object, but: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The attributes of a module or a configuration, to be compared with what they are later."""
    return {n: _ANYTHING if n in but else _kept(n, v) for n, v in thing.__dict__.items()}


def _tables(p: torch.Tensor) -> Iterator[tuple[dict, str]]:
    """Where the tensors of a quantised parameter's state are kept."""
    states = [s for s in (getattr(p, "quant_state", None),) if s is not None]
    while states:
        attributes = states.pop().__dict__
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor):
                yield attributes, name
            elif hasattr(value, "absmax"):
                states.append(value)


class LayerState:
    """One layer as it stood when this was made. It holds the modules below the layer, and not the layer."""

    def __init__(self, layer: nn.Module):
        self.cls, self.layer = type(layer), _as_it_is(layer, _OUTSIDE)
        self.here: list[Any] = [m for m in layer.modules() if m is not layer]
        configs = {id(c): c for m in layer.modules() if hasattr(c := m.__dict__.get("config"), "__dict__")}
        self.here += configs.values()
        self.classes, self.attributes = list(map(type, self.here)), [_as_it_is(thing) for thing in self.here]
        held = {
            id(t): t for m in layer.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
        }
        self.tensors = list(held.values())
        self.addresses = [t.data_ptr() for t in self.tensors]
        self.learning = [t.requires_grad for t in self.tensors]
        self.tables = [(a, n, a[n], a[n].data_ptr()) for t in held.values() for a, n in _tables(t)]

    def matches(self, layer: nn.Module) -> bool:
        """Is the layer still in the state that was noted?"""
        now = layer.__dict__
        if len(now) != len(self.layer):  # the policy's switches come and go
            was = {n: v for n, v in self.layer.items() if n not in _SWITCHES}
            now = {n: v for n, v in now.items() if n not in _SWITCHES}
        else:
            was = self.layer
        try:
            return (
                type(layer) is self.cls
                and now == was
                and list(map(type, self.here)) == self.classes
                and list(map(_attributes, self.here)) == self.attributes
                and [t.data_ptr() for t in self.tensors] == self.addresses
                and [t.requires_grad for t in self.tensors] == self.learning
                and all(a.get(n) is t and t.data_ptr() == address for a, n, t, address in self.tables)
            )
        except Exception:  # an attribute that cannot be compared with the one that stood there: tensors, arrays
            return False

    def versions(self) -> int:
        """A number that grows when a parameter or buffer is changed in place."""
        return sum([t._version for t in self.tensors])


def obstacle_in(layer: nn.Module, device: torch.device, is_ours: Callable[[Any], bool]) -> str:
    """Why this layer, as it stands, cannot be captured; empty where it can. is_ours: whether a hook on a module inside
    does nothing unless outputs are collected."""
    if context_parallel_mesh() is not None:
        return "rows are split over processes, and their attention waits for others"
    for module in layer.modules():
        if module is not layer:
            if any(not is_ours(h) for table in CALL_HOOKS for h in module.__dict__.get(table, {}).values()):
                return "hooks stand on modules inside a layer"
            if "forward" in module.__dict__:
                return "a forward is bound on an instance inside a layer (parameters are fetched for each call?)"
        if any("FSDP" in c.__name__ for c in type(module).__mro__):
            return "its parameters are sharded"
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is None:
                continue
            if any(hasattr(t, a) for a in SHARDED):
                return "its parameters are sharded"
            if t.device != device:
                return "a layer's tensors and its input are on several devices, or on the host"
        for p in module._parameters.values():
            if p is None or type(p) is nn.Parameter:
                continue
            if p.requires_grad or getattr(p, "quant_state", None) is None:
                return f"a parameter is a {type(p).__name__}"
    return ""


def environment(kind: str) -> Hashable:
    """What torch is set to, where it changes a captured call on a device of this kind."""
    return (
        torch.is_autocast_enabled(kind),
        torch.get_autocast_dtype(kind),
        torch.is_autocast_enabled("cuda"),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    )
