"""The kinds of swap, in the order in which they are tried: one file each."""

from __future__ import annotations

from fastft.patching.kinds import Kind


def kinds() -> tuple[Kind, ...]:
    """Fresh recognisers: what they remember belongs to one patch."""
    from fastft.swaps.experts import Experts
    from fastft.swaps.head import Heads
    from fastft.swaps.linears import LinearGroups
    from fastft.swaps.mlp import MLPs
    from fastft.swaps.norms import Norms
    from fastft.swaps.rotary import Rotary

    return (Norms(), Rotary(), MLPs(), LinearGroups(), Experts(), Heads())
