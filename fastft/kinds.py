"""The kinds of module that fastft replaces, in the order in which they are tried: one folder each."""

from __future__ import annotations

from fastft.patching.kind import Kind


def kinds() -> tuple[Kind, ...]:
    """Fresh recognisers: what they remember belongs to one patch."""
    from fastft.experts.experts import Experts
    from fastft.linear.groups import LinearGroups
    from fastft.lm_head.head import Heads
    from fastft.mlp.recogniser import MLPs
    from fastft.norm.recogniser import Norms
    from fastft.rotary.rotary import Rotary

    return (Norms(), Rotary(), MLPs(), LinearGroups(), Experts(), Heads())
