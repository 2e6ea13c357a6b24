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

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastft_kernels.runtime import higher_order
from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import KERNEL_DTYPES, math_dtype, on_device, op, use_triton, wider
from fastft_kernels.runtime.language import tl, triton


@dataclass(frozen=True)
class RopeLayout:
    """interleaved_in, _out: pairs are neighbours (else halves). columns: "own" (those of the channels written),
    "narrow" (column j of a table of R/2), "first" (column j of a table of R). tail: the last R channels rotate (else
    the first)."""

    interleaved_in: bool
    interleaved_out: bool
    columns: str = "own"
    tail: bool = False

    def ends(self, transposed: bool) -> tuple[bool, bool]:
        """(pairs are neighbours in what is read, in what is written)."""
        there_and_back = (self.interleaved_in, self.interleaved_out)
        return there_and_back[::-1] if transposed else there_and_back

    @property
    def kernel_columns(self) -> int:
        """COLUMNS of the kernel."""
        return (2 if self.interleaved_out else 1) if self.columns == "own" else 0


LAYOUTS = {
    "half": RopeLayout(False, False),
    "half_narrow": RopeLayout(False, False, "narrow"),
    "interleaved": RopeLayout(True, True),
    "interleaved_narrow": RopeLayout(True, True, "narrow"),
    "interleaved_narrow_tail": RopeLayout(True, True, "narrow", tail=True),
    "interleaved_first": RopeLayout(True, True, "first"),
    "interleaved_to_half": RopeLayout(True, False, "first"),
}


@dataclass(frozen=True)
class RopeLaunch:
    """pairs: (heads of a tile) x (pairs of a head) of one program; num_warps: 8 pairs a thread."""

    pairs: int = 1024
    num_warps: int = 4


LAUNCH = RopeLaunch()


class _RopeSettings(NamedTuple):
    """The settings that forward and backward share. axis: `unsqueeze_dim`; sign: 1.0 or -1.0."""

    layout: str
    axis: int | None
    sign: float


# reference


def _pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the two members of every pair along the last dim."""
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def _rotated(x: torch.Tensor, layout: RopeLayout, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of x: (channels that rotate, channels that pass)."""
    r = 2 * width if layout.columns == "narrow" else width
    return (x[..., -r:], x[..., :-r]) if layout.tail else (x[..., :r], x[..., r:])


def rope_ref(x, cos, sin, layout: RopeLayout, sign: float, transposed: bool, y: torch.Tensor) -> torch.Tensor:
    """Writes the rotation of x into y and returns y. cos, sin: broadcast against x but for their columns; math in their
    dtype."""
    (xr, xp), (yr, yp) = _rotated(x, layout, cos.shape[-1]), _rotated(y, layout, cos.shape[-1])
    yp.copy_(xp)
    if layout.columns == "own":
        (c1, c2), (s1, s2) = _pairs(cos, layout.interleaved_out), _pairs(sin, layout.interleaved_out)
    else:
        c1 = c2 = cos[..., : xr.shape[-1] // 2]
        s1 = s2 = sin[..., : xr.shape[-1] // 2]
    here, there = layout.ends(transposed)
    if transposed:
        sign, s1, s2 = -sign, s2, s1
    x1, x2 = (v.to(cos.dtype) for v in _pairs(xr, here))
    y1, y2 = _pairs(yr, there)
    y1.copy_(x1 * c1 - x2 * s1 * sign)
    y2.copy_(x2 * c2 + x1 * s2 * sign)
    return y


# kernel


@triton.jit
def _load_pairs(
    x, h, x_h, x_d, mask, HALF: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, IN: tl.constexpr
):
    """(first, second) members of the pairs of BLOCK_H heads, fp32.  # [BLOCK_H, BLOCK_P] each"""
    if IN:  # one contiguous read, taken apart in registers
        c = tl.arange(0, 2 * BLOCK_P)[None, :].to(tl.int64)
        both = tl.load(x + h * x_h + c * x_d, mask=mask & (c < 2 * HALF), other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(both, (BLOCK_H, BLOCK_P, 2)))
    else:
        c = tl.arange(0, BLOCK_P)[None, :].to(tl.int64)
        x1 = tl.load(x + h * x_h + c * x_d, mask=mask & (c < HALF), other=0.0).to(tl.float32)
        x2 = tl.load(x + h * x_h + (c + HALF) * x_d, mask=mask & (c < HALF), other=0.0).to(tl.float32)
    return x1, x2


@triton.jit
def _rotate(
    x_ptr,
    y_ptr,
    c1,
    s1,
    c2,
    s2,
    b,
    s,
    first,
    heads,
    x_b,
    x_s,
    x_h,
    x_d,
    y_b,
    y_s,
    y_h,
    y_d,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    TAIL: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Heads first .. first + BLOCK_H of one token. The tables: [1, BLOCK_P], sign included."""
    h = first + tl.arange(0, BLOCK_H)[:, None].to(tl.int64)  # [BLOCK_H, 1]
    mask = h < heads
    x = x_ptr + b * x_b + s * x_s
    y = y_ptr + b * y_b + s * y_s
    rotated: tl.constexpr = REST if TAIL else 0
    rest: tl.constexpr = 0 if TAIL else 2 * HALF
    x1, x2 = _load_pairs(x + rotated * x_d, h, x_h, x_d, mask, HALF, BLOCK_P, BLOCK_H, IN)
    y1 = (x1 * c1 - x2 * s1).to(y_ptr.dtype.element_ty)
    y2 = (x2 * c2 + x1 * s2).to(y_ptr.dtype.element_ty)
    to = y + rotated * y_d + h * y_h
    if OUT:
        c = tl.arange(0, 2 * BLOCK_P)[None, :].to(tl.int64)
        tl.store(to + c * y_d, tl.reshape(tl.join(y1, y2), (BLOCK_H, 2 * BLOCK_P)), mask=mask & (c < 2 * HALF))
    else:
        c = tl.arange(0, BLOCK_P)[None, :].to(tl.int64)
        tl.store(to + c * y_d, y1, mask=mask & (c < HALF))
        tl.store(to + (c + HALF) * y_d, y2, mask=mask & (c < HALF))
    if REST > 0:
        c = tl.arange(0, BLOCK_R)[None, :].to(tl.int64)
        passed = tl.load(x + rest * x_d + h * x_h + c * x_d, mask=mask & (c < REST), other=0.0)
        tl.store(y + rest * y_d + h * y_h + c * y_d, passed.to(y_ptr.dtype.element_ty), mask=mask & (c < REST))


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    yq_ptr,
    yk_ptr,
    cos_ptr,
    sin_ptr,  # k_ptr and yk_ptr None: q alone
    length,
    q_heads,
    k_heads,  # length: tokens of one batch entry
    q_b,
    q_s,
    q_h,
    q_d,
    k_b,
    k_s,
    k_h,
    k_d,
    yq_b,
    yq_s,
    yq_h,
    yq_d,
    yk_b,
    yk_s,
    yk_h,
    yk_d,  # strides
    t_b,
    t_s,
    t_c,
    sign,  # strides of cos, and of sin; b, s, h, d, c: batch, token, head, channel, column
    HALF: tl.constexpr,
    Q_REST: tl.constexpr,
    K_REST: tl.constexpr,
    TAIL: tl.constexpr,  # R / 2; D - R
    IN: tl.constexpr,
    OUT: tl.constexpr,  # pairs are neighbours in what is read, in what is written
    COLUMNS: tl.constexpr,  # 0: column j for both, 1: j and j + R/2, 2: 2j and 2j + 1
    TRANSPOSED: tl.constexpr,  # sin of the two columns changes places
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_QR: tl.constexpr,
    BLOCK_KR: tl.constexpr,
):
    q_blocks = tl.cdiv(q_heads, BLOCK_H)
    blocks = q_blocks
    if k_ptr is not None:
        blocks += tl.cdiv(k_heads, BLOCK_H)
    pid = tl.program_id(0)
    token, block = pid // blocks, pid % blocks
    b, s = (token // length).to(tl.int64), (token % length).to(tl.int64)

    p = tl.arange(0, BLOCK_P)[None, :].to(tl.int64)  # [1, BLOCK_P]
    i1 = p
    i2 = p
    if COLUMNS == 1:
        i2 = p + HALF
    elif COLUMNS == 2:
        i1 = 2 * p
        i2 = 2 * p + 1
    cos = cos_ptr + b * t_b + s * t_s
    sin = sin_ptr + b * t_b + s * t_s
    c1 = tl.load(cos + i1 * t_c, mask=p < HALF, other=0.0).to(tl.float32)
    s1 = tl.load(sin + i1 * t_c, mask=p < HALF, other=0.0).to(tl.float32) * sign
    c2 = c1
    s2 = s1
    if COLUMNS > 0:
        c2 = tl.load(cos + i2 * t_c, mask=p < HALF, other=0.0).to(tl.float32)
        s2 = tl.load(sin + i2 * t_c, mask=p < HALF, other=0.0).to(tl.float32) * sign
        if TRANSPOSED:
            s1, s2 = s2, s1

    if block < q_blocks:
        _rotate(
            q_ptr,
            yq_ptr,
            c1,
            s1,
            c2,
            s2,
            b,
            s,
            block * BLOCK_H,
            q_heads,
            q_b,
            q_s,
            q_h,
            q_d,
            yq_b,
            yq_s,
            yq_h,
            yq_d,
            HALF,
            Q_REST,
            TAIL,
            IN,
            OUT,
            BLOCK_H,
            BLOCK_P,
            BLOCK_QR,
        )
    if k_ptr is not None:
        if block >= q_blocks:
            _rotate(
                k_ptr,
                yk_ptr,
                c1,
                s1,
                c2,
                s2,
                b,
                s,
                (block - q_blocks) * BLOCK_H,
                k_heads,
                k_b,
                k_s,
                k_h,
                k_d,
                yk_b,
                yk_s,
                yk_h,
                yk_d,
                HALF,
                K_REST,
                TAIL,
                IN,
                OUT,
                BLOCK_H,
                BLOCK_P,
                BLOCK_KR,
            )


# launchers


def _table(t: torch.Tensor, axis: int | None) -> torch.Tensor:
    return t if axis is None else t.unsqueeze(axis)


def _head_axis(x: torch.Tensor, table: torch.Tensor, axis: int | None) -> int:
    """The dim of x over which the table is repeated; x.dim() - 1 where every dim before the last is a position."""
    if axis is not None:
        return axis % x.dim()
    return max((i for i in range(x.dim() - 1) if table.shape[i] == 1), default=x.dim() - 1)


def _check(name: str, xs: tuple[torch.Tensor, ...], cos: torch.Tensor, sin: torch.Tensor, form: _RopeSettings) -> None:
    if form.layout not in LAYOUTS:
        raise ValueError(f"{name}: want layout in {tuple(LAYOUTS)}, got {form.layout!r}")
    if form.sign not in (1.0, -1.0):
        raise ValueError(f"{name}: want sign 1 or -1, got {form.sign}")
    if not all(t.is_floating_point() for t in (*xs, cos, sin)):
        raise ValueError(f"{name}: want floating dtypes, got {[t.dtype for t in (*xs, cos, sin)]}")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError(f"{name}: want cos and sin that require no gradient (none is computed for them)")
    dims = cos.dim() + (form.axis is not None)
    if cos.shape != sin.shape or not 2 <= dims <= 4:
        raise ValueError(f"{name}: want cos and sin of one shape, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if form.axis is not None and (not -dims <= form.axis < dims - 1 or form.axis == -1):
        raise ValueError(f"{name}: want unsqueeze_dim before the last of {dims} dims, got {form.axis}")
    table = _table(cos, form.axis)
    r = table.shape[-1] * (2 if LAYOUTS[form.layout].columns == "narrow" else 1)
    head = _head_axis(xs[0], table, form.axis) if xs[0].dim() == dims else 0
    for x in xs:
        if x.dim() != dims or r % 2 or not 0 < r <= x.shape[-1]:
            raise ValueError(f"{name}: want an even number of rotary channels <= head_dim, got {r} of {tuple(x.shape)}")
        for i in range(dims - 1):
            fits = table.shape[i] == 1 if i == head else table.shape[i] in (1, x.shape[i])
            if not fits or (i != head and x.shape[i] != xs[0].shape[i]):
                raise ValueError(
                    f"{name}: want tables that fit {[tuple(v.shape) for v in xs]}, got {tuple(table.shape)}"
                )


def _empty(x: torch.Tensor, dtype: torch.dtype | None, order: list[int] | None) -> torch.Tensor:
    """An output shaped like x: its dims in memory from slowest to fastest are `order`, or as x has them."""
    if order is None:
        return torch.empty_like(x, dtype=dtype)
    back = [order.index(i) for i in range(x.dim())]
    return x.new_empty([x.shape[i] for i in order], dtype=dtype).permute(back)


def _order(x: torch.Tensor) -> list[int]:
    """Dims of a dense tensor from slowest to fastest in memory."""
    return sorted(range(x.dim()), key=lambda i: -x.stride(i))


def _walk(x: torch.Tensor, head: int) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
    """(sizes of batch, length, heads; strides of batch, length, heads, channel); a dim that is absent has size 1 and
    stride 0."""
    dims = ([None, None] + [i for i in range(x.dim() - 1) if i != head])[-2:] + [head if head < x.dim() - 1 else None]
    sizes = tuple(1 if i is None else x.shape[i] for i in dims)
    return sizes, (*(0 if n == 1 else x.stride(i) for i, n in zip(dims, sizes)), x.stride(-1))


def _launch(xs: list[torch.Tensor], cos, sin, form: _RopeSettings, transposed: bool, ys: list[torch.Tensor]) -> None:
    """Rotates one or two tensors into ys."""
    layout = LAYOUTS[form.layout]
    cos, sin = _table(cos, form.axis), _table(sin, form.axis)
    if not (use_triton(xs[0]) and all(x.dtype in KERNEL_DTYPES for x in (*xs, *ys))):
        widest = cos.dtype
        for t in (*xs, *ys, sin):
            widest = wider(widest, t.dtype)
        cos, sin = cos.to(math_dtype(widest)), sin.to(math_dtype(widest))
        for x, y in zip(xs, ys):
            rope_ref(x, cos, sin, layout, form.sign, transposed, y)
        return
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    head = _head_axis(xs[0], cos, form.axis)
    half = cos.shape[-1] // (1 if layout.columns == "narrow" else 2)
    (batch, length, heads), q_steps = _walk(xs[0], head)
    k_heads, k_steps, yk_steps, k_rest = 0, (0,) * 4, (0,) * 4, 0
    if len(xs) == 2:
        (_, _, k_heads), k_steps = _walk(xs[1], head)
        yk_steps, k_rest = _walk(ys[1], head)[1], xs[1].shape[-1] - 2 * half
    t_b, t_s, _, t_c = _walk(cos, head)[1]
    q_rest = xs[0].shape[-1] - 2 * half
    block_p = triton.next_power_of_2(half)
    block_h = min(max(1, LAUNCH.pairs // block_p), triton.next_power_of_2(max(heads, k_heads, 1)))
    grid = (batch * length * (-(-heads // block_h) + -(-k_heads // block_h)),)
    if not grid[0]:
        return
    here, there = layout.ends(transposed)
    with on_device(xs[0]):
        _rope_kernel[grid](
            xs[0],
            xs[1] if len(xs) == 2 else None,
            ys[0],
            ys[1] if len(ys) == 2 else None,
            cos,
            sin,
            length,
            heads,
            k_heads,
            *q_steps,
            *k_steps,
            *_walk(ys[0], head)[1],
            *yk_steps,
            t_b,
            t_s,
            t_c,
            -form.sign if transposed else form.sign,
            HALF=half,
            Q_REST=q_rest,
            K_REST=k_rest,
            TAIL=layout.tail,
            IN=here,
            OUT=there,
            COLUMNS=layout.kernel_columns,
            TRANSPOSED=transposed,
            BLOCK_H=block_h,
            BLOCK_P=block_p,
            BLOCK_QR=triton.next_power_of_2(max(q_rest, 1)),
            BLOCK_KR=triton.next_power_of_2(max(k_rest, 1)),
            num_warps=LAUNCH.num_warps,
            enable_fp_fusion=True,
        )


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
    _launch([q, k], cos, sin, _RopeSettings(layout, axis, sign), transposed, ys)
    return ys[0], ys[1]


@op(
    f"rope_single(Tensor x, {_SETTINGS}, ScalarType? dtype, int[]? order) -> Tensor",
    lambda x, cos, sin, layout, axis, sign, transposed, dtype, order: _empty(x, dtype, order),
)
def _rope_single(x, cos, sin, layout, axis, sign, transposed, dtype, order):
    y = _empty(x, dtype, order)
    _launch([x], cos, sin, _RopeSettings(layout, axis, sign), transposed, [y])
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
        still = [y for y, wanted in zip((yq, yk), ctx.needs_input_grad) if not wanted]
        if len(still) == 1:
            ctx.mark_non_differentiable(*still)
        return yq, yk

    @staticmethod
    def backward(ctx, dyq, dyk):
        cos, sin = ctx.saved_tensors
        wanted = [dy is not None and need for dy, need in zip((dyq, dyk), ctx.needs_input_grad)]
        if higher_order.wanted():
            dq, dk = (
                _Rotation.apply(dy, cos, sin, ctx.form, True, dtype, order) if want else None
                for dy, want, dtype, order in zip((dyq, dyk), wanted, ctx.dtypes, ctx.orders)
            )
            return dq, dk, None, None, None, None, None, None
        if all(wanted):
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
    """(q rotated, k rotated), formulas in the module docstring.

    q, k: two to four dims, the last of them channels, any strides, not modified; head counts and head dims may differ.
    cos, sin: with a dim inserted at unsqueeze_dim (None: as they are) they broadcast against q and k but for their last
    dim:
    [B or 1, S, C] for q [B, H, S, D] with unsqueeze_dim 1, or q [B, S, H, D] with 2; [S, C] for q [S, H, D] with -2.
    Any floating dtypes, any strides. layout: one of LAYOUTS; sign: 1, or -1 for the opposite rotation.
    Outputs: in out_dtype (None: the dtype of q, and of k; eager promotes instead where cos is wider), in the memory
    order of the inputs; math in float32 and one rounding. Differentiable in q and k, only in what is asked for; saves
    cos and sin alone. Raises ValueError for shapes or settings that do not fit, and where cos or sin requires a
    gradient."""
    form = _RopeSettings(layout, unsqueeze_dim, float(sign))
    _check("rope", (q, k), cos, sin, form)
    return _Rope.apply(q, k, cos, sin, *form, out_dtype)


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
    form = _RopeSettings(layout, unsqueeze_dim, float(sign))
    _check("rope_single", (x,), cos, sin, form)
    return _RopeSingle.apply(x, cos, sin, *form, out_dtype)


def _case(
    layout: str, types: tuple[str, str], heads: tuple[int, int], dim: int, r: int, transposed: bool, note: str
) -> AotCase:
    """types: of q and k, of cos and sin; dim: D; r: R. A head count of k 0: one tensor."""
    lay, (t, table), pair = LAYOUTS[layout], types, heads[1] > 0
    block_p = triton.next_power_of_2(r // 2)
    absent = () if pair else ("k", "yk")
    signature = {f"{x}_ptr": f"*{t}" for x in ("q", "k", "yq", "yk") if x not in absent}
    signature |= {
        "cos_ptr": f"*{table}",
        "sin_ptr": f"*{table}",
        "length": "i32",
        "q_heads": "i32",
        "k_heads": "i32",
        "sign": "fp32",
    }
    signature |= {f"{x}_{d}": "i32" for x in ("q", "k", "yq", "yk") for d in "bsh"} | {"t_b": "i32", "t_s": "i32"}
    constexprs = {"q_d": 1, "k_d": 1, "yq_d": 1, "yk_d": 1, "t_c": 1} | {f"{x}_ptr": None for x in absent}
    constexprs |= {"HALF": r // 2, "Q_REST": dim - r, "K_REST": (dim - r) * pair, "TAIL": lay.tail}
    constexprs |= dict(zip(("IN", "OUT"), lay.ends(transposed))) | {"TRANSPOSED": transposed}
    constexprs |= {"COLUMNS": lay.kernel_columns, "BLOCK_P": block_p}
    constexprs["BLOCK_H"] = min(max(1, LAUNCH.pairs // block_p), triton.next_power_of_2(max(heads)))
    constexprs |= {
        "BLOCK_QR": triton.next_power_of_2(max(dim - r, 1)),
        "BLOCK_KR": triton.next_power_of_2(max((dim - r) * pair, 1)),
    }
    unaligned = ("length", "q_heads", "k_heads")
    return AotCase(_rope_kernel, signature, constexprs, num_warps=LAUNCH.num_warps, note=note, unaligned=unaligned)


AOT_CASES = (
    _case("half", ("bf16", "bf16"), (32, 8), 128, 128, False, "Llama-3.1-8B"),
    _case("half", ("fp16", "fp32"), (32, 32), 80, 32, True, "Phi-2, partial, backward"),
    _case("half_narrow", ("bf16", "fp32"), (64, 8), 64, 64, False, "GPT-OSS"),
    _case("interleaved", ("bf16", "bf16"), (8, 0), 256, 256, True, "one tensor of wide heads, backward"),
    _case("interleaved_first", ("bf16", "bf16"), (32, 2), 128, 64, False, "GLM-4, partial"),
    _case("interleaved_to_half", ("bf16", "bf16"), (128, 1), 64, 64, True, "DeepSeek-V3, backward"),
)
