"""What captures a function and replays it.

A captured function reads and writes static tensors alone, and returns nothing. `CudaRecorder` makes a CUDA graph of it;
`RerunRecorder` runs the function again, which lets all the bookkeeping be tested on a CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

LEAST = (7, 0)  # compute capability
SPARE = 0.2  # of the device's memory, that captures leave free; what they use comes from outside the allocator's cache


class Recorder(Protocol):
    """One for each stack of layers: its graphs share one memory pool, so what a later capture keeps may lie where an
    earlier one worked. graphs.stack says which replays that allows."""

    def obstacle(self, device: torch.device) -> str:
        """Why nothing can be captured there; empty where it can."""
        ...

    def place(self, device: torch.device) -> Hashable:
        """Where a replay would run now (a stream): replays in two places are not ordered."""
        ...

    def is_short(self, device: torch.device) -> bool:
        """Is too little memory free for another capture, which holds its activations between steps as well?"""
        ...

    def rehearse(self, run: Callable[[], Any]) -> Any:
        """run() as a warm-up, where captures are made."""
        ...

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """A function that does on the same static tensors what run() does."""
        ...

    def fresh(self) -> Recorder:
        """A new one of the same sort, with a pool of its own."""
        ...


class RerunRecorder:
    """Runs the captured function again. For tests."""

    def obstacle(self, device: torch.device) -> str:
        return ""

    def place(self, device: torch.device) -> Hashable:
        return device

    def is_short(self, device: torch.device) -> bool:
        return False

    def rehearse(self, run: Callable[[], Any]) -> Any:
        return run()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run

    def fresh(self) -> RerunRecorder:
        return type(self)()


class CudaRecorder:
    """CUDA graphs, captured on a stream of their own into one memory pool."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.streams: dict[torch.device, Any] = {}
        self.obstacles: dict[torch.device, str] = {}

    def obstacle(self, device: torch.device) -> str:
        if device not in self.obstacles:
            self.obstacles[device] = cuda_obstacle(device)
        if not self.obstacles[device] and torch.cuda.is_current_stream_capturing():
            return "somebody else is capturing a CUDA graph"
        return self.obstacles[device]

    def place(self, device: torch.device) -> Hashable:
        return device, torch.cuda.current_stream(device).cuda_stream

    def is_short(self, device: torch.device) -> bool:
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached < SPARE * total

    def _stream(self) -> Any:
        device = torch.device("cuda", torch.cuda.current_device())
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        return self.streams[device]

    def rehearse(self, run: Callable[[], Any]) -> Any:
        stream, here = self._stream(), torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            found = run()
        here.wait_stream(stream)
        return found

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph, stream, collects = torch.cuda.CUDAGraph(), self._stream(), gc.isenabled()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        if free < SPARE * total:  # while a stream is captured, the allocator cannot give its cache back
            torch.cuda.empty_cache()
        gc.disable()  # what a collection would free on the device may not be freed now
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph.replay

    def fresh(self) -> CudaRecorder:
        return CudaRecorder()


def cuda_obstacle(device: torch.device) -> str:
    """Why this device replays no CUDA graphs; empty where it does."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        kind = "hip" if device.type == "cuda" and torch.version.hip is not None else device.type
        return f"the model is on a {kind} device, which has no CUDA graphs"
    found = torch.cuda.get_device_capability(device)
    if found < LEAST:
        return f"CUDA graphs want compute capability {LEAST[0]}.{LEAST[1]}, this device has {found[0]}.{found[1]}"
    return ""
