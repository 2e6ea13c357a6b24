"""Run any stock module in float64, also where its own code casts to float32: the reference that proofs and parity tests
judge against.

Models upcast inside ("x.to(torch.float32)", softmax(dtype=float32)) and come back. Under `float64_reference()` every
conversion to a floating dtype, and every factory or reduction that names one, yields float64 instead, forward and
backward alike."""

from __future__ import annotations

import torch

from fastft.compat.torch_private import TorchDispatchMode

_LOW = frozenset({torch.float32, torch.bfloat16, torch.float16})
_DEFAULT = (
    torch.ops.aten.zeros.default,
    torch.ops.aten.ones.default,
)  # factories that name no dtype mean the default one
_FULL = torch.ops.aten.full.default  # of a float


class float64_reference(TorchDispatchMode):
    """Context manager: floating-point dtypes named by the code inside become float64. Parameters and inputs must be
    float64 already."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _LOW or (
            kwargs.get("dtype") is None and (func in _DEFAULT or (func is _FULL and isinstance(args[1], float)))
        ):
            kwargs["dtype"] = torch.float64
        if func in (torch.ops.aten.to.dtype, torch.ops.prims.convert_element_type.default) and args[1] in _LOW:
            args = (args[0], torch.float64, *args[2:])
        elif func is torch.ops.aten._softmax.default or func is torch.ops.aten._log_softmax.default:
            args = (args[0].double(), args[1], False)
        elif func in (torch.ops.aten._softmax_backward_data.default, torch.ops.aten._log_softmax_backward_data.default):
            args = (*args[:3], torch.float64)
        return func(*args, **kwargs)
