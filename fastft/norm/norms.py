"""Norms: RMSNorm in its variants and LayerNorm, recognised by what a leaf module computes.

A norm is a leaf whose only parameters are vectors over the last dimension and whose output does not change when its
input grows. Which formula it is (weight or none, 1 + w, bias, eps, centred or not, the cast before or after the weight)
is read off its own answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from fastft.compat.torch_private import FakeTensor
from fastft.swapping.stock_only import gains_nothing, stood_aside, transformed
from fastft.swapping.swap import KEY, Replacement, install, order
from fastft.swapping.unchanged import ModuleSnapshot
from fastft_kernels.norm.layer_norm import layer_norm, layer_norm_recompute, layer_norm_with_stats
from fastft_kernels.norm.rms_norm import rms_norm, run_again
from fastft_kernels.norm.rms_norm import run as rms_norm_with_rstd
from fastft_kernels.norm.rms_norm import run_rounded as rms_norm_rounded
from fastft_kernels.recompute.recomputation import Recomputation, attach
from fastft_kernels.runtime.compat import is_dynamo_compiling
from fastft_kernels.runtime.dispatch import wider

KIND = "norm"
MAX_WIDTH = 1 << 17
_PLAIN = (torch.Tensor, nn.Parameter)


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


@dataclass(frozen=True)
class Settings:
    """A formula's arguments for an input and a weight of certain dtypes and a certain eps, and how the norm's output is
    recomputed: tensors -> y, from what was saved and, differentiably, from x and the parameters."""

    eps: float
    cast_before: bool
    out: torch.dtype
    recompute: Callable[..., torch.Tensor]
    formula: Callable[..., torch.Tensor]


@dataclass
class NormState:
    """What a swapped norm keeps. found: the settings, by (dtype of x, dtype of the weight, eps). spares: consumers may
    recompute its output; not where their backward may run while the weight is sharded. asked: calls that are still to
    round their output to FP8 as well, as a consumer that multiplies in FP8 asked for. rounds: whether it may be asked,
    as that was proven too."""

    formula: Formula
    seen: ModuleSnapshot
    spares: bool = True
    rounds: bool = False
    asked: int = 0
    found: dict[tuple, Settings] = field(default_factory=dict)

    def settings(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> Settings:
        key = (x.dtype, None if weight is None else weight.dtype, bias is None, eps)
        if key not in self.found:
            self.found[key] = self._made(x, weight, bias, eps)
        return self.found[key]

    def _made(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> Settings:
        f, there = self.formula, (weight is not None, bias is not None)
        out, before = f.out_dtype(x, weight), f.cast_of(x, weight) == "before"
        if f.centred:
            again: Callable = partial(_layer_norm_again, there, out)
            return Settings(eps, before, out, again, partial(_layer_norm_formula, there, eps, out))
        again = partial(run_again, f.offset, before, out)
        return Settings(eps, before, out, again, partial(_rms_norm_formula, eps, f.offset, before, out))


@order(50)
class FastNorm(Replacement):
    """Mixin: one launch forward, one backward; the output carries the recomputation by which a consumer recomputes it
    instead of saving it."""

    def forward(self, *args, **kwargs):
        d = self.__dict__
        slot = d[KEY] if KEY in d else None
        if not torch.is_grad_enabled() and gains_nothing(args):
            return super().forward(*args, **kwargs)
        if slot is None or (transformed() and stood_aside(slot.fallbacks, KIND)):
            return super().forward(*args, **kwargs)
        state: NormState = slot.parts[KIND][1]
        f, parameters = state.formula, d["_parameters"]
        x: Any = args[0] if len(args) == 1 and not kwargs else _only(args, kwargs)
        weight = bias = None
        if f.weight is not None:
            weight = parameters[f.weight] if f.weight in parameters else getattr(self, f.weight)
        if f.bias is not None:
            bias = parameters[f.bias] if f.bias in parameters else getattr(self, f.bias)
        why = state.seen.changed(self) or _gone(f, weight, bias) or _cannot(x, weight, bias)
        if why:
            slot.fallbacks[f"norm: {why}"] += 1
            return super().forward(*args, **kwargs)
        settings = state.settings(x, weight, bias, f.eps_of(self))
        if f.centred:
            weight = f.weight_of(self)
            y, mean, rstd = layer_norm_with_stats(x, weight, bias, settings.eps, out_dtype=settings.out)
            if y.requires_grad and state.spares:
                tensors = tuple([t for t in (x, mean, rstd, weight, bias) if t is not None])
                attach(y, Recomputation(tensors, settings.recompute, settings.formula))
            return y
        form, rounded = (settings.eps, f.offset, settings.cast_before, settings.out), None
        if state.asked and state.spares and torch.is_grad_enabled() and not is_dynamo_compiling():
            state.asked -= 1
            y, rstd, q, scale = rms_norm_rounded(x, weight, *form)
            rounded = q, scale
        else:
            y, rstd = rms_norm_with_rstd(x, weight, *form)
        if y.requires_grad and state.spares:
            tensors = (x, rstd) if weight is None else (x, rstd, weight)
            producer = state if state.rounds else None
            attach(y, Recomputation(tensors, settings.recompute, settings.formula, rounded, producer))
        return y


def _only(args: tuple, kwargs: dict) -> Any:
    """The one argument that was given by keyword; None where there are others."""
    return next(iter(kwargs.values())) if len(kwargs) == 1 and not args else None


def _install(module: nn.Module, f: Formula, spares: bool = True, rounds: bool = False) -> None:
    install(module, KIND, FastNorm, NormState(f, ModuleSnapshot(module, but=(f.eps,)), spares, rounds))


def _layer_norm_again(there: tuple[bool, bool], out: torch.dtype, x, mean, rstd, *parameters) -> torch.Tensor:
    return layer_norm_recompute(x, mean, rstd, *_placed(there, parameters), out_dtype=out)


def _layer_norm_formula(there: tuple[bool, bool], eps: float, out, x, mean, rstd, *parameters) -> torch.Tensor:
    weight, bias = _placed(there, parameters)
    return layer_norm(x, weight, bias, eps, out_dtype=out)


def _placed(there: tuple[bool, bool], parameters: tuple[torch.Tensor, ...]) -> list[torch.Tensor | None]:
    """(weight, bias): absent ones are no tensors to save, and are passed as None again."""
    rest = iter(parameters)
    return [next(rest) if t else None for t in there]


def _rms_norm_formula(eps: float, offset: float, before: bool, out, x, rstd, weight=None) -> torch.Tensor:
    return rms_norm(x, weight, eps, offset=offset, cast="before" if before else "after", out_dtype=out)


def _gone(f: Formula, weight, bias) -> str:
    return "its weight or bias was removed" if (f.weight and weight is None) or (f.bias and bias is None) else ""


def _cannot(x, weight, bias) -> str:
    if x.__class__ not in _PLAIN and not isinstance(x, FakeTensor):
        return "input is no plain tensor" if isinstance(x, torch.Tensor) else "called with more than one input"
    if not x.dtype.is_floating_point:
        return "input is not floating point"
    for p in (weight, bias):
        if p is None:
            continue
        if p.__class__ not in _PLAIN and not isinstance(p, FakeTensor):
            return f"its parameter is a {type(p).__name__}"
        if p.shape != x.shape[-1:]:
            return "parameter is sharded or of another width"
    return ""
