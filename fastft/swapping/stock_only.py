"""Calls that only stock can take: under a torch.func transform (grad, vmap, jvp, functional_call inside them), a level
of forward-mode differentiation, or a tracer that writes operations down (torch.export, torch.jit.trace, make_fx). They
ask for derivatives of other kinds or orders, or for the operations themselves; a fused function has one backward, and
shows one operation."""

from __future__ import annotations

from collections import Counter

import torch

from fastft.compat.torch_private import forward_ad
from fastft_kernels.recompute.replay import REPLAY
from fastft_kernels.runtime.compat import (
    compiler,
    dispatch_modes,
    is_dynamo_compiling,
    is_proxy_traced,
    is_tracing,
    transforms_active,
)
from fastft_kernels.runtime.dispatch import use_triton


def transformed() -> bool:
    """Is this call one of those? A few look-ups, no import, no scan. (torch.compile is not:
    `torch.compiler.is_compiling()` says that.)"""
    if is_dynamo_compiling():  # the compiler cannot follow the other questions
        return torch.compiler.is_exporting()
    if transforms_active() or forward_ad._current_level >= 0 or is_tracing() or compiler._is_exporting_flag:
        return True
    return dispatch_modes() > 0 and is_proxy_traced()


def gains_nothing(args: tuple) -> bool:
    """Asked where gradients are off: does the first argument lie on a device without kernels? Stock is then as good as
    the references, and costs the host less. (False in the first run of a reentrant checkpoint, as the second, with
    gradients, has to repeat its bits.)"""
    return not REPLAY.first and bool(args) and isinstance(args[0], torch.Tensor) and not use_triton(args[0])


def stood_aside(fallbacks: Counter, kind: str) -> bool:
    """Count a call under `transformed()` that is left to stock's code. Always True."""
    if not is_dynamo_compiling():
        fallbacks[f"{kind}: under a torch.func transform, forward-mode differentiation or a tracer"] += 1
    return True
