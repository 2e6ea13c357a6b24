"""Norms with a gate: rms(x act(gate)) w or rms(x) w act(gate), over the whole width or over groups of it, in one launch
each way.

A leaf with one vector of parameters that the model gives two tensors of its width. Which of them gates, where, by which
activation and in how many groups is read off its answers in float64, then proven as every norm is."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastft.compat.torch_private import FakeTensor
from fastft.patching.kind import Context
from fastft.proving.float64 import float64_reference
from fastft.proving.proof_sizes import FEW, norm_rows
from fastft.proving.prove import FORMULA_EPS, Proof, prove
from fastft.swapping.out_of_memory import not_for_want_of_memory
from fastft.swapping.stock_only import stood_aside, transformed
from fastft.swapping.swap import KEY, Replacement, install, order, stock_class
from fastft.swapping.unchanged import ModuleSnapshot
from fastft_kernels.norm.gated_rms_norm import gated_rms_norm
from fastft_kernels.numerics import compare
from fastft_kernels.runtime.dispatch import wider

KIND = "norm"
ACTIVATIONS = ("silu", "sigmoid", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class GatedFormula:
    """names: of the forward's parameters, in order; x, gate: the two that are given. eps: an attribute's name, or the
    value. promotes: a wider weight gives a wider result."""

    names: tuple[str, ...]
    x: str
    gate: str
    weight: str
    eps: str | float
    activation: str
    gate_first: bool
    groups: int
    promotes: bool = False

    @property
    def kernel(self) -> str:
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"gated_rms_norm({self.activation} {'before' if self.gate_first else 'after'}{groups})"

    def __call__(self, module: nn.Module, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        w = getattr(module, self.weight)
        return gated_rms_norm(
            x,
            gate,
            w,
            getattr(module, self.eps) if isinstance(self.eps, str) else self.eps,
            activation=self.activation,
            gate_first=self.gate_first,
            groups=self.groups,
            out_dtype=wider(x.dtype, w.dtype) if self.promotes else x.dtype,
        )


@order(50)
class FastGatedNorm(Replacement):
    """Mixin: what is not two plain tensors of one shape goes the stock way, counted."""

    def forward(self, *args, **kwargs):
        slot = self.__dict__.get(KEY)
        if slot is None or (transformed() and stood_aside(slot.fallbacks, KIND)):
            return super().forward(*args, **kwargs)
        f, seen = slot.state(KIND)
        if why := seen.changed(self):
            slot.fallbacks[f"norm: {why}"] += 1
            return super().forward(*args, **kwargs)
        given = {**dict(zip(f.names, args)), **kwargs}
        x: Any = given.get(f.x)
        gate: Any = given.get(f.gate)
        if (
            len(given) != 2
            or len(args) + len(kwargs) != 2
            or not all(map(_plain, (x, gate, getattr(self, f.weight))))
            or x.shape != gate.shape
        ):
            slot.fallbacks["norm: called without a gate, or with other tensors than in the proof"] += 1
            return super().forward(*args, **kwargs)
        return f(self, x, gate)


def install_gated(module: nn.Module, f: GatedFormula) -> None:
    """Swap a norm with a gate for `FastGatedNorm`."""
    install(module, KIND, FastGatedNorm, (f, ModuleSnapshot(module, but=(f.eps,))))


def _plain(t: Any) -> bool:
    if type(t) not in (torch.Tensor, nn.Parameter) and not isinstance(t, FakeTensor):
        return False
    return t.is_floating_point() and t.device.type != "meta"


def two_inputs(module: nn.Module, width: int, context: Context) -> tuple[str, str, int] | None:
    """(names of the two parameters that are given tensors of the norm's width, how many dimensions these have)."""
    names = _names(module)
    for call in context.seen.of(module):
        given = [*names[: call.n_args], *call.kwargs]
        if len(call.inputs) == len(given) == 2 and all(t.dim() and t.shape[-1] == width for t in call.inputs):
            return given[0], given[1], call.inputs[0].dim()
    return None


def _names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(stock_class(module).forward).parameters)[1:]


def recognise_gated(probe: nn.Module, weight: str, given: tuple[str, str, int]) -> GatedFormula | str:
    """probe: a CPU copy of the module, whose parameters may be set."""
    *names, dims = given
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    width = getattr(probe, weight).numel()
    getattr(probe, weight).data = draw(width) * 0.3 + 0.5
    shape = (*(1,) * (dims - 2), 6, width)
    x, gate = draw(*shape), draw(*shape)
    x, gate = torch.cat([x, x * 1e-3], -2), torch.cat([gate, 4 * gate], -2)  # small inputs, so that eps shows
    try:
        with torch.no_grad(), float64_reference():
            y = probe(**dict(zip(names, (x, gate))))
    except Exception as e:  # foreign code on input that it may not expect
        not_for_want_of_memory(e)
        return f"cannot be run on two tensors of width {width}: {type(e).__name__}"
    for f in _formulas(probe, names, weight, width):
        with torch.no_grad():
            if (
                isinstance(y, torch.Tensor)
                and y.shape == x.shape
                and (f(probe, *_ordered(f, names, x, gate)) - y).abs().max() <= FORMULA_EPS * y.abs().max()
            ):
                return _with_dtype(probe, f, names, x, gate)
    return "no gated norm formula known here gives its output"


def _ordered(f: GatedFormula, names: list[str], *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    by_name = dict(zip(names, tensors))
    return by_name[f.x], by_name[f.gate]


def _formulas(probe: nn.Module, names: list[str], weight: str, width: int) -> Iterator[GatedFormula]:
    numbers = [v for v in probe.__dict__.values() if type(v) is int and 0 < v < width and width % v == 0]
    groups = dict.fromkeys([1, *numbers, *(width // v for v in numbers)])
    eps = [*(k for k, v in probe.__dict__.items() if isinstance(v, float) and 0 <= v < 0.1), 1e-5, 1e-6]
    for names_in_order, e, n, act, first in itertools.product(
        (names, names[::-1]), eps, groups, ACTIVATIONS, (True, False)
    ):
        yield GatedFormula(_names(probe), names_in_order[0], names_in_order[1], weight, e, act, first, n)


def _with_dtype(probe: nn.Module, f: GatedFormula, names: list[str], *tensors: torch.Tensor) -> GatedFormula | str:
    """The result's dtype for bfloat16 tensors, with a weight of the same dtype and a wider one; the wider one is judged
    as well."""
    value, found = getattr(probe, f.weight).data, {}
    low = [t.bfloat16() for t in tensors]
    for dtype in (torch.bfloat16, torch.float32):
        getattr(probe, f.weight).data = value.bfloat16().to(dtype)
        with torch.no_grad():
            found[dtype] = probe(**dict(zip(names, low)))
    if found[torch.bfloat16].dtype != torch.bfloat16 or found[torch.float32].dtype not in (
        torch.bfloat16,
        torch.float32,
    ):
        return f"returns {found[torch.bfloat16].dtype} for bfloat16"
    f = GatedFormula(**{**f.__dict__, "promotes": found[torch.float32].dtype == torch.float32})
    with torch.no_grad():
        ours = f(probe, *_ordered(f, names, *low))
        getattr(probe, f.weight).data = value.bfloat16().double()
        with float64_reference():
            reference = probe(**dict(zip(names, [t.double() for t in low])))
    verdict = compare(ours, reference, found[torch.float32], "bfloat16 input, float32 weight")
    return f if verdict else str(verdict)


class _Called(nn.Module):
    """The norm, given its two tensors by position where its forward allows that, and by name."""

    def __init__(self, norm: nn.Module, f: GatedFormula):
        super().__init__()
        self.norm, self.f = norm, f

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> list[torch.Tensor]:
        given = {self.f.x: x, self.f.gate: gate}
        ways = [self.norm(**given)]
        if set(self.f.names[:2]) == set(given):
            ways.append(self.norm(*(given[n] for n in self.f.names[:2])))
        return ways


def prove_gated(
    stock: nn.Module,
    f: GatedFormula,
    dims: int,
    dtype: torch.dtype,
    device: torch.device,
    reset: Callable[[nn.Module], None],
) -> Proof:
    """The stock norm with a gate beside the kernel."""
    width = getattr(stock, f.weight).numel()
    rows = lambda scale: norm_rows(width, device) if scale == 1.0 else FEW
    draw = lambda g, scale: (
        torch.randn((*(1,) * (dims - 2), rows(scale), width), generator=g, dtype=torch.float64) * scale
    ).to(device)
    inputs = lambda g, scale: [draw(g, scale), draw(g, scale)]
    swap = lambda m: install_gated(m.norm, f)
    return prove(_Called(stock, f), swap, inputs, dtype=dtype, scales=(1.0, 10.0), reset=reset)
