"""y = (act(g) (u + o)) W_d^T,  g = x W_g^T,  u = x W_u^T, each with bias and adapters: a gated MLP as ONE autograd function.

    dh = dy W_d + adapters      (dg, du, h) = one launch from (dh, g, u)      dx = dg W_g + du W_u + adapters

Products and their gradients: _lora_group.py; activation, limit and offset o: glu.py. Kept for the backward: x (or the tensors its
`Recipe` recomputes it from), g, u and the three low-rank products; h = act(g) (u + o) is recomputed by the launch that
differentiates it. Stock keeps beside these act(g), h, a cast of x and one of h for each adapter, and a mask for each dropout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastft_kernels import _lora_group as group
from fastft_kernels import higher_order, lora_formula
from fastft_kernels._lora_group import Group, Kept
from fastft_kernels.activation import resolve
from fastft_kernels.glu import glu_bwd_recompute, glu_plain, glu_recompute
from fastft_kernels.lora_linear import Projection, again, input_needed, pack, saved_input, source_of, trainable
from fastft_kernels.recipe import Recipe


class _Spec(NamedTuple):
    inner: Group  # gate, up
    outer: Group  # down
    counts: tuple[int, int]  # tensors of each
    activation: str
    alpha: float | None
    limit: float | None
    up_offset: float

    @property
    def glu(self) -> dict:
        return {"activation": self.activation, "alpha": self.alpha, "limit": self.limit, "up_offset": self.up_offset}


def _any_trainable(g: Group, needs) -> bool:
    return any(trainable(g, needs, i) for i in range(len(g.projections)))


def _split(kept: Kept, g: Group, needs) -> list[torch.Tensor]:
    """What of Kept is saved: xA if the gradient of a B wants it, and the masks."""
    return [*([kept.xA] if kept.xA is not None and any(needs[a.B] for a in g.adapters) else []), *kept.masks]


def _join(tensors, draws) -> Kept:
    n_masks = sum(isinstance(d, int) for d in draws)
    low_rank, masks = tensors[: len(tensors) - n_masks], tensors[len(tensors) - n_masks :]
    return Kept(low_rank[0] if low_rank else None, draws, tuple(masks))


class _LoraMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec: _Spec, source: Recipe | None, x: torch.Tensor, *tensors: torch.Tensor):
        n1, n2 = spec.counts
        t1, t2 = tensors[:n1], tensors[n1:]
        want, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
        needs1, needs2 = needs[:n1], needs[n1 : n1 + n2]
        with group.exact_dtypes(x):
            (gate, up), kept1 = group.forward(spec.inner, t1, x)
            h = glu_recompute(gate, up, **spec.glu).view(*x.shape[:-1], -1 if x.numel() else gate.shape[-1])
            (y,), kept2 = group.forward(spec.outer, t2, h)
            xs: tuple[torch.Tensor, ...] = ()
            inside = want or _any_trainable(spec.inner, needs1)
            if input_needed(spec.inner, needs1) or (inside and not torch.compiler.is_compiling()):  # the latter for second derivatives
                xs = source.tensors if source is not None else (saved_input(spec.inner, x),)
        middle = (gate, up) if inside or input_needed(spec.outer, needs2) else ()
        saved1, saved2 = _split(kept1, spec.inner, needs1), _split(kept2, spec.outer, needs2)
        ctx.save_for_backward(*t1, *t2, *xs, *middle, *saved1, *saved2)
        ctx.counts = (len(xs), len(middle), len(saved1))
        ctx.spec, ctx.draws = spec, (kept1.draws, kept2.draws)
        ctx.recompute, ctx.formula = (None, None) if source is None else (source.recompute, source.differentiable)
        ctx.x_shape, ctx.x_dtype, ctx.inside = x.shape, x.dtype, inside
        # no view, to autograd: who called may write into the result
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx, dy):
        spec, (n1, n2), (n_xs, n_middle, n_saved1) = ctx.spec, ctx.spec.counts, ctx.counts
        saved = list(ctx.saved_tensors)
        t1, t2, xs, middle, saved1 = (_take(saved, n) for n in (n1, n2, n_xs, n_middle, n_saved1))
        kept1, kept2 = _join(saved1, ctx.draws[0]), _join(saved, ctx.draws[1])
        want, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
        needs1, needs2 = needs[:n1], needs[n1 : n1 + n2]
        if higher_order.wanted():
            return None, None, *_differentiable(ctx, dy, (t1, t2), xs, middle, (kept1, kept2))
        dx, grads1 = None, [None] * n1
        with group.exact_dtypes(dy):
            h_shape = (*ctx.x_shape[:-1], spec.outer.projections[0].layout.shape[1])
            outer = group.Backward(spec.outer, t2, needs2, kept2, (dy,), h_shape)
            dh = outer.input_gradient(ctx.inside, spec.inner.out)
            dgate = dup = h = None
            if ctx.inside:
                dgate, dup, h = glu_bwd_recompute(dh, *middle, **spec.glu)
            elif input_needed(spec.outer, needs2):
                h = glu_recompute(*middle, **spec.glu)
            del dh
            grads2 = outer.parameter_gradients(h if input_needed(spec.outer, needs2) else None)
            del h, outer, middle
            if ctx.inside:
                inner = group.Backward(spec.inner, t1, needs1, kept1, (dgate, dup), ctx.x_shape)
                dx = inner.input_gradient(want, ctx.x_dtype)
                x = None
                if n_xs and input_needed(spec.inner, needs1):
                    x = ctx.recompute(*xs) if ctx.recompute is not None else xs[0]
                grads1 = inner.parameter_gradients(x)
        return None, None, dx if dx is None else dx.view(ctx.x_shape), *grads1, *grads2


def _differentiable(ctx, dy, tensors, xs, middle, kept) -> list[torch.Tensor | None]:
    """The gradients of x and the parameters with a graph of their own."""
    spec, (t1, t2), n1 = ctx.spec, tensors, len(tensors[0])
    act, alpha = resolve(spec.activation, spec.alpha)
    shape = (*ctx.x_shape[:-1], spec.outer.projections[0].layout.shape[1])
    with group.exact_dtypes(dy):
        x = again("lora_mlp", ctx.formula, xs, ctx.needs_input_grad[2]) if xs else dy.new_zeros(ctx.x_shape, dtype=ctx.x_dtype)
        masks1 = lora_formula.masks_of(spec.inner, t1, kept[0], x.detach().contiguous())
        masks2 = lora_formula.masks_of(spec.outer, t2, kept[1], dy.new_empty(shape))

        def formula(x, *t):
            gate, up = lora_formula.outputs(spec.inner, t[:n1], x, masks1) if xs else middle or (None, None)
            if gate is None:  # only xA of the outer projection counts
                return lora_formula.outputs(spec.outer, t[n1:], dy.new_zeros(shape), masks2, kept[1].xA)
            h = glu_plain(gate.view(shape), up.view(shape), act, alpha, spec.limit, spec.up_offset)
            return lora_formula.outputs(spec.outer, t[n1:], h, masks2)

        return higher_order.gradients(formula, (x, *t1, *t2), ctx.needs_input_grad[2:], (dy,))


def _take(items: list, n: int) -> list:
    """The first n items, removed."""
    head = items[:n]
    del items[:n]
    return head


def lora_mlp(
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
    adapter_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    recipe: Recipe | None = None,
) -> torch.Tensor:
    """y [..., out] of x [..., in]: down(act(gate(x)) * (up(x) + up_offset)).

    activation, alpha, limit, up_offset: as in `glu`. The dtypes and `recipe`: as in `lora_linear`, for each of the three
    projections; out_dtype is also the dtype between them. Dropout draws in the order gate, up, down.
    Differentiable in x and in every tensor of the projections that is a parameter; only gradients that are asked for are
    computed. Nothing is modified. ValueError on shapes that do not fit and for what `glu` refuses.
    """
    inner, t1 = pack("lora_mlp", x.shape[-1], x.dtype, (gate, up), compute_dtype, adapter_dtype, out_dtype)
    width, other = (p.layout.shape[0] for p in inner.projections)
    if width != other:
        raise ValueError(f"lora_mlp: want gate and up of one width, got {width} and {other}")
    outer, t2 = pack("lora_mlp", width, inner.out, (down,), compute_dtype, adapter_dtype, out_dtype)
    spec = _Spec(inner, outer, (len(t1), len(t2)), activation, alpha, limit, float(up_offset))
    return _LoraMLP.apply(spec, source_of(inner, t1, x, recipe), x, *t1, *t2)
