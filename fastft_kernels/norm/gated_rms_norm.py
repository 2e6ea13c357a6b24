"""RMSNorm with a gate, over groups of the last dimension (Mamba-2 and gated delta networks).   a = act(g) in either
    place:

    gate first   h = x a,   n = h r,   y = n w        r = 1 / sqrt(mean(h^2) + eps) by group
    norm first   n = x r,   y = n w a                 r = 1 / sqrt(mean(x^2) + eps) by group

With m = dy w (norm first: dy w a) and d = r (m - n mean(m n)), the gradient through the norm:

    gate first   dx = d a,   dg = d x a'(g),       dw = sum over rows of dy n
    norm first   dx = d,     dg = dy n w a'(g),    dw = sum over rows of dy n a

Saved for the backward: x, g, w and r. Shapes [..., N] in G groups of S = N / G columns; bf16, fp16, fp32 in and out,
math in fp32, one rounding, at the end (stock modules round in between as well); float64, and groups wider than 4096, by
the reference. dw: each program sums its own rows into its own line of a [P, N] buffer, and one sum over P follows: no
atomics, the same bits every run."""

from __future__ import annotations

import torch

from fastft_kernels.mlp.activation import act_grad, act_grad_ref, act_ref, act_value, act_weight, resolve
from fastft_kernels.runtime import higher_order
from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import math_dtype, on_device, op, use_triton
from fastft_kernels.runtime.language import tl, triton
from fastft_kernels.runtime.precise import column_sum, row_mean_of_product, row_rstd
from fastft_kernels.runtime.rows import BWD_TILES, PARTIALS, RowLaunch, row_launch

TILES = BWD_TILES[:-1]  # a wider group's backward, which holds the gate as well, does not fit in the registers

# reference


def gated_rms_norm_ref(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    activation: str = "silu",
    gate_first: bool,
    groups: int = 1,
) -> torch.Tensor:
    """The formula in plain torch, rounded once to the dtype of x; differentiable by autograd."""
    y, _ = _formula(x, gate, weight, eps, *resolve(activation, None), gate_first, groups)
    return y.to(x.dtype)


def _formula(x, gate, weight, eps, act, alpha, gate_first, groups):
    """(y, r [..., G]) in the math dtype."""
    f = math_dtype(x.dtype)
    h, a = x.to(f), act_ref(gate.to(f), act, alpha)
    if gate_first:
        h = h * a
    h = h.unflatten(-1, (groups, -1))
    r = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    y = (h * r).flatten(-2) * weight.to(f)
    return (y if gate_first else y * a), r.squeeze(-1)


# kernels: program (p, group) takes rows of one group


@triton.jit(do_not_specialize=["rows"])
def _fwd_kernel(
    x_ptr,
    g_ptr,
    w_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    eps,
    alpha,
    N: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    ACT: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    col = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (row < rows)[:, None] & (col < S)[None, :]  # [BLOCK_M, BLOCK_N]
    at = row[:, None] * N + group * S + col[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + group * S + col, mask=col < S, other=0.0).to(tl.float32)
    a = act_value(g, act_weight(g, alpha, ACT), ACT)
    if GATE_FIRST:
        x = x * a
    r = row_rstd(x, eps, S, x_ptr.dtype.element_ty == tl.float32)
    tl.store(rstd_ptr + row * G + group, r, mask=row < rows)
    y = x * r[:, None] * w[None, :]
    if not GATE_FIRST:
        y = y * a
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _bwd_kernel(
    dy_ptr,
    x_ptr,
    g_ptr,
    w_ptr,
    rstd_ptr,
    dx_ptr,
    dg_ptr,
    dw_ptr,
    rows,
    alpha,
    N: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    ACT: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each program takes every P-th block of rows. A pointer is None where that gradient is not wanted."""
    group = tl.program_id(1)
    col = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    w = tl.load(w_ptr + group * S + col, mask=col < S, other=0.0).to(tl.float32)
    if dw_ptr is not None:
        dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
        mask = (row < rows)[:, None] & (col < S)[None, :]  # [BLOCK_M, BLOCK_N]
        at = row[:, None] * N + group * S + col[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd_ptr + row * G + group, mask=row < rows, other=0.0)[:, None]
        sig = act_weight(g, alpha, ACT)
        a = act_value(g, sig, ACT)
        if GATE_FIRST:
            n = x * a * r
            m = dy
        else:
            n = x * r
            m = dy * a
        if dw_ptr is not None:
            dw += m * n
        m = m * w[None, :]
        d = r * (m - n * row_mean_of_product(m, n, S, x_ptr.dtype.element_ty == tl.float32)[:, None])
        if dx_ptr is not None:
            dx = d
            if GATE_FIRST:
                dx = d * a
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dg_ptr is not None:
            up = act_grad(g, sig, alpha, ACT)
            if GATE_FIRST:
                dg = d * x * up
            else:
                dg = dy * n * w[None, :] * up
            tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=mask)
    if dw_ptr is not None:
        tl.store(
            dw_ptr + tl.program_id(0).to(tl.int64) * N + group * S + col,
            column_sum(dw, x_ptr.dtype.element_ty == tl.float32),
            mask=col < S,
        )


# launchers


def _runs_kernel(x, gate, weight, groups) -> bool:
    kernels = use_triton(x, gate.dtype, weight.dtype)
    return kernels and x.numel() > 0 and not _launch(x, groups).wide


def _launch(x: torch.Tensor, groups: int) -> RowLaunch:
    return row_launch(x.shape[-1] // groups, TILES)


def _rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def _fwd_fake(x, gate, weight, eps, act, alpha, gate_first, groups, out_dtype):
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty((*x.shape[:-1], groups), dtype=math_dtype(x.dtype))


@op(
    "gated_rms_norm_fwd(Tensor x, Tensor gate, Tensor weight, float eps, str act, float alpha, bool gate_first, int "
    "groups,"
    " ScalarType out_dtype) -> (Tensor, Tensor)",
    _fwd_fake,
)
def _fwd(x, gate, weight, eps, act, alpha, gate_first, groups, out_dtype):
    if not _runs_kernel(x, gate, weight, groups):
        y, r = _formula(x, gate, weight, eps, act, alpha, gate_first, groups)
        return y.to(out_dtype).contiguous(), r.contiguous()
    x, gate, weight = x.contiguous(), gate.contiguous(), weight.contiguous()
    y, rstd = _fwd_fake(x, gate, weight, eps, act, alpha, gate_first, groups, out_dtype)
    launch, rows, n = _launch(x, groups), _rows(x), x.shape[-1]
    with on_device(x):
        _fwd_kernel[(launch.programs(rows), groups)](
            x,
            gate,
            weight,
            y,
            rstd,
            rows,
            eps,
            alpha,
            N=n,
            S=n // groups,
            G=groups,
            ACT=act,
            GATE_FIRST=gate_first,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            num_warps=launch.num_warps,
            enable_fp_fusion=True,
        )
    return y, rstd


def _lines(x: torch.Tensor, groups: int) -> int:
    """Programs of one group that share the rows: no more than PARTIALS in all groups together, at least one a group."""
    return max(min(_launch(x, groups).programs(_rows(x)), PARTIALS // groups), 1)


def _bwd_fake(dy, x, gate, weight, rstd, act, alpha, gate_first, groups, need_dx, need_dg, need_dw):
    lines = _lines(x, groups) if _runs_kernel(x, gate, weight, groups) else 1
    dx = x.new_empty(x.shape) if need_dx else x.new_empty(0)
    dg = gate.new_empty(gate.shape) if need_dg else gate.new_empty(0)
    return dx, dg, x.new_empty((lines if need_dw else 0, x.shape[-1]), dtype=rstd.dtype)


@op(
    "gated_rms_norm_bwd(Tensor dy, Tensor x, Tensor gate, Tensor weight, Tensor rstd, str act, float alpha, bool "
    "gate_first, int groups,"
    " bool need_dx, bool need_dg, bool need_dw) -> (Tensor dx, Tensor dg, Tensor dw)",
    _bwd_fake,
)
def _bwd(dy, x, gate, weight, rstd, act, alpha, gate_first, groups, need_dx, need_dg, need_dw):
    """dx, dg (empty where not needed) and the partial sums of dw [P, N] (P = 0 where not needed)."""
    out = _bwd_fake(dy, x, gate, weight, rstd, act, alpha, gate_first, groups, need_dx, need_dg, need_dw)
    if not _runs_kernel(x, gate, weight, groups):
        return _bwd_ref(out, dy, x, gate, weight, rstd, act, alpha, gate_first, groups)
    dx, dg, dw = out
    dy, x, gate, weight = dy.contiguous(), x.contiguous(), gate.contiguous(), weight.contiguous()
    launch, n = _launch(x, groups), x.shape[-1]
    with on_device(x):
        _bwd_kernel[(_lines(x, groups), groups)](
            dy,
            x,
            gate,
            weight,
            rstd.contiguous(),
            dx if need_dx else None,
            dg if need_dg else None,
            dw if need_dw else None,
            _rows(x),
            alpha,
            N=n,
            S=n // groups,
            G=groups,
            ACT=act,
            GATE_FIRST=gate_first,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            num_warps=launch.num_warps,
            enable_fp_fusion=True,
        )
    return out


def _bwd_ref(out, dy, x, gate, weight, rstd, act, alpha, gate_first, groups):
    dx, dg, dw = out
    f = rstd.dtype
    x, g, w, dy = x.to(f), gate.to(f), weight.to(f), dy.to(f)
    a = act_ref(g, act, alpha)
    by_group = lambda t: t.unflatten(-1, (groups, -1))
    n = (by_group(x * a if gate_first else x) * rstd.unsqueeze(-1)).flatten(-2)
    m = dy if gate_first else dy * a
    if dw.numel():
        dw.copy_((m * n).reshape(-1, x.shape[-1]).sum(0, keepdim=True))
    m = m * w
    mean = by_group(m * n).mean(-1, keepdim=True)
    d = ((by_group(m) - by_group(n) * mean) * rstd.unsqueeze(-1)).flatten(-2)
    if dx.numel():
        dx.copy_(d * a if gate_first else d)
    if dg.numel():
        dg.copy_((d * x if gate_first else dy * n * w) * act_grad_ref(g, act, alpha))
    return out


# autograd


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, eps, act, alpha, gate_first, groups, out_dtype):
        y, rstd = _fwd(x, gate, weight, eps, act, alpha, gate_first, groups, out_dtype)
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.settings, ctx.eps, ctx.out_dtype = (act, alpha, gate_first, groups), eps, out_dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate, weight, rstd = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        if higher_order.wanted():
            formula = lambda x, gate, weight: _formula(x, gate, weight, ctx.eps, *ctx.settings)[0].to(ctx.out_dtype)
            return *higher_order.gradients(formula, (x, gate, weight), need, (dy,)), *(None,) * 6
        dx, dg, partial = _bwd(dy, x, gate, weight, rstd, *ctx.settings, *need)
        dw = partial.sum(0).to(weight.dtype) if need[2] else None
        return dx if need[0] else None, dg if need[1] else None, dw, *(None,) * 6


# public


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    activation: str = "silu",
    gate_first: bool,
    groups: int = 1,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """gate_first: rms(x act(gate)) weight, else rms(x) weight act(gate); rms over each of `groups` equal parts of the
    last dimension.

    x, gate: [..., N], any strides; weight: [N]; bf16, fp16, fp32 (math in fp32) or float64. activation: of
    `activation`. The result is contiguous, of x's dtype unless out_dtype says another, rounded once. Differentiable in
    x, gate and weight; saves these and r. Raises TypeError on dtypes that are not floating, ValueError on shapes that
    do not fit and on an unknown activation."""
    if not (x.is_floating_point() and gate.is_floating_point() and weight.is_floating_point()):
        raise TypeError(f"gated_rms_norm: want floating dtypes, got {x.dtype}, {gate.dtype}, {weight.dtype}")
    if x.dim() == 0 or gate.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"gated_rms_norm: want x and gate [..., N], weight [N], got {list(x.shape)}, {list(gate.shape)}, "
            f"{list(weight.shape)}"
        )
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"gated_rms_norm: want groups that divide {x.shape[-1]}, got {groups}")
    act, alpha = resolve(activation, None)
    return _GatedRMSNorm.apply(x, gate, weight, float(eps), act, alpha, gate_first, groups, out_dtype or x.dtype)


# compilations that stand for real models


def _aot_case(note, kernel, n, groups, dtype, act="silu", gate_first=True, dw=False) -> AotCase:
    launch = row_launch(n // groups, TILES)
    signature = {"x_ptr": dtype, "g_ptr": dtype, "w_ptr": dtype, "rstd_ptr": "*fp32", "rows": "i32", "alpha": "fp32"}
    constexprs = {"N": n, "S": n // groups, "G": groups, "ACT": act, "GATE_FIRST": gate_first}
    constexprs |= {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
    if kernel is _fwd_kernel:
        signature |= {"y_ptr": dtype, "eps": "fp32"}
    else:
        signature |= {"dy_ptr": dtype, "dx_ptr": dtype, "dg_ptr": dtype}
        (signature if dw else constexprs)["dw_ptr"] = "*fp32" if dw else None
    return AotCase(kernel, signature, constexprs, launch.num_warps, note=note, unaligned=("rows",))


AOT_CASES = (
    _aot_case("Nemotron-H-8B", _fwd_kernel, 8192, 8, "*bf16"),
    _aot_case("Qwen3-Next-80B, a head", _fwd_kernel, 128, 1, "*bf16", gate_first=False),
    _aot_case("Nemotron-H-8B", _bwd_kernel, 8192, 8, "*bf16", dw=True),
    _aot_case("Kimi-Linear-48B, a head", _bwd_kernel, 128, 1, "*bf16", act="sigmoid", gate_first=False),
    _aot_case("the widest group, fp16", _bwd_kernel, 4096, 1, "*fp16", dw=True),
)
