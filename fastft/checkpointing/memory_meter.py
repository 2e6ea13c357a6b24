"""How much memory is there, and how much a piece of code keeps for its backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil
import torch

from fastft.compat.torch_private import storage_id

SLACK = 0.04  # of the device's memory: what an allocator loses to fragments, and what libraries take beside it


@dataclass(frozen=True)
class Meter:
    """Measures the memory that is left. budget: bytes that the process may use in all on the device (resident bytes, on
    a CPU); None: what the device has."""

    device: torch.device
    budget: int | None = None

    def available(self) -> int | None:
        """Bytes that a step can still take, caches of the allocator included, less a slack; None on a device that does
        not say."""
        if self.device.type == "cpu":
            memory = psutil.virtual_memory()
            free, total, used = memory.available, memory.total, psutil.Process().memory_info().rss
        elif self.device.type in ("cuda", "xpu"):
            module = torch.get_device_module(self.device)
            free, total = module.mem_get_info(self.device)
            used = module.memory_allocated(self.device)
            free += module.memory_reserved(self.device) - used
        elif self.device.type == "mps":
            total = torch.mps.recommended_max_memory()
            used = torch.mps.current_allocated_memory()
            free = total - torch.mps.driver_allocated_memory()
        else:
            return None
        if self.budget is not None:
            free, total = min(free, self.budget - used), min(total, self.budget)
        return int(free - SLACK * total)


class SavedBytes:
    """bytes: those of the storages that autograd kept, each once."""

    def __init__(self) -> None:
        self.bytes = 0


@contextlib.contextmanager
def keeping(known: Iterable[torch.Tensor]) -> Iterator[SavedBytes]:
    """Counts what autograd keeps inside, without the storages of `known` (parameters)."""
    kept, seen = SavedBytes(), {storage_id(t.untyped_storage()) for t in known}
    alive = []  # an address is not to be used again while we count

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if (key := storage_id(storage)) not in seen:
            seen.add(key)
            alive.append(storage)
            kept.bytes += storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept
    alive.clear()
