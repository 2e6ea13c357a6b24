"""What this package uses of torch beside its documented interface. tests/kernels/test_compat.py fails first, by name,
where a new version of torch changes one of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "FakeTensor",
    "apply_directly",
    "compiler",
    "copy_each",
    "dispatch_modes",
    "grouped_mm",
    "has_grouped_mm",
    "is_dynamo_compiling",
    "is_proxy_traced",
    "is_tracing",
    "scale_each",
    "scaled_mm",
    "transforms_active",
    "viewed",
]

_C: Any = torch._C

transforms_active = _C._are_functorch_transforms_active  # () -> bool: is this call inside torch.func.grad, vmap, jvp?
dispatch_modes = _C._len_torch_dispatch_stack  # () -> int: how many TorchDispatchModes listen
is_tracing = _C._is_tracing  # () -> bool: inside torch.jit.trace?
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
compiler: Any = torch.compiler  # ._is_exporting_flag: what torch.compiler.is_exporting() answers
copy_each: Callable = vars(torch)["_foreach_copy_"]  # (targets, sources): one launch for many copies
scale_each: Callable = vars(torch)["_foreach_mul_"]  # (tensors, factors): one launch for many products, in place
# (a, b, scale_a=, scale_b=, out_dtype=, use_fast_accum=): the product of two 8-bit matrices, b by columns, times scales
scaled_mm: Callable = vars(torch)["_scaled_mm"]
# (a, b, offs=ends): products of groups of rows. Older torch has it under a private name; None where it has neither.
grouped_mm: Callable | None = getattr(F, "grouped_mm", None) or vars(torch).get("_grouped_mm")


def apply_directly(function: type[torch.autograd.Function]):
    """The bound `apply` of an autograd.Function's C base: what `function.apply` calls in the end, outside torch.func
    transforms. It spares the host two Python calls for each argument."""
    return super(torch.autograd.Function, function).apply


def viewed(t: torch.Tensor) -> torch.Tensor | None:
    """The tensor of which autograd knows t as a view; None for what is no view."""
    return t._base


def has_grouped_mm(major: int) -> bool:
    """Does `grouped_mm` run on CUDA devices of this compute capability?"""
    return major >= 8 if hasattr(F, "grouped_mm") else major == 9 and grouped_mm is not None


def is_proxy_traced() -> bool:
    """Is a tracer (make_fx, torch.export) among the dispatch modes?"""
    return dispatch_modes() > 0 and _C._get_dispatch_mode(_C._TorchDispatchModeKey.PROXY) is not None
