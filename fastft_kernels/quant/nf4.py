"""w[i] = code[nibble i] * absmax[i // blocksize]: bitsandbytes' 4-bit storage (NF4, FP4) as a dense matrix, bit for
bit.

Two elements share a byte, the first in the high nibble. Where absmax is itself quantised ("double quantisation"),

    absmax[b] = code2[absmax8[b]] * absmax2[b // blocksize2] + offset

in the same launch, with a rounding after the product and another after the sum, as two launches would round: the kernel
is compiled without fused multiply-add. Math in float32, one rounding to bf16 or fp16. Nothing here is differentiable: a
quantised weight is frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import KERNEL_DTYPES, on_device, op, use_triton
from fastft_kernels.runtime.language import tl, triton

QUANT_TYPES = ("nf4", "fp4")
TILE = 1024  # bytes of one program: 8 a thread, 16 elements out
NUM_WARPS = 4

Nested = tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]


# reference


def dequantize_4bit_ref(packed, absmax, code, blocksize: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """The n elements, flat; absmax not nested."""
    pairs = torch.stack([code[:, None].expand(16, 16), code[None, :].expand(16, 16)], dim=-1).view(256, 2)
    w = pairs.index_select(0, packed.reshape(-1).int()).view(-1)[:n]
    full = n // blocksize
    w[: full * blocksize].view(full, blocksize).mul_(absmax[:full, None])
    if full * blocksize < n:
        w[full * blocksize :].mul_(absmax[full])
    return w.to(dtype)


def absmax_ref(absmax8, absmax2, code2, blocksize2: int, offset) -> torch.Tensor:
    """Nested absmax, float32."""
    scale = absmax2.float().repeat_interleave(blocksize2)[: absmax8.numel()]
    return code2.index_select(0, absmax8.reshape(-1).int()).mul_(scale).add_(offset)


# kernel


@triton.jit
def _dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    absmax2_ptr,  # this and the next two: None where absmax is not nested
    code2_ptr,
    offset_ptr,
    w_ptr,
    n,
    blocks,
    blocksize2,
    HALF: tl.constexpr,  # bytes of one block
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]  # [BLOCKS, 1]
    live = block < blocks
    if absmax2_ptr is not None:
        q = tl.load(absmax_ptr + block, mask=live, other=0).to(tl.int32)
        scale = tl.load(code2_ptr + q) * tl.load(absmax2_ptr + block // blocksize2, mask=live, other=0.0).to(tl.float32)
        scale = scale + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=live, other=0.0).to(tl.float32)
    at = block.to(tl.int64) * HALF + tl.arange(0, HALF)[None, :]  # [BLOCKS, HALF]
    byte = tl.load(packed_ptr + at, mask=2 * at < n, other=0).to(tl.int32)
    # [BLOCKS, 2 HALF]
    w = tl.interleave(tl.load(code_ptr + (byte >> 4)) * scale, tl.load(code_ptr + (byte & 15)) * scale)
    to = block.to(tl.int64) * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(w_ptr + to, w.to(w_ptr.dtype.element_ty), mask=to < n)


# launcher


@op(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor code, int blocksize, int[] shape, ScalarType dtype,"
    " Tensor? absmax2, Tensor? code2, int blocksize2, Tensor? offset) -> Tensor",
    lambda packed, absmax, code, blocksize, shape, dtype, *nested: packed.new_empty(shape, dtype=dtype),
)
def _dequantize(packed, absmax, code, blocksize, shape, dtype, absmax2, code2, blocksize2, offset):
    n = math.prod(shape)
    if not use_triton(code, dtype):
        if absmax2 is not None:
            absmax = absmax_ref(absmax, absmax2, code2, blocksize2, offset)
        return dequantize_4bit_ref(packed, absmax.float(), code, blocksize, n, dtype).view(shape)
    w = packed.new_empty(shape, dtype=dtype)
    if n:
        packed, absmax, code = packed.contiguous(), absmax.contiguous(), code.contiguous()
        absmax2, code2 = (None if v is None else v.contiguous() for v in (absmax2, code2))
        blocks, half = -(-n // blocksize), blocksize // 2
        per_program = max(TILE // half, 1)
        with on_device(w):
            _dequantize_kernel[(-(-blocks // per_program),)](
                packed,
                absmax,
                code,
                absmax2,
                code2,
                offset,
                w,
                n,
                blocks,
                blocksize2,
                HALF=half,
                BLOCKS=per_program,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
    return w


# public


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    quant_type: str = "nf4",
    nested: Nested | None = None,
) -> torch.Tensor:
    """The weight of `shape` in `dtype` (bf16, fp16, fp32), the bits of bitsandbytes.functional.dequantize_4bit. One
    launch.

    packed: contiguous, ceil(n / 2) bytes, in any storage dtype; absmax: [ceil(n / blocksize)], floating, or uint8 if
    nested; code: the 16 values of `quant_type`, float32; blocksize: a power of two from 32 to 4096.
    nested: (absmax2 [ceil(blocks / blocksize2)], code2 [256] float32, blocksize2, offset: a float32 scalar tensor).
    Not differentiable. Raises ValueError for another quant_type, dtype or blocksize, and for sizes that do not fit.
    """
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"dequantize_4bit: want quant_type in {QUANT_TYPES}, got {quant_type!r}")
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"dequantize_4bit: want dtype bfloat16, float16 or float32, got {dtype}")
    if blocksize & (blocksize - 1) or not 32 <= blocksize <= 4096:
        raise ValueError(f"dequantize_4bit: want blocksize a power of two from 32 to 4096, got {blocksize}")
    n = math.prod(shape)
    if packed.numel() * packed.element_size() != (n + 1) // 2 or not packed.is_contiguous():
        got = f"{tuple(packed.shape)} {packed.dtype}"
        raise ValueError(f"dequantize_4bit: want {(n + 1) // 2} contiguous bytes for shape {tuple(shape)}, got {got}")
    if absmax.numel() != -(-n // blocksize) or code.numel() != 16:
        raise ValueError(
            f"dequantize_4bit: want {-(-n // blocksize)} absmax and 16 codes, got {absmax.numel()} and {code.numel()}"
        )
    if packed.dtype != torch.uint8:
        packed = packed.view(torch.uint8)
    absmax2, code2, blocksize2, offset = nested if nested is not None else (None, None, 1, None)
    return _dequantize(packed, absmax, code, blocksize, list(shape), dtype, absmax2, code2, blocksize2, offset)


def _case(dtype: str, blocksize: int, nested: bool, note: str) -> AotCase:
    pointers = {
        "packed_ptr": "*u8",
        "absmax_ptr": "*u8" if nested else "*fp32",
        "code_ptr": "*fp32",
        "w_ptr": f"*{dtype}",
    }
    sizes = {"n": "i32", "blocks": "i32"}
    constexprs = {"HALF": blocksize // 2, "BLOCKS": max(2 * TILE // blocksize, 1)}
    more = {"absmax2_ptr": "*fp32", "code2_ptr": "*fp32", "offset_ptr": "*fp32", "blocksize2": "i32"}
    if nested:
        pointers |= more
    else:
        constexprs |= dict.fromkeys(("absmax2_ptr", "code2_ptr", "offset_ptr")) | {"blocksize2": 1}
    return AotCase(
        _dequantize_kernel,
        pointers | sizes,
        constexprs,
        num_warps=NUM_WARPS,
        options={"enable_fp_fusion": False},
        note=note,
    )


AOT_CASES = (
    _case("bf16", 64, True, "QLoRA, double quantisation"),
    _case("bf16", 64, False, "QLoRA"),
    _case("fp16", 64, True, "QLoRA on a T4"),
    _case("fp32", 64, False, "float32 compute"),
    _case("bf16", 4096, True, "the largest block"),
)
