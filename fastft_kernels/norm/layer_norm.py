"""y = n w + b,   n = (x - m) r,   m = mean(x),   r = 1 / sqrt(mean((x - m)^2) + eps)   over the last dimension (Ba et
                  al. 2016).

With g = dy w (dy without a weight):
    dx = r (g - mean(g) - n mean(g n)),   dw = sum over rows of dy n,   db = sum over rows of dy.

Saved for the backward: x, w, m and r (8 bytes a row). y is never saved: `layer_norm_recompute` gives it again, bit for
bit. Shapes [..., N]; bf16, fp16, fp32 in and out, math in fp32, one rounding at the end; float64 in float64, by the
reference. dw, db: each program sums its own rows into its own line of a [P, N] buffer, P fixed by the shape, and one
sum over P follows: no atomics."""

from __future__ import annotations

import torch

from fastft_kernels.norm.layer_norm_kernels import bwd_kernel, bwd_wide_kernel, fwd_kernel, fwd_wide_kernel
from fastft_kernels.runtime import higher_order
from fastft_kernels.runtime.dispatch import math_dtype, on_device, op, use_triton
from fastft_kernels.runtime.rows import (
    BWD_TILES,
    FWD_TILES,
    as_rows,
    count_rows,
    empty_rows_like,
    in_rows_layout,
    row_launch,
)

# reference


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


# launchers (of `layer_norm_kernels`)


def _runs_kernel(x: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    return use_triton(x, *(p.dtype for p in parameters if p is not None))


def _launch_fwd(x, weight, bias, eps, mean, rstd, out_dtype, recompute) -> torch.Tensor:
    y = empty_rows_like(x, out_dtype)
    rows, n = count_rows(x), x.shape[-1]
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    if x.numel():
        (x, out), sizes, (x_strides, y_strides) = as_rows(x, y)
        launch = row_launch(n, FWD_TILES)
        kernel = fwd_wide_kernel if launch.wide else fwd_kernel
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
        kernel = bwd_wide_kernel if launch.wide else bwd_kernel
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


# autograd


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
            # no gradient depends on it
            bias = None if ctx.bias_dtype is None else x.new_zeros(x.shape[-1], dtype=ctx.bias_dtype)
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


# public


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
    No gradient flows through m and r: they are there to compute y again from x."""
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


# compilations that stand for real models
