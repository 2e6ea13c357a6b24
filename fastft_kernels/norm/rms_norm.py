"""y = c(x r) (offset + w),   r = 1 / sqrt(mean(x^2) + eps)   over the last dimension (Zhang & Sennrich 2019).

With n = x r, u = offset + w (1 without a weight) and g = dy u:
    dx = r (g - n mean(g n)),   dw = sum over rows of dy n.
c is where the rounding to the dtype of x takes place: cast="before" rounds n before the product with the weight (Llama,
Qwen, Mistral), cast="after" keeps everything in float32 until the end (Gemma with offset=1, OLMo-2 with offset=0).

Saved for the backward: x, w and r (4 bytes a row). y is never saved: `rms_norm_recompute` gives it again, bit for bit.
Shapes [..., N]; bf16, fp16, fp32 in and out, math in fp32; float64 in float64, by the reference. dw: each program sums
its own rows into its own line of a [P, N] buffer, P fixed by the shape, and one sum over P follows: no atomics, the
same bits every run."""

from __future__ import annotations

import torch

from fastft_kernels.norm.rms_norm_kernels import bwd_kernel, bwd_wide_kernel, fwd_kernel, fwd_wide_kernel
from fastft_kernels.quant.fp8 import E4M3, casts_in_hardware, quantize_e4m3_rows
from fastft_kernels.runtime import higher_order
from fastft_kernels.runtime.dispatch import (
    applied,
    math_dtype,
    on_device,
    op,
    quick_apply,
    use_triton,
    wider,
)
from fastft_kernels.runtime.rows import (
    BWD_TILES,
    FWD_TILES,
    as_rows,
    count_rows,
    empty_rows_like,
    in_rows_layout,
    row_launch,
)

# --- reference
# ----------------------------------------------------------------------------------------------------------


def rms_norm_ref(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "before",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The formula in plain torch; differentiable by autograd."""
    xm = x.to(math_dtype(x.dtype))
    n = xm * torch.rsqrt(xm.square().mean(-1, keepdim=True) + eps)
    return _scale_ref(n, x.dtype, weight, offset, cast == "before", _out_dtype(x, weight, cast, out_dtype))


def _scale_ref(n, x_dtype, weight, offset, cast_before, out_dtype):
    if cast_before:
        n = n.to(x_dtype)
    if weight is not None:
        m = wider(math_dtype(weight.dtype), math_dtype(x_dtype))
        n = n.to(m) * (weight.to(m) + offset)
    return n.to(out_dtype)


def _out_dtype(x, weight, cast, out_dtype):
    if out_dtype is not None:
        return out_dtype
    if cast == "after" or weight is None:
        return x.dtype
    return wider(x.dtype, weight.dtype)


# --- kernels
# ------------------------------------------------------------------------------------------------------------


# --- launchers
# ----------------------------------------------------------------------------------------------------------


def _runs_kernel(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    return use_triton(x) if weight is None else use_triton(x, weight.dtype)


def _launch_fwd(x, weight, eps, rstd, offset, cast_before, out_dtype, recompute, q=None, scale=None) -> torch.Tensor:
    """q [rows, N] uint8, scale [rows]: receive y's rows in e4m3; for a launch that is not wide."""
    y = empty_rows_like(x, out_dtype)
    rows, n = count_rows(x), x.shape[-1]
    weight = None if weight is None else weight.contiguous()
    if x.numel():
        (x, out), sizes, (x_strides, y_strides) = as_rows(x, y)
        launch = row_launch(n, FWD_TILES)
        kernel, rounded = fwd_wide_kernel, {}
        if not launch.wide:
            kernel, rounded = fwd_kernel, {"q_ptr": q, "scale_ptr": scale, "HARDWARE": casts_in_hardware(x)}
        with on_device(x):
            kernel[(launch.programs(rows),)](
                x,
                weight,
                out,
                rstd,
                rows,
                sizes,
                x_strides,
                y_strides,
                eps,
                **rounded,
                N=n,
                OFFSET=offset,
                CAST_BEFORE=cast_before,
                RECOMPUTE=recompute,
                BLOCK_M=launch.block_m,
                BLOCK_N=launch.block_n,
                num_warps=launch.num_warps,
                enable_fp_fusion=True,
            )
        if out is not y:
            y.copy_(out)
    return y


def _is_plain(x, weight, offset, out_dtype) -> bool:
    """Nothing is cast, and the weight is the factor."""
    return weight is not None and not offset and x.dtype == weight.dtype == out_dtype == math_dtype(x.dtype)


def _fwd_fake(x, weight, eps, offset, cast_before, out_dtype):
    return empty_rows_like(x, out_dtype), x.new_empty(count_rows(x), dtype=math_dtype(x.dtype))


@op(
    "rms_norm_fwd(Tensor x, Tensor? weight, float eps, float offset, bool cast_before, ScalarType out_dtype) -> "
    "(Tensor, Tensor)",
    _fwd_fake,
)
def _fwd(x, weight, eps, offset, cast_before, out_dtype):
    if _runs_kernel(x, weight):
        rstd = x.new_empty(count_rows(x), dtype=torch.float32)
        return _launch_fwd(x, weight, eps, rstd, offset, cast_before, out_dtype, False), rstd
    math = math_dtype(x.dtype)
    xm = x if x.dtype == math else x.to(math)
    n = xm.square()
    rstd = n.mean(-1, keepdim=True).add_(eps).rsqrt_()
    torch.mul(xm, rstd, out=n)
    if _is_plain(x, weight, offset, out_dtype):
        return in_rows_layout(n.mul_(weight), x), rstd.view(-1)
    return in_rows_layout(_scale_ref(n, x.dtype, weight, offset, cast_before, out_dtype), x), rstd.view(-1)


def _fwd_rounded_fake(x, weight, eps, offset, cast_before, out_dtype):
    rows = count_rows(x)
    q, scale = x.new_empty((rows, x.shape[-1]), dtype=E4M3), x.new_empty((rows, 1), dtype=torch.float32)
    return *_fwd_fake(x, weight, eps, offset, cast_before, out_dtype), q, scale


@op(
    "rms_norm_fwd_rounded(Tensor x, Tensor? weight, float eps, float offset, bool cast_before, ScalarType out_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_rounded_fake,
)
def _fwd_rounded(x, weight, eps, offset, cast_before, out_dtype):
    rows, n = count_rows(x), x.shape[-1]
    if not _runs_kernel(x, weight) or row_launch(n, FWD_TILES).wide or not x.numel():
        y, rstd = _fwd(x, weight, eps, offset, cast_before, out_dtype)
        return y, rstd, *quantize_e4m3_rows(y.reshape(rows, n))
    rstd, scale = (x.new_empty(shape, dtype=torch.float32) for shape in ((rows,), (rows, 1)))
    q = x.new_empty((rows, n), dtype=torch.uint8)
    y = _launch_fwd(x, weight, eps, rstd, offset, cast_before, out_dtype, False, q, scale)
    return y, rstd, q.view(E4M3), scale


def _recompute_fake(x, rstd, weight, offset, cast_before, out_dtype):
    return empty_rows_like(x, out_dtype)


@op(
    "rms_norm_recompute(Tensor x, Tensor rstd, Tensor? weight, float offset, bool cast_before, ScalarType out_dtype) "
    "-> Tensor",
    _recompute_fake,
)
def _recompute(x, rstd, weight, offset, cast_before, out_dtype):
    if _runs_kernel(x, weight):
        return _launch_fwd(x, weight, 0.0, rstd.contiguous(), offset, cast_before, out_dtype, True)
    if _is_plain(x, weight, offset, out_dtype):
        return in_rows_layout((x * rstd.view(*x.shape[:-1], 1)).mul_(weight), x)
    n = x.to(rstd.dtype) * rstd.view(*x.shape[:-1], 1)
    return in_rows_layout(_scale_ref(n, x.dtype, weight, offset, cast_before, out_dtype), x)


def _bwd_fake(dy, x, rstd, weight, offset, need_dx, need_dw):
    lines = row_launch(x.shape[-1], BWD_TILES).partials(count_rows(x)) if _runs_kernel(x, weight) else 1
    dx = empty_rows_like(x, x.dtype) if need_dx else x.new_empty(0)
    return dx, x.new_empty((lines if need_dw else 0, x.shape[-1]), dtype=rstd.dtype)


@op(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor rstd, Tensor? weight, float offset, bool need_dx, bool need_dw)"
    " -> (Tensor dx, Tensor dw)",
    _bwd_fake,
)
def _bwd(dy, x, rstd, weight, offset, need_dx, need_dw):
    """dx (empty where not needed) and the partial sums of dw [P, N] (P = 0 where not needed)."""
    if not _runs_kernel(x, weight):
        return _bwd_ref(dy, x, rstd, weight, offset, need_dx, need_dw)
    n, rows = x.shape[-1], count_rows(x)
    launch = row_launch(n, BWD_TILES)
    lines = launch.partials(rows) if need_dw else 0
    partial = (x.new_empty if x.numel() else x.new_zeros)((lines, n), dtype=torch.float32)
    dx = empty_rows_like(x, x.dtype) if need_dx else x.new_empty(0)
    weight = None if weight is None else weight.contiguous()
    if x.numel():
        (dy, x, out), sizes, (dy_strides, x_strides, dx_strides) = as_rows(dy, x, dx if need_dx else x)
        kernel = bwd_wide_kernel if launch.wide else bwd_kernel
        with on_device(x):
            kernel[(lines or launch.programs(rows),)](
                dy,
                x,
                weight,
                rstd.contiguous(),
                out if need_dx else None,
                partial if need_dw else None,
                rows,
                sizes,
                dy_strides,
                x_strides,
                dx_strides,
                N=n,
                OFFSET=offset,
                BLOCK_M=launch.block_m,
                BLOCK_N=launch.block_n,
                num_warps=launch.num_warps,
                enable_fp_fusion=True,
            )
        if need_dx and out is not dx:
            dx.copy_(out)
    return dx, partial


def _bwd_ref(dy, x, rstd, weight, offset, need_dx, need_dw):
    """In two buffers: on a CPU it is fresh memory that costs the time."""
    math, r, u = rstd.dtype, rstd.view(*x.shape[:-1], 1), None
    if weight is not None:
        u = weight if weight.dtype == math else weight.to(math)
        u = u + offset if offset else u
    dy = dy if dy.dtype == math else dy.to(math)
    n = (x if x.dtype == math else x.to(math)) * r
    products = dy * n
    dw = (
        products.reshape(-1, x.shape[-1]).sum(0, keepdim=True)
        if need_dw
        else x.new_empty((0, x.shape[-1]), dtype=rstd.dtype)
    )
    if not need_dx:
        return x.new_empty(0), dw
    mean = (products if u is None else products.mul_(u)).mean(-1, keepdim=True)
    g = products.copy_(dy) if u is None else torch.mul(dy, u, out=products)
    dx = g.sub_(n.mul_(mean)).mul_(r)
    return in_rows_layout(dx if x.dtype == math else dx.to(x.dtype), x), dw


# --- autograd
# -----------------------------------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, cast_before, out_dtype):
        y, rstd = _fwd(x, weight, eps, offset, cast_before, out_dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.form = offset, (eps, offset, "before" if cast_before else "after", out_dtype)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return y, rstd

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return None, None, None, None, None, None
        x, weight, rstd = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[:2]
        if higher_order.wanted():
            eps, offset, cast, out = ctx.form
            formula = lambda x, weight: rms_norm_ref(x, weight, eps, offset=offset, cast=cast, out_dtype=out)
            return *higher_order.gradients(formula, (x, weight), (need_dx, need_dw), (dy,)), None, None, None, None
        dx, partial = _bwd(dy, x, rstd, weight, ctx.offset, need_dx, need_dw)
        dw = partial.sum(0).to(weight.dtype) if need_dw else None
        return dx if need_dx else None, dw, None, None, None, None


class _RMSNormRounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, cast_before, out_dtype):
        y, rstd, q, scale = _fwd_rounded(x, weight, eps, offset, cast_before, out_dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.form = offset, (eps, offset, "before" if cast_before else "after", out_dtype)
        ctx.mark_non_differentiable(rstd, q, scale)
        ctx.set_materialize_grads(False)
        return y, rstd, q, scale

    @staticmethod
    def backward(ctx, dy, *_):
        return _RMSNorm.backward(ctx, dy, None)


# --- public
# -------------------------------------------------------------------------------------------------------------


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "before",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = c(x r) (offset + weight), r = 1 / sqrt(mean(x^2) + eps), over the last dimension.

    Args:
        x: [..., N], any strides; bf16, fp16, fp32 (math in fp32) or float64.
        weight: [N] of a floating dtype, or None.
        eps: added to the mean square.
        offset: added to the weight; 1 where a checkpoint stores weight - 1.
        cast: "before" rounds x r to the dtype of x before the product, and the result has the promoted dtype of x and
            weight; "after" rounds once, at the end, to the dtype of x.
        out_dtype: another dtype for the result.

    Returns:
        y [..., N], dense, its dimensions in the order of x's where the last is innermost, else contiguous.
        Differentiable in x and weight; saves x, weight and r.

    Raises:
        TypeError: a dtype is not floating.
        ValueError: shapes do not fit, `cast` is unknown, or there is an offset without a weight.
    """
    return rms_norm_with_rstd(x, weight, eps, offset=offset, cast=cast, out_dtype=out_dtype)[0]


def rms_norm_with_rstd(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "before",
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm`, and r: [rows] in fp32 (float64 for float64 x), rows in the order of the leading dimensions. No
    gradient
    flows through r: it is there to compute y again from x."""
    _check("rms_norm", x, weight, offset, cast)
    return applied(
        _RMSNorm, x, weight, float(eps), float(offset), cast == "before", _out_dtype(x, weight, cast, out_dtype)
    )


# (x, weight, eps, offset, cast_before, out_dtype) -> `rms_norm_with_rstd` of arguments that are known to fit, outside
# torch.func transforms
run = quick_apply(_RMSNorm)


# the same, and y's rows in e4m3 with their scales, as `quantize_e4m3_rows(y)` gives them, in the same launch
run_rounded = quick_apply(_RMSNormRounded)


def run_again(offset: float, cast_before: bool, out_dtype: torch.dtype, x, rstd, weight=None) -> torch.Tensor:
    """`rms_norm_recompute` of arguments that are known to fit."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _recompute(x, rstd, weight, offset, cast_before, out_dtype)
    return _recompute(x, rstd, weight, offset, cast_before, out_dtype)


@torch.no_grad()
def rms_norm_recompute(
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
    cast: str = "before",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The y of `rms_norm_with_rstd(x, weight, ...)` from its rstd, bit for bit, in one launch. Not differentiable.

    Raises as `rms_norm`, and ValueError where rstd has not one element for each row of x.
    """
    _check("rms_norm_recompute", x, weight, offset, cast)
    if rstd.shape != (count_rows(x),) or rstd.dtype != math_dtype(x.dtype):
        want = f"[{count_rows(x)}] {math_dtype(x.dtype)}"
        raise ValueError(f"rms_norm_recompute: want rstd {want}, got {list(rstd.shape)} {rstd.dtype}")
    return _recompute(x, rstd, weight, float(offset), cast == "before", _out_dtype(x, weight, cast, out_dtype))


def _check(name: str, x: torch.Tensor, weight: torch.Tensor | None, offset: float, cast: str) -> None:
    if not x.is_floating_point() or (weight is not None and not weight.is_floating_point()):
        got = x.dtype if weight is None else (x.dtype, weight.dtype)
        raise TypeError(f"{name}: want floating dtypes, got {got}")
    if x.dim() == 0 or (weight is not None and weight.shape != x.shape[-1:]):
        got = None if weight is None else list(weight.shape)
        raise ValueError(f"{name}: want x [..., N] and weight [N] or None, got {list(x.shape)} and {got}")
    if cast not in ("before", "after"):
        raise ValueError(f"{name}: want cast 'before' or 'after', got {cast!r}")
    if weight is None and offset:
        raise ValueError(f"{name}: want offset 0 without a weight, got {offset}")


# --- compilations that stand for real models
# ------------------------------------------------------------------------------
