"""What a module of experts computes, read off the module: which parameters, which way round, which gate.

The module is one of the experts interface: two stacks of matrices [experts, ., .], a forward of hidden states, the
experts of each token and their weights, and between the two products its own `_apply_gate`, or an activation. The
formula of the gate is found by trying: on small and large numbers, in float64. A gate that is none of those known is
called as it is."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastft.compat.transformers_private import GATE, is_expert_parallel
from fastft.mlp.mlp import ACTIVATIONS
from fastft.proving.float64 import float64_reference
from fastft.proving.prove import FORMULA_EPS
from fastft.swapping.out_of_memory import not_for_want_of_memory
from fastft.swapping.swap import stock_class
from fastft_kernels.experts.gating import Gating

UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"  # the interface's names
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class ExpertsStructure:
    """up, down, up_bias, down_bias: names of parameters, biases "" where there are none. transposed: stored [E, in,
    out]. gating: None where the module's own function is called."""

    experts: int
    hidden: int
    inner: int
    up: str
    down: str
    up_bias: str
    down_bias: str
    transposed: bool
    gated: bool
    gating: Gating | None

    @property
    def kernel(self) -> str:
        g = self.gating
        if g is None:
            return "grouped_experts(its own gate)"
        parts = [g.act, g.limit is not None and f"limit {g.limit:g}", g.layout == "interleaved" and "interleaved"]
        return f"grouped_experts({', '.join(p for p in parts if p)})"

    def gating_of(self, module: Any) -> Gating:
        """What is between the products at a call of `module`."""
        if self.gating is not None:
            return self.gating
        return Gating(layout="chunk" if self.gated else "", function=gate_function(module, self.gated))


def experts_of(module: nn.Module) -> int:
    """How many experts this module's own parameters stack, 0 where it holds none."""
    shapes = [tuple(p.shape) for p in module._parameters.values() if p is not None and p.dim() == 3]
    if len(shapes) not in (2, 3) or len({e for e, _, _ in shapes}) > 1 or shapes[0][0] < 2:
        return 0
    ways = [s for _, a, b in shapes for s in ((a, b), (b, a))]  # stored either way round
    back = any(a == d and b in (c, 2 * c) for (a, b), (c, d) in itertools.permutations(ways, 2))
    return shapes[0][0] if back else 0


def wide_experts(model: nn.Module) -> str:
    """One line about experts that a 4-bit model holds in more bits; empty where it has none."""
    found = [(m, p) for m in model.modules() if experts_of(m) for p in m._parameters.values() if p is not None]
    wide = [(m, p) for m, p in found if p.dim() == 3 and p.is_floating_point()]
    if not wide:
        return ""
    classes = ", ".join(sorted({stock_class(m).__name__ for m, _ in wide}))
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for _, p in wide}))
    return f"bitsandbytes puts linear layers into 4 bits, and no 3-D parameters: {classes} stays in {dtypes}"


def gate_function(module: Any, gated: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """The module's own function between its two products."""
    return getattr(module, GATE) if gated else module.act_fn


def arguments(module: nn.Module) -> list[str]:
    """The names of the stock forward's parameters."""
    return list(inspect.signature(stock_class(module).forward).parameters)[1:]


def structure_of(module: nn.Module) -> ExpertsStructure | str:
    """The structure, its gate not looked at yet, or why it is none that is known here. module: `experts_of` is not
    0."""
    parameters = {n: p for n, p in module._parameters.items() if p is not None}
    up = next((n for n in UP if n in parameters), None)
    if up is None or DOWN not in parameters or len(arguments(module)) != 3:
        return "no forward of hidden states, experts and their weights"
    gated = bool(getattr(module, "has_gate", up == UP[0]))
    if not hasattr(module, GATE if gated else "act_fn"):
        return "what is between its products is not in a function of its own"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm after each expert"
    if is_expert_parallel(module):
        return "its experts are on several devices"
    if any(True for c in module.children() for _ in itertools.chain(c.parameters(), c.buffers())):
        return "a child with parameters"
    biases = [n if n in parameters else "" for n in (f"{up}_bias", f"{DOWN}_bias")]
    if other := set(parameters) - {up, DOWN, *biases}:
        return f"a parameter of another kind ({min(other)})"
    if (strange := [n for n, p in parameters.items() if p.dtype not in DTYPES]) or len(
        {p.dtype for p in parameters.values()}
    ) > 1:
        return f"{strange[0]} is {parameters[strange[0]].dtype}" if strange else "parameters of several dtypes"
    return _shaped(module, parameters, up, biases, gated)


def _shaped(module, parameters, up: str, biases: list[str], gated: bool) -> ExpertsStructure | str:
    (e, a, b), (_, c, d) = parameters[up].shape, parameters[DOWN].shape
    ways = {False: (b, a, d, c), True: (a, b, c, d)}  # (in, out) of up, (in, out) of down
    said = getattr(module, "is_transposed", None)
    for transposed in (False, True) if said is None else (bool(said),):
        hidden, out, inner, back = ways[transposed]
        if back == hidden and out == (2 * inner if gated else inner):
            return ExpertsStructure(e, hidden, inner, up, DOWN, biases[0], biases[1], transposed, gated, None)
    return "its matrices do not go from one width to another and back"


def with_gating(s: ExpertsStructure, small: Any) -> ExpertsStructure:
    """The structure with the formula of its gate, where it is known. small: a stand-in of the module."""
    width = small._parameters[s.down].shape[1 if s.transposed else 2]
    p = torch.randn(6, 2 * width if s.gated else width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    p = torch.cat([p, 30 * p]).to(small._parameters[s.down].device)
    try:
        with torch.no_grad(), float64_reference():
            h = gate_function(small, s.gated)(p.clone())
            found = next((g for g in _formulas(small, s.gated) if _fits(g.plain(p), h)), None)
    except Exception as e:  # the proof will say it
        not_for_want_of_memory(e)
        found = None
    return replace(s, gating=found)


def _fits(ours: torch.Tensor, h: torch.Tensor) -> bool:
    return ours.shape == h.shape and bool((ours - h).abs().max() <= FORMULA_EPS * h.abs().max())


def _formulas(module: nn.Module, gated: bool) -> list[Gating]:
    """Every gate that this could be, plain ones first."""
    if not gated:
        return [Gating(act, "") for act in ACTIVATIONS]
    plain = [
        Gating(act, layout, swapped)
        for act in ACTIVATIONS
        for layout in ("chunk", "interleaved")
        for swapped in (False, True)
    ]
    numbers = [v for v in module.__dict__.values() if isinstance(v, float) and 0 < v < float("inf")]
    silu = [g for g in plain if g.act == "silu"]
    limits = [replace(g, limit=v) for g, v in itertools.product(plain, numbers)]
    scaled = [
        replace(g, limit=v, alpha=a, offset=o)
        for g, v, a, o in itertools.product(silu, [None, *numbers], numbers, (0.0, 1.0))
    ]
    return plain + limits + scaled
