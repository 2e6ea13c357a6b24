"""Timers for CPU and GPU alike, and the measured roof of a device.

A kernel is timed with cold caches: a buffer larger than the last-level cache is written before each run, because in a
training step what a kernel reads was not just written. On a GPU the time is that of CUDA events around the call, so the
host's part hides behind the buffer's write; on a CPU it is the clock's. (`triton.testing.do_bench` does the same where
Triton has a driver, and nothing on a CPU.)"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds: median, 20th and 80th percentile of `n` runs."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        if not seconds:
            raise ValueError("Times.of: want one duration at least, got none")
        ordered = sorted(seconds)
        at = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]
        return cls(statistics.median(ordered), at(0.2), at(0.8), len(ordered))


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class ColdTimer:
    """`timer(fn)` runs fn until `seconds` are over, between `least` and `most` times, each time with cold caches.

    flush_bytes: what is written before each run; None is twice the GPU's L2, or 8 MiB on a CPU.
    """

    def __init__(
        self, device: torch.device, seconds: float = 0.3, least: int = 5, most: int = 50, flush_bytes: int | None = None
    ):
        if flush_bytes is None:
            flush_bytes = (
                2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 8 << 20
            )
        self.device, self.seconds, self.least, self.most = device, seconds, least, most
        self.buffer = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def __call__(self, fn: Callable[[], object]) -> Times:
        fn()  # what is compiled or allocated once is not timed
        synchronize(self.device)
        once = self._cuda if self.device.type == "cuda" else self._cpu
        start, found = time.perf_counter(), []
        while len(found) < self.least or (len(found) < self.most and time.perf_counter() - start < self.seconds):
            found += once(fn)
        return Times.of(found)

    def _cpu(self, fn: Callable[[], object]) -> list[float]:
        self.buffer.zero_()
        start = time.perf_counter()
        fn()
        return [time.perf_counter() - start]

    def _cuda(self, fn: Callable[[], object]) -> list[float]:
        """Five runs are queued before the host waits."""
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(5)]
        for start, end in pairs:
            self.buffer.zero_()
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


@dataclass(frozen=True)
class Roof:
    """What this device was seen to do: matrix products in FLOP/s, copies in bytes/s (read and written)."""

    flops: float
    bandwidth: float
    dtype: str

    def seconds(self, flops: float = 0.0, n_bytes: float = 0.0) -> float:
        """The least time of a kernel: the longer of its arithmetic and its traffic, which overlap."""
        return max(flops / self.flops, n_bytes / self.bandwidth)


def measure_roof(
    device: torch.device,
    dtype: torch.dtype,
    *,
    n: int | None = None,
    copy_bytes: int | None = None,
    seconds: float = 0.3,
) -> Roof:
    """The best of a square product [n, n] of `dtype` (random values: a product of zeros draws less power and runs
    faster) and of a copy."""
    cuda = device.type == "cuda"
    n = n or (8192 if cuda else 384)
    copy_bytes = copy_bytes or (1 << 30 if cuda else 32 << 20)
    timer = ColdTimer(device, seconds=seconds)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = timer(lambda: torch.mm(a, b))
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = timer(lambda: target.copy_(source))
    return Roof(2 * n**3 / product.p20, 2 * copy_bytes / copied.p20, str(dtype).removeprefix("torch."))
