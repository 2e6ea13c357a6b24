"""One module run on what it received, as it is and in float64."""

from __future__ import annotations

import torch
from torch import nn

from fastft.linear.group_proof import dense_in_float64
from fastft.linear.projection import is_float8
from fastft.proving.clone import clone
from fastft.proving.prove import cast_parameters, outputs_and_gradients


def results(
    module: nn.Module, args: tuple, kwargs: dict, dtype: torch.dtype | None = None, reference: bool = False
) -> dict[str, torch.Tensor]:
    """Floating outputs, gradients of floating inputs and of the parameters that train, for one random upstream
    gradient."""
    leaves: dict[str, torch.Tensor] = {}
    args = tuple(_lifted(v, f"input {i}", dtype, leaves) for i, v in enumerate(args))
    kwargs = {k: _lifted(v, k, dtype, leaves) for k, v in kwargs.items()}
    named = [*leaves.items(), *module.named_parameters()]
    return outputs_and_gradients(lambda: module(*args, **kwargs), (), named, 11, reference)


def _lifted(v, name: str, dtype: torch.dtype | None, leaves: dict[str, torch.Tensor]):
    """v with its floating tensors in `dtype`; those that a gradient is asked for are new leaves, noted in `leaves`."""
    if isinstance(v, torch.Tensor) and v.is_floating_point():
        v = v.to(dtype or v.dtype)
        if not name.startswith(("attention_mask", "position_embeddings", "cos", "sin")):
            v = leaves[name] = v.detach().requires_grad_()
        return v
    if type(v) in (tuple, list):
        return type(v)(_lifted(x, f"{name}.{i}", dtype, leaves) for i, x in enumerate(v))
    return v


def reference(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the stock module in float64."""
    return {k: v.double() for k, v in results(in_float64(module), args, kwargs, torch.float64, True).items()}


def in_float64(module: nn.Module) -> nn.Module:
    """A stock copy in float64 (a 4-bit weight as the matrix that it stands for; an FP8 one as it is, which means the
    same in any dtype), with the same parameters training."""
    quantised = any(is_float8(m) or hasattr(getattr(m, "weight", None), "quant_state") for m in module.modules())
    copy = dense_in_float64(module, torch.float64) if quantised else cast_parameters(clone(module), torch.float64)
    for (_, p), (_, q) in zip(copy.named_parameters(), module.named_parameters()):
        p.requires_grad_(q.requires_grad and p.is_floating_point())
    return copy
