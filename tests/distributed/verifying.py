"""`fastft verify --nproc 2` on a tiny model, in processes that are there already; and the same with a fault planted
into what the processes do.

"STRATEGY" is as it should be, "STRATEGY+PLANT" is not."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastft.tools.verify.ranks.job import RankJob
from fastft.tools.verify.ranks.worker import verified
from tests.distributed.models import make
from tests.distributed.plants import PLANTS


def verify_case(strategy: str, case: str) -> dict[str, Any]:
    """What the command's processes find of one model: "lines" and "notes"."""
    kind, _, plant = strategy.partition("+")
    family, weights = case.split("-")
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            make(f"{family}-full").save_pretrained(folder / "base")
        dist.barrier()
        base, out = str(folder / "base"), str(folder / "out")
        job = RankJob(base, kind, "float32", weights == "nf4", weights != "full", rows=2, seq=16, steps=3, folder=out)
        with PLANTS[plant]() if plant else contextlib.nullcontext():
            return verified(job)


@contextlib.contextmanager
def shared_folder():
    """The first process's, known to all."""
    with tempfile.TemporaryDirectory() if dist.get_rank() == 0 else contextlib.nullcontext() as folder:
        shared: list[Any] = [folder]
        dist.broadcast_object_list(shared, 0)
        yield Path(shared[0])
        dist.barrier()
