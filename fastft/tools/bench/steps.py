"""Watching a trainer: the gradients of its first steps for the gate; the time, tokens and memory of its later ones."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from fastft.compat.transformers_private import prepare_inputs, set_prepare_inputs
from fastft.proving.float64 import float64_reference
from fastft.tools.bench.cells import lengths_in, make_trainer
from fastft.tools.bench.spec import Spec
from fastft.tools.bench.stacks import STACK_SETTINGS, attention, device
from fastft.tools.bench.timing import synchronize
from fastft.tools.peak import held_bytes, peak_of_events

GATE_SEQ = 64
BEFORE = 2  # steps that are not timed: the first, and the one whose memory is watched on a CPU


def losses_and_gradients(spec: Spec, cell: str, model: Any, tokenizer: Any, draws: int) -> dict[str, torch.Tensor]:
    """ "0:loss", "0:name of an adapter", "1:loss", ...: of `draws` training steps at learning rate 0, float32 (the
    reference's in its own dtype), on the CPU."""
    seq = min(spec.seq, GATE_SEQ)
    trainer = make_trainer(
        spec, cell, model, tokenizer, steps=draws, checkpointing=False, seq=seq, rate=0.0, callbacks=[]
    )
    found: dict[str, torch.Tensor] = {}
    exact = spec.stack == "reference"
    wide = (
        next((p.dtype for p in model.parameters() if p.dtype == torch.float64), torch.float32)
        if exact
        else torch.float32
    )
    if exact:  # TRL rounds the adapters of a quantised base: from these same bits it goes on in full
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data = p.data.to(wide)
    step, draw = trainer.training_step, iter(range(draws))

    def watched(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(model, *args, **kwargs)
        i, scaler = next(draw), getattr(trainer.accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        found[f"{i}:loss"] = loss.detach().to("cpu", wide).reshape(1)
        for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
            if p.requires_grad and p.grad is not None:
                found[f"{i}:{n}"] = (p.grad.detach().to(wide) / scale).cpu()
        return loss

    trainer.training_step = watched
    with (
        attention(STACK_SETTINGS[spec.stack].tuned),
        float64_reference() if wide == torch.float64 else contextlib.nullcontext(),
    ):
        trainer.train()
    return found


class StepMeter(TrainerCallback):
    """Seconds, losses and row lengths of every step; memory of those after the first two.

    On a GPU `peak` is the allocator's, with everything that lives; on a CPU it is what the allocator's events add up to
    in the second step, above the parameters, buffers and optimizer states."""

    def __init__(self, where: torch.device):
        self.where = where
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.lengths: list[list[int]] = []
        self.peak: float | None = None
        self.reserved: float | None = None
        self.profile: Any = None

    def watch(self, trainer: Any) -> None:
        step = trainer.training_step

        def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            prepared: list[Any] = []
            prepare = prepare_inputs(trainer)
            set_prepare_inputs(trainer, lambda x: prepared.append(prepare(x)) or prepared[-1])
            try:
                loss = step(model, inputs, *args, **kwargs)
            finally:
                set_prepare_inputs(trainer, prepare)
            self.losses.append(float(loss.detach()))
            self.lengths.append(lengths_in(prepared[0]) if prepared else [])
            return loss

        trainer.training_step = watched

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        step = len(self.seconds)
        if step == BEFORE and self.where.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if step == BEFORE - 1 and self.where.type == "cpu" and model is not None:
            self.resident = held_bytes(model, optimizer)
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()
        synchronize(self.where)
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.where)
        self.seconds.append(time.perf_counter() - self.begun)
        if self.profile is not None:
            self.profile.__exit__(None, None, None)
            self.peak = self.resident + peak_of_events(self.profile)
            self.profile = None

    def on_train_end(self, args, state, control, **kwargs):
        if self.where.type == "cuda":
            self.peak, self.reserved = float(torch.cuda.max_memory_allocated()), float(torch.cuda.max_memory_reserved())


def measure(
    spec: Spec, cell: str, model: Any, tokenizer: Any, seq: int, steps: int, tidy: Callable[[], None]
) -> dict[str, Any]:
    """One cell, in the first of the stack's ways that fits into memory: {"checkpointing", "seconds", "first", "losses",
    "lengths", "peak", "reserved"}."""
    way = STACK_SETTINGS[spec.stack]
    for i, checkpointing in enumerate(way.tries):
        try:
            return _measure(spec, cell, model, tokenizer, seq, steps, checkpointing)
        except torch.OutOfMemoryError:
            if i == len(way.tries) - 1:
                raise
        finally:
            tidy()
    raise AssertionError("unreachable: the last way returns or raises")


def _measure(
    spec: Spec, cell: str, model: Any, tokenizer: Any, seq: int, steps: int, checkpointing: bool
) -> dict[str, Any]:
    meter = StepMeter(device())
    trainer = make_trainer(
        spec,
        cell,
        model,
        tokenizer,
        steps=BEFORE + steps,
        checkpointing=checkpointing,
        seq=seq,
        rate=2e-4,
        callbacks=[meter],
    )
    meter.watch(trainer)
    with attention(STACK_SETTINGS[spec.stack].tuned):
        trainer.train()
    if not all(math.isfinite(x) for x in meter.losses):
        raise FloatingPointError(f"a loss is not finite: {meter.losses}")
    return {
        "checkpointing": checkpointing,
        "first": meter.seconds[0],
        "seconds": meter.seconds[BEFORE:],
        "losses": meter.losses,
        "lengths": meter.lengths[BEFORE:],
        "peak": meter.peak,
        "reserved": meter.reserved,
    }
