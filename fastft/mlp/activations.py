"""Activations of MLPs that are written out inside another module (a decoder layer with fc1 and fc2 of its own, a
feed-forward that also adds a residual): the activation is a leaf between two linear layers, and is swapped by itself.
Its result can be recomputed by the linear layer that it is given to, instead of being saved beside its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastft.compat.torch_private import FakeTensor
from fastft.proving.float64 import float64_reference
from fastft.proving.proof_sizes import elementwise_rows
from fastft.proving.prove import FORMULA_EPS, Proof, prove
from fastft.swapping.out_of_memory import not_for_want_of_memory
from fastft.swapping.stock_only import gains_nothing, stood_aside, transformed
from fastft.swapping.swap import KEY, Replacement, install, order
from fastft.swapping.unchanged import ModuleSnapshot
from fastft_kernels.mlp.activation import activation
from fastft_kernels.recompute.recomputation import Recomputation, attach

KIND = "mlp"
WIDTH = 64


@order(30)
class FastActivation(Replacement):
    """Mixin of an activation module: one launch forward, one backward."""

    def forward(self, *args, **kwargs):
        slot = self.__dict__.get(KEY)
        if not torch.is_grad_enabled() and gains_nothing(args):
            return super().forward(*args, **kwargs)
        if slot is None or (transformed() and stood_aside(slot.fallbacks, KIND)):
            return super().forward(*args, **kwargs)
        act, seen = slot.state(KIND)
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        plain = type(x) in (torch.Tensor, nn.Parameter) or isinstance(x, FakeTensor)
        if not plain or not x.is_floating_point():
            slot.fallbacks["mlp: an activation was called with something else than one plain tensor"] += 1
            return super().forward(*args, **kwargs)
        if why := seen.changed(self):
            slot.fallbacks[f"mlp: {why}"] += 1
            return super().forward(*args, **kwargs)
        y = activation(x, act)
        if y.requires_grad:
            attach(y, Recomputation((x,), lambda x: activation(x, act)))
        return y


def is_leaf(module: nn.Module) -> bool:
    """A module without parameters and children."""
    return not (
        any(module._modules.values())
        or any(True for _ in module.parameters(False))
        or any(True for _ in module.buffers(False))
    )


def activation_of(module: nn.Module, names: Sequence[str]) -> str | None:
    """Which of the activations known by `names` this leaf is, on small and large numbers alike."""
    if getattr(module, "inplace", False) or not is_leaf(module):
        return None
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = torch.cat([x, 30 * x])
    try:
        with torch.no_grad(), float64_reference():
            y = module(x.clone())
    except Exception as e:  # no function of one tensor, so no activation
        not_for_want_of_memory(e)
        return None
    if not isinstance(y, torch.Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    with torch.no_grad():
        return next((act for act in names if (activation(x, act) - y).abs().max() <= FORMULA_EPS * y.abs().max()), None)


def prove_activation(module: nn.Module, act: str, dtype: torch.dtype, device: torch.device) -> Proof:
    """The stock activation module beside the kernel `act`, on rows of several blocks."""
    rows = elementwise_rows(WIDTH, device)
    inputs = lambda g, scale: [(torch.randn(rows, WIDTH, generator=g, dtype=torch.float64) * scale).to(device)]
    return prove(
        module,
        lambda m: install(m, KIND, FastActivation, (act, ModuleSnapshot(m))),
        inputs,
        dtype=dtype,
        scales=(1.0, 30.0),
    )
