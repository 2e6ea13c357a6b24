"""What a proof depends on, as a hashable key: a module's class, its scalar attributes, its parameters' shapes and
dtypes, its children.

Values of parameters do not enter (proofs draw their own). An attribute that is no scalar, and no partial function of
scalars, enters by identity and is kept alive by the key, so that two modules share a proof only when they share that
object."""

from __future__ import annotations

import functools
from collections.abc import Hashable

import torch
from torch import nn

from fastft.compat.accelerate_private import LEFT_BY_HOOKS
from fastft.compat.sharding_private import LEFT_BY_DEEPSPEED
from fastft.swapping.swap import KEY, stock_class

_MODULE_INTERNALS = frozenset(nn.Module().__dict__) | {KEY, *LEFT_BY_HOOKS, *LEFT_BY_DEEPSPEED, "forward"}
_SCALARS = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device)


class IdentityKey:
    """Hashable by identity, keeps its object alive."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other) -> bool:
        return isinstance(other, IdentityKey) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _value(v: object) -> Hashable:
    if isinstance(v, _SCALARS):
        return v
    if isinstance(v, (tuple, list)):
        return tuple(map(_value, v))
    if type(v) is functools.partial:
        return IdentityKey(v.func), tuple(map(_value, v.args)), tuple((k, _value(a)) for k, a in v.keywords.items())
    return IdentityKey(v)


def attributes(module: nn.Module, ignore: frozenset[str] = frozenset()) -> tuple[tuple[str, Hashable], ...]:
    """(name, value) of a module's own scalar attributes, but for those in `ignore`."""
    return tuple(
        sorted(
            ((k, _value(v)) for k, v in module.__dict__.items() if k not in _MODULE_INTERNALS and k not in ignore),
            key=lambda kv: kv[0],
        )
    )


def fingerprint(module: nn.Module, ignore: frozenset[str] = frozenset({"layer_idx"})) -> Hashable:
    """ignore: attributes that cannot matter to the proof (a layer's number)."""
    tensors = tuple(
        (n, tuple(t.shape), t.dtype, t.device.type)
        for n, t in sorted([*module._parameters.items(), *module._buffers.items()])
        if t is not None
    )
    children = tuple((n, fingerprint(c, ignore)) for n, c in module._modules.items() if c is not None)
    return (stock_class(module), attributes(module, ignore), tensors, children)
