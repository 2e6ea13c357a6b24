"""Where the time of one training step goes, by kind of work: large products, the adapters' small products, attention,
Triton kernels, other kernels, and the time in which the device does nothing.

Eight layers of an 8B shape at 4 x 2048, bf16 and nothing recomputed. A product is small where one of its sizes is at
most `SMALL` (the rank of adapters is 16, of a whole group 48). Kernels belong to the operator that launched them, as
the profiler's correlation ids say. Replays of CUDA graphs have no operators: there a kernel is of the kind that its
name was in the run without graphs, by most of its time."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastft
from benchmarks.gpu_models import batch, build, config_8b
from benchmarks.gpu_steps import WARM, _autocast, sft_loss, stock, train
from benchmarks.sheet import Figures, Sheet
from fastft.tools.bench.timing import Roof, synchronize

SMALL = 64
KINDS = ("large products", "small products", "attention", "Triton", "other")
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "aten::_scaled_mm"}
_ATTENTION = ("attention", "sdpa", "flash", "fmha", "attn", "convert_dq", "dot_do_o")


def sizes_of(shapes: Iterable) -> list[int]:
    """Every size of an operator's matrices; vectors (biases) do not count."""
    return [n for shape in shapes if isinstance(shape, (list, tuple)) and len(shape) >= 2 for n in shape]


def kind(operator: str, shapes: Iterable, kernel: str) -> str:
    """Of KINDS; operator: "" for a kernel that no operator of torch launched. Triton's names end in `_kernel` and have
    no namespace."""
    if operator in _PRODUCTS:
        return "small products" if min(sizes_of(shapes), default=SMALL + 1) <= SMALL else "large products"
    if any(word in f"{operator} {kernel}".lower() for word in _ATTENTION):
        return "attention"
    if "::" not in kernel and " " not in kernel and kernel.endswith("_kernel"):
        return "Triton"
    return "other"


class Work:
    """What a profile's kernels did. names: {(kernel, kind): ms}, as another profile may ask."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self.launches: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.names: dict[tuple[str, str], float] = defaultdict(float)

    def add(self, kind: str, kernel: str, ms: float) -> None:
        self.ms[kind] += ms
        self.launches[kind] += 1
        self.names[kernel, kind] += ms

    def kind_of(self, kernel: str) -> str | None:
        """The kind that most of the time of kernels of this name was of."""
        times = {k: self.names[kernel, k] for k in KINDS if (kernel, k) in self.names}
        return max(times, key=lambda k: times[k], default=None)


def work_of(events: Iterable, known: Work | None = None) -> Work:
    """Of a profile's events. known: of a run whose operators were seen."""
    found, owned, events = Work(), Counter(), list(events)
    for event in events:
        for kernel in event.kernels:
            found.add(kind(event.name, event.input_shapes or (), kernel.name), kernel.name, kernel.duration / 1e3)
            owned[kernel.name] += 1
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        if owned[event.name] > 0:  # told above, with its operator
            owned[event.name] -= 1
            continue
        named = known.kind_of(event.name) if known is not None else None
        found.add(named or kind("", (), event.name), event.name, event.device_time / 1e3)
    return found


def profiled(step: Callable[[], object], device: torch.device, known: Work | None = None) -> Work:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as found:
        step()
        synchronize(device)
    return work_of(found.events(), known)


@contextlib.contextmanager
def _eager(model: nn.Module, device: torch.device):
    with fastft.patched(model, activation_policy="none", cuda_graphs=False):
        yield


@contextlib.contextmanager
def _graphs(model: nn.Module, device: torch.device):
    with fastft.patched(model, activation_policy="none"):
        yield


STACKS = {"stock": stock, "fastft, without graphs": _eager, "fastft": _graphs}


def section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    """Rows for each stack: the step's time (with the optimizer's; the device is waited for after each); forward and
    backward one after another, how busy the device is in them, and ms and launches of each kind."""
    layers, lengths = (2, [24] * 4) if tiny else (8, [2048] * 4)
    made: dict[str, nn.Module] = {}
    eager: dict[str, Work] = {}

    def measure(base: str, context: Callable) -> Figures:
        if base not in made:
            made.clear()
            gc.collect()
            made[base] = build(config_8b(tiny, layers=layers), device, four_bit=base == "NF4")
        model = made[base]
        b = batch(lengths, model.config.vocab_size, device)

        def step() -> None:
            with _autocast(device):
                loss = sft_loss(model, b)
            loss.backward()

        with context(model, device):
            timed = train(model, sft_loss, b, device, checkpointing=False, seconds=0.0 if tiny else 1.0, warm=WARM)
            for _ in range(3):
                step()
            begun = time.perf_counter()
            for _ in range(5):
                step()
            synchronize(device)
            whole = (time.perf_counter() - begun) / 5 * 1e3
            work = eager[base] = profiled(step, device, eager.get(base))
        model.zero_grad(set_to_none=True)
        busy = sum(work.ms.values())
        found: Figures = {"step ms": timed.times.median * 1e3, "forward + backward ms": whole, "busy ms": busy}
        found |= {"busy %": 100 * busy / whole, "launches": float(sum(work.launches.values()))}
        found |= {f"{k} ms": ms for k, ms in work.ms.items()}
        return found | {f"{k} launches": float(n) for k, n in work.launches.items()}

    for base in ("bf16", "NF4"):
        for name, context in STACKS.items():
            sheet.run(
                f"{layers} layers of an 8B shape, {base}, {len(lengths)}x{lengths[0]}: {name}",
                lambda base=base, context=context: measure(base, context),
                least=0.0 if tiny else 4.0,
            )
