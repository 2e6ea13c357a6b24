"""y[t] = sum over j of w[t, j] (h W_down[e])[t, j],  h = gating(x[t] W_up[e]),  e = index[t, j]: the experts of a
mixture, with their adapters, as ONE autograd function.

Rows are sorted by expert once. With dy_s = dy[token of s], u = dy_s W_down^T (adapters included, `projection`):
    dw = <h, u> + <b_down, dy_s>       dp = w gating'(p) u       dx = the sum of each token's rows of dp W_up^T
Kept are x, the order of the rows, the first product p and the low-rank products: not the permuted x, not h (computed
again from p), not the rows before the weighted sum (dw is taken from u), nothing of the size of the weights. Sums run
in a fixed order: the same inputs give the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastft_kernels.experts import projection
from fastft_kernels.experts.gating import Gating
from fastft_kernels.experts.grouped_mm import Groups
from fastft_kernels.experts.projection import ExpertsProjection, ExpertsSlot
from fastft_kernels.experts.routing import Routing, combine, route
from fastft_kernels.lora.group import exact_dtypes
from fastft_kernels.runtime import higher_order
from fastft_kernels.runtime.dispatch import math_dtype


class ExpertsForm(NamedTuple):
    """up, down: where their tensors are. experts: how many. dtype: of the products."""

    up: ExpertsSlot
    down: ExpertsSlot
    gating: Gating
    experts: int
    dtype: torch.dtype

    @property
    def has_bias(self) -> bool:
        return self.up.has_bias or self.down.has_bias


# reference


def grouped_experts_ref(
    form: ExpertsForm, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, t: Sequence[torch.Tensor]
) -> torch.Tensor:
    """y [T, H] in the dtype of x, one expert at a time, in plain torch; differentiable any number of times."""
    y = x.new_zeros(x.shape, dtype=math_dtype(form.dtype))
    for e in range(form.experts):
        token, j = torch.where(index == e)
        if len(token):
            p = _plain_product(form.up, t, x[token].to(form.dtype), e)
            rows = _plain_product(form.down, t, form.gating.plain(p).to(form.dtype), e)
            y = y.index_add(0, token, rows.to(y.dtype) * weights[token, j, None].to(y.dtype))
    return y.to(x.dtype)


def _plain_product(slot: ExpertsSlot, t: Sequence[torch.Tensor], x: torch.Tensor, e: int) -> torch.Tensor:
    w = t[slot.at][e]
    y = x @ (w if slot.transposed else w.t())
    for (first, second), scaling in zip(slot.adapters, slot.scalings):
        y = y + scaling * (x @ t[first][e].to(x.dtype)) @ t[second][e].to(x.dtype)
    return y + t[slot.bias][e].to(y.dtype) if slot.has_bias else y


# autograd


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form: ExpertsForm, index, x, weights, *t):
        with exact_dtypes(x):
            routing = route(index, form.experts, form.dtype)
            ids = _ids(form, routing)
            p, low_up = projection.forward(form.up, t, x.to(form.dtype)[routing.tokens()], ids, routing.groups)
            rows, low_down = projection.forward(form.down, t, form.gating.forward(p), ids, routing.groups)
            y = combine(rows, routing.places(), weights * routing.inside, x.dtype)
        needs = ctx.needs_input_grad[4:]
        kept_x = x if form.up.needs_input(needs) else None
        low_up = low_up if form.up.needs_low_rank(needs) else None
        low_down = low_down if form.down.needs_low_rank(needs) else None
        ctx.save_for_backward(index, routing.order, routing.groups.ends, kept_x, weights, p, low_up, low_down, *t)
        ctx.form, ctx.host, ctx.x_dtype = form, routing.groups.host, x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        form: ExpertsForm = ctx.form
        index, order, ends, x, weights, p, low_up, low_down, *t = ctx.saved_tensors
        want_x, want_w, *needs = ctx.needs_input_grad[2:]
        if higher_order.wanted():
            return None, None, *_differentiable(form, index, x, weights, t, (want_x, want_w, *needs), dy)
        inside = (index >= 0) & (index < form.experts)
        routing = Routing(order, Groups(ends, ctx.host), inside)
        with exact_dtypes(dy):
            dx, dw, grads = _gradients(form, routing, x, weights, p, (low_up, low_down), t, (want_x, want_w, needs), dy)
        return None, None, None if dx is None else dx.to(ctx.x_dtype), dw, *grads


def _gradients(form: ExpertsForm, routing: Routing, x, weights, p, lows, t, wants, dy):
    """(dx or None, dw or None, one gradient or None for each of t)."""
    (want_x, want_w, needs), groups = wants, routing.groups
    w = routing.sorted_weights(weights)
    dy = dy.to(form.dtype)[routing.tokens()]
    dlow = projection.backward_low_rank(form.down, t, dy, groups)
    dh = projection.input_gradient(form.down, t, dy, dlow, groups)
    dp, h = form.gating.backward(p, dh, w)
    dw = _weights_gradient(form, routing, weights, h, dh, dy, t) if want_w else None
    del dh
    down = projection.parameter_gradients(form.down, t, needs, lambda h=h: h, lows[1], dy, dlow, w, groups)
    del dy, h, dlow
    dlow = projection.backward_low_rank(form.up, t, dp, groups)
    tokens = lambda: x.to(form.dtype)[routing.tokens()]
    up = projection.parameter_gradients(form.up, t, needs, tokens, lows[0], dp, dlow, None, groups)
    dx = None
    if want_x:
        dx = combine(projection.input_gradient(form.up, t, dp, dlow, groups), routing.places(), None, form.dtype)
    return dx, dw, [*up, *down]


def _weights_gradient(form: ExpertsForm, routing: Routing, weights, h, dh, dy, t) -> torch.Tensor:
    """dw [T, k]"""
    f = math_dtype(form.dtype)
    dw = (h.to(f) * dh.to(f)).sum(1)
    if form.down.has_bias:
        dw += (t[form.down.bias].to(dy.dtype)[_ids(form, routing)].to(f) * dy.to(f)).sum(1)
    return (dw[routing.places()] * routing.inside).to(weights.dtype)


def _ids(form: ExpertsForm, routing: Routing) -> torch.Tensor | None:
    """The expert of each sorted row, where a bias is added."""
    if not form.has_bias:
        return None
    rows = torch.arange(len(routing.order), device=routing.order.device, dtype=torch.int32)
    return torch.searchsorted(routing.groups.ends, rows, right=True)


def _differentiable(form: ExpertsForm, index, x, weights, t, wants, dy):
    if x is None:
        raise RuntimeError(
            "grouped_experts: what a second derivative needs was not kept for the backward; want the stock modules: "
            "fastft.unpatch(model)"
        )
    formula = lambda x, weights, *t: grouped_experts_ref(form, x, index, weights, t)
    return higher_order.gradients(formula, (x, weights, *t), wants, (dy,))


# public


def grouped_experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: ExpertsProjection,
    down: ExpertsProjection,
    gating: Gating,
) -> torch.Tensor:
    """A block of experts, from hidden states and a routing to their weighted sum; formulas in the module docstring.

    Args:
        x: [T, H], floating.
        index: integer [T, k], the experts of each token (one that is none counts for nothing).
        weights: [T, k], floating.
        up: H -> gate and up (or the one input of the activation).
        down: back to H.
        gating: what is between the two products.

    Returns:
        y [T, H] in the dtype of x. Products run in the dtype of up's weight, which is down's; the weighted sum in
        float32. Differentiable in x, weights, and every tensor of both projections, only in what is asked for; nothing
        is modified.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    form = _form(x, index, weights, up, down, gating)
    return _Experts.apply(form, index, x, weights, *up.tensors(), *down.tensors())


def _form(x, index, weights, up: ExpertsProjection, down: ExpertsProjection, gating: Gating) -> ExpertsForm:
    if x.dim() != 2 or index.dim() != 2 or index.shape != weights.shape or len(index) != len(x):
        raise ValueError(
            "grouped_experts: want x [T, H], index and weights [T, k], got "
            f"{tuple(x.shape)}, {tuple(index.shape)} and {tuple(weights.shape)}"
        )
    if not (x.is_floating_point() and weights.is_floating_point()) or index.dtype.is_floating_point:
        raise ValueError(
            "grouped_experts: want floating x and weights, integer index, got "
            f"{x.dtype}, {weights.dtype}, {index.dtype}"
        )
    experts, width = len(up.weight), gating.width(up.widths[1])
    if up.widths[0] != x.shape[1] or down.widths != (width, x.shape[1]) or len(down.weight) != experts:
        raise ValueError(
            f"grouped_experts: want projections {x.shape[1]} -> . -> {x.shape[1]} of as many experts, got "
            f"{tuple(up.weight.shape)} and {tuple(down.weight.shape)}"
        )
    if up.weight.dtype != down.weight.dtype:
        raise ValueError(f"grouped_experts: want weights of one dtype, got {up.weight.dtype} and {down.weight.dtype}")
    for p in (up, down):
        for a in p.adapters:
            r = a.first.shape[-1]
            if a.first.shape != (experts, p.widths[0], r) or a.second.shape != (experts, r, p.widths[1]):
                raise ValueError(
                    f"grouped_experts: want an adapter [{experts}, {p.widths[0]}, r] and [{experts}, r, {p.widths[1]}]"
                    f", got {tuple(a.first.shape)} and {tuple(a.second.shape)}"
                )
        if p.bias is not None and p.bias.shape != (experts, p.widths[1]):
            raise ValueError(f"grouped_experts: want a bias {(experts, p.widths[1])}, got {tuple(p.bias.shape)}")
    at = ExpertsSlot.of(up, 0)
    return ExpertsForm(at, ExpertsSlot.of(down, at.count), gating, experts, up.weight.dtype)
