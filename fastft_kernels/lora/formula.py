"""The outputs of a group of adapted projections in plain torch, differentiable any number of times: what `higher_order`
evaluates.

Same formula, dtypes and dropout masks as group.py, one product at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastft_kernels.lora import dropout
from fastft_kernels.lora.group import GroupTensors, SavedProjections, rows
from fastft_kernels.quant.weights import expand
from fastft_kernels.recompute.recomputation import Recomputation
from fastft_kernels.runtime.dispatch import wider

UNKEPT = (
    "{}: what a second derivative needs was not kept for the backward; want the stock modules: fastft.unpatch(model)"
)


def masks_of(
    g: GroupTensors, t: Sequence[torch.Tensor], kept: SavedProjections, like: torch.Tensor
) -> list[torch.Tensor | None]:
    """The forward's dropout mask [T, in] of each adapter. like: any tensor of the input's shape, contiguous."""
    masks: list[torch.Tensor | None] = []
    for a, draw in zip(g.adapters, kept.draws):
        if a.p == 0 or draw is None:
            masks.append(None)
        elif isinstance(draw, int):
            masks.append(rows(kept.masks[draw]))
        else:
            masks.append(rows(dropout.draw_mask(like, g.drawn or t[a.A].dtype, a.p, draw)))
    return masks


def outputs(
    g: GroupTensors,
    t: Sequence[torch.Tensor],
    x: torch.Tensor,
    masks: Sequence[torch.Tensor | None],
    xA: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """[..., out_i] in g.out of x [..., in]. xA: the low-rank products, where x is not known (its values are then not
    read)."""
    flat, of_mask = rows(x), iter(masks)
    add = wider(g.compute, g.lora) if g.adapters else g.compute
    ys = []
    for p in g.projections:
        y = flat.to(g.compute) @ expand(p.layout, t[p.weight : p.weight + p.n_weight], g.compute).t()
        if p.bias >= 0:
            y = y + t[p.bias].to(g.compute)
        y = y.to(add)
        for a in p.adapters:
            mask = next(of_mask, None)
            if xA is None:
                source = flat.to(g.lora)
                source = source if mask is None else source * mask * dropout.factor(a.p)
                low = source @ t[a.A].to(g.lora).t()
            else:
                low = xA[:, a.column : a.column + a.rank]
            y = y + a.scaling * (low.to(add) @ t[a.B].to(add).t())
            if a.bias >= 0:
                y = y + a.scaling * t[a.bias].to(add)
        ys.append(y.to(g.out).view(*x.shape[:-1], y.shape[-1]))
    return tuple(ys)


def narrowed(x: torch.Tensor, dtype: torch.dtype) -> Recomputation:
    """x kept in a narrower dtype, connected to x: its values are those of the products, its gradient is x's."""
    wide = x.dtype
    return Recomputation((x.to(dtype),), lambda kept: kept, lambda kept: kept.to(wide))
