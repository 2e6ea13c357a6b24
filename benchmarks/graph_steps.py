"""One training step with and without CUDA graphs: python -m benchmarks.graph_steps OUT.json [--tiny]

A Qwen3-0.6B shape at 2 x 512 and eight layers of a Llama-3.1-8B shape at 4 x 2048, bf16 with float32 LoRA adapters
under autocast, AdamW, clipping: stock, fastft eager, fastft with graphs. For each: the median step, the host's time
until it has queued it, the share of the step in which the device is busy, launches, the peak of allocated memory, and
what the report says of the graphs. (--tiny: small shapes, on a CPU as well.)"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastft
from benchmarks.gpu_models import Batch, batch, build, config_8b, config_small
from benchmarks.gpu_steps import _autocast, sft_loss, tuned
from benchmarks.header import header
from fastft.patching.patcher import record_of
from fastft.tools.bench.timing import synchronize

Context = Callable[[nn.Module], contextlib.AbstractContextManager]


def measured(model: nn.Module, b: Batch, device: torch.device, context: Context, repeats: int) -> dict:
    """One row's figures; times in ms, memory in GiB."""
    trained, cuda = [p for p in model.parameters() if p.requires_grad], device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=cuda)

    def step() -> torch.Tensor:
        with _autocast(device):
            loss = sft_loss(model, b)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    with context(model):
        for _ in range(6):
            step()
        synchronize(device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times, queued = [], []
        for _ in range(repeats):
            start = time.perf_counter()
            loss = step()
            queued.append(time.perf_counter() - start)
            synchronize(device)
            times.append(time.perf_counter() - start)
        row = {"step_ms": statistics.median(times) * 1e3, "host_ms": statistics.median(queued) * 1e3}
        row["loss"] = float(loss)
        if cuda:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                step()
                synchronize(device)
            events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            row |= {"busy_ms": sum(e.device_time for e in events) / 1e3, "launches": len(events)}
            row["busy_share"] = row["busy_ms"] / row["step_ms"]
        if record_of(model) is not None:
            row["notes"] = [n for n in fastft.report(model).notes if "CUDA graphs" in n]
    return row


def main(argv: list[str]) -> int:
    tiny, device = "--tiny" in argv, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = {
        "0.6B shape, 2x512": (config_small(tiny), [16, 16] if tiny else [512, 512], None, 3 if tiny else 10),
        "8 layers of an 8B shape, 4x2048": (
            config_8b(tiny, layers=2 if tiny else 8),
            [24] * 4 if tiny else [2048] * 4,
            "none",
            3,
        ),
    }
    rows, failed = [], False
    for name, (config, lengths, policy, repeats) in shapes.items():
        model = build(config, device)
        b = batch(lengths, model.config.vocab_size, device)
        stacks: dict[str, Context] = {
            "stock": lambda m: contextlib.nullcontext(),
            "fastft, eager": lambda m, p=policy: fastft.patched(m, activation_policy=p, cuda_graphs=False),
            "fastft, CUDA graphs": lambda m, p=policy: fastft.patched(m, activation_policy=p, cuda_graphs="auto"),
        }
        for stack, context in stacks.items():
            try:
                with tuned(device) if policy and stack != "stock" else contextlib.nullcontext():
                    row = measured(model, b, device, context, repeats)
            except Exception as e:  # the other rows are still worth having
                row, failed = {"error": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()[-1500:]}, True
            rows.append({"name": f"{name}: {stack}", **row})
            print(json.dumps(rows[-1]), flush=True)
            result = {"header": header(device, f"python -m benchmarks.graph_steps {argv[0]}"), "rows": rows}
            Path(argv[0]).write_text(json.dumps(result, indent=1) + "\n")
            model.zero_grad(set_to_none=True)
            gc.collect()
        del model
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
