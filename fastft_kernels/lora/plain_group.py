"""The arithmetic of `group` where nothing is cast, dropped out or dequantised: every tensor of the group, x and the
outputs are of one dtype. The same formulas in fewer calls, as a small model's step is made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastft_kernels.lora.layout import GroupTensors
from fastft_kernels.runtime.compat import is_dynamo_compiling

FEW = 4  # rows


def product(a: torch.Tensor, b: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """alpha a b, alpha applied before the result is rounded."""
    if alpha == 1.0:
        return torch.mm(a, b)
    if is_dynamo_compiling() or b.shape[0] == 0:
        return torch.mm(a, b) * alpha
    return torch.addmm(b[:1], a, b, beta=0, alpha=alpha)  # beta=0: the first operand is only a shape


def product_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float = 1.0) -> None:
    """out = alpha a b, whatever out held."""
    if is_dynamo_compiling():
        out.copy_(torch.mm(a, b) * alpha)
    else:
        out.addmm_(a, b, beta=0, alpha=alpha)


def add_to(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """total + alpha a b, in place; all of one dtype."""
    # CPU libraries add so few rows term by term: 1.7 times the rounding error
    if total.shape[0] < FEW and total.device.type == "cpu":
        return total.add_(torch.mm(a, b), alpha=alpha)
    return total.addmm_(a, b, alpha=alpha)


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., n] as a matrix [T, n] that a product takes without a copy of its own."""
    if x.ndim != 2:
        x = x.reshape(-1, x.shape[-1])
    if x.is_contiguous():
        return x
    (m, n), (s, t) = x.shape, x.stride()
    return x if (t == 1 and s >= n) or (s == 1 and t >= m) else x.contiguous()


def forward(
    g: GroupTensors, t: Sequence[torch.Tensor], x: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """x [..., in] -> ([..., out_i] for every projection, x A^T [T, sum of ranks] or None)."""
    adapters, xA, few = g.adapters, None, False
    if adapters:
        A = t[adapters[0].A] if not adapters[1:] else torch.cat([t[a.A] for a in adapters])
        xA = torch.mm(rows(x), A.T)
        few = xA.shape[0] < FEW
    ys: list = list(g.projections)  # each in the place of its projection
    for i, p in enumerate(g.projections):
        ys[i] = y = F.linear(x, t[p.weight], None if p.bias < 0 else t[p.bias])
        if p.adapters:
            assert xA is not None
            flat = y if y.ndim == 2 else y.view(-1, y.shape[-1])
            for a in p.adapters:
                of_a = xA if not adapters[1:] else xA[:, a.column : a.column + a.rank]
                if few:
                    add_to(flat, of_a, t[a.B].T, a.scaling)
                else:
                    flat.addmm_(of_a, t[a.B].T, alpha=a.scaling)
    return ys, xA


class PlainBackward:
    """One backward of a plain group: `input_gradient` first, then `parameter_gradients`, which alone needs x. Arguments
    as `group.Backward`'s."""

    def __init__(self, g: GroupTensors, t: Sequence[torch.Tensor], needs: Sequence[bool], xA: torch.Tensor | None, dys):
        self.g, self.t, self.needs, self.xA = g, t, needs, xA
        self.live = [(p, rows(dy)) for p, dy in zip(g.projections, dys) if dy is not None]
        self.adapters = []  # (adapter, its dy), those that are live
        for p, dy in self.live:
            for a in p.adapters:
                self.adapters.append((a, dy))
        self.dxA: torch.Tensor | None = None

    def input_gradient(self, want: bool) -> torch.Tensor | None:
        """dx [T, in] if it is wanted; prepares dxA for the parameters' gradients either way."""
        t, dx = self.t, None
        if self.adapters:
            self._low_rank_gradient()
        if not want:
            return None
        for p, dy in self.live:
            dx = torch.mm(dy, t[p.weight]) if dx is None else add_to(dx, dy, t[p.weight])
        if self.dxA is not None:
            assert dx is not None
            A = [t[a.A] for a, _ in self.adapters]
            add_to(dx, self.dxA, A[0] if len(A) == 1 else torch.cat(A))
        return dx

    def _low_rank_gradient(self) -> None:
        t, adapters = self.t, self.adapters
        if len(adapters) == 1:
            a, dy = adapters[0]
            self.dxA = product(dy, t[a.B], a.scaling)
            return
        width = sum([a.rank for a, _ in adapters])
        dy = adapters[0][1]
        self.dxA = dxA = dy.new_empty((dy.shape[0], width))
        column = 0
        for a, dy in adapters:
            product_into(dxA[:, column : column + a.rank], dy, t[a.B], a.scaling)
            column += a.rank

    def parameter_gradients(self, x: torch.Tensor | None) -> list[torch.Tensor | None]:
        """The gradient of each of the group's tensors that wants one, None elsewhere. x [..., in]; None if not
        needed."""
        needs, grads = self.needs, [None] * len(self.needs)
        x = None if x is None else rows(x)
        if self.dxA is not None and x is not None:
            self._of_A(x, grads)
        for a, dy in self.adapters:
            if needs[a.B]:
                assert self.xA is not None
                grads[a.B] = product(dy.T, self.xA[:, a.column : a.column + a.rank], a.scaling)
        for p, dy in self.live:
            if needs[p.weight]:
                grads[p.weight] = torch.mm(dy.T, x)
            if p.bias >= 0 and needs[p.bias]:
                grads[p.bias] = dy.sum(0, dtype=torch.float32 if dy.element_size() == 2 else None).to(dy.dtype)
        return grads

    def _of_A(self, x: torch.Tensor, grads: list) -> None:
        """Every dA in one product, unless some are not wanted."""
        assert self.dxA is not None
        wanted = [a for a, _ in self.adapters if self.needs[a.A]]
        if len(wanted) == len(self.adapters):
            dA = torch.mm(self.dxA.T, x)
            if len(wanted) == 1:
                grads[wanted[0].A] = dA
                return
            for a, part in zip(wanted, dA.split([a.rank for a in wanted])):
                grads[a.A] = part
            return
        column = 0
        for a, _ in self.adapters:
            if self.needs[a.A]:
                grads[a.A] = torch.mm(self.dxA[:, column : column + a.rank].T, x)
            column += a.rank
