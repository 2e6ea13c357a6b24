"""What this package uses of torch beside its documented interface. tests/kernels/test_compat.py fails first, by name,
where a new version of torch changes one of these."""

from __future__ import annotations

from typing import Any

import torch

_C: Any = torch._C

transforms_active = _C._are_functorch_transforms_active  # () -> bool: is this call inside torch.func.grad, vmap, jvp?
dispatch_modes = _C._len_torch_dispatch_stack  # () -> int: how many TorchDispatchModes listen
is_tracing = _C._is_tracing  # () -> bool: inside torch.jit.trace?
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
compiler: Any = torch.compiler  # ._is_exporting_flag: what torch.compiler.is_exporting() answers


def apply_directly(function: type[torch.autograd.Function]):
    """The bound `apply` of an autograd.Function's C base: what `function.apply` calls in the end, outside torch.func
    transforms. It spares the host two Python calls for each argument."""
    return super(torch.autograd.Function, function).apply


def is_proxy_traced() -> bool:
    """Is a tracer (make_fx, torch.export) among the dispatch modes?"""
    return dispatch_modes() > 0 and _C._get_dispatch_mode(_C._TorchDispatchModeKey.PROXY) is not None
