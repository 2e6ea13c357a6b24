"""What one patched model knows of its policy: what is in force, and what was measured."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field

from torch import nn

from fastft.checkpointing.embedding_input import Embedded
from fastft.checkpointing.layer_stack import Stack
from fastft.checkpointing.memory_meter import Meter
from fastft.checkpointing.policy import Policy

LOWER = {"auto": "lean", "lean": "offload"}


@dataclass
class Controller:
    """One for each patched model. base: the innermost transformers model; meter: None measures the device of the
    batch."""

    base: weakref.ref[nn.Module]
    policy: Policy
    stacks: list[Stack] = field(default_factory=list)
    embedded: Embedded | None = None
    meter: Meter | None = None
    untouched: int | None = None  # sum of the trainable parameters' versions, as the first forward found it: the same
    # until an optimizer writes to one
    passed: bool = False  # has a backward reached its end? From then on out of memory lowers nothing
    lowered: list[str] = field(default_factory=list)  # the policies that took the place of "auto" as memory ran out

    def lines(self) -> list[str]:
        """For the report: the policy, and what the last forward of each stack did."""
        lines = [
            f"activation policy {self.policy}"
            + "".join(f", lowered to {p} when memory ran out in the first step" for p in self.lowered[-1:])
        ]
        for stack in self.stacks:
            owner = stack.owner()
            if stack.last and owner is not None:
                per_token = max((b for b, _ in stack.measured.values()), default=0.0)
                size = f"; a kept layer holds {per_token / 1000:.0f} kB a token" if per_token else ""
                lines.append(f"{type(owner).__name__}, last forward: {stack.last}{size}")
        return [] if len(lines) == 1 and self.policy == Policy() else lines

    @property
    def mode(self) -> str:
        return self.lowered[-1] if self.lowered else self.policy.mode

    @property
    def is_explicit(self) -> bool:
        """Whether the policy holds whatever the trainer says about checkpointing."""
        return self.policy.is_explicit or bool(self.lowered)

    def lower(self) -> str | None:
        """The policy that takes less memory than the one in force, from now on; None where there is none, or the user
        chose."""
        following = LOWER.get(self.mode) if self.policy.mode == "auto" else None
        if following is not None:
            self.lowered.append(following)
        return following

    def missing(self) -> int:
        """Bytes that the step will add beside activations: gradients that are not there, and before the first step of
        an optimizer two moments for each parameter."""
        base = self.base()
        learning = [] if base is None else [p for p in base.parameters() if p.requires_grad]
        versions = sum(p._version for p in learning)
        self.untouched = versions if self.untouched is None else self.untouched
        moments = 2 if versions == self.untouched else 0
        return sum(((p.grad is None) + moments) * p.numel() * p.element_size() for p in learning)

    def __deepcopy__(self, memo) -> Controller:
        base = self.base()
        new = memo[id(self)] = Controller(self.base, self.policy, meter=self.meter, lowered=list(self.lowered))
        if base is not None:
            new.base = weakref.ref(copy.deepcopy(base, memo))
        new.stacks, new.embedded = copy.deepcopy(self.stacks, memo), copy.deepcopy(self.embedded, memo)
        return new
