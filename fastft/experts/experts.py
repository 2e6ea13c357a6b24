"""Experts in the 3-D layout: stock's own implementation is kept, and the report says so.

A module whose own parameters are two or three stacks [experts, ., .] that go from one width to another and back holds
the MLPs of all its experts. transformers runs these grouped already, and PEFT's adapters on such parameters are PEFT's
own; nothing here is exchanged."""

from __future__ import annotations

import itertools

from torch import nn

from fastft.patching.kind import Candidate, Context

KIND = "experts"


def experts_of(module: nn.Module) -> int:
    """How many experts this module's own parameters stack, 0 where it holds none."""
    shapes = [tuple(p.shape) for p in module._parameters.values() if p is not None and p.dim() == 3]
    if len(shapes) not in (2, 3) or len({e for e, _, _ in shapes}) > 1 or shapes[0][0] < 2:
        return 0
    ways = [s for _, a, b in shapes for s in ((a, b), (b, a))]  # stored either way round
    back = any(a == d and b in (c, 2 * c) for (a, b), (c, d) in itertools.permutations(ways, 2))
    return shapes[0][0] if back else 0


class Experts:
    """Recognises experts in the 3-D layout, which stay stock."""

    name = KIND

    def recognise(self, module: nn.Module, context: Context) -> Candidate | str | None:
        if not (count := experts_of(module)):
            return None
        how = getattr(getattr(module, "config", None), "_experts_implementation", None) or "own"
        return f"{count} experts in 3-D parameters: stock's {how} implementation is kept"
