"""A copy of a module to run proofs on: its own parameters, buffers and children; everything else (configurations,
tables, functions) is shared with the original, which is faster than a deepcopy and leaves no trace on the classes of
what is not copied.

A forward that is bound on the instance is bound to the copy in it. One that wraps another (TRL's fused head,
Accelerate's autocast) holds the original in its closure, where the copy would run the original's weights: there the
copy goes by its class."""

from __future__ import annotations

import copy
import types
from typing import Any

from torch import nn

from fastft.swapping.swap import KEY, new_instance


def clone(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """The copy; tied parameters and shared children stay tied and shared in it."""
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    new = memo[id(module)] = new_instance(module)
    new.__dict__.update({k: v for k, v in module.__dict__.items() if k != KEY})
    forward = module.__dict__.get("forward")
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        del new.__dict__["forward"]
        if not hasattr(forward.__func__, "__wrapped__"):
            new.__dict__["forward"] = types.MethodType(forward.__func__, new)
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            new.__dict__[name] = value.copy()
    new.__dict__["_parameters"] = {
        n: None if p is None else copy.deepcopy(p, memo) for n, p in module._parameters.items()
    }
    new.__dict__["_buffers"] = {n: None if b is None else copy.deepcopy(b, memo) for n, b in module._buffers.items()}
    new.__dict__["_modules"] = {n: None if c is None else clone(c, memo) for n, c in module._modules.items()}
    return new
