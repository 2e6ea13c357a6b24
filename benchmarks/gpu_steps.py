"""Whole LoRA training steps: stock at its defaults, stock at its best flags, fastft; one model, one set of adapters,
the same batches.

    stock    what TRL's trainers do: bf16 autocast over float32 adapters, every layer checkpointed, torch's fused AdamW,
             gradient clipping
    best     the same with cuDNN's attention first where it is there, and nothing checkpointed if it fits
    fastft   cuDNN's attention, and `fastft.patch(model, activation_policy="auto")`: of the layers that are to be
             checkpointed, as few are as must

The gate comes first, for every stack: losses and gradients of two layers at full width, over several padded batches,
against float64. With TRL installed, losses go through its fused head; without it through the model's own loss or plain
log-probabilities; the rows say which."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastft
from benchmarks.gpu_models import (
    HAS_TRL,
    RANK,
    Batch,
    alpaca_lengths,
    batch,
    build,
    checkpoint_layers,
    config_8b,
    with_trl_head,
)
from benchmarks.sheet import Figures, Red, Sheet
from fastft.proving.float64 import float64_reference
from fastft.tools.bench.limits import ModelShape, limit_seconds
from fastft.tools.bench.timing import Roof, Times, synchronize
from fastft.tools.gate import gate
from fastft.tools.verify.runner import in_float64

Loss = Callable[[nn.Module, Batch], torch.Tensor]
WARM = 5  # of fastft: the steps that capture and prove CUDA graphs are among them
PRIORITY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextlib.contextmanager
def tuned(device: torch.device) -> Iterator[None]:
    """cuDNN's attention before flash attention; nothing on a CPU."""
    with sdpa_kernel(PRIORITY, set_priority=True) if device.type == "cuda" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def stock(model: nn.Module, device: torch.device) -> Iterator[None]:
    yield


@contextlib.contextmanager
def best(model: nn.Module, device: torch.device) -> Iterator[None]:
    with tuned(device):
        yield


@contextlib.contextmanager
def ours(model: nn.Module, device: torch.device) -> Iterator[None]:
    with tuned(device), fastft.patched(model, activation_policy="auto"):
        yield


# name -> (context, whether checkpointing is on: the ways tried in turn until one fits)
STACKS: dict[str, tuple[Callable, tuple[bool, ...]]] = {
    "stock": (stock, (True,)),
    "best": (best, (False, True)),
    "fastft": (ours, (True,)),
}


# --- losses


def sft_loss(model: nn.Module, b: Batch) -> torch.Tensor:
    return model(**b, fused_lm_head=True).loss if HAS_TRL else model(**b).loss


def log_probs(model: nn.Module, b: Batch) -> torch.Tensor:
    """[rows, tokens - 1]; 0 where there is no label."""
    labels = b["labels"][:, 1:]
    if HAS_TRL:
        return model(**b, fused_lm_head=True).log_probs
    logits = model(**{k: v for k, v in b.items() if k != "labels"}).logits[:, :-1]
    found = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(labels == -100, 0.0)


def dpo_loss(model: nn.Module, b: Batch, beta: float = 0.1) -> torch.Tensor:
    """Rows are the chosen, then the rejected; the reference is the model without its adapters."""
    with torch.no_grad(), model.disable_adapter():
        reference = log_probs(model, b).float().sum(-1)
    policy = log_probs(model, b).float().sum(-1)
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def grpo_loss(model: nn.Module, b: Batch) -> torch.Tensor:
    """One clipped policy step on given completions: generation is not this library's work."""
    found = log_probs(model, b).float()
    kept = (b["labels"][:, 1:] != -100).float()
    ratio = (found - found.detach()).exp()
    advantages = torch.linspace(-1, 1, len(found), device=found.device)[:, None]
    return -(torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * kept).sum() / kept.sum()


def extra_forwards(loss: Loss) -> int:
    return 1 if loss is dpo_loss else 0


# --- the gate


def _autocast(device: torch.device, enabled: bool = True):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def losses_and_gradients(
    model: nn.Module, loss: Loss, batches: Sequence[Batch], device: torch.device, reference: bool = False
) -> dict[str, torch.Tensor]:
    """Of every batch: its loss, and the gradient of every adapter; "0:loss", "0:...lora_A...weight", "1:loss", ..."""
    found = {}
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    for i, b in enumerate(batches):
        with float64_reference() if reference else _autocast(device):
            value = loss(model, b)
        with float64_reference() if reference else contextlib.nullcontext():
            grads = torch.autograd.grad(value, parameters)
        found[f"{i}:loss"] = value.detach()
        found |= {f"{i}:{n}": g for n, g in zip(names, grads)}
    return found


class Gate:
    """Judges a stack once per (weights, loss); `check` raises Red."""

    def __init__(self, tiny: bool, device: torch.device, four_bit: bool):
        self.device = device
        self.model = build(config_8b(tiny, layers=2), device, four_bit=four_bit, seed=1)
        vocab = self.model.config.vocab_size
        n = 12 if tiny else 128
        self.batches = [batch([n, n - n // 4, n, n // 2], vocab, device, seed) for seed in range(3)]
        self.known: dict[tuple[str, str], str] = {}
        self.results: dict[str, tuple] = {}

    def check(self, stack: str, loss: Loss) -> None:
        key = (stack, loss.__name__)
        if key not in self.known:
            self.known[key] = self._verdict(stack, loss)
        if self.known[key]:
            raise Red(self.known[key])

    def _verdict(self, stack: str, loss: Loss) -> str:
        if loss.__name__ not in self.results:
            reference = losses_and_gradients(
                with_trl_head(in_float64(self.model)), loss, self.batches, self.device, reference=True
            )
            self.results[loss.__name__] = reference, losses_and_gradients(self.model, loss, self.batches, self.device)
        reference, eager = self.results[loss.__name__]
        if stack == "stock":
            return ""
        with STACKS[stack][0](self.model, self.device):
            found = losses_and_gradients(self.model, loss, self.batches, self.device)
        verdict = gate(found, reference, eager)
        return "" if verdict else str(verdict)


# --- the step


@dataclass
class Step:
    """One measured cell. seconds: of whole steps; first: of the first, with whatever was compiled or chosen in it."""

    times: Times
    first: float
    losses: list[float]
    checkpointing: bool
    allocated: float = 0.0  # bytes, peak of the steps after the first
    reserved: float = 0.0
    policy: str = ""  # what fastft says it did about checkpointing


def train(
    model: nn.Module,
    loss: Loss,
    b: Batch,
    device: torch.device,
    *,
    checkpointing: bool,
    seconds: float,
    warm: int = 1,
    most: int = 8,
    least: int = 3,
) -> Step:
    """Some steps of training on one batch; adapters are as before afterwards. warm: steps that are not timed, after the
    first."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    checkpoint_layers(model, checkpointing)
    cuda, losses = device.type == "cuda", []

    def step() -> float:
        synchronize(device)
        start = time.perf_counter()
        with _autocast(device):
            value = loss(model, b)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        losses.append(value.detach())
        return time.perf_counter() - start

    try:
        first = step()
        for _ in range(warm):
            step()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begun, times = time.perf_counter(), []
        while len(times) < least or (len(times) < most and time.perf_counter() - begun < seconds):
            times.append(step())
        done = Step(Times.of(times), first, [float(x) for x in losses], checkpointing)
        if cuda:
            done.allocated, done.reserved = (
                float(torch.cuda.max_memory_allocated()),
                float(torch.cuda.max_memory_reserved()),
            )
        return done
    finally:
        optimizer.zero_grad(set_to_none=True)
        checkpoint_layers(model, False)
        with torch.no_grad():
            for p, q in zip(trained, before):
                p.copy_(q)


def fitting(model: nn.Module, stack: str, loss: Loss, b: Batch, device: torch.device, seconds: float) -> Step:
    """`train` in the first of the stack's ways that fits into memory."""
    context, ways = STACKS[stack]
    for i, checkpointing in enumerate(ways):
        try:
            with context(model, device):
                more = {"warm": WARM} if stack == "fastft" else {}
                step = train(model, loss, b, device, checkpointing=checkpointing, seconds=seconds, **more)
                if stack == "fastft":
                    told = ("activation policy", "last forward", "CUDA graphs")
                    step.policy = "; ".join(n for n in fastft.report(model).notes if any(t in n for t in told))
                return step
        except torch.OutOfMemoryError:
            if i == len(ways) - 1:
                raise
        torch.cuda.empty_cache()  # outside the handler, whose traceback holds the step's tensors
    raise AssertionError("unreachable: the last way returns or raises")


def figures(step: Step, lengths: Sequence[int], shape: ModelShape, roof: Roof, loss: Loss, four_bit: bool) -> Figures:
    tokens, t = sum(lengths), step.times
    found: Figures = {
        "tokens/s": tokens / t.median,
        "p20": tokens / t.p80,
        "p80": tokens / t.p20,
        "step ms": t.median * 1e3,
        "first step ms": step.first * 1e3,
        "% of limit": 100
        * limit_seconds(shape, lengths, RANK, roof, forwards=extra_forwards(loss), four_bit=four_bit)
        / t.median,
        "checkpointing": step.checkpointing,
        "first loss": step.losses[0],
        "last loss": step.losses[-1],
    }
    if step.policy:
        found["policy"] = step.policy
    if step.allocated:
        found |= {"peak GiB": step.allocated / 2**30, "reserved GiB": step.reserved / 2**30}
    return found


def cells(tiny: bool) -> dict[str, tuple[Loss, list[int]]]:
    """name -> (loss, lengths of the rows)"""
    long, longest, n = (48, 96, 24) if tiny else (8192, 32768, 2048)
    return {
        f"4x{n}": (sft_loss, [n] * 4),
        "16 Alpaca-like rows": (sft_loss, alpaca_lengths(16, tiny)),
        f"1x{long}": (sft_loss, [long]),
        f"1x{longest}": (sft_loss, [longest]),
    }


def preference_cells(tiny: bool) -> dict[str, tuple[Loss, list[int]]]:
    pair, group = (16, 24) if tiny else (768, 1024)
    return {f"DPO, 4 pairs of {pair}": (dpo_loss, [pair] * 8), f"GRPO, 8x{group}": (grpo_loss, [group] * 8)}


def section(
    sheet: Sheet, tiny: bool, device: torch.device, roof: Roof, *, four_bit: bool = False, preference: bool = False
) -> None:
    """Rows "stack, cell"; the longest lengths come last. The first row is the time of a patch, in a process that has
    proven nothing yet, and once more."""
    made: dict[str, object] = {}

    def once(name: str, make: Callable):
        if name not in made:
            made[name] = make()
        return made[name]

    def measure(stack: str, loss: Loss, lengths: list[int]) -> Figures:
        once("gate", lambda: Gate(tiny, device, four_bit)).check(stack, loss)
        model = once("model", lambda: build(config_8b(tiny), device, four_bit=four_bit))
        shape = once("shape", lambda: shape_of(tiny))
        b = batch(lengths, model.config.vocab_size, device)
        step = fitting(model, stack, loss, b, device, seconds=0.0 if tiny else 3.0)
        return {"head": "TRL's" if HAS_TRL else "the model's", **figures(step, lengths, shape, roof, loss, four_bit)}

    def patch() -> Figures:
        model = once("model", lambda: build(config_8b(tiny), device, four_bit=four_bit))
        found: Figures = {}
        for which in ("first", "second"):
            synchronize(device)
            begun = time.perf_counter()
            fastft.patch(model)
            synchronize(device)
            found[f"{which} patch s"] = time.perf_counter() - begun
            fastft.unpatch(model)
        return found

    base = "NF4" if four_bit else "bf16"
    if not preference:
        sheet.run(f"8B shape, {base}: patch", patch)
    for cell, (loss, lengths) in (preference_cells(tiny) if preference else cells(tiny)).items():
        for stack in STACKS:
            least = 0.0 if tiny else 20.0 if max(lengths) > 10_000 else 6.0
            sheet.run(
                f"8B shape, {base}, {cell}: {stack}",
                lambda stack=stack, loss=loss, lengths=lengths: measure(stack, loss, lengths),
                least,
            )


def shape_of(tiny: bool) -> ModelShape:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return ModelShape.of(AutoModelForCausalLM.from_config(config_8b(tiny)))
