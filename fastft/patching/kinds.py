"""What a kind of swap is, to the patcher: a recogniser that looks at one module and answers with a candidate, or with why not."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from fastft.patching.observe import Observation
from fastft.patching.prove import Proof


@dataclass
class Candidate:
    """A module that matches a kind's structure.

    kernel: what it would run, for the report. key: everything the proof depends on (class, configuration, shapes, dtype); one proof
    serves all modules with equal keys. prove: runs the proof. apply: swaps this instance (after a good proof).
    """

    kernel: str
    key: Hashable
    prove: Callable[[], Proof]
    apply: Callable[[nn.Module], None]
    note: str = ""


@dataclass
class Context:
    """What a recogniser may look at beside the module itself."""

    model: nn.Module
    seen: Observation
    names: dict[nn.Module, str]
    shared: dict = field(default_factory=dict)  # per patch call, for kinds that need to remember something between modules


class Kind(Protocol):
    """`wants(fn)`, where a kind has it, asks the observation to record that free function's calls."""

    name: str

    def recognise(self, module: nn.Module, context: Context) -> Candidate | str | None:
        """None: not of this kind at all. A string: it is, or may be, but stays stock, and why. A Candidate: prove it."""
        ...
