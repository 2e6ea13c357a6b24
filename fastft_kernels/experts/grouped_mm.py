"""y[s] = x[s] W[e(s)]  and  G[e] = sum over the rows s of e of x[s]^T y[s]: products of groups of rows.

Rows lie in the order of their groups: group e ends before row ends[e], and begins where the group before it ends. A
group may be empty. All grouped products of the package go through `grouped_mm` and `grouped_mm_t`: torch's kernel where
it is native (bfloat16 on sm_80 and later), else one product a group, for which the ends are read from the device once
(`Groups.of`). torch's kernel wants rows of a multiple of 16 bytes and one contiguous direction in each operand, and
leaves unwritten what no group covers: here widths are padded, other strides are copied, and such rows are zeros.
float64 always takes the products one by one: the reference of errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastft_kernels.runtime.compat import FakeTensor, has_grouped_mm
from fastft_kernels.runtime.compat import grouped_mm as torch_grouped_mm
from fastft_kernels.runtime.dispatch import goes_to_cuda, math_dtype, op

ALIGN = 16  # bytes


@dataclass(frozen=True)
class Groups:
    """ends: int32 [E], on the rows' device, not decreasing. host: the same numbers where they have been read. whole:
    the last end is the number of rows, so that every row is written by a product."""

    ends: torch.Tensor
    host: list[int] | None = None
    whole: bool = True

    @classmethod
    def of(cls, ends: torch.Tensor, dtype: torch.dtype, whole: bool = True) -> Groups:
        """Reads the ends from the device where products in `dtype` will need them there, and only then."""
        unread = native(ends, dtype) or torch.compiler.is_compiling()
        unread = unread or ends.is_meta or isinstance(ends, FakeTensor)
        return cls(ends, None if unread else ends.tolist(), whole)


def native(like: torch.Tensor, dtype: torch.dtype) -> bool:
    """Does torch's grouped kernel run on the device of `like` in `dtype`, without a look at the counts?"""
    if dtype != torch.bfloat16 or not goes_to_cuda(like) or torch.version.hip:
        return False
    if not like.is_cuda:  # planned for a device that is not here
        return True
    major, _ = torch.cuda.get_device_capability(like.device)
    return has_grouped_mm(major)


# reference


def _spans(ends: torch.Tensor, host: Sequence[int] | None, rows: int) -> list[tuple[int, int]]:
    if host is None and isinstance(ends, FakeTensor):  # no values: as many rows for each
        host = [rows * (e + 1) // len(ends) for e in range(len(ends))]
    stops = [min(end, rows) for end in (ends.tolist() if host is None else host)]
    return list(zip([0, *stops], stops))


def grouped_mm_ref(
    x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, host: Sequence[int] | None = None
) -> torch.Tensor:
    """[S, N]: one product a group; zeros past the last end."""
    y = x.new_empty(x.shape[0], w.shape[2])
    spans = _spans(ends, host, len(x))
    for e, (start, end) in enumerate(spans):
        if end > start:
            torch.mm(x[start:end], w[e], out=y[start:end])
    y[spans[-1][1] if spans else 0 :].zero_()
    return y


def grouped_mm_t_ref(
    x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor, host: Sequence[int] | None = None
) -> torch.Tensor:
    """[E, K, N]: one product a group; zeros for an empty one."""
    g = x.new_empty(ends.shape[0], x.shape[1], y.shape[1])
    for e, (start, end) in enumerate(_spans(ends, host, len(x))):
        if end > start:
            torch.mm(x[start:end].t(), y[start:end], out=g[e])
        else:
            g[e].zero_()
    return g


def grouped_sum_ref(
    y: torch.Tensor, scale: torch.Tensor | None, ends: torch.Tensor, host: Sequence[int] | None = None
) -> torch.Tensor:
    """[E, N]: the sum of a group's rows; zeros for an empty one."""
    f = math_dtype(y.dtype)
    g = y.new_zeros(ends.shape[0], y.shape[1])
    for e, (start, end) in enumerate(_spans(ends, host, len(y))):
        if end > start:
            part = y[start:end].to(f)
            g[e] = (part if scale is None else part * scale[start:end]).sum(0)
    return g


def grouped_outer_ref(
    thin: torch.Tensor,
    scale: torch.Tensor | None,
    wide: torch.Tensor,
    ends: torch.Tensor,
    host: Sequence[int] | None = None,
) -> torch.Tensor:
    """[E, R, N], float32 or wider: the sum of (scale thin)^T wide over a group's rows."""
    f = math_dtype(wide.dtype)
    g = wide.new_zeros(ends.shape[0], thin.shape[1], wide.shape[1], dtype=f)
    for e, (start, end) in enumerate(_spans(ends, host, len(wide))):
        if end > start:
            part = thin[start:end].to(f)
            part = part if scale is None else part * scale[start:end]
            torch.mm(part.t(), wide[start:end].to(f), out=g[e])
    return g


# launchers


def _torch_kernel(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    assert torch_grouped_mm is not None
    return torch_grouped_mm(a, b, offs=ends)


@op(
    "grouped_mm(Tensor x, Tensor w, Tensor ends, int[]? host) -> Tensor",
    lambda x, w, ends, host: x.new_empty(x.shape[0], w.shape[2]),
)
def _mm(x, w, ends, host):
    return _torch_kernel(x, w, ends) if native(x, x.dtype) else grouped_mm_ref(x, w, ends, host)


@op(
    "grouped_mm_t(Tensor x, Tensor y, Tensor ends, int[]? host) -> Tensor",
    lambda x, y, ends, host: x.new_empty(ends.shape[0], x.shape[1], y.shape[1]),
)
def _mm_t(x, y, ends, host):
    return _torch_kernel(x.t(), y, ends) if native(x, x.dtype) else grouped_mm_t_ref(x, y, ends, host)


@op(
    "grouped_sum(Tensor y, Tensor? scale, Tensor ends, int[]? host) -> Tensor",
    lambda y, scale, ends, host: y.new_empty(ends.shape[0], y.shape[1]),
)
def _sum(y, scale, ends, host):
    return grouped_sum_ref(y, scale, ends, host)


@op(
    "grouped_outer(Tensor thin, Tensor? scale, Tensor wide, Tensor ends, int[]? host) -> Tensor",
    lambda thin, scale, wide, ends, host: wide.new_empty(
        ends.shape[0], thin.shape[1], wide.shape[1], dtype=math_dtype(wide.dtype)
    ),
)
def _outer(thin, scale, wide, ends, host):
    return grouped_outer_ref(thin, scale, wide, ends, host)


# layout


def _missing(width: int, dtype: torch.dtype) -> int:
    """Elements up to a multiple of 16 bytes."""
    return -width % (ALIGN // dtype.itemsize)


def _misplaced(t: torch.Tensor) -> bool:
    """Does t not start on 16 bytes? (Memory that an allocator gave does; a slice, or a mapped file, may not.)"""
    if isinstance(t, FakeTensor) or torch.compiler.is_compiling():
        return t.storage_offset() * t.element_size() % ALIGN != 0
    return t.data_ptr() % ALIGN != 0


def _rows(x: torch.Tensor, missing: int) -> torch.Tensor:
    """x [S, K], contiguous, with `missing` columns of zeros behind it, its start on 16 bytes."""
    if missing:
        return F.pad(x, (0, missing))
    x = x.contiguous()
    return x.clone() if _misplaced(x) else x


def _matrices(w: torch.Tensor, missing_k: int, missing_n: int) -> torch.Tensor:
    """w [E, K, N] with either direction contiguous as it is; padded where a width is no multiple of 16 bytes."""
    if missing_k or missing_n:
        return F.pad(w, (0, missing_n, 0, missing_k))
    _, k, n = w.shape
    straight, turned = w.stride() == (k * n, n, 1), w.stride() == (k * n, 1, k)
    return (w if straight or turned else w.contiguous()) if not _misplaced(w) else w.clone()


# public


def _check(where: str, x: torch.Tensor, other: torch.Tensor, groups: Groups, fits: bool) -> None:
    if not fits or x.dtype != other.dtype or groups.ends.dim() != 1 or groups.ends.dtype != torch.int32:
        raise ValueError(
            f"{where}: want operands of one dtype that fit, and int32 ends [E]; got {tuple(x.shape)} {x.dtype}, "
            f"{tuple(other.shape)} {other.dtype}, ends {tuple(groups.ends.shape)} {groups.ends.dtype}"
        )


def grouped_mm(x: torch.Tensor, w: torch.Tensor, groups: Groups) -> torch.Tensor:
    """y [S, N]: row s times the matrix of its group.

    x: [S, K]; w: [E, K, N], any strides (a transposed stack is not copied); one floating dtype, which is y's; sums in
    float32 or wider. Rows past the last end are zeros. No autograd. Raises ValueError for shapes or dtypes that do not
    fit."""
    _check("grouped_mm", x, w, groups, x.dim() == 2 and w.dim() == 3 and x.shape[1] == w.shape[1])
    if len(w) != len(groups.ends):
        raise ValueError(f"grouped_mm: want one matrix a group, got {len(w)} and {len(groups.ends)} ends")
    if not native(x, x.dtype):
        return _mm(x, w, groups.ends, groups.host)
    k, n = (_missing(size, x.dtype) for size in w.shape[1:])
    y = _mm(_rows(x, k), _matrices(w, k, n), groups.ends, None)
    y = y[:, : w.shape[2]].contiguous() if n else y
    if groups.whole:
        return y
    past = torch.arange(len(y), device=y.device) >= groups.ends[-1]
    return y.masked_fill_(past[:, None], 0.0)


def grouped_mm_t(x: torch.Tensor, y: torch.Tensor, groups: Groups) -> torch.Tensor:
    """G [E, K, N], contiguous: the sum of x[s]^T y[s] over the rows of each group, zeros for an empty one.

    x: [S, K], y: [S, N], any strides, one floating dtype, which is G's; sums in float32 or wider. No autograd. Raises
    ValueError for shapes or dtypes that do not fit."""
    _check("grouped_mm_t", x, y, groups, x.dim() == y.dim() == 2 and len(x) == len(y))
    if not native(x, x.dtype):
        return _mm_t(x, y, groups.ends, groups.host)
    k, n = _missing(x.shape[1], x.dtype), _missing(y.shape[1], x.dtype)
    g = _mm_t(_rows(x, k), _rows(y, n), groups.ends, None)
    g = g[:, : x.shape[1], : y.shape[1]].contiguous() if k or n else g
    empty = torch.diff(groups.ends, prepend=groups.ends.new_zeros(1)) == 0
    return g.masked_fill_(empty[:, None, None], 0.0)


def grouped_sum(y: torch.Tensor, scale: torch.Tensor | None, groups: Groups) -> torch.Tensor:
    """g [E, N]: the sum of each group's rows, zeros for an empty one.

    y: [S, N], whose dtype is g's; scale: [S, 1], float32 or wider, by which rows are multiplied, or None; sums in
    float32 or wider. No autograd."""
    if not native(y, y.dtype):
        return _sum(y, scale, groups.ends, groups.host)
    ones = y.new_ones(len(y), 1) if scale is None else scale.to(y.dtype)
    rest = None if scale is None else (scale - ones).to(y.dtype)  # what was rounded away
    thin = ones if rest is None else torch.cat([ones, rest], 1)
    return grouped_mm_t(thin, y, groups).sum(1)


def grouped_outer(thin: torch.Tensor, scale: torch.Tensor | None, wide: torch.Tensor, groups: Groups) -> torch.Tensor:
    """G [E, R, N], float32 or wider: the sums of (scale thin)^T wide over the rows of each group.

    thin: [S, R], of few columns; wide: [S, N], of thin's dtype; scale: [S, 1], float32 or wider, or None. What all of a
    row shares is not averaged away by the sum, so that thin times scale is not rounded: in 16 bits torch's kernel takes
    it as two numbers, what was rounded and the rest. No autograd."""
    if not native(wide, wide.dtype):
        return _outer(thin, scale, wide, groups.ends, groups.host)
    if scale is None:
        return grouped_mm_t(thin, wide, groups).float()
    exact = thin * scale
    high = exact.to(wide.dtype)
    both = grouped_mm_t(torch.cat([high, (exact - high).to(wide.dtype)], 1), wide, groups).float()
    return both[:, : thin.shape[1]] + both[:, thin.shape[1] :]
