"""How a strategy shares a training step among ranks. What is planned is the first of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastft.compat.sharding_private import imagined_group, local_part
from fastft.errors import PlanError
from fastft.tools.plan.measure import AllocationLedger
from fastft.tools.plan.ranks import fsdp2
from fastft.tools.plan.ranks.undo import as_it_was
from fastft.tools.plan.step import finish

STRATEGIES = ("ddp", "fsdp2")


@dataclass(frozen=True)
class RankSetup:
    """count: processes, each with a GPU of its own."""

    strategy: str
    count: int

    @property
    def wraps(self) -> bool:
        """Does it change the model's modules?"""
        return self.strategy != "ddp"

    @property
    def gradients_over(self) -> int:
        """Among how many ranks the gradients are divided once they are summed."""
        return 1 if self.strategy == "ddp" else self.count


def notes(ranks: RankSetup, dtype: torch.dtype, four_bit: bool, full: bool, accumulate: int) -> list[str]:
    """What is to be known of a strategy's plan. Raises PlanError for what is not planned."""
    found = [f"bytes are a rank's, of {ranks.count} processes under {ranks.strategy}; batch is the rows of each"]
    if ranks.strategy == "fsdp2":
        if accumulate > 1:
            raise PlanError(
                f"accumulate={accumulate} is not planned under fsdp2, where accelerate keeps whole gradients of every "
                "layer until the last batch: plan with 1, or another strategy"
            )
        if full and dtype != torch.float32:
            found.append("accelerate keeps what trains in float32 under fsdp2's mixed precision")
        if four_bit:
            found.append(
                "4-bit weights are sharded where they are stored in a floating dtype: "
                f"bnb_4bit_quant_storage={str(dtype).removeprefix('torch.')}"
            )
    return found


@dataclass
class Share:
    """What one rank has of a model while a step runs; by itself, of a single process: all of it. buffers: that live
    through the whole step to communicate."""

    model: nn.Module
    buffers: list[torch.Tensor] = field(default_factory=list)

    def parts(self, tensors: Any) -> list[torch.Tensor]:
        """Of each tensor what this rank has."""
        return [local_part(t) for t in tensors]

    def rehearse(self) -> None:
        """Whatever asks a library for shapes the first time does so now. (Sharded tensors keep the answers.)"""

    def summed(self, ledger: AllocationLedger) -> None:
        """Count what the ranks sum in a backward by other means than torch's operators."""


class DdpShare(Share):
    """DistributedDataParallel: every rank has everything, and beside the gradients the buckets in which they are
    summed (gradient_as_bucket_view is off by default)."""

    def __init__(self, model: nn.Module) -> None:
        learning = [p for p in model.parameters() if p.requires_grad]
        dtypes = dict.fromkeys(p.dtype for p in learning)
        sizes = [sum(p.numel() for p in learning if p.dtype == d) for d in dtypes]
        super().__init__(model, [torch.empty(n, dtype=d) for n, d in zip(sizes, dtypes)])

    def summed(self, ledger: AllocationLedger) -> None:
        ledger.communicated("all-reduce", sum(t.nbytes for t in self.buffers))


class Fsdp2Share(Share):
    """Torch's fully_shard, which does and moves everything by itself."""

    def rehearse(self) -> None:
        learning = [p for p in self.model.parameters() if p.requires_grad]
        for p in learning:
            p.grad = torch.empty_like(p)
        finish(self.model, lambda: None)
        for p in learning:
            p.grad = None


@contextlib.contextmanager
def share_of(
    model: nn.Module, ranks: RankSetup | None, low: torch.dtype | None, fake: Callable[[], AbstractContextManager]
) -> Iterator[Share]:
    """What the first rank has of `model`, whose tensors are fake; where a strategy `wraps`, `model` is afterwards as
    before. low: the dtype of mixed precision. fake: where fake tensors are made."""
    if ranks is None:
        yield Share(model)
    elif ranks.strategy == "ddp":
        with fake():
            share = DdpShare(model)
        yield share
    else:
        with imagined_group(ranks.count), as_it_was(model):
            with fake():
                fsdp2.shard(model, ranks.count, low)
            yield Fsdp2Share(model)
