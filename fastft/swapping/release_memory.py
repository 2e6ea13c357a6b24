"""Who can give memory back when a function runs out of it.

A guarded first step holds activations that it can compute again. What runs after it in the same step, the LM head above
all, asks here before it gives up."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

Result = TypeVar("Result")


class MemoryReleaser(Protocol):
    """Something that can free memory when asked."""

    def give(self, error: torch.OutOfMemoryError) -> bool:
        """Free what can be computed again; False where there is nothing."""
        ...


GIVERS: weakref.WeakSet[MemoryReleaser] = weakref.WeakSet()


def with_room(function: Callable[..., Result], *args, **kwargs) -> Result:
    """function(*args, **kwargs), again after each time that it ran out of memory and somebody gave some back. The
    function must have no effect but its result."""
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    while True:
        try:
            return function(*args, **kwargs)
        except torch.OutOfMemoryError as e:
            if not any([giver.give(e) for giver in GIVERS]):  # noqa: C419 - all of them
                raise
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
