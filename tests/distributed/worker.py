"""What each of two processes does: train every model one step under one strategy, on its half of a batch, and write
down how that agrees with a single process that sees the whole batch.

    torchrun --standalone --nproc_per_node 2 -m tests.distributed.worker OUT "STRATEGY MODEL-WEIGHTS" ...

OUT (JSON, written by the first process): for each job {"ok", "error", "stock_error", "worst", "adapters_equal",
"saved_equal", "ranks": [what the report of each rank says]}, or {"raised": the traceback}. `strategies.py` says how
each strategy prepares a model; "costs" is none (`costs.py`), nor "lost-masks" (`context.py`), nor "verify-STRATEGY"
(`verifying.py`)."""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

import fastft
from fastft.tools.verify.ranks.checks import exchanged
from tests.distributed.context import lost_masks
from tests.distributed.costs import costs
from tests.distributed.jobs import run_jobs
from tests.distributed.loaded import LOADED, adapter_too_late
from tests.distributed.models import make, step_of
from tests.distributed.strategies import STRATEGIES
from tests.distributed.verifying import verify_case
from tests.linear.lora_models import DRAWS, in_float64, judge, run


def summary(model: torch.nn.Module) -> dict[str, Any]:
    """What of the report the tests ask: swapped modules by kind, stock ones with the reason, fallbacks, notes."""
    report = fastft.report(model)
    swapped: dict[str, int] = {}
    for row in report.swapped:
        swapped[row.kind] = swapped.get(row.kind, 0) + row.count
    return {
        "swapped": swapped,
        "stock": [[r.kind, r.group, r.count, r.reason] for r in report.stock],
        "fallbacks": report.fallbacks,
        "apart": sorted(r.reason for r in report.swapped if r.reason),
    }


def one_case(name: str, strategy: Any) -> dict[str, Any]:
    """Results of one model; compared on the first process."""
    dtype = strategy.dtype
    stock = make(name, dtype)
    step = lambda m: step_of(m, DRAWS)
    reference = run(in_float64(stock), step, reference=True)
    if strategy.mixed:
        eager = strategy.train(copy.deepcopy(stock), patched=False).results
    else:
        eager = run(copy.deepcopy(stock), step)
    trained = strategy.train(stock, patched=True)
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, summary(trained.model))
    found: dict[str, Any] = {"ranks": ranks, **trained.checks()}
    if dist.get_rank() == 0:
        try:
            verdict = judge(trained.results, reference, eager)
            found |= {"ok": True, "error": verdict.error, "stock_error": verdict.eager_error}
        except AssertionError as e:
            found |= {"ok": False, "worst": str(e)[:600]}
    return found


def job_of(strategy: str, case: str) -> dict[str, Any]:
    if strategy.startswith("verify-"):
        found = verify_case(strategy.removeprefix("verify-"), case)
        return found | {"lines": [asdict(x) for x in found["lines"]]}
    if strategy == "lost-masks":
        return {"said": exchanged(lost_masks())}
    if strategy == "late-adapter":
        return {"notes": adapter_too_late()}
    return costs(case) if strategy == "costs" else one_case(case, (STRATEGIES | LOADED)[strategy])


def main(out: str, *jobs: str) -> None:
    """Every job."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    run_jobs(out, jobs, job_of)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
