"""MLPs: down(act(gate(x)) * up(x)), fused or separate, and down(act(up(x))): the elementwise middle becomes one launch.

A module is an MLP when, with stand-ins for its linear children, its forward calls two or three of them once each, gives
the last one a known elementwise function of what the others returned, and returns the last one's output. Where a module
does more than that, the activation between its linear layers is swapped alone (`activations`). The stand-ins are
low-rank products of the full width, so that an 8B model's MLP is probed in milliseconds; the real children keep being
called as modules, hooks and all."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastft.compat.sharding_private import only_gathers
from fastft.swapping.stock_only import gains_nothing, stood_aside, transformed
from fastft.swapping.swap import KEY, Replacement, install, order
from fastft.swapping.unchanged import ModuleSnapshot
from fastft_kernels.mlp.activation import activation
from fastft_kernels.mlp.glu import GluSettings, glu_settings, run, run_again
from fastft_kernels.mlp.rounded_glu import run_rounded
from fastft_kernels.recompute.recomputation import Recomputation, attach
from fastft_kernels.runtime.compat import is_dynamo_compiling

KIND = "mlp"
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu", "relu2", "quick_gelu", "sigmoid")
_INTERPOSED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Shape:
    """calls: names of the linear children in the order of their calls; the last is down, unless `down` is False (the
    product itself is returned). final: an activation after down. same_dtype: stock looks at the dtype of down's weight,
    and may cast. split: how one fused product is divided ("chunk", "interleaved", or "" where gate and up are two
    children). swapped: up comes first."""

    calls: tuple[str, ...]
    activation: str
    gated: bool
    split: str = ""
    swapped: bool = False
    limit: float | None = None
    alpha: float | None = None
    up_offset: float = 0.0
    down: bool = True
    final: str = ""
    same_dtype: bool = False
    others: tuple[str, ...] = ()  # children that do not run in the fast forward: the activation, dropouts

    @property
    def kernel(self) -> str:
        parts = (
            self.limit and f"limit {self.limit:g}",
            self.split and f"{self.split} gate_up",
            self.final and f"then {self.final}",
        )
        extra = "".join(f", {part}" for part in parts if part)
        return f"{'glu' if self.gated else 'activation'}({self.activation}{extra})"

    def middle(self, *products: torch.Tensor) -> torch.Tensor:
        """The input of down from the outputs of the other children."""
        if not self.gated:
            return activation(products[0], self.activation)
        gate, up = self.parts(*products)
        return run(gate, up, self.settings)

    def middle_rounded(self, *products: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`middle` of a gated MLP, and its rows in e4m3 with their scales."""
        return run_rounded(*self.parts(*products), self.settings)

    def middle_again(self, *products: torch.Tensor) -> torch.Tensor:
        """`middle` outside autograd, bit for bit."""
        if not self.gated:
            return activation(products[0], self.activation)
        gate, up = self.parts(*products)
        return run_again(gate, up, self.settings)

    @functools.cached_property
    def settings(self) -> GluSettings:
        """The GLU's, as the kernel takes them."""
        return glu_settings(self.activation, self.alpha, self.limit, self.up_offset)

    def parts(self, *products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.split == "chunk":
            products = products[0].chunk(2, dim=-1)
        elif self.split == "interleaved":
            products = (products[0][..., ::2], products[0][..., 1::2])
        return (products[1], products[0]) if self.swapped else (products[0], products[1])


@dataclass
class MlpState:
    """What a swapped MLP keeps. asked: calls that are still to round down's input to FP8 as well, as down asked for.
    rounds: whether it may ask, as that was proven too."""

    shape: Shape
    seen: ModuleSnapshot
    rounds: bool = False
    asked: int = 0


@order(30)
class FastMLP(Replacement):
    """Mixin: the children run as modules, in stock's order; act and product in one launch; the product can be
    recomputed, not saved."""

    def forward(self, *args, **kwargs):
        d = self.__dict__
        slot = d[KEY] if KEY in d else None
        if not torch.is_grad_enabled() and gains_nothing(args):
            return super().forward(*args, **kwargs)
        if slot is None or (transformed() and stood_aside(slot.fallbacks, KIND)):
            return super().forward(*args, **kwargs)
        state: MlpState = slot.parts[KIND][1]
        shape = state.shape
        why = _interposed(self, shape) or state.seen.changed(self)
        if len(args) != 1 or kwargs or why:
            slot.fallbacks[f"mlp: {why or 'called with other arguments than in the proof'}"] += 1
            return super().forward(*args, **kwargs)
        modules: dict[str, Any] = self._modules
        first = shape.calls[:-1] if shape.down else shape.calls
        products = [modules[n](args[0]) for n in first]
        rounded = None
        if state.asked and torch.is_grad_enabled() and not is_dynamo_compiling():
            state.asked -= 1
            h, q, scale = shape.middle_rounded(*products)
            rounded = q, scale
        else:
            h = shape.middle(*products)
        if h.requires_grad:
            producer = state if state.rounds else None
            attach(h, Recomputation(tuple(products), shape.middle_again, shape.middle, rounded, producer))
        if not shape.down:
            return h
        y = modules[shape.calls[-1]](h)
        return activation(y, shape.final) if shape.final else y


def _install(module: nn.Module, shape: Shape, rounds: bool = False) -> None:
    install(module, KIND, FastMLP, MlpState(shape, ModuleSnapshot(module, shape.others), rounds))


def _interposed(module: nn.Module, shape: Shape) -> str:
    """Does a child that the fast forward does not call carry hooks, or is a dropout on?"""
    children = module._modules
    for n in shape.others:
        child = children[n] if n in children else None
        if child is None:
            return f"{n} was removed"
        d = child.__dict__
        for table in _INTERPOSED:
            if d[table] and not all(map(only_gathers, d[table].values())):
                return f"{n} carries a hook"
        if d["training"] and "p" in d and d["p"] > 0.0:
            return f"{n} drops out"
    if shape.same_dtype:
        dtypes = [getattr(module._modules[n], "weight", None) for n in shape.calls]
        if len({w.dtype if isinstance(w, torch.Tensor) else None for w in dtypes}) > 1:
            return "its weights are of several dtypes"
    return ""
