"""The kernels of `rms_norm`: one program a row where the row fits a tile, else one that walks along it."""

from __future__ import annotations

from fastft_kernels.quant.fp8 import CASTS_E4M3, store_rows
from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.language import tl, triton
from fastft_kernels.runtime.precise import column_sum, row_mean, row_mean_of_product, row_rstd
from fastft_kernels.runtime.rows import (
    BWD_TILES,
    FWD_TILES,
    row_launch,
    row_start,
)


@triton.jit
def _scaled(n, w, x_dtype, OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr):
    """c(n) (offset + w), with the row [BLOCK_N] or nothing for w."""
    if CAST_BEFORE:
        n = n.to(x_dtype).to(tl.float32)
    if w is not None:
        n = n * (OFFSET + w.to(tl.float32))[None, :]
    return n


@triton.jit(do_not_specialize=["rows"])
def fwd_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    sizes,
    x_strides,
    y_strides,
    eps,
    q_ptr,  # this and the next: None where y is not rounded to e4m3 as well
    scale_ptr,
    N: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_BEFORE: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whole rows: y and, where asked, 1/rms, and y's rows in e4m3. One program for BLOCK_M rows."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    col = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (row < rows)[:, None] & (col < N)[None, :]  # [BLOCK_M, BLOCK_N]
    x = tl.load(x_ptr + row_start(row, sizes, x_strides)[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if RECOMPUTE:
        r = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    else:
        r = row_rstd(x, eps, N, x_ptr.dtype.element_ty == tl.float32)
        tl.store(rstd_ptr + row, r, mask=row < rows)
    w = None
    if w_ptr is not None:
        w = tl.load(w_ptr + col, mask=col < N, other=0.0)
    y = _scaled(x * r[:, None], w, x_ptr.dtype.element_ty, OFFSET, CAST_BEFORE)
    y_at = y_ptr + row_start(row, sizes, y_strides)[:, None] + col[None, :]
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_at, y, mask=mask)
    if q_ptr is not None:
        store_rows(tl.where(mask, y.to(tl.float32), 0.0), q_ptr, scale_ptr, row, col, rows, N, HARDWARE)


@triton.jit(do_not_specialize=["rows"])
def fwd_wide_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    sizes,
    x_strides,
    y_strides,
    eps,
    N: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_BEFORE: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row (BLOCK_M = 1) in blocks of BLOCK_N columns: a pass for r, a pass for y."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [1]
    x_at = x_ptr + row_start(row, sizes, x_strides)[:, None]
    y_at = y_ptr + row_start(row, sizes, y_strides)[:, None]
    if RECOMPUTE:
        r = tl.load(rstd_ptr + row)
    else:
        squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)[None, :]
            x = tl.load(x_at + col, mask=col < N, other=0.0).to(tl.float32)
            squares += x * x
        r = tl.div_rn(1.0, tl.sqrt_rn(row_mean(squares, N, x_ptr.dtype.element_ty == tl.float32) + eps))
        tl.store(rstd_ptr + row, r)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_at + col[None, :], mask=(col < N)[None, :], other=0.0).to(tl.float32)
        w = None
        if w_ptr is not None:
            w = tl.load(w_ptr + col, mask=col < N, other=0.0)
        y = _scaled(x * r[:, None], w, x_ptr.dtype.element_ty, OFFSET, CAST_BEFORE)
        tl.store(y_at + col[None, :], y.to(y_ptr.dtype.element_ty), mask=(col < N)[None, :])


@triton.jit(do_not_specialize=["rows"])
def bwd_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    rstd_ptr,
    dx_ptr,
    dw_ptr,
    rows,
    sizes,
    dy_strides,
    x_strides,
    dx_strides,
    N: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each program takes every P-th block of rows. dx_ptr or dw_ptr is None where that gradient is not wanted."""
    col = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    if w_ptr is not None:
        u = OFFSET + tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32)
    if dw_ptr is not None:
        dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (row < rows)[:, None] & (col < N)[None, :]  # [BLOCK_M, BLOCK_N]
        dy_at = dy_ptr + row_start(row, sizes, dy_strides)[:, None] + col[None, :]
        dy = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row_start(row, sizes, x_strides)[:, None] + col[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        r = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        n = x * r
        if dw_ptr is not None:
            dw += dy * n
        if dx_ptr is not None:
            g = dy
            if w_ptr is not None:
                g = dy * u[None, :]
            dx = r * (g - n * row_mean_of_product(g, n, N, x_ptr.dtype.element_ty == tl.float32)[:, None])
            dx_at = dx_ptr + row_start(row, sizes, dx_strides)[:, None] + col[None, :]
            tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dw_ptr is not None:
        tl.store(
            dw_ptr + tl.program_id(0).to(tl.int64) * N + col,
            column_sum(dw, x_ptr.dtype.element_ty == tl.float32),
            mask=col < N,
        )


@triton.jit(do_not_specialize=["rows"])
def bwd_wide_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    rstd_ptr,
    dx_ptr,
    dw_ptr,
    rows,
    sizes,
    dy_strides,
    x_strides,
    dx_strides,
    N: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same, one row (BLOCK_M = 1) at a time in blocks of BLOCK_N columns: a pass for mean(g n), a pass for the
    gradients. The program's own line of dw stays in memory, where the L2 cache holds it; its first row begins from
    zero."""
    for first in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = first + tl.arange(0, BLOCK_M)  # [1]
        dy_at = dy_ptr + row_start(row, sizes, dy_strides)[:, None]
        x_at = x_ptr + row_start(row, sizes, x_strides)[:, None]
        r = tl.load(rstd_ptr + row)[:, None]
        if dx_ptr is not None:
            products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in range(0, N, BLOCK_N):
                col = start + tl.arange(0, BLOCK_N)[None, :]
                g = tl.load(dy_at + col, mask=col < N, other=0.0).to(tl.float32)
                if w_ptr is not None:
                    g *= OFFSET + tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32)
                products += g * (tl.load(x_at + col, mask=col < N, other=0.0).to(tl.float32) * r)
            mean = row_mean(products, N, x_ptr.dtype.element_ty == tl.float32)[:, None]
            dx_at = dx_ptr + row_start(row, sizes, dx_strides)[:, None]
        for start in range(0, N, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)[None, :]
            dy = tl.load(dy_at + col, mask=col < N, other=0.0).to(tl.float32)
            n = tl.load(x_at + col, mask=col < N, other=0.0).to(tl.float32) * r
            if dw_ptr is not None:
                dw_at = dw_ptr + tl.program_id(0).to(tl.int64) * N + col
                so_far = tl.where(first < tl.num_programs(0), 0.0, tl.load(dw_at, mask=col < N, other=0.0))
                tl.store(dw_at, so_far + dy * n, mask=col < N)
            if dx_ptr is not None:
                if w_ptr is not None:
                    dy *= OFFSET + tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32)
                tl.store(dx_at + col, (r * (dy - n * mean)).to(dx_ptr.dtype.element_ty), mask=col < N)
        if dw_ptr is not None:
            tl.debug_barrier()  # the next row reads this line of dw again


def _aot_case(
    note, kernel, n, lead=1, x="*bf16", w="*bf16", dw=False, offset=0.0, cast_before=True, recompute=False, cast=None
) -> AotCase:
    """cast: whether e4m3 is cast in hardware; None where y is not rounded to it."""
    forward = kernel in (fwd_kernel, fwd_wide_kernel)
    launch = row_launch(n, FWD_TILES if forward else BWD_TILES)
    steps = ("i32",) * lead
    signature = {"x_ptr": x, "rstd_ptr": "*fp32", "rows": "i32", "sizes": steps[1:], "x_strides": steps}
    constexprs = {"N": n, "OFFSET": offset, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
    if forward:
        signature |= {"y_ptr": x, "y_strides": steps, "eps": "fp32"}
        constexprs |= {"CAST_BEFORE": cast_before, "RECOMPUTE": recompute}
        if kernel is fwd_kernel and cast is None:
            constexprs |= {"q_ptr": None, "scale_ptr": None, "HARDWARE": False}
        elif kernel is fwd_kernel:
            signature |= {"q_ptr": "*u8", "scale_ptr": "*fp32"}
            constexprs |= {"HARDWARE": cast}
    else:
        signature |= {"dy_ptr": x, "dx_ptr": x, "dy_strides": steps, "dx_strides": steps}
        (signature if dw else constexprs)["dw_ptr"] = "*fp32" if dw else None
    (signature if w else constexprs)["w_ptr"] = w
    return AotCase(kernel, signature, constexprs, launch.num_warps, note=note, unaligned=("rows",))


def AOT_CASES(arch: str) -> tuple[AotCase, ...]:
    """Norms of real models; those that also round for an FP8 product cast as the architecture does."""
    cast = arch in CASTS_E4M3
    return (
        *_CASES,
        _aot_case("Llama-3.1-8B, FP8", fwd_kernel, 4096, cast=cast),
        _aot_case("Llama-3.1-405B, FP8", fwd_kernel, 16384, cast=cast),
    )


_CASES = (
    _aot_case("Llama-3.1-8B", fwd_kernel, 4096),
    _aot_case("Llama-3.1-8B, y again", fwd_kernel, 4096, recompute=True),
    _aot_case("Gemma-2-2B, T4", fwd_kernel, 2304, x="*fp16", w="*fp16", offset=1.0, cast_before=False),
    _aot_case("Qwen3, heads of a transposed view", fwd_kernel, 128, lead=3),
    _aot_case("Llama-3.1-405B", fwd_kernel, 16384, w="*fp32"),
    _aot_case("wider than a block", fwd_wide_kernel, 32768),
    _aot_case("Llama-3.1-8B, LoRA", bwd_kernel, 4096),
    _aot_case("Llama-3.1-8B, full fine-tuning", bwd_kernel, 4096, dw=True),
    _aot_case("Llama-3.1-70B, full, fp32", bwd_kernel, 8192, x="*fp32", w="*fp32", dw=True),
    _aot_case("Qwen3, heads of a transposed view, full", bwd_kernel, 128, lead=3, dw=True),
    _aot_case("Llama-3.1-405B, full", bwd_wide_kernel, 16384, w="*fp32", dw=True),
)
