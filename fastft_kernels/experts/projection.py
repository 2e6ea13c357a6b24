"""y[s] = x[s] W[e] + b[e] + sum_a s_a (x[s] F_a[e]) G_a[e]: one projection of all experts with its adapters factored.

    dx = dy W^T + sum_a s_a (dy G_a^T) F_a^T      dW = x^T dy      db = 1^T dy
    dF_a = s_a x^T (dy G_a^T)                     dG_a = s_a (x F_a)^T dy        (sums over each expert's rows)

The adapters' ranks stand side by side, so that all of them are two thin grouped products. W + F G is never made. Of the
forward only x F is kept, rank values a row. Parameters stay as they are stored, either way round and in their own
dtype; what is cast or copied is adapters, for one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastft_kernels.experts.grouped_mm import Groups, grouped_mm, grouped_mm_t, grouped_outer, grouped_sum


@dataclass(frozen=True)
class ExpertsAdapter:
    """scaling (x first[e]) second[e]: first [E, in, r], second [E, r, out], any strides and floating dtype."""

    first: torch.Tensor
    second: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class ExpertsProjection:
    """weight [E, out, in], or [E, in, out] where `transposed`; bias [E, out] or None; the adapters in force."""

    weight: torch.Tensor
    transposed: bool = False
    bias: torch.Tensor | None = None
    adapters: tuple[ExpertsAdapter, ...] = ()

    @property
    def widths(self) -> tuple[int, int]:
        """(in, out)"""
        a, b = self.weight.shape[1:]
        return (a, b) if self.transposed else (b, a)

    def tensors(self) -> list[torch.Tensor]:
        own = [self.weight] if self.bias is None else [self.weight, self.bias]
        return own + [t for a in self.adapters for t in (a.first, a.second)]


class ExpertsSlot(NamedTuple):
    """Where an `ExpertsProjection`'s tensors are in a list: weight first, then the bias, then each adapter's two.
    spans: the columns of each adapter's ranks."""

    at: int
    transposed: bool
    has_bias: bool
    scalings: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, p: ExpertsProjection, at: int) -> ExpertsSlot:
        ends, end = [], 0
        for a in p.adapters:
            ends.append((end, end + a.first.shape[2]))
            end = ends[-1][1]
        return cls(at, p.transposed, p.bias is not None, tuple(float(a.scaling) for a in p.adapters), tuple(ends))

    @property
    def bias(self) -> int:
        return self.at + 1 if self.has_bias else -1

    @property
    def adapters(self) -> list[tuple[int, int]]:
        start = self.at + 1 + self.has_bias
        return [(start + 2 * i, start + 2 * i + 1) for i in range(len(self.scalings))]

    @property
    def count(self) -> int:
        return 1 + self.has_bias + 2 * len(self.scalings)

    def needs_input(self, needs: Sequence[bool]) -> bool:
        """Does a gradient that is wanted use x?"""
        return needs[self.at] or any(needs[first] for first, _ in self.adapters)

    def needs_low_rank(self, needs: Sequence[bool]) -> bool:
        """Does a gradient that is wanted use x F?"""
        return any(needs[second] for _, second in self.adapters)


def _matrices(slot: ExpertsSlot, t: Sequence[torch.Tensor]) -> torch.Tensor:
    """[E, in, out], a view."""
    w = t[slot.at]
    return w if slot.transposed else w.transpose(1, 2)


def _firsts(slot: ExpertsSlot, t: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """[E, in, ranks]"""
    found = [t[first].to(dtype) for first, _ in slot.adapters]
    return found[0] if len(found) == 1 else torch.cat(found, 2)


def _seconds(slot: ExpertsSlot, t: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """[E, ranks, out]"""
    found = [t[second].to(dtype) for _, second in slot.adapters]
    return found[0].contiguous() if len(found) == 1 else torch.cat(found, 1)


def _scaled(slot: ExpertsSlot, low: torch.Tensor) -> torch.Tensor:
    """Each adapter's columns times its scaling."""
    if len(set(slot.scalings)) == 1:
        return low * slot.scalings[0]
    low = low.clone()
    for (start, end), s in zip(slot.spans, slot.scalings):
        low[:, start:end].mul_(s)
    return low


def forward(
    slot: ExpertsSlot, t: Sequence[torch.Tensor], x: torch.Tensor, ids: torch.Tensor | None, groups: Groups
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y [S, out], x F [S, ranks] or None). x: [S, in], in the dtype of the weight; ids: [S], the expert of each row,
    where there is a bias."""
    y, low = grouped_mm(x, _matrices(slot, t), groups), None
    bias = t[slot.bias].to(y.dtype)[ids] if slot.has_bias else None
    if slot.scalings:
        low = grouped_mm(x, _firsts(slot, t, x.dtype), groups)
        small = grouped_mm(_scaled(slot, low), _seconds(slot, t, x.dtype), groups)
        bias = small if bias is None else bias.add_(small)  # small numbers first: the sum with y is rounded once
    return y if bias is None else y.add_(bias), low


def backward_low_rank(
    slot: ExpertsSlot, t: Sequence[torch.Tensor], dy: torch.Tensor, groups: Groups
) -> torch.Tensor | None:
    """s dy G^T [S, ranks]; None without adapters."""
    if not slot.scalings:
        return None
    return _scaled(slot, grouped_mm(dy, _seconds(slot, t, dy.dtype).transpose(1, 2), groups))


def input_gradient(
    slot: ExpertsSlot, t: Sequence[torch.Tensor], dy: torch.Tensor, dlow: torch.Tensor | None, groups: Groups
) -> torch.Tensor:
    """dx [S, in]. dlow: of `backward_low_rank`."""
    dx = grouped_mm(dy, _matrices(slot, t).transpose(1, 2), groups)
    if dlow is not None:
        dx += grouped_mm(dlow, _firsts(slot, t, dy.dtype).transpose(1, 2), groups)
    return dx


def parameter_gradients(
    slot: ExpertsSlot,
    t: Sequence[torch.Tensor],
    needs: Sequence[bool],
    x: Callable[[], torch.Tensor],
    low: torch.Tensor | None,
    dy: torch.Tensor,
    dlow: torch.Tensor | None,
    scale: torch.Tensor | None,
    groups: Groups,
) -> list[torch.Tensor | None]:
    """One gradient, or None, for each tensor of the slot, in its dtype. scale: [S, 1], by which dy is multiplied before
    it is summed, or None. x(): [S, in], called where it is needed."""
    grads: list[torch.Tensor | None] = [None] * slot.count
    rows = x() if slot.needs_input(needs) else None
    if needs[slot.at] and rows is not None:
        scaled = rows if scale is None else (rows * scale).to(dy.dtype)
        grads[0] = grouped_mm_t(scaled, dy, groups) if slot.transposed else grouped_mm_t(dy, scaled, groups)
    if slot.has_bias and needs[slot.bias]:
        grads[1] = grouped_sum(dy, scale, groups).to(t[slot.bias].dtype)
    wanted = [(first, rows is not None and needs[first], second, needs[second]) for first, second in slot.adapters]
    dfirst = dsecond = None
    if dlow is not None and rows is not None and any(w for _, w, _, _ in wanted):
        dfirst = grouped_outer(dlow, scale, rows, groups)
    if low is not None and any(w for *_, w in wanted):
        dsecond = grouped_outer(low, scale, dy, groups)
    for (start, end), s, (first, want_first, second, want_second) in zip(slot.spans, slot.scalings, wanted):
        if want_first and dfirst is not None:
            grads[first - slot.at] = dfirst[:, start:end].transpose(1, 2).to(t[first].dtype)
        if want_second and dsecond is not None:
            grads[second - slot.at] = s * dsecond[:, start:end].to(t[second].dtype)
    return grads
