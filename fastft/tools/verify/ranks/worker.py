"""What each of the processes does: load, compare, wrap, train, save, load what was saved, go on.

The first process holds the truth: a stock copy of the model in one process on the whole batch."""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastft.api import patch, report, unpatch
from fastft.errors import FastftError
from fastft.tools.verify.ranks import checks, saving
from fastft.tools.verify.ranks.batches import tokens_of
from fastft.tools.verify.ranks.diagnosis import named, of_average, stale_weights
from fastft.tools.verify.ranks.job import Line, RankJob
from fastft.tools.verify.ranks.strategies import DDP, FSDP2, TP, Strategy, gathered, put
from fastft.tools.verify.ranks.training import (
    Recipe,
    Results,
    WholeRun,
    one_process,
    planned,
    trained,
    without_dropout,
)
from fastft.tools.verify.ranks.zero import Zero2, Zero3

# job.py: NAMES
STRATEGIES: dict[str, type[Strategy]] = {"ddp": DDP, "fsdp2": FSDP2, "zero2": Zero2, "zero3": Zero3, "tp": TP}
WAIT = timedelta(hours=1)  # for the first process, which computes the truth


def main(job: RankJob) -> dict[str, Any]:
    """One process. Returns {"lines": [...], "notes": [...], "model", "dtype"}; {"error": ...} for a mistake of the
    user's."""
    warnings.simplefilter("ignore")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=WAIT)
    try:
        return verified(job)
    except FastftError as e:
        return {"error": e}
    finally:
        dist.destroy_process_group()


def load(job: RankJob, name: str, **more: Any) -> Any:
    """The model as FastModel loads it, stock again. B of a new adapter is drawn: at its initial zero no gradient would
    reach A. more: for `from_pretrained`."""
    from fastft.loading.fast_model import FastModel

    how: dict[str, Any] = more if job.lora else more | {"peft_config": None}
    if job.four_bit:
        how |= STRATEGIES[job.strategy].quantised(job.dtype)
    with contextlib.redirect_stdout(None):
        torch.manual_seed(0)  # the adapter is drawn alike on every process
        model = FastModel.from_pretrained(name, dtype=job.dtype, **how)
    generator = torch.Generator().manual_seed(0)
    for n, p in trained(model).items():
        if "lora_B" in n and not gathered(p).any():
            put(p, (torch.randn(p.shape, generator=generator) * 0.02).to(p.device, p.dtype))
    return unpatch(model) or model


def verified(job: RankJob) -> dict[str, Any]:
    """Every check, in the order in which things happen; the lines of the first process are the result."""
    kind, folder, first = STRATEGIES[job.strategy], Path(job.folder), dist.get_rank() == 0
    size = dist.get_world_size()
    model = load(job, job.model)
    name, lines = type(model).__name__, []
    dtype = next(str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point())
    begin = saving.loaded(model)
    lines.append(checks.equal_on_all("loaded on all ranks", begin, "begins with"))
    truth = _truth(job, model, size if kind.is_split else 1)
    recipe = truth.recipe
    model = kind.placed(model, recipe, lambda **how: load(job, job.model, **how))

    with without_dropout(model):
        patch(model)
        strategy = kind(model, recipe)
        lines.append(_sharded(begin, strategy.weights()))
        results = {}
        for step in range(recipe.steps - 1):
            results |= strategy.step(step)
        halfway = strategy.weights()
        strategy.save(folder)
        strategy.save_optimizer(folder)
        results |= strategy.step(recipe.steps - 1)
        after = strategy.weights()
        summaries = checks.exchanged(_summary(model))
        lines.append(checks.same_swaps(summaries))
        lines += _steps(strategy, truth, results)
    if truth.run is not None:
        lines.append(checks.judged("weights", after, truth.run.weights, [r.weights for r in truth.stock], "weights"))
    lines.append(checks.equal_on_all("trained on all ranks", after, "ends with"))
    wanted = saving.as_saved(model, halfway)
    strategy.close()
    del strategy, model
    lines += _resumed(job, recipe, folder, wanted, halfway, truth)
    return {
        "model": name,
        "dtype": dtype,
        "lines": lines if first else [],
        "notes": _notes(summaries[0]),
    }


@dataclass(frozen=True)
class Truth:
    """What the first process knows, and the recipe, which all know. run: in float64; stock: stock's; parts: in float64,
    the first step's gradients of the rows of each process."""

    recipe: Recipe
    run: WholeRun | None = None
    stock: tuple[WholeRun, ...] = ()
    parts: tuple[Results, ...] = ()


def _truth(job: RankJob, model: Any, shares: int) -> Truth:
    found = None
    if dist.get_rank() == 0:
        with without_dropout(model):
            recipe, parts = planned(model, Recipe(job.steps, job.rows * dist.get_world_size(), job.seq), shares)
            run, stock = one_process(model, recipe, shares)
        found = Truth(recipe, run, tuple(stock), tuple(parts))
    shared: list[Any] = [found and found.recipe]
    dist.broadcast_object_list(shared, 0)
    return found or Truth(shared[0])


def _steps(strategy: Strategy, truth: Truth, results: Results) -> list[Line]:
    """Loss and gradients by the judge; where they fail, what is known of why."""
    lines, why = [], ""
    if truth.run is not None:
        lines = [_judged(results, truth, k) for k in ("loss", "gradients")]
    tokens = checks.exchanged(tokens_of(strategy.rows(0)[0]))
    if all(checks.exchanged([x.ok for x in lines])[0]):
        return lines
    stale = checks.exchanged(stale_weights(strategy))
    if truth.run is not None:
        first = {k.partition(":")[2]: v for k, v in results.items() if k.startswith("0:") and k != "0:loss"}
        why = of_average(first, truth.parts, tokens) or named(stale)
        if not why and all(_judged(results, truth, k, 0).ok for k in ("loss", "gradients")):
            why = "right in the first step, wrong after it: something computes with what it kept of a weight"
    return [x if x.ok else checks.worse(x, why) for x in lines]


def _judged(results: Results, truth: Truth, kind: str, step: int | None = None) -> Line:
    """Of one step, or of all."""
    of = lambda r: {k: v for k, v in r.items() if step is None or k.startswith(f"{step}:")}
    assert truth.run is not None
    return checks.judged(kind, of(results), of(truth.run.results), [of(r.results) for r in truth.stock], kind)


def _sharded(begin: dict[str, torch.Tensor], wrapped: dict[str, torch.Tensor]) -> Line:
    odd = saving.difference(begin, wrapped, "the wrapped model")
    return checks.on_all("wrapped as loaded", odd, f"{len(begin)} tensors")


def _resumed(job: RankJob, recipe: Recipe, folder: Path, wanted, halfway, truth: Truth) -> list[Line]:
    """What was saved is read, by its file and by loading it; then the last step is run again from there."""
    odd = saving.difference(wanted, saving.file_of(folder), "its file") if wanted else ""
    model, last = None, recipe.steps - 1
    try:
        model = load(job, str(folder))
        odd = odd or saving.difference(halfway, saving.loaded(model), "what it loads as")
    except Exception as e:  # a file that cannot be loaded is what is looked for; no process waits for another in there
        odd = odd or f"it cannot be loaded: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    lines = [checks.on_all("saved as trained", odd, f"{len(halfway)} tensors")]
    if not all(checks.exchanged(model is not None)):
        return [*lines, Line("resumed", False, "what was saved cannot be loaded")]
    model = STRATEGIES[job.strategy].placed(model, recipe, lambda **how: load(job, str(folder), **how))
    with without_dropout(model):
        patch(model)
        strategy = STRATEGIES[job.strategy](model, recipe)
        strategy.load_optimizer(folder)
        again = strategy.step(last)
        after = strategy.weights()
    strategy.close()
    if truth.run is None:
        return lines
    found = [_judged(again, truth, k, last) for k in ("loss", "gradients")]
    found.append(checks.judged("weights", after, truth.run.weights, [r.weights for r in truth.stock], "weights"))
    worst = min(found, key=lambda x: (x.ok, -x.error))
    return [*lines, replace(worst, name="resumed", detail=f"{worst.name}: {worst.detail}" if worst.detail else "")]


def _summary(model: Any) -> dict[str, Any]:
    """What of the report the table shows."""
    found = report(model)
    swapped: dict[str, int] = {}
    for row in found.swapped:
        swapped[row.kind] = swapped.get(row.kind, 0) + row.count
    stock = [f"stock: {r.kind}, {r.count} of {r.group}: {r.reason}" for r in found.stock]
    return {"swapped": swapped, "stock": stock, "fallbacks": dict(found.fallbacks)}


def _notes(summary: dict[str, Any]) -> list[str]:
    return [*summary["stock"], *(f"{n} calls went the stock way: {why}" for why, n in summary["fallbacks"].items())]
