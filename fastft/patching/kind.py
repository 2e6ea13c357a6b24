"""What a kind of swap is, to the patcher: a recogniser that looks at one module and answers with a candidate, or with
why not."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from fastft.patching.observe import Observation
from fastft.patching.sharded import Sharding
from fastft.proving.prove import Proof
from fastft.swapping.walk import parameters_of


@dataclass
class Candidate:
    """A module that matches a kind's structure.

    kernel: what it would run, for the report. key: everything the proof depends on (class, configuration, shapes,
    dtype); one proof serves all modules with equal keys on one device. prove: runs the proof, on `device`. apply: swaps
    the instance given (after a good proof): the module that was recognised, or its counterpart in a layer that is
    alike."""

    kernel: str
    key: Hashable
    prove: Callable[[], Proof]
    apply: Callable[[nn.Module], None]
    note: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class Context:
    """What a recogniser may look at beside the module itself. names: of all modules."""

    model: nn.Module
    seen: Observation
    names: dict[nn.Module, str]
    # per patch call, for kinds that need to remember something between modules
    shared: dict = field(default_factory=dict)
    sharding: Sharding = field(default_factory=Sharding)

    @property
    def looked_at(self) -> list[nn.Module]:
        """The modules that are recognised: all but those inside twins, which become what their counterparts do."""
        if "looked at" not in self.shared:
            inside = self.seen.twins.inside
            self.shared["looked at"] = [m for m in self.names if m not in inside]
        return self.shared["looked at"]

    @property
    def has_fp8(self) -> bool:
        """Are there weights in FP8, whose products may ask what makes their input to round it as well?"""
        if "has fp8" not in self.shared:
            dtypes = {p.dtype for m in self.looked_at for p in m._parameters.values() if p is not None}
            self.shared["has fp8"] = torch.float8_e4m3fn in dtypes
        return self.shared["has fp8"]


def device_of(module: nn.Module) -> torch.device:
    """Where a module's proof runs: where its parameters lie, and on the CPU where they are on the meta device or it has
    none."""
    return next((p.device for p in parameters_of(module) if p.device.type != "meta"), torch.device("cpu"))


class Kind(Protocol):
    """`wants(fn)`, where a kind has it, asks the observation to record that free function's calls; `parts`, where it
    installs under more names than its own, are these."""

    name: str

    def recognise(self, module: nn.Module, context: Context) -> Candidate | str | None:
        """None: not of this kind at all. A string: it is, or may be, but stays stock, and why. A Candidate: prove
        it."""
        ...
