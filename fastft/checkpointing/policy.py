"""What the user may ask for: how much of a step's activations is kept, recomputed, or moved to the host.

    "trainer"   the layers that the trainer checkpoints, and no others
    "auto"      of these as few as the free memory asks for, decided at each forward; offloaded where even that is too
                much
    "none"      nothing is recomputed
    "lean"      every layer is recomputed, but for what no gradient needs
    "full"      every layer is recomputed as torch.utils.checkpoint does it
    "offload"   lean recomputation, and the layers' inputs wait in pinned host memory
    12          lean recomputation of the first 12 layers, the others are kept
    "20GiB"     auto, as if the process had 20 GiB of memory

Gradients are the same, bit for bit, under all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastft.errors import PolicyError
from fastft.parsing import parse_bytes

MODES = ("trainer", "auto", "none", "lean", "full", "offload")


@dataclass(frozen=True)
class Policy:
    """mode: one of MODES, or "layers". layers: how many are recomputed, for "layers". budget: bytes of the process, for
    "auto"."""

    mode: str = "trainer"
    layers: int | None = None
    budget: int | None = None

    @property
    def is_explicit(self) -> bool:
        """Whether it holds whatever the trainer says about checkpointing."""
        return self.mode not in ("trainer", "auto")

    def __str__(self) -> str:
        if self.mode == "layers":
            return f"{self.layers} layers"
        return self.mode if self.budget is None else f"auto within {self.budget / 2**30:.3g} GiB"


def parse(value: str | int | Policy) -> Policy:
    """The policy that `value` names. PolicyError says what would have been one."""
    if isinstance(value, Policy):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Policy("layers", layers=value)
    if isinstance(value, str):
        if value in MODES:
            return Policy(value)
        if value.isdecimal():
            return Policy("layers", layers=int(value))
        if budget := parse_bytes(value):
            return Policy("auto", budget=budget)
    raise PolicyError(
        f"activation_policy={value!r}: want one of {', '.join(map(repr, MODES))}, a number of layers to recompute, "
        "or a memory budget such as '20GiB'"
    )
