"""What small models feel: the host's time in a step of a 0.6B shape at 2 x 512 tokens, and its launches; and whether two runs give one result."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.fake import counting
from benchmarks.gpu_models import Batch, batch, build, config_small
from benchmarks.gpu_steps import STACKS, _autocast, figures, fitting, ours, sft_loss
from benchmarks.sheet import Figures, Red, Row, Sheet
from fastft.tools.bench.limits import ModelShape
from fastft.tools.bench.timing import Roof, synchronize


def _step(model: nn.Module, b: Batch, device: torch.device) -> torch.Tensor:
    with _autocast(device):
        loss = sft_loss(model, b)
    loss.backward()
    return loss.detach()


def host_ms(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time until the host has queued forward and backward, not waiting for the device. (On a CPU: the whole step.)"""
    found = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    synchronize(device)
    return statistics.median(found) * 1e3


def launches(step: Callable[[], object], device: torch.device) -> float:
    """GPU kernels and copies of forward and backward by the profiler; on a CPU operators that would launch something."""
    if device.type != "cuda":
        with counting([]) as cost:
            step()
        return cost.launches
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
        synchronize(device)
    return float(sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events()))


def host_section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    lengths = [16, 16] if tiny else [512, 512]
    made: dict[str, nn.Module] = {}

    def measure(stack: str) -> Figures:
        if not made:
            made["model"] = build(config_small(tiny), device)
        model = made["model"]
        b = batch(lengths, model.config.vocab_size, device)
        step = fitting(model, stack, sft_loss, b, device, seconds=0.0 if tiny else 2.0)
        found = figures(step, lengths, ModelShape.of(model.get_base_model()), roof, sft_loss, False)
        with STACKS[stack][0](model, device):
            run = lambda: _step(model, b, device)
            run()
            found |= {"forward + backward, host ms": host_ms(run, device, 3 if tiny else 10), "launches": launches(run, device)}
        model.zero_grad(set_to_none=True)
        return found

    for stack in STACKS:
        sheet.run(f"0.6B shape, bf16, {len(lengths)}x{lengths[0]}: {stack}", lambda stack=stack: measure(stack), least=0.0 if tiny else 5.0)


def determinism_section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    """Three steps, twice, each with a fresh patch; attention's own backward is told to be deterministic, for stock's is not by default."""
    config, lengths = config_small(tiny, layers=2 if tiny else 4), ([16, 9] if tiny else [512, 300])

    def trained() -> list[torch.Tensor]:
        model = build(config, device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        found = []
        with ours(model, device):
            for i in range(3):
                found.append(_step(model, batch(lengths, config.vocab_size, device, seed=i), device))
                optimizer.step()
                optimizer.zero_grad()
        return found + [p.detach().cpu() for p in model.parameters() if p.requires_grad]

    def measure() -> Figures:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            first, second = trained(), trained()
        finally:
            torch.use_deterministic_algorithms(before)
        odd = sum(not torch.equal(a, b) for a, b in zip(first, second))
        if odd:
            raise Red(f"{odd} of {len(first)} losses and adapters differ between two runs")
        return {"losses and adapters compared": len(first), "same bits": True}

    sheet.run("three steps, twice", measure)


def planner_section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    """Predicted against measured peak memory, a row for each configuration."""
    try:
        from benchmarks.plan_error import cases, outcome
    except ImportError as e:
        sheet.write(Row("planner", "predicted against measured peak", "missing", note=f"the planner's benchmark is not there: {e}"))
        return

    def measure(case) -> Figures:
        found = outcome(case, device)
        predicted, measured = (max(d.values()) / 2**20 for d in (found.predicted, found.measured))
        return {"predicted MiB": predicted, "measured MiB": measured, "error %": 100 * found.error}

    for case in cases(device, tiny)[: 3 if tiny else None]:
        sheet.run(case.name, lambda case=case: measure(case), least=0.0 if tiny else 6.0)
