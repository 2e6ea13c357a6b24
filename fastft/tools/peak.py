"""The most memory that training takes, on any device that says so.

On a GPU torch's allocator counts it: everything that lives, weights included. A CPU's allocator counts nothing, but its
events can be watched: what they add up to, above the parameters, buffers and optimizer states that are there anyway.
Both are what `fastft.plan` predicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

GPUS = ("cuda", "xpu")


class Peak:
    """`with Peak(model, optimizer) as peak: step()`, then `peak.bytes`. model: where it trains, before the block is
    entered."""

    def __init__(self, model: nn.Module, optimizer: Any = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.device = next(model.parameters()).device
        self.bytes = 0
        self._held, self._profile = 0, None

    def __enter__(self) -> Peak:
        if self.device.type in GPUS:
            torch.get_device_module(self.device).reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            self._held = held_bytes(self.model, self.optimizer)
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.__enter__()
        else:
            raise NotImplementedError(
                f"the peak memory of a {self.device.type} device is not known: measure on a GPU or a CPU"
            )
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is None:
            self.bytes = torch.get_device_module(self.device).max_memory_allocated(self.device)
        else:
            self._profile.__exit__(*error)
            self.bytes = self._held + peak_of_events(self._profile)
            self._profile = None

    def __str__(self) -> str:
        return f"{self.bytes / 2**20:,.1f} MiB at the most ({how(self.device)})"


class StepPeak(TrainerCallback):
    """`callbacks=[peak := StepPeak()]` of any transformers or TRL trainer, then `peak.bytes`: of the steps after the
    first, which has no optimizer state yet; on a CPU of the second alone, for watching takes time. 0 where there was no
    second step."""

    def __init__(self) -> None:
        self.peak: Peak | None = None
        self._open = False

    @property
    def bytes(self) -> int:
        return 0 if self.peak is None else self.peak.bytes

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.peak is None and state.global_step >= 1 and model is not None:
            self.peak = Peak(model, optimizer).__enter__()
            self._open = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.peak is not None and self.peak.device.type == "cpu":
            self._close()

    def on_train_end(self, args, state, control, **kwargs):
        self._close()

    def _close(self) -> None:
        if self._open and self.peak is not None:
            self.peak.__exit__(None, None, None)
            self._open = False

    def __str__(self) -> str:
        return "no second step was taken" if self.peak is None else str(self.peak)


def how(device: torch.device) -> str:
    """What `Peak` measures there, in words."""
    return "allocated on the GPU" if device.type in GPUS else "tensors alive on the CPU, by its allocator's events"


def held_bytes(model: nn.Module, optimizer: Any = None) -> int:
    """Bytes of the storages of parameters, buffers and optimizer states, each once."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    states = (
        []
        if optimizer is None
        else [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    )
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers(), *states)
    }
    return sum(storages.values())


def peak_of_events(profile: torch.profiler.profile) -> int:
    """The most that lived at once of what the CPU's allocator gave and took back."""
    results: Any = profile.profiler and profile.profiler.kineto_results
    assert results is not None, "the profile has ended"
    events = [e for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    return peak
