"""What small models feel: the host's time in a step of a 0.6B shape at 2 x 512 tokens, and its launches; and whether
two runs give one result."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastft
from benchmarks.fake import counting
from benchmarks.gpu_models import Batch, batch, build, config_small
from benchmarks.gpu_repeat import culprits, owner
from benchmarks.gpu_steps import STACKS, _autocast, figures, fitting, sft_loss, tuned
from benchmarks.gpu_trainer import trainer_step
from benchmarks.sheet import Figures, Red, Row, Sheet
from fastft.tools.bench.limits import ModelShape
from fastft.tools.bench.timing import Roof, synchronize


def _step(model: nn.Module, b: Batch, device: torch.device) -> torch.Tensor:
    with _autocast(device):
        loss = sft_loss(model, b)
    loss.backward()
    return loss.detach()


def host_ms(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time until the host has queued forward and backward, not waiting for the device. (On a CPU: the whole
    step.)"""
    found = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    synchronize(device)
    return statistics.median(found) * 1e3


def launches(step: Callable[[], object], device: torch.device) -> float:
    """GPU kernels and copies of forward and backward by the profiler; on a CPU operators that would launch
    something."""
    if device.type != "cuda":
        with counting([]) as cost:
            step()
        return cost.launches
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    ) as profile:
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
            found |= {
                "forward + backward, host ms": host_ms(run, device, 3 if tiny else 10),
                "launches": launches(run, device),
            }
        model.zero_grad(set_to_none=True)
        return found

    for stack in STACKS:
        sheet.run(
            f"0.6B shape, bf16, {len(lengths)}x{lengths[0]}: {stack}",
            lambda stack=stack: measure(stack),
            least=0.0 if tiny else 5.0,
        )
    made.clear()
    for stack in ("stock", "fastft"):
        sheet.run(
            f"0.6B shape, bf16, {len(lengths)}x{lengths[0]}, SFTTrainer: {stack}",
            lambda stack=stack: trainer_step(stack, tiny, device, lengths, *((9,) if tiny else ())),
            least=0.0 if tiny else 8.0,
        )


def attentions(device: torch.device) -> dict[str, Callable]:
    """Rows of `determinism`: which attention torch may take. The first is what the benchmark's steps take."""
    if device.type != "cuda":
        return {"three steps, twice": contextlib.nullcontext}
    only = {"flash attention": SDPBackend.FLASH_ATTENTION, "math attention": SDPBackend.MATH}
    named = {
        f"three steps, twice, {name} alone": functools.partial(sdpa_kernel, backend) for name, backend in only.items()
    }
    return {"three steps, twice, cuDNN's attention first": lambda: tuned(device), **named}


def determinism_section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    """Three steps, twice, each with a fresh patch; torch is told to be deterministic. Where two runs differ, one step
    is run twice more with every operator watched: what is ours must repeat, else the row is red; else it names the
    first operation that does not, and whose it is."""
    config, lengths = config_small(tiny, layers=2 if tiny else 4), ([16, 9] if tiny else [512, 300])

    def trained(attention: Callable, steps: int) -> list[torch.Tensor]:
        model = build(config, device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        found = []
        with fastft.patched(model, activation_policy="auto"), attention():
            for i in range(steps):
                found.append(_step(model, batch(lengths, config.vocab_size, device, seed=i), device))
                optimizer.step()
                optimizer.zero_grad()
        return found + [p.detach().cpu() for p in model.parameters() if p.requires_grad]

    def measure(attention: Callable) -> Figures:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # with warn_only flash attention's backward stays as it is
        try:
            first, second = trained(attention, 3), trained(attention, 3)
            odd = sum(not torch.equal(a, b) for a, b in zip(first, second))
            if not odd:
                return {
                    "losses and adapters compared": len(first),
                    "that differ": 0,
                    "same bits": True,
                    "ours repeats": True,
                }
            found = culprits(lambda: trained(attention, 1))
        finally:
            torch.use_deterministic_algorithms(before)
        if found.ours or found.diverged or not found.first:
            raise Red(f"{odd} of {len(first)} losses and adapters differ between two runs; {found}")
        who = {"first that differs": found.first, "whose": owner(found.first), "all that differ": str(found)}
        return {
            "losses and adapters compared": len(first),
            "that differ": odd,
            "same bits": False,
            "ours repeats": True,
            **who,
        }

    for name, attention in attentions(device).items():
        sheet.run(name, lambda attention=attention: measure(attention))


def planner_section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    """Predicted against measured peak memory, a row for each configuration."""
    try:
        from benchmarks.plan_error import cases, outcome
    except ImportError as e:
        sheet.write(
            Row(
                "planner",
                "predicted against measured peak",
                "missing",
                note=f"the planner's benchmark is not there: {e}",
            )
        )
        return

    def measure(case) -> Figures:
        found = outcome(case, device)
        predicted, measured = (max(d.values()) / 2**20 for d in (found.predicted, found.measured))
        figures: Figures = {"predicted MiB": predicted, "measured MiB": measured, "error %": 100 * found.error}
        for phase, bytes in found.predicted.items():
            figures[f"{phase}, predicted - measured MiB"] = (bytes - found.measured[phase]) / 2**20
        return figures

    for case in cases(device, tiny)[: 3 if tiny else None]:
        sheet.run(case.name, lambda case=case: measure(case), least=0.0 if tiny else 6.0)
