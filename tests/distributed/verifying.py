"""`fastft verify --nproc 2` on a tiny model, in processes that are there already; and the same with a fault planted
into what the processes do.

"STRATEGY" is as it should be, "STRATEGY+PLANT" is not."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fastft.tools.verify.ranks.job import RankJob
from fastft.tools.verify.ranks.worker import verified
from tests.distributed.loaded import shared_folder
from tests.distributed.models import make
from tests.distributed.plants import PLANTS


def verify_case(strategy: str, case: str) -> dict[str, Any]:
    """What the command's processes find of one model: "lines" and "notes"."""
    kind, _, plant = strategy.partition("+")
    family, weights = case.split("-")
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            make(f"{family}-full").save_pretrained(folder / "base")
            if weights == "columns":
                columns(folder / "base").save_pretrained(folder / "columns")
        dist.barrier()
        base, out = str(folder / ("columns" if weights == "columns" else "base")), str(folder / "out")
        job = RankJob(base, kind, "float32", weights == "nf4", weights != "full", rows=2, seq=16, steps=3, folder=out)
        with PLANTS[plant]() if plant else contextlib.nullcontext():
            return verified(job)


def columns(base: Path) -> Any:
    """A model with an adapter on layers that tensor parallelism splits by columns."""
    model = AutoModelForCausalLM.from_pretrained(base)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "up_proj"]))
