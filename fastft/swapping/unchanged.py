"""What was read off a module at the patch, compared at the call.

A recogniser reads a module's attributes, and those of children that its swap does not call (an activation, a dropout).
Whatever of that is another by now, the swap was not proven for, and stock answers. Compared are class, class's forward,
and every attribute that stood on
the instance: numbers by value, the rest by identity.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fastft.compat.accelerate_private import LEFT_BY_HOOKS
from fastft.compat.sharding_private import LEFT_BY_DEEPSPEED
from fastft.compat.transformers_private import LOADED
from fastft.swapping.swap import KEY

_OWN = frozenset(nn.Module().__dict__) | {KEY, *LEFT_BY_HOOKS, *LEFT_BY_DEEPSPEED, "forward", "layer_idx", LOADED}
_NUMBERS = (int, float, bool, str, tuple, torch.dtype, torch.device, type(None))
_MISSING = object()


class ModuleSnapshot:
    """The attributes and children of one module as they were. but: names of attributes that the swap reads at every
    call by itself."""

    __slots__ = ("attributes", "children", "cls", "forward")

    def __init__(self, module: nn.Module, children: Iterable[str] = (), but: Iterable[object] = ()):
        self.cls = module.__dict__[KEY].stock if KEY in module.__dict__ else module.__class__
        self.forward = self.cls.forward
        left = _OWN.union(n for n in but if isinstance(n, str))
        self.attributes = tuple((k, v) for k, v in module.__dict__.items() if k not in left)
        below = {n: module._modules.get(n) for n in children}
        self.children = tuple((n, ModuleSnapshot(c, c._modules)) for n, c in below.items() if c is not None)

    def changed(self, module: nn.Module) -> str:
        """What has changed since the snapshot; empty where nothing has."""
        here = module.__dict__
        if (here[KEY].stock if KEY in here else module.__class__) is not self.cls:
            return "its class is another"
        if self.cls.forward is not self.forward:
            return f"the forward of {self.cls.__name__} is another"
        for name, was in self.attributes:
            now = here[name] if name in here else _MISSING
            if now is not was and not (type(now) is type(was) and isinstance(was, _NUMBERS) and now == was):
                return f"{name} is another"
        for name, child in self.children:
            children = here["_modules"]
            now = children[name] if name in children else None
            if now is None:
                return f"{name} was removed"
            if why := child.changed(now):
                return f"{name} was replaced" if why == "its class is another" else f"{name}: {why}"
        return ""
