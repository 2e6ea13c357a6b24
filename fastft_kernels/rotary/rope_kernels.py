"""The kernel of `rope`: how heads and pairs of channels lie in memory, and its launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import torch

from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import math_dtype, on_device, use_triton, wider
from fastft_kernels.runtime.language import tl, triton

_dtype_of = attrgetter("dtype")  # in `map` it costs the interpreter no call


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


class RopeSettings(NamedTuple):
    """The settings that forward and backward share. axis: `unsqueeze_dim`; sign: 1.0 or -1.0."""

    layout: str
    axis: int | None
    sign: float


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


def _table(t: torch.Tensor, axis: int | None) -> torch.Tensor:
    return t if axis is None else t.unsqueeze(axis)


def repeated_dim(table: Sequence[int], axis: int | None) -> int:
    """The dim over which a table of this shape, as many dims as x, is repeated; the last where every dim before it is a
    position."""
    if axis is not None:
        return axis % len(table)
    return max((i for i in range(len(table) - 1) if table[i] == 1), default=len(table) - 1)


def _walk(x: torch.Tensor, head: int) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
    """(sizes of batch, length, heads; strides of batch, length, heads, channel); a dim that is absent has size 1 and
    stride 0."""
    dims = ([None, None] + [i for i in range(x.dim() - 1) if i != head])[-2:] + [head if head < x.dim() - 1 else None]
    sizes = tuple(1 if i is None else x.shape[i] for i in dims)
    return sizes, (*(0 if n == 1 else x.stride(i) for i, n in zip(dims, sizes)), x.stride(-1))


def _reference(xs, cos, sin, layout: RopeLayout, sign: float, transposed: bool, ys) -> None:
    """`rope_ref` of each x, in the widest dtype at hand."""
    widest, plain = cos.dtype, layout is LAYOUTS["half"] and cos.shape[-1] == xs[0].shape[-1]
    for t in (*xs, *ys, sin):
        if t.dtype != widest:
            widest, plain = wider(widest, t.dtype), False
    math = math_dtype(widest)
    if math != widest or not plain or xs[0].shape[-1] != xs[-1].shape[-1]:
        cos, sin = cos.to(math), sin.to(math)
        for x, y in zip(xs, ys):
            rope_ref(x, cos, sin, layout, sign, transposed, y)
        return
    s1, s2 = sin.chunk(2, -1)
    if transposed:
        sign, s1, s2 = -sign, s2, s1
    for x, y in zip(xs, ys):
        torch.mul(x, cos, out=y)
        (x1, x2), (y1, y2) = x.chunk(2, -1), y.chunk(2, -1)
        if sign > 0:  # rounded as the usual expression rounds: on a CPU the bits are stock's
            y1.sub_(x2 * s1)
            y2.add_(x1 * s2)
        else:
            y1.add_(x2 * s1)
            y2.sub_(x1 * s2)


def _launch(xs: list[torch.Tensor], cos, sin, form: RopeSettings, transposed: bool, ys: list[torch.Tensor]) -> None:
    """Rotates one or two tensors into ys."""
    layout = LAYOUTS[form.layout]
    cos, sin = _table(cos, form.axis), _table(sin, form.axis)
    if not use_triton(xs[0], *map(_dtype_of, (*xs, *ys))):
        _reference(xs, cos, sin, layout, form.sign, transposed, ys)
        return
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    head = repeated_dim(cos.shape, form.axis)
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
