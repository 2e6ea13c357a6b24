"""Calls that only stock can take: under a torch.func transform (grad, vmap, jvp, functional_call inside them), a level
of forward-mode differentiation, or a tracer that writes operations down (torch.export, torch.jit.trace, make_fx). They
ask for derivatives of other kinds or orders, or for the operations themselves; a fused function has one backward, and
shows one operation."""

from __future__ import annotations

from collections import Counter

import torch
from torch.autograd import forward_ad

_PROXY = torch._C._TorchDispatchModeKey.PROXY


def transformed() -> bool:
    """Is this call one of those? Five look-ups, no import, no scan. (torch.compile is not:
    `torch.compiler.is_compiling()` says that.)"""
    if torch.compiler.is_compiling():  # the compiler cannot follow the other questions
        return torch.compiler.is_exporting()
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_dispatch_mode(_PROXY) is not None
        or torch._C._is_tracing()
    )


def stands_aside(fallbacks: Counter, kind: str) -> bool:
    """`transformed()`, counted as a call that went the stock way."""
    if not transformed():
        return False
    if not torch.compiler.is_compiling():
        fallbacks[f"{kind}: under a torch.func transform, forward-mode differentiation or a tracer"] += 1
    return True
