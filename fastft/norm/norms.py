"""Norms: RMSNorm in its variants and LayerNorm, recognised by what a leaf module computes.

A norm is a leaf whose only parameters are vectors over the last dimension and whose output does not change when its
input grows. Which formula it is (weight or none, 1 + w, bias, eps, centred or not, the cast before or after the weight)
is read off its own answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastft.swapping.stock_only import stands_aside
from fastft.swapping.swap import KEY, Replacement, install, order
from fastft.swapping.unchanged import ModuleSnapshot
from fastft_kernels.norm.layer_norm import layer_norm, layer_norm_recompute, layer_norm_with_stats
from fastft_kernels.norm.rms_norm import rms_norm, rms_norm_recompute, rms_norm_with_rstd
from fastft_kernels.recompute.recomputation import Recomputation, attach
from fastft_kernels.runtime.dispatch import wider

KIND = "norm"
MAX_WIDTH = 1 << 17


@dataclass(frozen=True)
class Formula:
    """weight, bias: parameter names or None. eps: an attribute's name, or the value. out: "x", "promote", or a dtype.
    mixed: the cast where the weight's dtype is not the input's."""

    centred: bool
    weight: str | None
    bias: str | None
    eps: str | float
    offset: float = 0.0
    cast: str = "after"
    out: str | torch.dtype = "x"
    mixed: str = "after"

    @property
    def kernel(self) -> str:
        if self.centred:
            plus = "1 + w, " if self.offset else ""
            return f"layer_norm({plus}{'bias' if self.bias else 'no bias'})" if self.weight else "layer_norm(no weight)"
        if not self.weight:
            return "rms_norm(no weight)"
        return f"rms_norm({'1 + w, ' if self.offset else ''}cast {self.cast})"

    def out_dtype(self, x: torch.Tensor, w: torch.Tensor | None) -> torch.dtype:
        if isinstance(self.out, torch.dtype):
            return x.dtype if x.dtype == torch.float64 else self.out
        return wider(x.dtype, w.dtype) if self.out == "promote" and w is not None else x.dtype

    def cast_of(self, x: torch.Tensor, w: torch.Tensor | None) -> str:
        return self.cast if w is None or w.dtype == x.dtype else self.mixed

    def weight_of(self, module: nn.Module) -> torch.Tensor | None:
        """The weight, with the offset that the layer norm kernel does not add itself."""
        w = getattr(module, self.weight) if self.weight else None
        return w + self.offset if w is not None and self.centred and self.offset else w

    def eps_of(self, module: nn.Module) -> float:
        return getattr(module, self.eps) if isinstance(self.eps, str) else self.eps

    def __call__(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The formula alone, without recomputation: what recognition compares."""
        w = self.weight_of(module)
        if self.centred:
            b = getattr(module, self.bias) if self.bias else None
            return layer_norm(x, w, b, self.eps_of(module), out_dtype=self.out_dtype(x, w))
        return rms_norm(
            x, w, self.eps_of(module), offset=self.offset, cast=self.cast_of(x, w), out_dtype=self.out_dtype(x, w)
        )


@order(50)
class FastNorm(Replacement):
    """Mixin: one launch forward, one backward; the output carries the recomputation by which a consumer recomputes it
    instead of saving it."""

    def forward(self, *args, **kwargs):
        slot = self.__dict__.get(KEY)
        if slot is None or stands_aside(slot.fallbacks, KIND):
            return super().forward(*args, **kwargs)
        f, seen = slot.state(KIND)
        x: Any = (
            args[0]
            if len(args) == 1 and not kwargs
            else next(iter(kwargs.values()))
            if len(kwargs) == 1 and not args
            else None
        )
        weight = getattr(self, f.weight) if f.weight else None
        bias = getattr(self, f.bias) if f.bias else None
        why = seen.changed(self) or _gone(f, weight, bias) or _cannot(x, weight, bias)
        if why:
            slot.fallbacks[f"norm: {why}"] += 1
            return super().forward(*args, **kwargs)
        eps, out = f.eps_of(self), f.out_dtype(x, weight)
        if f.centred:
            weight = f.weight_of(self)
            y, mean, rstd = layer_norm_with_stats(x, weight, bias, eps, out_dtype=out)
            if y.requires_grad:
                attach(
                    y,
                    _recomputation(
                        (x, mean, rstd, weight, bias), layer_norm_recompute, _layer_norm, eps, out_dtype=out
                    ),
                )
            return y
        cast = f.cast_of(x, weight)
        y, rstd = rms_norm_with_rstd(x, weight, eps, offset=f.offset, cast=cast, out_dtype=out)
        if y.requires_grad:
            attach(
                y,
                _recomputation(
                    (x, rstd, weight), rms_norm_recompute, _rms_norm, eps, offset=f.offset, cast=cast, out_dtype=out
                ),
            )
        return y


def _install(module: nn.Module, f: Formula) -> None:
    install(module, KIND, FastNorm, (f, ModuleSnapshot(module, but=(f.eps,))))


def _layer_norm(eps: float, x, mean, rstd, weight, bias, **settings) -> torch.Tensor:
    return layer_norm(x, weight, bias, eps, **settings)


def _rms_norm(eps: float, x, rstd, weight, **settings) -> torch.Tensor:
    return rms_norm(x, weight, eps, **settings)


def _recomputation(
    tensors: tuple[torch.Tensor | None, ...], recompute: Callable, formula: Callable, eps: float, **settings
) -> Recomputation:
    """Absent parameters are no tensors to save: they are passed as None again."""
    there = [t is not None for t in tensors]

    def arguments(saved: tuple[torch.Tensor, ...]):
        rest = iter(saved)
        return (next(rest) if t else None for t in there)

    def again(*saved: torch.Tensor) -> torch.Tensor:
        return recompute(*arguments(saved), **settings)

    def differentiable(*saved: torch.Tensor) -> torch.Tensor:
        return formula(eps, *arguments(saved), **settings)

    return Recomputation(tuple(t for t in tensors if t is not None), again, differentiable)


def _gone(f: Formula, weight, bias) -> str:
    return "its weight or bias was removed" if (f.weight and weight is None) or (f.bias and bias is None) else ""


def _cannot(x, weight, bias) -> str:
    if type(x) not in (torch.Tensor, nn.Parameter) and not isinstance(x, torch._subclasses.FakeTensor):
        return "input is no plain tensor" if isinstance(x, torch.Tensor) else "called with more than one input"
    if not x.is_floating_point():
        return "input is not floating point"
    for p in (weight, bias):
        if p is None:
            continue
        if type(p) not in (torch.Tensor, nn.Parameter) and not isinstance(p, torch._subclasses.FakeTensor):
            return f"its parameter is a {type(p).__name__}"
        if p.shape != x.shape[-1:]:
            return "parameter is sharded or of another width"
    return ""
