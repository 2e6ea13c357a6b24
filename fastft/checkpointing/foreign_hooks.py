"""Whose hooks stand on a module: a user's may look at, keep, or differentiate what a library's only passes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from fastft.compat.torch_private import call_hooks

_LIBRARIES = ("transformers", "peft", "trl", "accelerate", "fastft")


def library_of(hook: Callable) -> str:
    """The top-level package in which a hook was written."""
    return (getattr(hook, "__module__", None) or type(hook).__module__).split(".")[0]


def is_foreign(hook: Callable) -> bool:
    """Whether it is a user's hook."""
    return library_of(hook) not in _LIBRARIES


def hooks_on(module: nn.Module) -> Iterator[Callable]:
    """The hooks that a call of `module` runs."""
    for table in call_hooks(module):
        yield from table.values()


def has_foreign_hooks(module: nn.Module, inside: bool = True) -> bool:
    """Whether a user's hook stands on `module`, or on a module inside it."""
    for m in module.modules() if inside else (module,):
        if any(map(is_foreign, hooks_on(m))):
            return True
    return False
