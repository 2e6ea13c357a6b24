"""h = act(gate) * (up + offset) of the first product p, or act(p): what stands between the two projections.

p holds gate and up side by side ("chunk"), in turn ("interleaved"), or is one tensor (""). h is not kept: the backward
computes it again from p, in the launch that gives dgate and dup. A formula that is not known here is a function of p,
whose gradient torch derives when the backward asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastft_kernels.mlp.activation import activation
from fastft_kernels.mlp.glu import glu, glu_bwd_recompute, glu_recompute

LAYOUTS = ("chunk", "interleaved", "")


@dataclass(frozen=True)
class Gating:
    """layout: one of LAYOUTS. swapped: up comes first. act, alpha, limit, offset: as `glu` has them (act, alpha: as
    `activation`, where there is no gate). function: p -> h instead of all that."""

    act: str = "silu"
    layout: str = "chunk"
    swapped: bool = False
    alpha: float | None = None
    limit: float | None = None
    offset: float = 0.0
    function: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"Gating: want a layout of {LAYOUTS}, got {self.layout!r}")

    def width(self, first: int) -> int:
        """The width of h where p is `first` wide."""
        return first // 2 if self.layout else first

    def parts(self, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gate and up, views of p."""
        a, b = p.chunk(2, -1) if self.layout == "chunk" else (p[..., ::2], p[..., 1::2])
        return (b, a) if self.swapped else (a, b)

    def plain(self, p: torch.Tensor) -> torch.Tensor:
        """h, with a graph; differentiable any number of times."""
        if self.function is not None:
            return self.function(p)
        if not self.layout:
            return activation(p, self.act, alpha=self.alpha)
        return glu(*self.parts(p), self.act, alpha=self.alpha, limit=self.limit, up_offset=self.offset)

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        """h without a graph."""
        with torch.no_grad():
            if self.function is not None or not self.layout:
                return self.plain(p).to(p.dtype)
            return glu_recompute(*self.parts(p), self.act, alpha=self.alpha, limit=self.limit, up_offset=self.offset)

    def backward(self, p: torch.Tensor, dh: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(the gradient of p under dh times scale, contiguous; h). scale: [S, 1], float32 or wider, in which the
        product stays until the gradient is rounded."""
        dh = dh.to(scale.dtype) * scale
        if self.function is not None or not self.layout:
            with torch.enable_grad():
                leaf = p.detach().requires_grad_()
                h = self.plain(leaf)
                (dp,) = torch.autograd.grad(h, leaf, dh.to(h.dtype))
            return dp.to(p.dtype).contiguous(), h.detach().to(p.dtype)
        gate, up = self.parts(p)
        form = {"alpha": self.alpha, "limit": self.limit, "up_offset": self.offset}
        dgate, dup, h = glu_bwd_recompute(dh, gate, up, self.act, **form)
        a, b = (dup, dgate) if self.swapped else (dgate, dup)
        return torch.cat([a, b], -1) if self.layout == "chunk" else torch.stack([a, b], -1).flatten(-2), h
