"""Checkpoints that wait in host memory.

A tensor that is packed is copied to pinned host memory by a stream of its own, beside the forward; its device memory is
free as soon as the copy is done and nobody else holds it. When the backward asks for one, the next one it will ask for
starts on its way back, so that at most two are on the device. Copies are exact: the same bits come back."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class HostTensor:
    """One tensor on the host. before: the tensor parked before it, which the backward will want next."""

    host: torch.Tensor
    device: torch.device
    before: weakref.ref[HostTensor] | None
    back: torch.Tensor | None = None  # on the device again
    arrived: Any = None  # the event at which it is


class Offloader:
    """Parks the tensors of one forward on the host, and brings them back in reverse order."""

    def __init__(self, device: torch.device):
        self.last: weakref.ref[HostTensor] | None = None
        self.backend = torch.get_device_module(device) if device.type in ("cuda", "xpu") else None
        self.stream: Any = None if self.backend is None else self.backend.Stream(device)

    def park(self, x: torch.Tensor) -> HostTensor:
        """Copy x to the host: its values are those at the time of the call."""
        host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=self.stream is not None)
        parked = HostTensor(host, x.device, self.last)
        if self.backend is None:
            host.copy_(x)
        else:
            self.stream.wait_stream(self.backend.current_stream(x.device))
            with self.backend.stream(self.stream):
                host.copy_(x, non_blocking=True)
            x.record_stream(self.stream)
        self.last = weakref.ref(parked)
        return parked

    def fetch(self, parked: HostTensor) -> torch.Tensor:
        """The tensor, on its device; the one that will be asked for next is started."""
        self._start(parked)
        x, parked.back = parked.back, None
        assert x is not None
        if self.backend is not None:
            here = self.backend.current_stream(x.device)
            here.wait_event(parked.arrived)
            x.record_stream(here)
        if parked.before is not None and (following := parked.before()) is not None:
            self._start(following)
        return x

    def _start(self, parked: HostTensor) -> None:
        if parked.back is not None:
            return
        if self.backend is None:
            parked.back = parked.host.clone()
            return
        with self.backend.stream(self.stream):  # behind the copy to the host, which this stream has made
            parked.back = parked.host.to(parked.device, non_blocking=True)
        parked.arrived = self.stream.record_event()
