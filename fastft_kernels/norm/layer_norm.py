"""y = n w + b,   n = (x - m) r,   m = mean(x),   r = 1 / sqrt(mean((x - m)^2) + eps)   over the last dimension (Ba et
                  al. 2016).

With g = dy w (dy without a weight):
    dx = r (g - mean(g) - n mean(g n)),   dw = sum over rows of dy n,   db = sum over rows of dy.

Saved for the backward: x, w, m and r (8 bytes a row). y is never saved: `layer_norm_recompute` gives it again, bit for
bit. Shapes [..., N]; bf16, fp16, fp32 in and out, math in fp32, one rounding at the end; float64 in float64, by the
reference. dw, db:
each program sums its own rows into its own line of a [P, N] buffer, P fixed by the shape, and one sum over P follows:
no atomics."""

from __future__ import annotations

import torch

from fastft_kernels.runtime import higher_order
from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import KERNEL_DTYPES, math_dtype, on_device, op, use_triton
from fastft_kernels.runtime.language import tl, triton
from fastft_kernels.runtime.precise import column_sum, quotient, row_mean, row_mean_of_product, row_rstd
from fastft_kernels.runtime.rows import (
    BWD_TILES,
    FWD_TILES,
    as_rows,
    count_rows,
    empty_rows_like,
    in_rows_layout,
    row_launch,
    row_start,
)

# --- reference
# ----------------------------------------------------------------------------------------------------------


def layer_norm_ref(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The formula in plain torch; differentiable by autograd."""
    centred = x.to(math_dtype(x.dtype))
    centred = centred - centred.mean(-1, keepdim=True)
    n = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return _affine_ref(n, weight, bias, out_dtype or x.dtype)


def _affine_ref(n, weight, bias, out_dtype):
    if weight is not None and bias is not None:
        n = torch.addcmul(bias.to(n.dtype), n, weight.to(n.dtype))
    elif weight is not None:
        n = n * weight.to(n.dtype)
    elif bias is not None:
        n = n + bias.to(n.dtype)
    return n.to(out_dtype)


# --- kernels
# ------------------------------------------------------------------------------------------------------------


@triton.jit
def _affine(n, w_ptr, b_ptr, col, N: tl.constexpr):
    """n w + b for the columns col [BLOCK_N]. Product and sum are one fused operation, stated here rather than left to
    the compiler, so that y computed again has the same bits."""
    if b_ptr is not None:
        b = tl.load(b_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
        if w_ptr is not None:
            w = tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
            n = tl.fma(n, w.broadcast_to(n.shape), b.broadcast_to(n.shape))
        else:
            n = n + b
    elif w_ptr is not None:
        n = n * tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    return n


@triton.jit(do_not_specialize=["rows"])
def _fwd_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    sizes,
    x_strides,
    y_strides,
    eps,
    N: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    col = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (row < rows)[:, None] & (col < N)[None, :]  # [BLOCK_M, BLOCK_N]
    x = tl.load(x_ptr + row_start(row, sizes, x_strides)[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if RECOMPUTE:
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        r = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        centred = x - mean[:, None]
    else:
        mean = row_mean(x, N, x_ptr.dtype.element_ty == tl.float32)
        centred = tl.where(mask, x - mean[:, None], 0.0)
        r = row_rstd(centred, eps, N, x_ptr.dtype.element_ty == tl.float32)
        tl.store(mean_ptr + row, mean, mask=row < rows)
        tl.store(rstd_ptr + row, r, mask=row < rows)
    y = _affine(centred * r[:, None], w_ptr, b_ptr, col, N)
    y_at = y_ptr + row_start(row, sizes, y_strides)[:, None] + col[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _fwd_wide_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    sizes,
    x_strides,
    y_strides,
    eps,
    N: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row (BLOCK_M = 1) in blocks of BLOCK_N columns: a pass that merges the blocks' means and sums of squares
    (Chan et al. 1979), a pass for y."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [1]
    x_at = x_ptr + row_start(row, sizes, x_strides)[:, None]
    y_at = y_ptr + row_start(row, sizes, y_strides)[:, None]
    if RECOMPUTE:
        mean = tl.load(mean_ptr + row)
        r = tl.load(rstd_ptr + row)
    else:
        mean = tl.zeros([BLOCK_M], tl.float32)
        squares = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, N, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)[None, :]
            size = tl.minimum(N - start, BLOCK_N).to(tl.float32)
            x = tl.load(x_at + col, mask=col < N, other=0.0).to(tl.float32)
            block_mean = tl.div_rn(tl.sum(x, axis=1), size)
            centred = tl.where(col < N, x - block_mean[:, None], 0.0)
            delta = block_mean - mean
            share = tl.div_rn(size, start + size)
            squares += tl.sum(centred * centred, axis=1) + delta * delta * (start * share)
            mean += delta * share
        r = tl.div_rn(1.0, tl.sqrt_rn(quotient(squares, N, 1.0 / N) + eps))
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, r)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_at + col[None, :], mask=(col < N)[None, :], other=0.0).to(tl.float32)
        y = _affine((x - mean[:, None]) * r[:, None], w_ptr, b_ptr, col, N)
        tl.store(y_at + col[None, :], y.to(y_ptr.dtype.element_ty), mask=(col < N)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _bwd_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    rows,
    sizes,
    dy_strides,
    x_strides,
    dx_strides,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each program takes every P-th block of rows. dx_ptr, dw_ptr, db_ptr are None where that gradient is not
    wanted."""
    col = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    if w_ptr is not None:
        w = tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32)
    if dw_ptr is not None:
        dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if db_ptr is not None:
        db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (row < rows)[:, None] & (col < N)[None, :]  # [BLOCK_M, BLOCK_N]
        dy_at = dy_ptr + row_start(row, sizes, dy_strides)[:, None] + col[None, :]
        dy = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row_start(row, sizes, x_strides)[:, None] + col[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        r = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        n = (x - mean) * r  # where masked, it meets dy = 0 only
        if dw_ptr is not None:
            dw += dy * n
        if db_ptr is not None:
            db += dy
        if dx_ptr is not None:
            g = dy
            if w_ptr is not None:
                g = dy * w[None, :]
            mean_g = row_mean(g, N, x_ptr.dtype.element_ty == tl.float32)[:, None]
            mean_gn = row_mean_of_product(g, n, N, x_ptr.dtype.element_ty == tl.float32)[:, None]
            dx = r * (g - mean_g - n * mean_gn)
            dx_at = dx_ptr + row_start(row, sizes, dx_strides)[:, None] + col[None, :]
            tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    line = tl.program_id(0).to(tl.int64) * N
    if dw_ptr is not None:
        tl.store(dw_ptr + line + col, column_sum(dw, x_ptr.dtype.element_ty == tl.float32), mask=col < N)
    if db_ptr is not None:
        tl.store(db_ptr + line + col, column_sum(db, x_ptr.dtype.element_ty == tl.float32), mask=col < N)


@triton.jit(do_not_specialize=["rows"])
def _bwd_wide_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    rows,
    sizes,
    dy_strides,
    x_strides,
    dx_strides,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same, one row (BLOCK_M = 1) at a time in blocks of BLOCK_N columns: a pass for the two means, a pass for the
    gradients. The program's own lines of dw and db stay in memory, where the L2 cache holds them; their first row
    begins from zero."""
    line = tl.program_id(0).to(tl.int64) * N
    for first in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = first + tl.arange(0, BLOCK_M)  # [1]
        dy_at = dy_ptr + row_start(row, sizes, dy_strides)[:, None]
        x_at = x_ptr + row_start(row, sizes, x_strides)[:, None]
        mean = tl.load(mean_ptr + row)[:, None]
        r = tl.load(rstd_ptr + row)[:, None]
        begins = first < tl.num_programs(0)
        if dx_ptr is not None:
            sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in range(0, N, BLOCK_N):
                col = start + tl.arange(0, BLOCK_N)[None, :]
                g = tl.load(dy_at + col, mask=col < N, other=0.0).to(tl.float32)
                if w_ptr is not None:
                    g *= tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32)
                sums += g
                products += g * ((tl.load(x_at + col, mask=col < N, other=0.0).to(tl.float32) - mean) * r)
            mean_g = row_mean(sums, N, x_ptr.dtype.element_ty == tl.float32)[:, None]
            mean_gn = row_mean(products, N, x_ptr.dtype.element_ty == tl.float32)[:, None]
            dx_at = dx_ptr + row_start(row, sizes, dx_strides)[:, None]
        for start in range(0, N, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)[None, :]
            dy = tl.load(dy_at + col, mask=col < N, other=0.0).to(tl.float32)
            n = (tl.load(x_at + col, mask=col < N, other=0.0).to(tl.float32) - mean) * r
            if dw_ptr is not None:
                so_far = tl.where(begins, 0.0, tl.load(dw_ptr + line + col, mask=col < N, other=0.0))
                tl.store(dw_ptr + line + col, so_far + dy * n, mask=col < N)
            if db_ptr is not None:
                so_far = tl.where(begins, 0.0, tl.load(db_ptr + line + col, mask=col < N, other=0.0))
                tl.store(db_ptr + line + col, so_far + dy, mask=col < N)
            if dx_ptr is not None:
                if w_ptr is not None:
                    dy *= tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32)
                tl.store(dx_at + col, (r * (dy - mean_g - n * mean_gn)).to(dx_ptr.dtype.element_ty), mask=col < N)
        if dw_ptr is not None or db_ptr is not None:
            tl.debug_barrier()  # the next row reads these lines again


# --- launchers
# ----------------------------------------------------------------------------------------------------------


def _runs_kernel(x: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    return use_triton(x) and all(p is None or p.dtype in KERNEL_DTYPES for p in parameters)


def _launch_fwd(x, weight, bias, eps, mean, rstd, out_dtype, recompute) -> torch.Tensor:
    y = empty_rows_like(x, out_dtype)
    rows, n = count_rows(x), x.shape[-1]
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    if x.numel():
        (x, out), sizes, (x_strides, y_strides) = as_rows(x, y)
        launch = row_launch(n, FWD_TILES)
        kernel = _fwd_wide_kernel if launch.wide else _fwd_kernel
        with on_device(x):
            kernel[(launch.programs(rows),)](
                x,
                weight,
                bias,
                out,
                mean,
                rstd,
                rows,
                sizes,
                x_strides,
                y_strides,
                eps,
                N=n,
                RECOMPUTE=recompute,
                BLOCK_M=launch.block_m,
                BLOCK_N=launch.block_n,
                num_warps=launch.num_warps,
                enable_fp_fusion=True,
            )
        if out is not y:
            y.copy_(out)
    return y


def _fwd_fake(x, weight, bias, eps, out_dtype):
    stats = [x.new_empty(count_rows(x), dtype=math_dtype(x.dtype)) for _ in range(2)]
    return empty_rows_like(x, out_dtype), *stats


@op(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _fwd_fake,
)
def _fwd(x, weight, bias, eps, out_dtype):
    if _runs_kernel(x, weight, bias):
        mean, rstd = (x.new_empty(count_rows(x), dtype=torch.float32) for _ in range(2))
        return _launch_fwd(x, weight, bias, eps, mean, rstd, out_dtype, False), mean, rstd
    xm = x.to(math_dtype(x.dtype))
    mean = xm.mean(-1, keepdim=True)
    centred = xm - mean
    rstd = centred.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = in_rows_layout(_affine_ref(centred.mul_(rstd), weight, bias, out_dtype), x)
    return y, mean.reshape(-1).contiguous(), rstd.reshape(-1).contiguous()


def _recompute_fake(x, mean, rstd, weight, bias, out_dtype):
    return empty_rows_like(x, out_dtype)


@op(
    "layer_norm_recompute(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, ScalarType out_dtype) -> "
    "Tensor",
    _recompute_fake,
)
def _recompute(x, mean, rstd, weight, bias, out_dtype):
    if _runs_kernel(x, weight, bias):
        return _launch_fwd(x, weight, bias, 0.0, mean.contiguous(), rstd.contiguous(), out_dtype, True)
    stat = (*x.shape[:-1], 1)
    n = (x.to(rstd.dtype) - mean.view(stat)).mul_(rstd.view(stat))
    return in_rows_layout(_affine_ref(n, weight, bias, out_dtype), x)


def _bwd_fake(dy, x, mean, rstd, weight, need_dx, need_dw, need_db):
    n = x.shape[-1]
    lines = row_launch(n, BWD_TILES).partials(count_rows(x)) if _runs_kernel(x, weight) else 1
    dw, db = (x.new_empty((lines if need else 0, n), dtype=rstd.dtype) for need in (need_dw, need_db))
    return empty_rows_like(x, x.dtype) if need_dx else x.new_empty(0), dw, db


@op(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, bool need_dx, bool need_dw, bool "
    "need_db)"
    " -> (Tensor dx, Tensor dw, Tensor db)",
    _bwd_fake,
)
def _bwd(dy, x, mean, rstd, weight, need_dx, need_dw, need_db):
    """dx (empty where not needed) and the partial sums of dw and db [P, N] (P = 0 where not needed)."""
    if not _runs_kernel(x, weight):
        return _bwd_ref(dy, x, mean, rstd, weight, need_dx, need_dw, need_db)
    n, rows = x.shape[-1], count_rows(x)
    launch = row_launch(n, BWD_TILES)
    lines = launch.partials(rows)
    allocate = x.new_empty if x.numel() else x.new_zeros
    dw, db = (allocate((lines if need else 0, n), dtype=torch.float32) for need in (need_dw, need_db))
    dx = empty_rows_like(x, x.dtype) if need_dx else x.new_empty(0)
    weight = None if weight is None else weight.contiguous()
    if x.numel():
        (dy, x, out), sizes, (dy_strides, x_strides, dx_strides) = as_rows(dy, x, dx if need_dx else x)
        kernel = _bwd_wide_kernel if launch.wide else _bwd_kernel
        with on_device(x):
            kernel[(lines if need_dw or need_db else launch.programs(rows),)](
                dy,
                x,
                weight,
                mean.contiguous(),
                rstd.contiguous(),
                out if need_dx else None,
                dw if need_dw else None,
                db if need_db else None,
                rows,
                sizes,
                dy_strides,
                x_strides,
                dx_strides,
                N=n,
                BLOCK_M=launch.block_m,
                BLOCK_N=launch.block_n,
                num_warps=launch.num_warps,
                enable_fp_fusion=True,
            )
        if need_dx and out is not dx:
            dx.copy_(out)
    return dx, dw, db


def _bwd_ref(dy, x, mean, rstd, weight, need_dx, need_dw, need_db):
    """torch's own operator, given everything in the dtype of the statistics."""
    n, stat = x.shape[-1], (*x.shape[:-1], 1)
    w = None if weight is None else weight.to(rstd.dtype)
    like_bias = rstd.new_empty(n) if need_db else None
    wanted = [need_dx, need_dw, need_db]
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy.to(rstd.dtype), x.to(rstd.dtype), [n], mean.view(stat), rstd.view(stat), w, like_bias, wanted
    )
    dw, db = (d.unsqueeze(0) if need else rstd.new_empty((0, n)) for d, need in ((dw, need_dw), (db, need_db)))
    return in_rows_layout(dx.to(x.dtype), x) if need_dx else x.new_empty(0), dw, db


# --- autograd
# -----------------------------------------------------------------------------------------------------------


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, out_dtype):
        y, mean, rstd = _fwd(x, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype, ctx.form = None if bias is None else bias.dtype, (eps, out_dtype)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    def backward(ctx, dy, _mean, _rstd):
        if dy is None:
            return None, None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
        if higher_order.wanted():
            eps, out = ctx.form
            bias = (
                None if ctx.bias_dtype is None else x.new_zeros(x.shape[-1], dtype=ctx.bias_dtype)
            )  # no gradient depends on it
            formula = lambda x, weight, bias: layer_norm_ref(x, weight, bias, eps, out_dtype=out)
            return *higher_order.gradients(formula, (x, weight, bias), (need_dx, need_dw, need_db), (dy,)), None, None
        dx, dw, db = _bwd(dy, x, mean, rstd, weight, need_dx, need_dw, need_db)
        return (
            dx if need_dx else None,
            dw.sum(0).to(weight.dtype) if need_dw else None,
            db.sum(0).to(ctx.bias_dtype) if need_db else None,
            None,
            None,
        )


# --- public
# -------------------------------------------------------------------------------------------------------------


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = (x - m) r weight + bias, m = mean(x), r = 1 / sqrt(mean((x - m)^2) + eps), over the last dimension.

    x: [..., N], any strides; bf16, fp16, fp32 (math in fp32) or float64. weight, bias: [N] of a floating dtype, each
    may be None. The result has the dtype of x (as torch.nn.functional.layer_norm), whatever that of weight and bias, or
    out_dtype. It is dense, its dimensions in the order of x's where the last is innermost, else contiguous.
    Differentiable in x, weight and bias; saves x, weight, m and r. Raises TypeError on dtypes that are not floating,
    ValueError on shapes that do not fit."""
    return layer_norm_with_stats(x, weight, bias, eps, out_dtype=out_dtype)[0]


def layer_norm_with_stats(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`layer_norm`, and m and r: [rows] in fp32 (float64 for float64 x), rows in the order of the leading dimensions.
    No gradient
    flows through m and r: they are there to compute y again from x."""
    _check("layer_norm", x, weight, bias)
    return _LayerNorm.apply(x, weight, bias, float(eps), out_dtype or x.dtype)


@torch.no_grad()
def layer_norm_recompute(
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The y of `layer_norm_with_stats(x, weight, bias)` from its mean and rstd, bit for bit, in one launch. Not
    differentiable.

    Raises as `layer_norm`, and ValueError where mean or rstd has not one element for each row of x.
    """
    _check("layer_norm_recompute", x, weight, bias)
    for stat in (mean, rstd):
        if stat.shape != (count_rows(x),) or stat.dtype != math_dtype(x.dtype):
            want = f"[{count_rows(x)}] {math_dtype(x.dtype)}"
            raise ValueError(f"layer_norm_recompute: want mean and rstd {want}, got {list(stat.shape)} {stat.dtype}")
    return _recompute(x, mean, rstd, weight, bias, out_dtype or x.dtype)


def _check(name: str, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    tensors = [t for t in (x, weight, bias) if t is not None]
    if not all(t.is_floating_point() for t in tensors):
        raise TypeError(f"{name}: want floating dtypes, got {[t.dtype for t in tensors]}")
    if x.dim() == 0 or any(t.shape != x.shape[-1:] for t in tensors[1:]):
        raise ValueError(
            f"{name}: want x [..., N], weight and bias [N] or None, got {[list(t.shape) for t in tensors]}"
        )


# --- compilations that stand for real models
# ------------------------------------------------------------------------------


def _aot_case(note, kernel, n, lead=1, x="*bf16", w="*bf16", b="*bf16", parameters=False, recompute=False) -> AotCase:
    forward = kernel in (_fwd_kernel, _fwd_wide_kernel)
    launch = row_launch(n, FWD_TILES if forward else BWD_TILES)
    steps = ("i32",) * lead
    arguments = {"x_ptr": x, "w_ptr": w, "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "rows": "i32", "sizes": steps[1:]}
    arguments |= {"x_strides": steps}
    constexprs = {"N": n, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
    if forward:
        arguments |= {"b_ptr": b, "y_ptr": x, "y_strides": steps, "eps": "fp32"}
        constexprs |= {"RECOMPUTE": recompute}
    else:
        partial = "*fp32" if parameters else None
        arguments |= {
            "dy_ptr": x,
            "dx_ptr": x,
            "dw_ptr": partial,
            "db_ptr": partial,
            "dy_strides": steps,
            "dx_strides": steps,
        }
    signature = {name: kind for name, kind in arguments.items() if kind is not None}
    constexprs |= {name: None for name, kind in arguments.items() if kind is None}
    return AotCase(kernel, signature, constexprs, launch.num_warps, note=note, unaligned=("rows",))


AOT_CASES = (
    _aot_case("GPT-2 XL, T4", _fwd_kernel, 1600, x="*fp16", w="*fp16", b="*fp16"),
    _aot_case("Command R, no bias", _fwd_kernel, 8192, b=None),
    _aot_case("Command R, q/k heads, y again", _fwd_kernel, 128, lead=2, b=None, recompute=True),
    _aot_case("wider than a block", _fwd_wide_kernel, 32768, w="*fp32", b="*fp32"),
    _aot_case("Falcon-7B, LoRA", _bwd_kernel, 4544),
    _aot_case("SigLIP so400m, full fine-tuning", _bwd_kernel, 1152, parameters=True),
    _aot_case("Command R, full fine-tuning", _bwd_kernel, 8192, b=None, parameters=True),
    _aot_case("Command R, q/k heads", _bwd_kernel, 128, lead=2),
    _aot_case("wider than a block, full fine-tuning", _bwd_wide_kernel, 16384, parameters=True),
)
