"""One module, run three ways on what it received: as it is, in float64, and, where a patched module is looked at, as it
was before the patch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fastft.compat.accelerate_private import OLD_FORWARD
from fastft.linear.group_proof import dense_in_float64
from fastft.proving.clone import clone
from fastft.proving.float64 import float64_reference
from fastft.proving.prove import cast_parameters
from fastft.swapping.swap import KEY


@contextlib.contextmanager
def as_stock(module: nn.Module) -> Iterator[nn.Module]:
    """A patched module and all below it as they were before the patch, inside; swapped again afterwards."""
    swapped = [
        (m, m.__dict__[KEY], type(m), m.__dict__.get(OLD_FORWARD)) for m in module.modules() if KEY in m.__dict__
    ]
    for m, slot, _, old in swapped:
        del m.__dict__[KEY]
        m.__class__ = slot.stock
        if old is not None and slot.old_forward is not None:
            m.__dict__[OLD_FORWARD] = slot.old_forward
    try:
        yield module
    finally:
        for m, slot, cls, old in swapped:
            m.__class__ = cls
            m.__dict__[KEY] = slot
            if old is not None:
                m.__dict__[OLD_FORWARD] = old


def results(
    module: nn.Module, args: tuple, kwargs: dict, dtype: torch.dtype | None = None, reference: bool = False
) -> dict[str, torch.Tensor]:
    """Floating outputs, gradients of floating inputs and of the parameters that train, for one random upstream
    gradient."""
    leaves: dict[str, torch.Tensor] = {}
    args = tuple(_lifted(v, f"input {i}", dtype, leaves) for i, v in enumerate(args))
    kwargs = {k: _lifted(v, k, dtype, leaves) for k, v in kwargs.items()}
    leaves |= {f"d {n}": p for n, p in module.named_parameters() if p.requires_grad}
    with float64_reference() if reference else contextlib.nullcontext():
        outs = [t for t in tensors_in(module(*args, **kwargs)) if t.is_floating_point()]
        g = torch.Generator().manual_seed(11)
        ups = [torch.randn(o.shape, generator=g, dtype=torch.float64).float().to(o.device, o.dtype) for o in outs]
        pairs = [(o, u) for o, u in zip(outs, ups) if o.requires_grad]
        grads = (
            torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [u for _, u in pairs], allow_unused=True)
            if pairs
            else ()
        )
    found = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    return found | {k: v for k, v in zip(leaves, grads) if v is not None}


def _lifted(v, name: str, dtype: torch.dtype | None, leaves: dict[str, torch.Tensor]):
    """v with its floating tensors in `dtype`; those that a gradient is asked for are new leaves, noted in `leaves`."""
    if isinstance(v, torch.Tensor) and v.is_floating_point():
        v = v.to(dtype or v.dtype)
        if not name.startswith(("attention_mask", "position_embeddings", "cos", "sin")):
            v = leaves[f"d {name}"] = v.detach().requires_grad_()
        return v
    if type(v) in (tuple, list):
        return type(v)(_lifted(x, f"{name}.{i}", dtype, leaves) for i, x in enumerate(v))
    return v


def tensors_in(out) -> Iterator[torch.Tensor]:
    """Every floating-point tensor in a module's output."""
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, dict):
        yield from tensors_in(tuple(out.values()))
    elif isinstance(out, (tuple, list)):
        for o in out:
            yield from tensors_in(o)


def reference(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the stock module in float64."""
    return {k: v.double() for k, v in results(in_float64(module), args, kwargs, torch.float64, True).items()}


def in_float64(module: nn.Module) -> nn.Module:
    """A stock copy in float64 (a quantised weight as the matrix that it stands for), with the same parameters
    training."""
    quantised = any(hasattr(getattr(m, "weight", None), "quant_state") for m in module.modules())
    copy = dense_in_float64(module, torch.float64) if quantised else cast_parameters(clone(module), torch.float64)
    for (_, p), (_, q) in zip(copy.named_parameters(), module.named_parameters()):
        p.requires_grad_(q.requires_grad and p.is_floating_point())
    return copy
