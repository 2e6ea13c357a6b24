"""The bytes that live at every moment of a training step that runs on fake tensors.

`AllocationLedger` sees each storage as it is made and as it dies, asks `inside` what an operator takes for itself while
it runs, and afterwards tells what was alive at any allocation, by what it was for. (torch's own tracker,
`torch.distributed._tools.mem_tracker`, is private and keeps peaks alone; from few layers to many only the sequence of
allocations can be extrapolated.)"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from fastft.compat.torch_private import FakeTensor, TorchDispatchMode, fake_device, operator_name, storage_id
from fastft.proving.tensors import tensors_in
from fastft.tools.plan.workspace import inside
from fastft_kernels.runtime.dispatch import FAKES, LAUNCHERS

TAGS = ("temporary", "activations", "gradients", "optimizer")


@dataclass
class Phase:
    """One stretch of a step. sizes: of each allocation, in order (an operator's own temporaries are a negative one).
    live: [allocations, TAGS], the bytes alive with it."""

    name: str
    sizes: np.ndarray
    live: np.ndarray

    @property
    def peak(self) -> float:
        return float(self.live.sum(1).max(initial=0.0))


@dataclass
class _Storage:
    size: int
    born: int
    died: int | None = None
    tag: int = 0


@dataclass(eq=False)
class AllocationLedger(TorchDispatchMode):
    """rounding: bytes to which the device's allocator rounds. for_cuda: operators allocate as they do on CUDA; else
    fastft's own run their CPU implementations, whose temporaries are then seen like all others. static: storages that
    live anyway and are not counted."""

    rounding: int = 1
    for_cuda: bool = True
    static: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self.alive: dict[int, _Storage] = {}
        self.all: list[_Storage] = []
        self.events: list[int] = []
        self.marks: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return fake_device(args[0]) if isinstance(args[0], FakeTensor) else func(*args)
        ours = func.namespace == "fastft"
        if ours and not self.for_cuda:
            with self:
                return LAUNCHERS[operator_name(func)](*args, **kwargs)
        # torch keeps no results of fake implementations other than its own, so ours are called without its detour
        out = (FAKES[operator_name(func)] if ours else func)(*args, **kwargs)
        given = None
        for t in (out,) if isinstance(out, torch.Tensor) else tensors_in(out):
            storage = t.untyped_storage()
            key = storage_id(storage)
            if key in self.alive or key in self.static:
                continue
            if isinstance(t, FakeTensor) and fake_device(t).type == "meta":  # made for the sake of its shape
                continue
            if given is None:
                given = {storage_id(a.untyped_storage()) for a in tensors_in((args, kwargs))}
            if key not in given and (size := storage.nbytes()):
                self._born(storage, key, size)
        if (taken := inside(func, args, kwargs, self.for_cuda)) > 0:
            self.all.append(_Storage(taken, len(self.events), len(self.events) + 1))
            self.events.append(-taken)
        return out

    def _born(self, storage: torch.UntypedStorage, key: int, size: int) -> None:
        size = -(-size // self.rounding) * self.rounding
        record = self.alive[key] = _Storage(size, len(self.events))
        self.all.append(record)
        self.events.append(size)
        weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        if (record := self.alive.pop(key, None)) is not None:
            record.died = len(self.events)

    def adopt(self, t: torch.Tensor, name: str) -> None:
        """Count a tensor that was made before."""
        storage = t.untyped_storage()
        if (key := storage_id(storage)) not in self.alive:
            self._born(storage, key, storage.nbytes())
            self.tag([t], name)

    def tag(self, tensors: Iterable[torch.Tensor] | None, name: str) -> None:
        """Say what the storages of `tensors` are for; None: all that live and have no other use."""
        if tensors is None:
            records = [r for r in self.alive.values() if r.tag == 0]
        else:
            keys = (storage_id(t.untyped_storage()) for t in tensors)
            records = [self.alive[k] for k in keys if k in self.alive]
        for r in records:
            r.tag = TAGS.index(name)

    def phase(self, name: str) -> None:
        """Begin the phase `name` of the step."""
        self.marks.append((name, len(self.events)))

    def phases(self) -> list[Phase]:
        n = len(self.events)
        change = np.zeros((n + 2, len(TAGS)))
        for r in self.all:
            change[r.born, r.tag] += r.size
            change[n + 1 if r.died is None else r.died, r.tag] -= r.size
        live, sizes = change.cumsum(0), np.array(self.events, dtype=np.int64)
        bounds = [at for _, at in self.marks] + [n]
        return [Phase(name, sizes[a:b], live[a:b]) for (name, a), b in zip(self.marks, bounds[1:])]


def aligned(short: np.ndarray, long: np.ndarray) -> list[np.ndarray]:
    """For each allocation of `short` its partner in `long`, a run of the same code with some layers more: they are one
    stretch that was put in. Like layers do not say which of them was: put in as late as can be, and as early, so that
    the first and the last of them each have a partner. None at all where `long` is something else."""
    extra = len(long) - len(short)
    if extra < 0:
        return []
    before, behind = short == long[: len(short)], short == long[extra:]
    latest = len(short) if before.all() else int(np.argmin(before))
    earliest = 0 if behind.all() else len(short) - int(np.argmin(behind[::-1]))
    if earliest > latest:
        return []
    places = np.arange(len(short))
    return [places + extra * (places >= split) for split in dict.fromkeys((latest, earliest))]


def deeper(
    short: list[Phase], longs: list[tuple[float, list[Phase]]], keep: Callable[[np.ndarray], np.ndarray] = lambda d: d
) -> list[Phase]:
    """The phases of a model with more layers. longs: (how many steps further, the phases of one step further) for each
    way of growing. Memory is linear in the number of like layers at each moment of the code, so every moment is
    extrapolated by itself, with each partner that it has (`sizes` are those of the short run). keep: of the growth of a
    step [moments, TAGS], what is real."""
    found = []
    for i, phase in enumerate(short):
        grown = [phase.live]
        for steps, phases in longs:
            partners = aligned(phase.sizes, phases[i].sizes)
            if partners:
                grown = [x + steps * keep(phases[i].live[p] - phase.live) for x in grown for p in partners]
            else:  # allocations whose number or size depends on the depth: the two peaks
                a, b = (
                    p.live[p.live.sum(1).argmax()] if len(p.live) else np.zeros(len(TAGS)) for p in (phase, phases[i])
                )
                grown = [x + steps * keep((b - a)[None]) for x in grown]
        found.append(Phase(phase.name, phase.sizes, np.concatenate(grown)))
    return found
