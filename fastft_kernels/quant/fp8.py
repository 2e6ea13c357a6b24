"""q = e4m3(v / scale), scale = max|v| / 448: numbers in 8 bits (4 of exponent, 3 of mantissa), with a float32 scale for
each row or block.

    rows     v = x or x * columns;  q [m, n], scale [m, 1]        activations, gradients, weights
    blocks   v = x;                 q [m, n], scale [ceil(m / a), ceil(n / b)]                 weights

In float32, each product and quotient rounded once: v * (1 / scale), to the nearest e4m3, ties to even. What a row
holds decides its scale alone, so tokens do not depend on each other. A scale is at least 2^-126: zeros have that one,
and stay zeros. A NaN is a NaN in q (0x7f) and no part of the maximum; an infinity makes the scale infinite, itself a
NaN in q and everything beside it zero: its row of a product is NaN, as is that of a NaN. sm_89 and later cast in
hardware, others in integer arithmetic, with the same bits. Nothing here is differentiable."""

from __future__ import annotations

import torch

from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import on_device, op, use_triton
from fastft_kernels.runtime.language import tl, triton
from fastft_kernels.runtime.rows import FWD_TILES, row_launch

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126
BLOCK = (128, 128)
CASTS_E4M3 = ("sm_89", "sm_90", "sm_100", "sm_120")  # architectures with an instruction that rounds float32 to it


# reference


def _cast_ref(v: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = amax.new_full((), LARGEST)  # on its device: by a number, CUDA multiplies by the reciprocal
    scale = (amax / largest).clamp(min=SMALLEST_SCALE)
    v = v * (1.0 / scale)
    q = v.nan_to_num(nan=0.0).to(E4M3).view(torch.uint8)  # v is at most 448 and a rounding, or NaN
    return q.masked_fill_(v.isnan(), 0x7F).view(E4M3), scale


def _amax_ref(v: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    if v.numel() == 0:
        return v.sum(dims, keepdim=True)
    return v.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(dims, keepdim=True)


def quantize_rows_ref(x: torch.Tensor, columns: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [m, n], columns [n] float32 -> (q [m, n], scale [m, 1])."""
    v = x.float().contiguous()
    v = v if columns is None else v * columns
    return _cast_ref(v, _amax_ref(v, (-1,)))


def quantize_blocks_ref(x: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """x [m, n] -> (q [m, n], scale [ceil(m / a), ceil(n / b)])."""
    (m, n), (a, b) = x.shape, block
    rows, columns = -(-m // a), -(-n // b)
    v = x.new_zeros(rows * a, columns * b, dtype=torch.float32)
    v[:m, :n] = x
    tiles = v.view(rows, a, columns, b)
    q, scale = _cast_ref(tiles, _amax_ref(tiles, (1, 3)))
    return q.view(rows * a, columns * b)[:m, :n].contiguous(), scale.view(rows, columns)


# kernels


@triton.jit
def _scale_of(amax):
    scale = tl.div_rn(amax, 448.0)
    return tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)


@triton.jit
def _e4m3(v, HARDWARE: tl.constexpr):
    """The bits of v, which is at most 448 and a rounding, or NaN."""
    if HARDWARE:
        q = v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = v.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # 960: the biases' difference, 120 << 3
        subnormal = (tl.abs(v) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # in units of 2^-9, those of 2^14
        q = tl.where(size < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)  # 0x3C800000: 2^-6
        q = q.to(tl.uint8)
    return tl.where(v == v, q, tl.full(q.shape, 0x7F, tl.uint8))


@triton.jit
def store_rows(v, q_ptr, scale_ptr, row, col, rows, n, HARDWARE: tl.constexpr):
    """For a kernel that has whole rows v [BLOCK_M, BLOCK_N] at hand, rounded as their reader sees them and 0 beyond
    column n: their e4m3 values [rows, n] and scales [rows]. Not for a kernel that fuses multiplications and additions
    where the cast is one in integers."""
    scale = _scale_of(tl.max(tl.where(v == v, tl.abs(v), 0.0), axis=1))
    q = _e4m3(v * tl.div_rn(1.0, scale)[:, None], HARDWARE)
    mask = (row < rows)[:, None] & (col < n)[None, :]
    tl.store(q_ptr + row.to(tl.int64)[:, None] * n + col[None, :], q, mask=mask)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@triton.jit
def _load(x_ptr, columns_ptr, r, c, m, n, stride_m, stride_n):
    mask = (r < m) & (c < n)
    v = tl.load(x_ptr + r.to(tl.int64) * stride_m + c.to(tl.int64) * stride_n, mask=mask, other=0.0).to(tl.float32)
    if columns_ptr is not None:
        v = v * tl.load(columns_ptr + c, mask=c < n, other=0.0)
    return v, mask


@triton.jit
def _rows_kernel(
    x_ptr,
    columns_ptr,  # or None
    q_ptr,
    scale_ptr,
    m,
    n,
    stride_m,
    stride_n,
    WIDE: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    c = tl.arange(0, BLOCK_N)[None, :]
    if WIDE:
        largest = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, n, BLOCK_N):
            v, _ = _load(x_ptr, columns_ptr, r, start + c, m, n, stride_m, stride_n)
            largest = tl.maximum(largest, tl.where(v == v, tl.abs(v), 0.0))
        scale = _scale_of(tl.max(largest, axis=1))[:, None]
        inverse = tl.div_rn(1.0, scale)
        for start in range(0, n, BLOCK_N):
            v, mask = _load(x_ptr, columns_ptr, r, start + c, m, n, stride_m, stride_n)
            tl.store(q_ptr + r.to(tl.int64) * n + start + c, _e4m3(v * inverse, HARDWARE), mask=mask)
    else:
        v, mask = _load(x_ptr, columns_ptr, r, c, m, n, stride_m, stride_n)  # [BLOCK_M, BLOCK_N]
        scale = _scale_of(tl.max(tl.where(v == v, tl.abs(v), 0.0), axis=1))[:, None]
        inverse = tl.div_rn(1.0, scale)
        tl.store(q_ptr + r.to(tl.int64) * n + c, _e4m3(v * inverse, HARDWARE), mask=mask)
    tl.store(scale_ptr + r, scale, mask=r < m)


@triton.jit
def _blocks_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    m,
    n,
    stride_m,
    stride_n,
    HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(n, BLOCK_N)
    r = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    c = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    v, mask = _load(x_ptr, None, r, c, m, n, stride_m, stride_n)  # [BLOCK_M, BLOCK_N]
    scale = _scale_of(tl.max(tl.max(tl.where(v == v, tl.abs(v), 0.0), axis=1), axis=0))
    tl.store(q_ptr + r.to(tl.int64) * n + c, _e4m3(v * tl.div_rn(1.0, scale), HARDWARE), mask=mask)
    tl.store(scale_ptr + tl.program_id(0), scale)


# launchers


def casts_in_hardware(x: torch.Tensor) -> bool:
    """Has this tensor's device an instruction that rounds float32 to e4m3?"""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 9)


@op(
    "quantize_e4m3_rows(Tensor x, Tensor? columns) -> (Tensor, Tensor)",
    lambda x, columns: (x.new_empty(x.shape, dtype=E4M3), x.new_empty((x.shape[0], 1), dtype=torch.float32)),
)
def _rows(x, columns):
    if not use_triton(x):
        return quantize_rows_ref(x, columns)
    (m, n), launch = x.shape, row_launch(x.shape[1], FWD_TILES)
    q = x.new_empty((m, n), dtype=torch.uint8)
    scale = x.new_empty((m, 1), dtype=torch.float32)
    if not n:
        scale.fill_(SMALLEST_SCALE)
    if q.numel():
        with on_device(x):
            _rows_kernel[(launch.programs(m),)](
                x,
                None if columns is None else columns.contiguous(),
                q,
                scale,
                m,
                n,
                x.stride(0),
                x.stride(1),
                WIDE=launch.wide,
                HARDWARE=casts_in_hardware(x),
                BLOCK_M=launch.block_m,
                BLOCK_N=launch.block_n,
                num_warps=launch.num_warps,
                enable_fp_fusion=False,
            )
    return q.view(E4M3), scale


@op(
    "quantize_e4m3_blocks(Tensor x, int a, int b) -> (Tensor, Tensor)",
    lambda x, a, b: (
        x.new_empty(x.shape, dtype=E4M3),
        x.new_empty((-(-x.shape[0] // a), -(-x.shape[1] // b)), dtype=torch.float32),
    ),
)
def _blocks(x, a, b):
    if not use_triton(x):
        return quantize_blocks_ref(x, (a, b))
    (m, n), rows, columns = x.shape, -(-x.shape[0] // a), -(-x.shape[1] // b)
    q, scale = x.new_empty((m, n), dtype=torch.uint8), x.new_empty((rows, columns), dtype=torch.float32)
    if q.numel():
        with on_device(x):
            _blocks_kernel[(rows * columns,)](
                x,
                q,
                scale,
                m,
                n,
                x.stride(0),
                x.stride(1),
                HARDWARE=casts_in_hardware(x),
                BLOCK_M=a,
                BLOCK_N=b,
                num_warps=8,
                enable_fp_fusion=False,
            )
    return q.view(E4M3), scale


# public


def quantize_e4m3_rows(x: torch.Tensor, columns: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [m, n], floating, any strides, each column times columns [n] (float32) if given -> (q [m, n] float8_e4m3fn,
    scale [m, 1] float32), both contiguous, q * scale ~ x * columns. One launch. Not differentiable.

    Raises ValueError for other dtypes and shapes."""
    if x.dim() != 2 or not x.is_floating_point() or x.element_size() == 1:
        raise ValueError(f"quantize_e4m3_rows: want floating [m, n], got {x.dtype} {tuple(x.shape)}")
    if columns is not None and (columns.shape != x.shape[1:] or columns.dtype != torch.float32):
        raise ValueError(
            f"quantize_e4m3_rows: want float32 columns [{x.shape[1]}], got {columns.dtype} {tuple(columns.shape)}"
        )
    return _rows(x, columns)


def quantize_e4m3_blocks(x: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """x [m, n], floating, any strides -> (q [m, n] float8_e4m3fn, scale [ceil(m / block[0]), ceil(n / block[1])]
    float32), as `int8.dequantize_e4m3` takes them. One launch. Not differentiable.

    Raises ValueError for other dtypes and shapes, and for a block that is not two powers of two up to 128."""
    if x.dim() != 2 or not x.is_floating_point() or x.element_size() == 1:
        raise ValueError(f"quantize_e4m3_blocks: want floating [m, n], got {x.dtype} {tuple(x.shape)}")
    a, b = block
    if not all(1 <= side <= 128 and side & (side - 1) == 0 for side in (a, b)) or a * b < 2:
        raise ValueError(f"quantize_e4m3_blocks: want a block of powers of two from 1 to 128, got {block}")
    return _blocks(x, a, b)


def AOT_CASES(arch: str) -> tuple[AotCase, ...]:
    """Activations, gradients with the weight's scales, and weights, of an 8B and a 70B decoder."""
    hardware = arch in CASTS_E4M3
    dtype = "fp16" if arch == "sm_75" else "bf16"
    sizes = {"m": "i32", "n": "i32", "stride_m": "i32"}
    pointers = {"x_ptr": f"*{dtype}", "q_ptr": "*u8", "scale_ptr": "*fp32"}

    def rows(n: int, columns: bool, note: str) -> AotCase:
        launch = row_launch(n, FWD_TILES)
        more = {"columns_ptr": "*fp32"} if columns else {}
        constants = {"stride_n": 1, "WIDE": launch.wide, "HARDWARE": hardware}
        constants |= {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n} | ({} if columns else {"columns_ptr": None})
        return AotCase(
            _rows_kernel,
            pointers | more | sizes,
            constants,
            num_warps=launch.num_warps,
            options={"enable_fp_fusion": False},
            note=note,
            unaligned=("m",),
        )

    return (
        rows(4096, False, "8B, the input of q_proj"),
        rows(14336, False, "8B, the input of down_proj"),
        rows(14336, True, "8B, the gradient of up_proj's output"),
        rows(28672, True, "70B, the gradient of up_proj's output"),
        rows(64, False, "a head"),
        AotCase(
            _blocks_kernel,
            pointers | sizes,
            {"stride_n": 1, "HARDWARE": hardware, "BLOCK_M": 128, "BLOCK_N": 128},
            num_warps=8,
            options={"enable_fp_fusion": False},
            note="8B, a weight in blocks",
        ),
    )
