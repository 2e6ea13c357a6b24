"""Whose hooks stand on a module: a user's may look at, keep, or differentiate what a library's only passes on."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_LIBRARIES = ("transformers", "peft", "trl", "accelerate", "fastft")


def is_foreign(hook: Callable) -> bool:
    """Whether it is a user's hook."""
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.split(".")[0] not in _LIBRARIES


def has_foreign_hooks(module: nn.Module, inside: bool = True) -> bool:
    """Whether a user's hook stands on `module`, or on a module inside it."""
    for m in module.modules() if inside else (module,):
        for table in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks):
            if any(map(is_foreign, table.values())):
                return True
    return False
