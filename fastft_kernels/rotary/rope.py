"""Rotary position embedding: R of the D channels of a head are taken in pairs (x1, x2), and each pair is rotated.

    y1 = x1 c1 - s x2 s1        dx1 = dy1 c1 + s dy2 s2
    y2 = x2 c2 + s x1 s2        dx2 = dy2 c2 - s dy1 s1        (the transposed rotation; s is `sign`, 1 or -1)

c and s come from tables cos and sin of C columns; the D - R other channels pass through unchanged. A layout says which
channels make pair j, where it goes, which columns it reads, and which channels rotate (found in: transformers 5.24):

    name                     in           out         columns      R   rotated  found in
    half                     j, j + R/2   same        j, j + R/2   C   first R  Llama and most; partial in GPT-NeoX,
                             Phi, Nemotron
    half_narrow              j, j + R/2   same        j, j         2C  first R  GPT-OSS
    interleaved              2j, 2j + 1   same        2j, 2j + 1   C   first R  Cohere, Ernie-VL, GLM-4V, SAM
    interleaved_narrow       2j, 2j + 1   same        j, j         2C  first R  GPT-J; complex tables: Llama-4,
                             DeepSeek-V2
    interleaved_narrow_tail  2j, 2j + 1   same        j, j         2C  last R   DeepSeek-V4
    interleaved_first        2j, 2j + 1   same        j, j         C   first R  GLM, Ernie, Helium, Moonshine
    interleaved_to_half      2j, 2j + 1   j, j + R/2  j, j         C   first R  DeepSeek-V3 and its heirs

A complex table t is cos = t.real, sin = t.imag. Multi-axis rotary (Qwen2-VL) merges sections of cos and sin before it
rotates,
packed sequences gather them by position: the formula is the same. NanoChat turns the other way: sign=-1. Vision towers
have no
batch: unsqueeze_dim=-2. A table is read as it is, both columns of a pair, so that it need not hold cosines.

q and k may have any strides (usually they are transposed views of a projection): they are read in place, and written in
the same order of memory, so that no copy follows on either side of attention. Both in ONE launch, forward and backward;
bf16, fp16, fp32, math in fp32, one rounding (eager rounds three times); float64 takes the reference, exactly. Saved:
cos and sin as they were given (every layer shares them), never q or k."""

from __future__ import annotations

import functools

import torch

from fastft_kernels.rotary.rope_kernels import LAYOUTS, RopeSettings, _launch, repeated_dim
from fastft_kernels.runtime import higher_order
from fastft_kernels.runtime.compat import is_dynamo_compiling
from fastft_kernels.runtime.dispatch import applied, op

# reference


# kernel


# launchers


def _check(name: str, xs: tuple[torch.Tensor, ...], cos: torch.Tensor, sin: torch.Tensor, form: RopeSettings) -> None:
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        raise ValueError(f"{name}: want cos and sin that require no gradient (none is computed for them)")
    check = _check_shapes.__wrapped__ if is_dynamo_compiling() else _check_shapes
    dtypes = (*[x.dtype for x in xs], cos.dtype, sin.dtype)
    check(name, tuple([x.shape for x in xs]), cos.shape, sin.shape, dtypes, form)


@functools.lru_cache(256)
def _check_shapes(name: str, shapes, cos, sin, dtypes, form: RopeSettings) -> None:
    """shapes: of the tensors that are rotated; cos, sin: theirs. Raises ValueError; what fits is looked up from then
    on."""
    if form.layout not in LAYOUTS:
        raise ValueError(f"{name}: want layout in {tuple(LAYOUTS)}, got {form.layout!r}")
    if form.sign not in (1.0, -1.0):
        raise ValueError(f"{name}: want sign 1 or -1, got {form.sign}")
    if not all(d.is_floating_point for d in dtypes):
        raise ValueError(f"{name}: want floating dtypes, got {list(dtypes)}")
    dims = len(cos) + (form.axis is not None)
    if cos != sin or not 2 <= dims <= 4:
        raise ValueError(f"{name}: want cos and sin of one shape, got {tuple(cos)} and {tuple(sin)}")
    table = tuple(cos)
    if form.axis is not None:
        if not -dims <= form.axis < dims - 1 or form.axis == -1:
            raise ValueError(f"{name}: want unsqueeze_dim before the last of {dims} dims, got {form.axis}")
        table = (*table[: form.axis % dims], 1, *table[form.axis % dims :])
    r = table[-1] * (2 if LAYOUTS[form.layout].columns == "narrow" else 1)
    head = repeated_dim(table, form.axis) if len(shapes[0]) == dims else 0
    for shape in shapes:
        if len(shape) != dims or r % 2 or not 0 < r <= shape[-1]:
            raise ValueError(f"{name}: want an even number of rotary channels <= head_dim, got {r} of {tuple(shape)}")
        for i in range(dims - 1):
            fits = table[i] == 1 if i == head else table[i] in (1, shape[i])
            if not fits or (i != head and shape[i] != shapes[0][i]):
                raise ValueError(f"{name}: want tables that fit {[tuple(s) for s in shapes]}, got {table}")


def _empty(x: torch.Tensor, dtype: torch.dtype | None, order: list[int] | None) -> torch.Tensor:
    """An output shaped like x: its dims in memory from slowest to fastest are `order`, or as x has them."""
    if order is None:
        return torch.empty_like(x, dtype=dtype)
    back = [order.index(i) for i in range(x.dim())]
    return x.new_empty([x.shape[i] for i in order], dtype=dtype).permute(back)


def _order(x: torch.Tensor) -> list[int]:
    """Dims of a dense tensor from slowest to fastest in memory."""
    return sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True)


_SETTINGS = "Tensor cos, Tensor sin, str layout, int? axis, float sign, bool transposed"


@op(
    f"rope(Tensor q, Tensor k, {_SETTINGS}, ScalarType? q_dtype, ScalarType? k_dtype, int[]? q_order, int[]? k_order) "
    "-> (Tensor, Tensor)",
    lambda q, k, cos, sin, layout, axis, sign, transposed, q_dtype, k_dtype, q_order, k_order: (
        _empty(q, q_dtype, q_order),
        _empty(k, k_dtype, k_order),
    ),
)
def _rope(q, k, cos, sin, layout, axis, sign, transposed, q_dtype, k_dtype, q_order, k_order):
    ys = [_empty(q, q_dtype, q_order), _empty(k, k_dtype, k_order)]
    _launch([q, k], cos, sin, RopeSettings(layout, axis, sign), transposed, ys)
    return ys[0], ys[1]


@op(
    f"rope_single(Tensor x, {_SETTINGS}, ScalarType? dtype, int[]? order) -> Tensor",
    lambda x, cos, sin, layout, axis, sign, transposed, dtype, order: _empty(x, dtype, order),
)
def _rope_single(x, cos, sin, layout, axis, sign, transposed, dtype, order):
    y = _empty(x, dtype, order)
    _launch([x], cos, sin, RopeSettings(layout, axis, sign), transposed, [y])
    return y


# autograd


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, layout, axis, sign, out_dtype):
        ctx.set_materialize_grads(False)
        yq, yk = _rope(q, k, cos, sin, layout, axis, sign, False, out_dtype, out_dtype, None, None)
        ctx.save_for_backward(cos, sin)
        ctx.form = (layout, axis, sign)
        ctx.dtypes, ctx.orders = (q.dtype, k.dtype), (_order(yq), _order(yk))
        need_q, need_k = ctx.needs_input_grad[:2]
        if need_q != need_k:
            ctx.mark_non_differentiable(yk if need_q else yq)
        return yq, yk

    @staticmethod
    def backward(ctx, dyq, dyk):
        cos, sin = ctx.saved_tensors
        need_q, need_k = ctx.needs_input_grad[:2]
        wanted = (need_q and dyq is not None, need_k and dyk is not None)
        if higher_order.wanted():
            dq, dk = (
                _Rotation.apply(dy, cos, sin, ctx.form, True, dtype, order) if want else None
                for dy, want, dtype, order in zip((dyq, dyk), wanted, ctx.dtypes, ctx.orders)
            )
            return dq, dk, None, None, None, None, None, None
        if wanted[0] and wanted[1]:
            dq, dk = _rope(dyq, dyk, cos, sin, *ctx.form, True, *ctx.dtypes, *ctx.orders)
        else:
            dq, dk = (
                _rope_single(dy, cos, sin, *ctx.form, True, dtype, order) if want else None
                for dy, want, dtype, order in zip((dyq, dyk), wanted, ctx.dtypes, ctx.orders)
            )
        return dq, dk, None, None, None, None, None, None


class _Rotation(torch.autograd.Function):
    """One tensor, rotated or (`transposed`) rotated back: linear, so its derivative is the other one, however often it
    is taken."""

    @staticmethod
    def forward(ctx, x, cos, sin, form, transposed, dtype, order):
        y = _rope_single(x, cos, sin, *form, transposed, dtype, order)
        ctx.save_for_backward(cos, sin)
        ctx.settings = (form, not transposed, x.dtype, _order(y))
        return y

    @staticmethod
    def backward(ctx, dy):
        return _Rotation.apply(dy, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None, None


class _RopeSingle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, layout, axis, sign, out_dtype):
        y = _rope_single(x, cos, sin, layout, axis, sign, False, out_dtype, None)
        ctx.save_for_backward(cos, sin)
        ctx.form, ctx.dtype, ctx.order = (layout, axis, sign), x.dtype, _order(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        if higher_order.wanted():
            return (
                _Rotation.apply(dy, cos, sin, ctx.form, True, ctx.dtype, ctx.order),
                None,
                None,
                None,
                None,
                None,
                None,
            )
        dx = _rope_single(dy, cos, sin, *ctx.form, True, ctx.dtype, ctx.order)
        return dx, None, None, None, None, None, None


# public


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: str = "half",
    unsqueeze_dim: int | None = 1,
    sign: int = 1,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated by position, formulas in the module docstring.

    Args:
        q, k: two to four dims, the last of them channels, floating, any strides, not modified; head counts and head
            dims may differ.
        cos, sin: floating, any strides. With a dim inserted at unsqueeze_dim they broadcast against q and k but for
            their last dim: [B or 1, S, C] for q [B, H, S, D] with unsqueeze_dim 1, or q [B, S, H, D] with 2; [S, C] for
            q [S, H, D] with -2.
        layout: one of LAYOUTS: which channels are rotated together.
        unsqueeze_dim: None takes cos and sin as they are.
        sign: 1, or -1 for the opposite rotation.
        out_dtype: of both results; None: the dtype of q, and of k (eager promotes instead where cos is wider).

    Returns:
        (q rotated, k rotated), in the memory order of the inputs; math in float32 and one rounding. Differentiable in q
        and k, only in what is asked for; saves cos and sin alone.

    Raises:
        ValueError: shapes or settings do not fit, or cos or sin requires a gradient.
    """
    form = RopeSettings(layout, unsqueeze_dim, float(sign))
    _check("rope", (q, k), cos, sin, form)
    return applied(_Rope, q, k, cos, sin, *form, out_dtype)


def rope_single(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: str = "half",
    unsqueeze_dim: int | None = 1,
    sign: int = 1,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x rotated: `rope` for one tensor; arguments, saved tensors and errors as there."""
    form = RopeSettings(layout, unsqueeze_dim, float(sign))
    _check("rope_single", (x,), cos, sin, form)
    return applied(_RopeSingle, x, cos, sin, *form, out_dtype)
