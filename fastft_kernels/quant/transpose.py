"""out[j, i] = q[i, j]: the transpose of a matrix of 8-bit values, into memory that the caller gives.

FP8 products take their second operand by columns alone, so the product with the transposed weight needs the transposed
weight. It costs one pass over memory, 1 / (2 tokens) of the product's time and less, and a buffer that all layers can
share: a second copy of the model's weights it need not be."""

from __future__ import annotations

import torch

from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import on_device, op, runs_triton
from fastft_kernels.runtime.language import tl, triton

BLOCK_M, BLOCK_N, NUM_WARPS = 128, 64, 4
WORDS, WORD_WARPS = 32, 8  # a side of a tile in words: 128 x 128 values


# reference


def transpose_8bit_ref(q: torch.Tensor, out: torch.Tensor) -> None:
    """q [m, n] -> out [n, m]."""
    out.view(torch.uint8).copy_(q.view(torch.uint8).t())


# kernel


@triton.jit
def _transpose_kernel(q_ptr, out_ptr, m, n, stride_m, stride_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    tiles = tl.cdiv(n, BLOCK_N)
    first_r, first_c = (tl.program_id(0) // tiles) * BLOCK_M, (tl.program_id(0) % tiles) * BLOCK_N
    r, c = first_r + tl.arange(0, BLOCK_M)[:, None], first_c + tl.arange(0, BLOCK_N)[None, :]
    at = r.to(tl.int64) * stride_m + c.to(tl.int64) * stride_n
    tile = tl.load(q_ptr + at, mask=(r < m) & (c < n), other=0)  # [BLOCK_M, BLOCK_N]
    to_c, to_r = first_c + tl.arange(0, BLOCK_N)[:, None], first_r + tl.arange(0, BLOCK_M)[None, :]
    tl.store(out_ptr + to_c.to(tl.int64) * m + to_r, tl.trans(tile), mask=(to_r < m) & (to_c < n))


@triton.jit
def _words_kernel(q_ptr, out_ptr, m, n, stride_m, BLOCK: tl.constexpr):
    """Sizes and stride in words of four values. Four rows of words become four columns of words before they are
    exchanged between threads, so that shared memory is read by the word: by the byte it is read four times as often."""
    tiles = tl.cdiv(n, BLOCK)
    first_r, first_c = (tl.program_id(0) // tiles) * BLOCK, (tl.program_id(0) % tiles) * BLOCK
    r, c = first_r + tl.arange(0, BLOCK)[:, None], first_c + tl.arange(0, BLOCK)[None, :]
    mask = (r < m) & (c < n)
    at = q_ptr + r.to(tl.int64) * 4 * stride_m + c  # [BLOCK, BLOCK]
    r0 = tl.load(at, mask=mask, other=0)
    r1 = tl.load(at + stride_m, mask=mask, other=0)
    r2 = tl.load(at + 2 * stride_m, mask=mask, other=0)
    r3 = tl.load(at + 3 * stride_m, mask=mask, other=0)
    to_c, to_r = first_c + tl.arange(0, BLOCK)[:, None], first_r + tl.arange(0, BLOCK)[None, :]
    to = out_ptr + to_c.to(tl.int64) * 4 * m + to_r
    for byte in tl.static_range(4):
        low = ((r0 >> (8 * byte)) & 0xFF) | (((r1 >> (8 * byte)) & 0xFF) << 8)
        high = (((r2 >> (8 * byte)) & 0xFF) << 16) | (((r3 >> (8 * byte)) & 0xFF) << 24)
        tl.store(to + byte * m, tl.trans(low | high), mask=(to_r < m) & (to_c < n))


# launcher


def in_words(q: torch.Tensor, out: torch.Tensor) -> bool:
    """Do rows of q [m, n] and of its transpose consist of whole, aligned words of four values?"""
    m, n = q.shape
    whole = not (m % 4 or n % 4 or q.stride(0) % 4 or q.data_ptr() % 4 or out.data_ptr() % 4)
    return whole and q.stride(1) == 1


@op("transpose_8bit(Tensor q, Tensor(a!) out) -> ()", lambda q, out: None)
def _transpose(q, out):
    if not runs_triton(q):
        transpose_8bit_ref(q, out)
        return
    m, n = q.shape
    if q.numel() and in_words(q, out):
        m, n = m // 4, n // 4
        words = q.view(torch.uint8).view(torch.int32)
        with on_device(q):
            _words_kernel[(-(-m // WORDS) * -(-n // WORDS),)](
                words,
                out.view(torch.int32),
                m,
                n,
                words.stride(0),
                BLOCK=WORDS,
                num_warps=WORD_WARPS,
                enable_fp_fusion=True,
            )
    elif q.numel():
        with on_device(q):
            _transpose_kernel[(-(-m // BLOCK_M) * -(-n // BLOCK_N),)](
                q.view(torch.uint8),
                out.view(torch.uint8),
                m,
                n,
                q.stride(0),
                q.stride(1),
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )


# public


def transpose_8bit(q: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """q [m, n] of any 8-bit dtype and strides -> out [n, m], contiguous, overwritten; a new one if none is given. One
    launch. Not differentiable. Raises ValueError where `out` does not fit."""
    if q.dim() != 2 or q.element_size() != 1:
        raise ValueError(f"transpose_8bit: want an 8-bit matrix, got {q.dtype} {tuple(q.shape)}")
    m, n = q.shape
    if out is None:
        out = q.new_empty((n, m))
    elif out.shape != (n, m) or out.dtype != q.dtype or out.device != q.device or not out.is_contiguous():
        raise ValueError(
            f"transpose_8bit: want a contiguous {q.dtype} {(n, m)} on {q.device} for the result, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    _transpose(q, out)
    return out


AOT_CASES = (
    AotCase(
        _transpose_kernel,
        {"q_ptr": "*u8", "out_ptr": "*u8", "m": "i32", "n": "i32", "stride_m": "i32"},
        {"stride_n": 1, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N},
        num_warps=NUM_WARPS,
        note="8B, up_proj",
    ),
    AotCase(
        _words_kernel,
        {"q_ptr": "*i32", "out_ptr": "*i32", "m": "i32", "n": "i32", "stride_m": "i32"},
        {"BLOCK": WORDS},
        num_warps=WORD_WARPS,
        note="8B, up_proj, by words",
    ),
)
