"""w[i, j] = q[i, j] * scale[i // rows, j // columns] * factor: scaled 8-bit weights as a dense matrix.

    int8    bitsandbytes LLM.int8(): q = CB [out, in], scale = SCB [out], factor = 1/127 (in float32, as bitsandbytes
            multiplies)
    e4m3    FP8: one scale for the tensor, one a row, or one a block of rows x columns; factor = 1

Math in float32, products in the order written, one rounding to bf16 or fp16. e4m3 is decoded from its bits, so that it
runs on GPUs without FP8 as well. Nothing here is differentiable: a quantised weight is frozen."""

from __future__ import annotations

import torch

from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import KERNEL_DTYPES, on_device, op, use_triton
from fastft_kernels.runtime.language import tl, triton

FACTOR_INT8 = 7.874015718698502e-3  # 1/127
TILE = 2048  # elements of one program: 16 a thread, one 16-byte load
NUM_WARPS = 4


# reference


def dequantize_8bit_ref(q, scale, rows: int, columns: int, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """scale [ceil(out / rows), ceil(in / columns)]."""
    m, n = q.shape
    if rows > 1:
        scale = scale.repeat_interleave(rows, 0)[:m]
    if 1 < columns < n:
        scale = scale.repeat_interleave(columns, 1)[:, :n]
    w = q.float().mul_(scale.float())
    return (w if factor == 1.0 else w.mul_(factor)).to(dtype)


# kernel


@triton.jit
def _dequantize_kernel(
    q_ptr,
    scale_ptr,
    w_ptr,
    m,
    n,
    rows,
    columns,
    scale_columns,
    factor,
    E4M3: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(n, BLOCK_N)
    r = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    c = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (r < m) & (c < n)
    at = r.to(tl.int64) * n + c  # [BLOCK_M, BLOCK_N]
    q = tl.load(q_ptr + at, mask=mask, other=0)
    if E4M3:  # sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities
        bits = q.to(tl.int32)
        exponent = (bits >> 3) & 15
        normal = (((exponent + 120) << 23) | ((bits & 7) << 20)).to(tl.float32, bitcast=True)
        v = tl.where(exponent == 0, (bits & 7).to(tl.float32) * 0.001953125, normal)
        v = tl.where((bits & 127) == 127, float("nan"), v)
        v = tl.where(bits > 127, -v, v)
    else:
        v = q.to(tl.float32)
    at_scale = (r // rows).to(tl.int64) * scale_columns + c // columns
    w = v * tl.load(scale_ptr + at_scale, mask=mask, other=0.0).to(tl.float32)
    tl.store(w_ptr + at, (w * factor).to(w_ptr.dtype.element_ty), mask=mask)


# launcher


@op(
    "dequantize_8bit(Tensor q, Tensor scale, int rows, int columns, float factor, ScalarType dtype) -> Tensor",
    lambda q, scale, rows, columns, factor, dtype: q.new_empty(q.shape, dtype=dtype),
)
def _dequantize(q, scale, rows, columns, factor, dtype):
    if not use_triton(scale, dtype):
        return dequantize_8bit_ref(q, scale, rows, columns, factor, dtype)
    q, scale = q.contiguous(), scale.contiguous()
    (m, n), e4m3 = q.shape, q.dtype == torch.float8_e4m3fn
    w = q.new_empty(m, n, dtype=dtype)
    if w.numel():
        block_n = min(1 << max(n - 1, 15).bit_length(), TILE)
        block_m = TILE // block_n
        with on_device(w):
            _dequantize_kernel[(-(-m // block_m) * -(-n // block_n),)](
                q.view(torch.uint8) if e4m3 else q,
                scale,
                w,
                m,
                n,
                rows,
                columns,
                scale.shape[1],
                factor,
                E4M3=e4m3,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
    return w


# public


def dequantize_int8(CB: torch.Tensor, SCB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """CB [out, in] int8, contiguous, SCB [out] float32 -> w [out, in] in `dtype` (bf16, fp16, fp32). One launch, no
    gradient.

    In float32 the bits of bitsandbytes.functional.int8_vectorwise_dequant. Raises ValueError for other dtypes and
    shapes."""
    if CB.dtype != torch.int8 or CB.dim() != 2 or SCB.numel() != CB.shape[0] or not CB.is_contiguous():
        raise ValueError(
            f"dequantize_int8: want int8 [out, in] and [out], got {CB.dtype} {tuple(CB.shape)} and {tuple(SCB.shape)}"
        )
    _check_dtype("dequantize_int8", dtype)
    return _dequantize(CB, SCB.reshape(-1, 1), 1, max(CB.shape[1], 1), FACTOR_INT8, dtype)


def dequantize_e4m3(
    q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] | None = None
) -> torch.Tensor:
    """q [out, in] float8_e4m3fn, contiguous, times its scales -> w [out, in] in `dtype` (bf16, fp16, fp32). One launch.

    scale, floating: one element for the whole tensor; [out] or [out, 1]: one a row; [ceil(out / block[0]), ceil(in /
    block[1])]. Raises ValueError for other dtypes and shapes."""
    if q.dtype != torch.float8_e4m3fn or q.dim() != 2 or not q.is_contiguous():
        raise ValueError(f"dequantize_e4m3: want contiguous float8_e4m3fn [out, in], got {q.dtype} {tuple(q.shape)}")
    _check_dtype("dequantize_e4m3", dtype)
    m, n = q.shape
    if block is not None:
        rows, columns = block
        want = (-(-m // rows), -(-n // columns))
    elif scale.numel() == 1:
        rows, columns, want = max(m, 1), max(n, 1), (1, 1)
    else:
        rows, columns, want = 1, max(n, 1), (m, 1)
    if scale.numel() != want[0] * want[1] or (block is not None and tuple(scale.shape) != want):
        raise ValueError(
            f"dequantize_e4m3: want scales {want} for {(m, n)} and block {block}, got {tuple(scale.shape)}"
        )
    return _dequantize(q, scale.reshape(want).contiguous(), rows, columns, 1.0, dtype)


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"{name}: want dtype bfloat16, float16 or float32, got {dtype}")


def _case(q: str, dtype: str, note: str) -> AotCase:
    sizes = dict.fromkeys(("m", "n", "rows", "columns", "scale_columns"), "i32")
    return AotCase(
        _dequantize_kernel,
        {"q_ptr": f"*{q}", "scale_ptr": "*fp32", "w_ptr": f"*{dtype}", "factor": "fp32"} | sizes,
        {"E4M3": q == "u8", "BLOCK_M": 1, "BLOCK_N": TILE},
        num_warps=NUM_WARPS,
        note=note,
        unaligned=("rows", "scale_columns"),
    )


AOT_CASES = (
    _case("i8", "fp16", "LLM.int8()"),
    _case("i8", "bf16", "LLM.int8()"),
    _case("u8", "bf16", "FP8, blocks of 128 x 128"),
    _case("u8", "fp32", "FP8, rows"),
)
