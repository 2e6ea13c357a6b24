"""The error of `fastft plan --gpus`: the peak memory of a step on one of two ranks as predicted, and as two real
processes (gloo, on the CPU) take it.

    python -m benchmarks.plan_ranks [--strategies ddp,fsdp2] [--out benchmarks/results]

Accelerate prepares each model as it does in a Trainer. The profile of the allocator's events begins before the weights
are made, so everything that lives is in it, buckets and buffers of the strategy as well."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.header import header
from benchmarks.plan_error import BF16, PHASES, Case, Outcome, cases, llama, optimizer_for, predicted, real_model
from fastft.compat.sharding_private import has_shards
from fastft.compat.torch_private import TorchDispatchMode
from fastft.tools.plan import fake as plan_fake
from fastft.tools.plan.ranks.strategies import STRATEGIES, RankSetup
from fastft.tools.plan.step import finish, forward

ROOT = Path(__file__).parents[1]
RANKS = 2
SPANS = tuple(f"plan:{p}" for p in PHASES)
SETTLING = 0.02  # seconds
CPU = torch.device("cpu")
CHOSEN = {
    "LoRA, nothing recomputed, the model's loss": "LoRA, nothing recomputed",
    "LoRA, bfloat16 under autocast, float32 adapters": "LoRA in bfloat16, nothing recomputed",
    "QLoRA: NF4, double quantisation": "QLoRA, nothing recomputed",
    "LoRA, every layer lean": "LoRA, every layer lean",
    "full fine-tuning, AdamW": "full fine-tuning, nothing recomputed",
    "stock, LoRA, every layer checkpointed": "stock, LoRA, every layer checkpointed",
}


def rank_cases(strategies: tuple[str, ...] = STRATEGIES) -> dict[str, Case]:
    """By "STRATEGY: WHAT": models in which weights, and not the head's tiles, take most of the memory."""
    config, found = llama(6, vocab_size=1024), {}
    for strategy in strategies:
        for case in (c for c in cases(CPU) if c.name in CHOSEN):
            depth = config.num_hidden_layers
            layers = (depth, 0) if case.layers[0] else (0, depth)
            setting = replace(case.setting, ranks=RankSetup(strategy, RANKS))
            name = f"{strategy}: {CHOSEN[case.name]}"
            found[name] = Case(name, config, setting, 1, 64, layers)
    return found


# --- one of the processes


def _wrapped(model: nn.Module, case: Case) -> nn.Module:
    """As accelerate prepares it. (Its Accelerator takes FSDP2 on accelerators alone: its function is called here.)"""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    assert case.setting.ranks is not None
    if case.setting.ranks.strategy == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
    )
    mixed = "bf16" if case.setting.autocast == BF16 else "no"
    if mixed == "bf16":
        plugin.set_mixed_precision(mixed)
    told: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=mixed, is_main_process=False, device=CPU
    )
    return fsdp2_prepare_model(told, model)


def _anew(model: nn.Module) -> None:
    """All that the model holds is allocated now."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and id(p) not in made:
                made[id(p)] = p
                p.data = p.data.clone()
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = b.clone()
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        for part in () if state is None else (state, state.state2):
            part.absmax, part.code = part.absmax.clone(), part.code.clone()
            if part.offset is not None:
                part.offset = part.offset.clone()


class Settled(TorchDispatchMode):
    """A collective is over before it returns. The thread of gloo holds its tensors, and the profile does not see what
    that thread frees."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if has_shards(types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            for work in out if isinstance(out, (tuple, list)) else (out,):
                if hasattr(work, "wait"):
                    work.wait()
            time.sleep(SETTLING)
        return out


def measured(case: Case, model: Any) -> dict[str, float]:
    """The third of three real steps of this process, by phase. model: `real_model`, not wrapped yet."""
    batch = plan_fake.batch(case.config, case.rows, case.tokens)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, Settled():
        _anew(model)
        batch = {k: v.clone() for k, v in batch.items()}
        model = _wrapped(model, case)
        optimizer = optimizer_for(model, case.setting.optim)
        for i in range(3):
            _step(case, model, optimizer, batch, record_function if i == 2 else None)
    return by_spans(profiler)


def _step(case: Case, model: nn.Module, optimizer: Any, batch: dict, around: Callable | None) -> None:
    loss: list[torch.Tensor] = []
    phases = {
        "forward": lambda: loss.append(forward(model, batch, case.setting.loss, case.setting.autocast)),
        "backward": lambda: loss[0].backward(),
        "optimizer": lambda: finish(model, optimizer.step),
    }
    for name, run in phases.items():
        if around is None:
            run()
        else:
            with around(f"plan:{name}"):
                run()
    optimizer.zero_grad(set_to_none=True)


def by_spans(profiler: Any) -> dict[str, float]:
    """The most that lived in each phase, of all that was allocated since the profile began. (What an earlier one saw
    made may be freed in this.)"""
    events, left = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while left:
        events.append(left.pop())
        left += events[-1].children
    spans = {e.name.removeprefix("plan:"): (e.start_time_ns, e.end_time_ns) for e in events if e.name in SPANS}
    allocations = [e for e in events if e.name == "[memory]"]
    alive: dict[int, int] = {}
    now, found = 0, dict.fromkeys(PHASES, 0.0)
    for e in sorted(allocations, key=lambda e: e.start_time_ns):
        at, size, change = e.extra_fields.ptr, e.extra_fields.alloc_size, 0
        if size > 0:
            change = alive[at] = size
        else:
            change = -alive.pop(at, 0)
        now += change
        for name, (start, end) in spans.items():
            if start <= e.start_time_ns <= end:
                found[name] = max(found[name], float(now))
    return found


def worker(out: str, names: list[str]) -> None:
    """Measures every case; the first process writes what it found."""
    import torch.distributed as dist

    known, found = rank_cases(), {}
    models = {name: real_model(known[name], CPU) for name in names}  # transformers saves on the first process alone
    dist.init_process_group("gloo")
    for name in names:
        found[name] = measured(known[name], models.pop(name))
        gc.collect()
        dist.barrier()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


# --- the processes, and what was predicted


def outcomes(names: list[str]) -> Iterator[tuple[str, Outcome]]:
    """Predicted and measured of each case; all are measured by one launch."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
        command += ["-m", "benchmarks.plan_ranks", "--worker", str(out), *names]
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        run = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"the {RANKS} processes failed: {run.stderr[-3000:]}")
        found = json.loads(out.read_text())
    known = rank_cases()
    for name in names:
        yield name, Outcome(predicted(known[name]), found[name])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_ranks", description=__doc__)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        worker(options.worker[0], options.worker[1:])
        return 0
    names = list(rank_cases(tuple(options.strategies.split(","))))
    most = lambda d: max(d.values()) / 2**20
    rows = {}
    for name, result in outcomes(names):
        line = f"| {name} | {most(result.predicted):,.1f} | {most(result.measured):,.1f} | {result.error:+.2%} |"
        print(line, flush=True)
        rows[name] = {**dataclasses.asdict(result), "error": result.error}
    worst = max(abs(r["error"]) for r in rows.values())
    if options.out is not None:
        command = "python -m benchmarks.plan_ranks " + " ".join(sys.argv[1:])
        found = {"header": header(CPU, command), "ranks": RANKS, "largest_error": worst, "cases": rows}
        (options.out / f"plan-ranks-{date.today()}.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0 if worst <= 0.05 else 1


if __name__ == "__main__":
    raise SystemExit(main())
