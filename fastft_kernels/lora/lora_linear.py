"""y_i = x W_i^T + b_i + sum_a s_a (drop_a(x) A_a^T B_a^T + c_a): adapted projections of one input, as ONE autograd
function.

Gradients: group.py. The input is saved once for the whole group, in the smaller of its own and the compute dtype;
or not at all, where a `Recomputation` tells how to recompute it from tensors that are saved anyway. Beside it only x
A^T is kept (rank values a token), never a cast copy of a parameter, never a dropout mask (masks are drawn again), never
an expanded weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastft_kernels.lora import formula as lora_formula
from fastft_kernels.lora import group, plain_group
from fastft_kernels.lora.group import AdapterSlot, GroupTensors, ProjectionSlot, SavedProjections
from fastft_kernels.quant.weights import FrozenWeight, as_weight
from fastft_kernels.recompute.recomputation import Recomputation
from fastft_kernels.recompute.replay import REPLAY
from fastft_kernels.runtime import higher_order
from fastft_kernels.runtime.compat import apply_directly, is_dynamo_compiling, transforms_active


@dataclass(frozen=True)
class Adapter:
    """s (drop(x) A^T B^T + c): A [r, in], B [out, r], c [out] or None; dropout is the probability in force now (0 in
    eval)."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Projection:
    """W [out, in] (a tensor, trainable or not, or another form of weights.py), bias [out] or None, and the adapters in
    force."""

    weight: torch.Tensor | FrozenWeight
    bias: torch.Tensor | None = None
    adapters: tuple[Adapter, ...] = ()


def pack(
    where: str,
    features: int,
    dtype: torch.dtype,
    projections: Sequence[Projection],
    compute_dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    dropout_dtype: torch.dtype | None = None,
) -> tuple[GroupTensors, list[torch.Tensor]]:
    """The description of a group over inputs [..., features] of `dtype`, and its tensors. ValueError where shapes do
    not fit."""
    compute = compute_dtype or dtype
    if adapter_dtype is None:
        adapter_dtype = compute
        if compute_dtype is None:
            for a in (a for p in projections for a in p.adapters):
                adapter_dtype = group.wider(group.wider(adapter_dtype, a.A.dtype), a.B.dtype)
    tensors: list[torch.Tensor] = []
    slots, column = [], 0
    for p in projections:
        weight = as_weight(p.weight)
        out, width = weight.shape
        if width != features:
            raise ValueError(
                f"{where}: want a weight [out, {features}] for an input [..., {features}], got {(out, width)}"
            )
        held, index = weight.tensors(), len(tensors)
        tensors += held
        bias, adapters = _place(tensors, p.bias), []
        for a in p.adapters:
            A, B = a.A, a.B
            r = A.shape[0]
            if A.shape != (r, width) or B.shape != (out, r):
                raise ValueError(
                    f"{where}: want A [r, {width}] and B [{out}, r], got {tuple(A.shape)} and {tuple(B.shape)}"
                )
            at = len(tensors)
            tensors += (A, B)
            adapters.append(
                AdapterSlot(r, column, float(a.scaling), float(a.dropout), at, at + 1, _place(tensors, a.bias))
            )
            column += r
        slots.append(ProjectionSlot(weight.layout(), index, len(held), bias, tuple(adapters)))
    adapters = tuple(a for p in slots for a in p.adapters)
    plain = (
        dtype == compute == adapter_dtype == (out_dtype or compute)
        and all(t.dtype == dtype for t in tensors)
        and all(p.layout.kind == "dense" for p in slots)
        and not any(a.p > 0 or a.bias >= 0 for a in adapters)
    )
    g = GroupTensors(compute, adapter_dtype, out_dtype or compute, tuple(slots), column, adapters, dropout_dtype, plain)
    return g, tensors


def _place(tensors: list[torch.Tensor], new: torch.Tensor | None) -> int:
    """The index at which `new` is put, -1 for None."""
    if new is None:
        return -1
    tensors.append(new)
    return len(tensors) - 1


def saved_input(g: GroupTensors, x: torch.Tensor) -> torch.Tensor:
    """x as the backward will want it: in the compute dtype where that is smaller and no product of the backward is
    wider."""
    if g.plain:
        return x
    return x.to(g.compute) if g.lora == g.compute and g.compute.itemsize < x.element_size() else x


def input_needed(g: GroupTensors, needs: Sequence[bool]) -> bool:
    """Does a gradient that is wanted use x?"""
    for p in g.projections:
        if needs[p.weight]:
            return True
    for a in g.adapters:
        if needs[a.A]:
            return True
    return False


def trainable(g: GroupTensors, needs: Sequence[bool], index: int) -> bool:
    """Does projection `index` have a parameter of its own that wants a gradient?"""
    p = g.projections[index]
    own = [p.weight, p.bias, *(i for a in p.adapters for i in (a.A, a.B, a.bias))]
    return any(i >= 0 and needs[i] for i in own)


def source_of(
    g: GroupTensors, t: Sequence[torch.Tensor], x: torch.Tensor, recomputation: Recomputation | None
) -> Recomputation | None:
    """How the backward gets x, where x itself is not saved: its recomputation, or a narrower copy, both connected to
    x's graph."""
    if recomputation is not None or g.plain or torch.compiler.is_compiling():
        return recomputation
    if not (x.requires_grad and torch.is_grad_enabled()):
        return None
    narrow = g.lora == g.compute and g.compute.itemsize < x.element_size()
    return lora_formula.narrowed(x, g.compute) if narrow and input_needed(g, [p.requires_grad for p in t]) else None


def again(where: str, formula, xs: Sequence[torch.Tensor], want: bool) -> torch.Tensor:
    """x from what was saved, connected where its gradient is wanted."""
    x = xs[0] if formula is None else formula(*xs)
    if want and not x.requires_grad:
        raise RuntimeError(lora_formula.UNKEPT.format(where))
    return x


def _remember(
    ctx,
    g: GroupTensors,
    source: Recomputation | None,
    x: torch.Tensor,
    parameters: tuple[torch.Tensor, ...],
    xA: torch.Tensor | None,
    draws: tuple = (),
    masks: tuple[torch.Tensor, ...] = (),
    first: int = 3,
) -> tuple[int, ...]:
    """Saves what the backward needs; the indices of the projections whose output has no gradient. first: the
    parameters' place among the function's arguments."""
    n = len(parameters)
    want, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[first : first + n]
    xs: tuple[torch.Tensor, ...] = ()
    trained_B = False
    for a in g.adapters:
        trained_B = trained_B or needs[a.B]
    # the latter for second derivatives: a recomputation costs nothing
    if input_needed(g, needs) or (want and trained_B and source is not None):
        xs = source.tensors if source is not None else (saved_input(g, x),)
    kept_xA = (xA,) if xA is not None and trained_B else ()
    ctx.save_for_backward(*parameters, *xs, *kept_xA, *masks)
    ctx.recompute, ctx.formula = (None, None) if source is None else (source.recompute, source.differentiable)
    ctx.g, ctx.draws, ctx.counts = g, draws or (None,) * len(g.adapters), (n, len(xs), 1 if kept_xA else 0)
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.set_materialize_grads(False)
    return () if want else tuple(i for i in range(len(g.projections)) if not trainable(g, needs, i))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g: GroupTensors, source: Recomputation | None, x: torch.Tensor, *parameters: torch.Tensor):
        if g.plain and not torch.is_autocast_enabled(x.device.type):
            ys, xA = plain_group.forward(g, parameters, x)
            constant = _remember(ctx, g, source, x, parameters, xA)
        else:
            with group.exact_dtypes(x):
                ys, kept = group.forward(g, parameters, x, source)
                constant = _remember(ctx, g, source, x, parameters, *kept)
            ys = _shaped(ys, x)
        if constant:
            ctx.mark_non_differentiable(*(ys[i] for i in constant))
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        return _gradients(ctx, dys)


def _gradients(ctx, dys, first: int = 3) -> tuple[torch.Tensor | None, ...]:
    """One gradient, or None, for each argument of the forward; the parameters begin at argument `first`."""
    n, n_xs, n_xA = ctx.counts
    saved = ctx.saved_tensors
    parameters, xs, rest = saved[:n], saved[n : n + n_xs], saved[n + n_xs :]
    if not any(dy is not None for dy in dys):
        return (None,) * len(ctx.needs_input_grad)
    want, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[first : first + n]
    kept = SavedProjections(rest[0] if n_xA else None, ctx.draws, rest[n_xA:])
    if higher_order.wanted():
        dx, *grads = _differentiable(ctx, dys, parameters, xs, kept, want, needs)
        return None, None, dx, *(None,) * (first - 3), *grads
    if ctx.g.plain and not torch.is_autocast_enabled(parameters[0].device.type):
        work = plain_group.PlainBackward(ctx.g, parameters, needs, kept.xA, dys)
        dx, x = work.input_gradient(want), None
        if n_xs and input_needed(ctx.g, needs):
            x = ctx.recompute(*xs) if ctx.recompute is not None else xs[0]
        grads = work.parameter_gradients(x)
        return None, None, dx if dx is None else dx.view(ctx.x_shape), *(None,) * (first - 3), *grads
    with group.exact_dtypes(next(dy for dy in dys if dy is not None)):
        work = group.Backward(ctx.g, parameters, needs, kept, dys, ctx.x_shape)
        dx = work.input_gradient(want, ctx.x_dtype)
        x = None
        if n_xs and input_needed(ctx.g, needs):
            x = ctx.recompute(*xs) if ctx.recompute is not None else xs[0]
        grads = work.parameter_gradients(x)
    dx = dx if dx is None else dx.view(ctx.x_shape)
    return None, None, dx, *(None,) * (first - 3), *grads


def _differentiable(ctx, dys, parameters, xs, kept: SavedProjections, want: bool, needs) -> list[torch.Tensor | None]:
    """The gradients of x and the parameters with a graph of their own."""
    g, xA = ctx.g, None
    if xs:
        x = again("lora_linear", ctx.formula, xs, want)
    elif want and kept.xA is not None:
        raise RuntimeError(lora_formula.UNKEPT.format("lora_linear"))
    else:  # the outputs are linear in x, or x is a constant of which only xA counts
        x, xA = next(dy for dy in dys if dy is not None).new_zeros(ctx.x_shape, dtype=ctx.x_dtype), kept.xA
    with group.exact_dtypes(x):
        masks = lora_formula.masks_of(g, parameters, kept, x.detach().contiguous())
        formula = lambda x, *t: lora_formula.outputs(g, t, x, masks, xA)
        return higher_order.gradients(formula, (x, *parameters), (want, *needs), dys)


def _shaped(ys: Sequence[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[T, out_i] -> [..., out_i], no views to autograd: who called may write into the result."""
    return tuple(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])) for y in ys)


_apply = apply_directly(_LoraLinear)


class _Keep(torch.autograd.Function):
    """The first half of _LoraLinear: saves the same tensors in the same order, and multiplies nothing but xA. Returns
    stand-ins for the outputs, of their shapes and without memory. started: an empty list that receives the state with
    which to go on."""

    @staticmethod
    def forward(
        ctx, g: GroupTensors, source: Recomputation | None, x: torch.Tensor, started: list, *parameters: torch.Tensor
    ):
        with group.exact_dtypes(x):
            started.append(group.low_rank(g, parameters, x, source))
            constant = _remember(ctx, g, source, x, parameters, *started[0].kept, first=4)
        stand_ins = tuple(x.new_empty((), dtype=g.out).expand(*x.shape[:-1], p.layout.shape[0]) for p in g.projections)
        ctx.mark_non_differentiable(*(stand_ins[i] for i in constant))
        return stand_ins

    @staticmethod
    def backward(ctx, *dys):
        return _gradients(ctx, dys, first=4)


class _Deliver(torch.autograd.Function):
    """The second half: the output in the place of its stand-in."""

    @staticmethod
    def forward(ctx, stand_in: torch.Tensor, y: torch.Tensor):
        return torch.ops.aten._unsafe_view(y, stand_in.shape)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


def _saved_first(
    g: GroupTensors, source: Recomputation | None, x: torch.Tensor, *tensors: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What _LoraLinear returns, in two halves: a recomputation that stops at the last saved tensor never reaches the
    products."""
    started: list = []
    stand_ins = _Keep.apply(g, source, x, started, *tensors)
    with torch.no_grad(), group.exact_dtypes(x):
        ys = group.outputs(g, tensors, started[0])
    return tuple(map(deliver, stand_ins, ys))


def deliver(stand_in: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y in the place of its stand-in, with the stand-in's graph."""
    return _Deliver.apply(stand_in, y) if stand_in.requires_grad else y.view(stand_in.shape)


def lora_linear(
    x: torch.Tensor,
    projections: Sequence[Projection],
    *,
    compute_dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    dropout_dtype: torch.dtype | None = None,
    recomputation: Recomputation | None = None,
) -> tuple[torch.Tensor, ...]:
    """Linear layers of one input, with their adapters: W_i x + bias_i + sum of s (drop(x) A^T B^T + c).

    Args:
        x: [..., in], floating.
        projections: each with W [out_i, in], its bias, and its adapters in force.
        compute_dtype: of the base products; None is x's dtype (stock without autocast), under autocast give autocast's
            dtype.
        adapter_dtype: of the adapters' products; None is compute_dtype if that is given, else the widest of x and the
            adapters (stock without autocast computes float32 adapters in float32).
        out_dtype: of the results; None is the dtype of the base products.
        dropout_dtype: of the x that stock's dropout is given, on which its random stream depends on a GPU; None is each
            A's.
        recomputation: how to recompute x in the backward (`recomputation_of(x)`); None saves x.

    Returns:
        One tensor [..., out_i] in out_dtype for each projection. Differentiable in x, in a weight and bias that are
        tensors, in A, B and adapter biases; each gradient in its tensor's dtype; only those asked for are computed.
        Dropout draws from torch's default stream, in the order of the projections and their adapters, as
        torch.nn.functional.dropout on x in dropout_dtype would. Nothing is modified.

    Raises:
        ValueError: shapes do not fit.
    """
    g, tensors = pack(
        "lora_linear", x.shape[-1], x.dtype, projections, compute_dtype, adapter_dtype, out_dtype, dropout_dtype
    )
    if not is_dynamo_compiling() and transforms_active():
        return _LoraLinear.apply(g, None, x, *tensors)  # torch says why it cannot
    return run(g, tensors, x, recomputation)


def run(
    g: GroupTensors, tensors: Sequence[torch.Tensor], x: torch.Tensor, recomputation: Recomputation | None
) -> tuple[torch.Tensor, ...]:
    """`lora_linear` of what `pack` gave, outside torch.func transforms. g holds for other tensors of the same shapes,
    dtypes and settings too."""
    source = source_of(g, tensors, x, recomputation)
    if is_dynamo_compiling():
        return _LoraLinear.apply(g, source, x, *tensors)
    return _saved_first(g, source, x, *tensors) if REPLAY.depth else _apply(g, source, x, *tensors)
