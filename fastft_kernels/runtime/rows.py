"""Tensors [..., N] as rows of N elements: what every row-wise kernel (norms) needs to know of layout and tiles.

A kernel sees `rows` rows in the logical order of the leading dimensions, and for each tensor where a row starts:
leading dimensions that are contiguous in every tensor are collapsed to one; what remains (at most three, e.g. a
transposed [B, H, S, D] view) is given as strides. So per-head norms of transposed or sliced views run without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastft_kernels.runtime.language import tl, triton

MAX_LEAD = 3


@dataclass(frozen=True)
class RowTile:
    """One line of a launch table: rows of up to `width` columns are taken block_m at a time, with num_warps warps."""

    width: int
    block_m: int
    num_warps: int


# 16 elements a thread (two 16-byte loads of a 16-bit type) up to 8192 columns, then 32.
FWD_TILES = (
    RowTile(64, 32, 4),
    RowTile(128, 16, 4),
    RowTile(256, 8, 4),
    RowTile(512, 4, 4),
    RowTile(1024, 2, 4),
    RowTile(2048, 1, 4),
    RowTile(4096, 1, 8),
    RowTile(8192, 1, 16),
    RowTile(16384, 1, 16),
)
# A backward holds twice as much in registers: wider rows are looped over.
BWD_TILES = FWD_TILES[:-1]
WIDE_BLOCK = 8192  # columns a step of such a loop
PARTIALS = 256  # programs that sum a parameter's gradient: two per multiprocessor or more on what people train on


@dataclass(frozen=True)
class RowLaunch:
    """A launch for rows of n columns. wide: a row does not fit in one block, the kernel loops over blocks of block_n
    columns."""

    block_m: int
    block_n: int
    num_warps: int
    wide: bool

    def programs(self, rows: int) -> int:
        """Programs that cover `rows` rows, one block each. Raises ValueError where a row's number does not fit in 32
        bits."""
        most = 2**31 - 1 - self.block_m * PARTIALS  # the last step of a program that takes every P-th block
        if rows > most:
            raise ValueError(f"rows: want at most {most}, got {rows}")
        return -(-rows // self.block_m)

    def partials(self, rows: int) -> int:
        """Programs that share `rows` rows where each also sums a parameter's gradient into a line of its own; at least
        1."""
        return max(min(self.programs(rows), PARTIALS), 1)


def row_launch(n: int, tiles: Sequence[RowTile]) -> RowLaunch:
    """Look up the launch for rows of n columns: the first tile that is wide enough, else a loop with the last one's
    warps."""
    for tile in tiles:
        if n <= tile.width:
            return RowLaunch(tile.block_m, max(1 << max(n - 1, 0).bit_length(), 2), tile.num_warps, False)
    return RowLaunch(1, min(tiles[-1].width, WIDE_BLOCK), tiles[-1].num_warps, True)


def count_rows(x: torch.Tensor) -> int:
    """Rows of x [..., N]."""
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return rows


def empty_rows_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised dense tensor, its dimensions in the order of x's where the last is innermost, else
    contiguous."""
    y = torch.empty_like(x, dtype=dtype)
    return y if y.stride(-1) == 1 else torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def in_rows_layout(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y in the layout of `empty_rows_like(x, y.dtype)`: itself, unless an expression of the reference chose another
    one."""
    if x.is_contiguous() and y.is_contiguous():
        return y
    want = empty_rows_like(x, y.dtype)
    return y if y.stride() == want.stride() else want.copy_(y)


def as_rows(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], tuple[int, ...], list[tuple[int, ...]]]:
    """Tensors of one shape [..., N] -> (tensors, sizes, strides): for each tensor the strides of the leading dimensions
    that cannot be collapsed (1 to 3), and `sizes`, the sizes of all of these but the first. The tensors are those
    given, or contiguous copies where the last dimension is strided (an expanded gradient) or more than 3 dimensions
    would remain."""
    shape = tensors[0].shape
    n = shape[-1]
    if all(t.is_contiguous() for t in tensors):
        return list(tensors), (), [(n,)] * len(tensors)
    rows = [t if t.stride(-1) == 1 or n == 1 else t.contiguous() for t in tensors]
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in rows]
    for d, size in enumerate(shape[:-1]):
        if size == 1:
            continue
        if sizes and all(s[-1] == t.stride(d) * size for s, t in zip(strides, rows)):
            sizes[-1] *= size
            for s, t in zip(strides, rows):
                s[-1] = t.stride(d)
        else:
            sizes.append(size)
            for s, t in zip(strides, rows):
                s.append(t.stride(d))
    if len(sizes) > MAX_LEAD:
        return [t.contiguous() for t in tensors], (), [(n,)] * len(tensors)
    return rows, tuple(sizes[1:]), [tuple(s) or (n,) for s in strides]


@triton.jit
def row_start(row, sizes, strides):
    """int64 offset of rows (int32) in a tensor whose leading dimensions have `strides` (1 to 3) and, but the first,
    `sizes`."""
    if len(sizes) == 0:
        start = row.to(tl.int64) * strides[0]
    elif len(sizes) == 1:
        start = (row // sizes[0]).to(tl.int64) * strides[0] + (row % sizes[0]).to(tl.int64) * strides[1]
    else:
        outer = row // sizes[1]
        start = (outer // sizes[0]).to(tl.int64) * strides[0] + (outer % sizes[0]).to(tl.int64) * strides[1]
        start += (row % sizes[1]).to(tl.int64) * strides[2]
    return start
