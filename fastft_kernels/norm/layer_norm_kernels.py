"""The kernels of `layer_norm`: one program a row where the row fits a tile, else one that walks along it."""

from __future__ import annotations

from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.language import tl, triton
from fastft_kernels.runtime.precise import column_sum, product, quotient, row_mean, row_mean_of_product, row_rstd
from fastft_kernels.runtime.rows import (
    BWD_TILES,
    FWD_TILES,
    row_launch,
    row_start,
)


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
def fwd_kernel(
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
    """Whole rows: y and, where asked, mean and 1/std. One program for BLOCK_M rows."""
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
def fwd_wide_kernel(
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
def bwd_kernel(
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
                g = product(dy, w[None, :])
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
def bwd_wide_kernel(
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
                    g = product(g, tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32))
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
                    dy = product(dy, tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32))
                tl.store(dx_at + col, (r * (dy - mean_g - n * mean_gn)).to(dx_ptr.dtype.element_ty), mask=col < N)
        if dw_ptr is not None or db_ptr is not None:
            tl.debug_barrier()  # the next row reads these lines again


def _aot_case(note, kernel, n, lead=1, x="*bf16", w="*bf16", b="*bf16", parameters=False, recompute=False) -> AotCase:
    forward = kernel in (fwd_kernel, fwd_wide_kernel)
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
    _aot_case("GPT-2 XL, T4", fwd_kernel, 1600, x="*fp16", w="*fp16", b="*fp16"),
    _aot_case("Command R, no bias", fwd_kernel, 8192, b=None),
    _aot_case("Command R, q/k heads, y again", fwd_kernel, 128, lead=2, b=None, recompute=True),
    _aot_case("wider than a block", fwd_wide_kernel, 32768, w="*fp32", b="*fp32"),
    _aot_case("Falcon-7B, LoRA", bwd_kernel, 4544),
    _aot_case("SigLIP so400m, full fine-tuning", bwd_kernel, 1152, parameters=True),
    _aot_case("Command R, full fine-tuning", bwd_kernel, 8192, b=None, parameters=True),
    _aot_case("Command R, q/k heads", bwd_kernel, 128, lead=2),
    _aot_case("wider than a block, full fine-tuning", bwd_wide_kernel, 16384, parameters=True),
)
