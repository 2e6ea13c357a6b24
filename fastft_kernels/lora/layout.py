"""What a group of projections is apart from its tensors: where each tensor stands, ranks, scalings, dtypes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastft_kernels.quant.weights import WeightLayout


class AdapterSlot(NamedTuple):
    """One adapter's place: its columns of xA, and the indices of A, B and c (or -1) in the group's tensors."""

    rank: int
    column: int
    scaling: float
    p: float
    A: int
    B: int
    bias: int


class ProjectionSlot(NamedTuple):
    """Where the tensors of one projection lie among those of its group."""

    layout: WeightLayout
    weight: int  # index of the first of n_weight tensors
    n_weight: int
    bias: int  # or -1
    adapters: tuple[AdapterSlot, ...]


class GroupTensors(NamedTuple):
    """A group without its tensors: hashable, and what an autograd.Function keeps on its context."""

    compute: torch.dtype
    lora: torch.dtype
    out: torch.dtype
    projections: tuple[ProjectionSlot, ...]
    rank: int
    adapters: tuple[AdapterSlot, ...]  # of all projections, in order
    drawn: torch.dtype | None = None  # the dtype of x in which dropout draws; None: that of A
    plain: bool = False  # every tensor, x and the outputs are of one dtype; no dropout, no adapter bias: `plain_group`
