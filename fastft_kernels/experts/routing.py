"""Rows in the order of their experts, and back: y[t] = sum over j of w[t, j] rows[place[t, j]].

A token goes to k experts: S = T k rows. The sort is stable, so that equal choices stay in the order of their tokens; it
is the only thing kept of the permutation, and x itself is never kept permuted. An index that is no expert's (as some
routers write for a choice that was dropped) gets weight zero and the last expert: its row is computed, and counts for
nothing. The sum over j runs in order, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastft_kernels.experts.grouped_mm import Groups
from fastft_kernels.runtime.aot import AotCase
from fastft_kernels.runtime.dispatch import math_dtype, on_device, op, use_triton
from fastft_kernels.runtime.language import tl, triton

BLOCK = 1024  # columns of one program


@dataclass(frozen=True)
class Routing:
    """order: int64 [S], the place t k + j that each sorted row was at. groups: where each expert's rows end. inside:
    bool [T, k], which choices are experts."""

    order: torch.Tensor
    groups: Groups
    inside: torch.Tensor

    @property
    def top_k(self) -> int:
        return self.inside.shape[1]

    def tokens(self) -> torch.Tensor:
        """int64 [S]: the token of each sorted row."""
        return self.order // self.top_k

    def places(self) -> torch.Tensor:
        """int64 [T, k]: the sorted row of each choice."""
        return inverse(self.order).view(-1, self.top_k)

    def sorted_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """[S, 1], float32 or wider: the weight of each sorted row, zero for what is no expert's."""
        weights = weights.to(math_dtype(weights.dtype)) * self.inside
        return weights.reshape(-1)[self.order].unsqueeze(1)


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def route(index: torch.Tensor, experts: int, dtype: torch.dtype) -> Routing:
    """index: integer [T, k], the experts of each token. dtype: that of the grouped products to come."""
    flat = index.reshape(-1)
    inside = (flat >= 0) & (flat < experts)
    ids, order = torch.sort(torch.where(inside, flat, experts - 1), stable=True)
    numbers = torch.arange(experts, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ids, numbers, right=True).to(torch.int32)
    return Routing(order, Groups.of(ends, dtype), inside.view(index.shape))


# reference


def combine_ref(
    rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """y [T, H] in `dtype`; sums in float32 or wider."""
    f = math_dtype(rows.dtype)
    y: torch.Tensor | None = None
    for j in range(places.shape[1]):
        row = rows[places[:, j]].to(f)
        row = row if weights is None else row * weights[:, j, None].to(f)
        y = row if y is None else y + row
    return rows.new_zeros(len(places), rows.shape[1], dtype=dtype) if y is None else y.to(dtype)


# kernels


@triton.jit
def _combine_kernel(
    rows_ptr,
    places_ptr,
    weights_ptr,  # None: all are one
    y_ptr,
    cols,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = c < cols
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)  # [BLOCK_N]
    for j in range(K):
        place = tl.load(places_ptr + t * K + j)
        row = tl.load(rows_ptr + place * cols + c, mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            row *= tl.load(weights_ptr + t * K + j).to(tl.float32)
        total += row
    tl.store(y_ptr + t * cols + c, total.to(y_ptr.dtype.element_ty), mask=mask)


# launchers


def _y(rows: torch.Tensor, places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return rows.new_empty(places.shape[0], rows.shape[1], dtype=dtype)


@op(
    "experts_combine(Tensor rows, Tensor places, Tensor? weights, ScalarType dtype) -> Tensor",
    lambda rows, places, weights, dtype: _y(rows, places, dtype),
)
def _combine(rows, places, weights, dtype):
    if not use_triton(rows, dtype):
        return combine_ref(rows, places, weights, dtype)
    y = _y(rows, places, dtype)
    tokens, top_k = places.shape
    if y.numel():
        block = min(BLOCK, triton.next_power_of_2(rows.shape[1]))
        with on_device(y):
            _combine_kernel[(tokens, triton.cdiv(rows.shape[1], block))](
                rows.contiguous(),
                places.contiguous(),
                None if weights is None else weights.contiguous(),
                y,
                rows.shape[1],
                K=top_k,
                BLOCK_N=block,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return y


def combine(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """y [T, H] in `dtype`: the weighted sum of each token's rows, in the order of its choices, in one pass.

    rows: [S, H]; places: int64 [T, k] into them; weights: [T, k], floating, or None for ones. No autograd."""
    return _combine(rows, places, weights, dtype)


AOT_CASES = tuple(
    AotCase(
        _combine_kernel,
        {"rows_ptr": f"*{t}", "places_ptr": "*i64", "y_ptr": f"*{t}", "cols": "i32"}
        | ({"weights_ptr": f"*{w}"} if w else {}),
        {"K": k, "BLOCK_N": BLOCK} | ({} if w else {"weights_ptr": None}),
        num_warps=4,
        note=f"top {k}, {t}, weights {w or 'none'}",
    )
    for t, w, k in (("bf16", "fp32", 8), ("bf16", "", 8), ("fp16", "fp16", 2), ("fp32", "bf16", 1))
)
