"""y = down(act(gate(x)) up(x)): a gated MLP with one adapter on each of its three projections, as one function.

    xA  = x [A_g; A_u]^T          gate = x W_g^T + b_g        up = x W_u^T + b_u
    h   = act(g) (u + o)          g, u: gate and up with their adapters (`adapted_glu`: they exist on the chip alone)
    hA  = h A_d^T                 y = h W_d^T + b_d + s_d hA B_d^T

Kept for the backward: x (or what it is recomputed from), xA, gate, up, hA. Between the large products the adapters
of gate, up and down cost no pass over a matrix [T, N] but reading h for hA, and dgate and dup for dxA, where
`lora_linear`, `glu` and `lora_linear` one after the other take fourteen.

The base is frozen; its weights may be of any form of `weights`. Values are those of the separate functions to rounding:
g, u and dh are not rounded to 16 bits on their way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastft_kernels.lora import formula as lora_formula
from fastft_kernels.lora import group
from fastft_kernels.lora.group import GroupTensors, Job, add_product, exact_dtypes, multiply
from fastft_kernels.lora.lora_linear import Projection, again, deliver, pack, saved_input, source_of
from fastft_kernels.lora.plain_group import product, product_into, rows
from fastft_kernels.mlp.adapted_glu import MAX_RANK, adapted_glu_bwd, adapted_glu_fwd, adapted_glu_sums
from fastft_kernels.mlp.glu import GluSettings, glu_plain, glu_settings
from fastft_kernels.quant.weights import expand
from fastft_kernels.recompute.recomputation import Recomputation
from fastft_kernels.recompute.replay import REPLAY
from fastft_kernels.runtime import higher_order
from fastft_kernels.runtime.compat import apply_directly
from fastft_kernels.runtime.dispatch import wider


class MlpTensors(NamedTuple):
    """An MLP without its tensors, which are `first`'s and then `last`'s. n: how many are first's."""

    first: GroupTensors
    last: GroupTensors
    n: int
    form: GluSettings

    def split(self, t: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """The tensors of gate and up, and those of down."""
        return t[: self.n], t[self.n :]


def unfit(m: MlpTensors, t: Sequence[torch.Tensor]) -> str:
    """Why these projections cannot run as one function; empty if they can."""
    slots = (*m.first.projections, *m.last.projections)
    if len(m.first.projections) != 2 or any(len(p.adapters) != 1 for p in slots):
        return "not one adapter on each of gate, up and down"
    if any(p.layout.kind == "float8" for p in slots):
        return "an FP8 base, whose products may be of FP8 matrices"
    adapters = (*m.first.adapters, *m.last.adapters)
    if any(a.p > 0 or a.bias >= 0 for a in adapters):
        return "an adapter drops out or has a bias"
    if any(a.rank > MAX_RANK for a in adapters):
        return f"an adapter's rank is above {MAX_RANK}"
    own = {i for a in m.first.adapters for i in (a.A, a.B)} | {m.n + i for a in m.last.adapters for i in (a.A, a.B)}
    if any(x.requires_grad != (i in own) for i, x in enumerate(t)):
        return "a base weight learns, or an adapter does not"
    dtypes = {g for part in (m.first, m.last) for g in (part.compute, part.lora, part.out)}
    if len(dtypes) != 1 or len({t[i].dtype for i in own}) != 1:
        return "its parts are of several dtypes"
    return ""


class Kept(NamedTuple):
    """What the forward leaves beside x and the parameters."""

    xA: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    hA: torch.Tensor


class Operands(NamedTuple):
    """The adapters' matrices in the dtype of the products. A: gate's and up's, one above the other."""

    A: torch.Tensor
    Bg: torch.Tensor
    Bu: torch.Tensor
    Ad: torch.Tensor
    Bd: torch.Tensor
    scratch: torch.Tensor | None


def _operands(m: MlpTensors, t: Sequence[torch.Tensor]) -> Operands:
    (gate, up), (down,), dtype = m.first.adapters, m.last.adapters, m.first.compute
    of_down = t[m.n :]
    (A,), Bs, scratch = group.operands(
        [t[gate.A], t[up.A]], dtype, [t[gate.B], t[up.B], of_down[down.A], of_down[down.B]], dtype, stack=True
    )
    return Operands(A, *Bs, scratch)


def _started(m: MlpTensors, t: Sequence[torch.Tensor], x: torch.Tensor) -> tuple[Kept, torch.Tensor, torch.Tensor]:
    """(what is kept, h, B_d): all but the last product."""
    o = _operands(m, t)
    (gate, up), first = m.first.projections, t[: m.n]
    xc = rows(x).to(m.first.compute)
    xA = torch.mm(xc, o.A.t())
    products = [group.base(m.first, p, first, xc, m.first.compute)[0] for p in (gate, up)]
    h = adapted_glu_fwd(*products, xA, o.Bg, o.Bu, *_scales(m), *m.form)
    return Kept(xA, *products, torch.mm(h, o.Ad.t())), h, o.Bd


def _scales(m: MlpTensors) -> tuple[float, float]:
    gate, up = m.first.adapters
    return gate.scaling, up.scaling


def _finished(m: MlpTensors, t: Sequence[torch.Tensor], h: torch.Tensor, hA: torch.Tensor, Bd: torch.Tensor):
    """y [T, out]"""
    (down,) = m.last.projections
    y, _ = group.base(m.last, down, t[m.n :], h, m.last.compute)
    return add_product(y, hA, Bd.t(), m.last.compute, down.adapters[0].scaling)


class _AdaptedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, m: MlpTensors, source: Recomputation | None, x: torch.Tensor, *t: torch.Tensor):
        with exact_dtypes(x):
            kept, h, Bd = _started(m, t, x)
            _remember(ctx, m, source, x, t, kept)
            y = _finished(m, t, h, kept.hA, Bd)
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy, 0)


class _KeepMlp(torch.autograd.Function):
    """The first half: saves the same tensors in the same order and leaves out the last product. Returns a stand-in of
    the output's shape, without memory. started: an empty list that receives what the last product needs."""

    @staticmethod
    def forward(ctx, m: MlpTensors, source: Recomputation | None, x: torch.Tensor, started: list, *t: torch.Tensor):
        with exact_dtypes(x):
            kept, h, Bd = _started(m, t, x)
            _remember(ctx, m, source, x, t, kept)
        started += (h, kept.hA, Bd)
        width = m.last.projections[0].layout.shape[0]
        return x.new_empty((), dtype=m.last.out).expand(*x.shape[:-1], width)

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy, 1)


def _remember(ctx, m: MlpTensors, source: Recomputation | None, x: torch.Tensor, t, kept: Kept) -> None:
    xs = source.tensors if source is not None else (saved_input(m.first, x),)
    ctx.recompute, ctx.formula = (None, None) if source is None else (source.recompute, source.differentiable)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*t, *xs, *kept)
    ctx.m, ctx.n_t, ctx.n_xs, ctx.x_shape, ctx.x_dtype = m, len(t), len(xs), x.shape, x.dtype


def _gradients(ctx, dy: torch.Tensor | None, more: int) -> tuple[torch.Tensor | None, ...]:
    """One gradient, or None, for each argument of the forward. more: arguments between x and the tensors."""
    if dy is None:
        return (None,) * len(ctx.needs_input_grad)
    m, saved = ctx.m, ctx.saved_tensors
    n = ctx.n_t
    t, xs, kept = saved[:n], saved[n : n + ctx.n_xs], Kept(*saved[n + ctx.n_xs :])
    want, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[3 + more :]
    if higher_order.wanted():
        x = again("adapted_mlp", ctx.formula, xs, want)
        with exact_dtypes(dy):
            dx, *grads = higher_order.gradients(lambda x, *t: (formula(m, t, x),), (x, *t), (want, *needs), (dy,))
        return None, None, dx, *(None,) * more, *grads
    with exact_dtypes(dy):
        dx, grads = backward(m, t, kept, dy, xs, ctx.recompute, ctx.x_dtype if want else None)
    return None, None, None if dx is None else dx.view(ctx.x_shape), *(None,) * more, *grads


def backward(m: MlpTensors, t, kept: Kept, dy, xs, recompute, dtype: torch.dtype | None):
    """(dx [T, in] in `dtype`, or None where that is None; the gradient of each of the tensors, or None)."""
    first, last = m.split(t)
    (gate, up), (down,), compute = m.first.projections, m.last.projections, m.first.compute
    a_gate, a_up, a_down = *m.first.adapters, *m.last.adapters
    o = _operands(m, t)
    dyc = rows(dy).to(compute)
    dhA = product(dyc, o.Bd, a_down.scaling)
    dh0 = torch.mm(dyc, expand(down.layout, last[down.weight : down.weight + down.n_weight], compute))
    dgate, dup, parts = adapted_glu_bwd(dh0, dhA, kept.gate, kept.up, kept.xA, o.Bg, o.Bu, o.Ad, *_scales(m), *m.form)
    del dh0
    grads: list[torch.Tensor | None] = [None] * len(t)
    sums, start = adapted_glu_sums(parts, first[a_gate.B].dtype), 0
    for i, like in ((a_gate.B, first[a_gate.B]), (a_up.B, first[a_up.B]), (m.n + a_down.A, last[a_down.A])):
        grads[i] = sums[start : start + like.numel()].view(like.shape)
        start += like.numel()
    dxA = torch.empty_like(kept.xA)
    product_into(dxA[:, : a_gate.rank], dgate, o.Bg, a_gate.scaling)
    product_into(dxA[:, a_gate.rank :], dup, o.Bu, a_up.scaling)
    dx = None
    if dtype is not None:
        total = wider(dtype, compute)
        for p, d in ((gate, dgate), (up, dup)):
            dx = add_product(dx, d, expand(p.layout, first[p.weight : p.weight + p.n_weight], compute), total)
        dx = add_product(dx, dxA, o.A, total).to(dtype)
    del dgate, dup
    x = rows(recompute(*xs) if recompute is not None else xs[0]).to(compute)
    jobs = [
        Job([a_gate, a_up], dxA, x, 1.0, first[a_gate.A].dtype),
        Job([a_down], dyc, kept.hA, a_down.scaling, last[a_down.B].dtype),
    ]
    dA, grads[m.n + a_down.B] = multiply(jobs, o.scratch)
    grads[a_gate.A], grads[a_up.A] = dA.split([a_gate.rank, a_up.rank])
    return dx, grads


def formula(m: MlpTensors, t: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """y [..., out] in plain torch, differentiable any number of times."""
    first, last = m.split(t)
    gate, up = lora_formula.outputs(m.first, first, x, ())
    h = glu_plain(gate, up, *m.form)
    return lora_formula.outputs(m.last, last, h, ())[0]


_apply = apply_directly(_AdaptedMLP)


def run(m: MlpTensors, t: Sequence[torch.Tensor], x: torch.Tensor, recomputation: Recomputation | None) -> torch.Tensor:
    """`adapted_mlp` of what `pack_mlp` gave, outside torch.func transforms and compilers."""
    source = source_of(m.first, t[: m.n], x, recomputation)
    if not REPLAY.depth:
        return _apply(m, source, x, *t)
    started: list = []
    stand_in = _KeepMlp.apply(m, source, x, started, *t)
    with torch.no_grad(), exact_dtypes(x):
        y = _finished(m, t, *started)
    return deliver(stand_in, y)


def pack_mlp(
    features: int, dtype: torch.dtype, gate: Projection, up: Projection, down: Projection, form: GluSettings, **dtypes
) -> tuple[MlpTensors, list[torch.Tensor]]:
    """The description of an MLP over inputs [..., features] of `dtype`, and its tensors. dtypes: as `pack`'s.
    ValueError where shapes do not fit."""
    first, t = pack("adapted_mlp", features, dtype, [gate, up], **dtypes)
    width = first.projections[0].layout.shape[0]
    last, of_down = pack("adapted_mlp", width, first.out, [down], **dtypes)
    return MlpTensors(first, last, len(t), form), [*t, *of_down]


def adapted_mlp(
    x: torch.Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    *,
    alpha: float | None = None,
    limit: float | None = None,
    up_offset: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    recomputation: Recomputation | None = None,
) -> torch.Tensor:
    """down(act(gate(x)) (up(x) + up_offset)), each of the three with one adapter.

    Args:
        x: [..., in], floating, not modified.
        gate, up, down: weights [N, in], [N, in], [out, N], frozen, with or without bias; one adapter each that learns,
            without dropout or bias, of a rank up to MAX_RANK; all adapters of one dtype.
        activation, alpha, limit, up_offset: as `glu`'s.
        compute_dtype: of all products; None is x's dtype, which the adapters must then have.
        recomputation: how to recompute x in the backward (`recomputation_of(x)`); None saves x.

    Returns:
        y [..., out] in the compute dtype. Differentiable in x and the adapters' A and B, any number of times.

    Raises:
        ValueError: shapes do not fit, or the projections are not as said above.
    """
    form = glu_settings(activation, alpha, limit, up_offset)
    m, t = pack_mlp(x.shape[-1], x.dtype, gate, up, down, form, compute_dtype=compute_dtype)
    if why := unfit(m, t):
        raise ValueError(f"adapted_mlp: {why}; want gate, up and down with one adapter each that alone learns")
    return run(m, t, x, recomputation)
