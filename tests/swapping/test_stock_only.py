"""`transformed()` says when a call is under a transform or a tracer, and not otherwise."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from fastft.swapping.stock_only import transformed


class Asks(nn.Module):
    seen: bool | None = None

    def forward(self, x):
        Asks.seen = transformed()
        return x * 2


def forward_mode(module, x):
    with forward_ad.dual_level():
        module(forward_ad.make_dual(x, x))


TRANSFORMS = {
    "grad": lambda m, x: torch.func.grad(lambda x: m(x).sum())(x),
    "vmap": lambda m, x: torch.func.vmap(m)(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,)),
    "hessian": lambda m, x: torch.func.hessian(lambda x: m(x).sum())(x),
    "forward mode": forward_mode,
    "export": lambda m, x: torch.export.export(m, (x,), strict=False),
    "make_fx": lambda m, x: make_fx(m)(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_under_transforms(name):
    Asks.seen = None
    TRANSFORMS[name](Asks(), torch.ones(2, 2))
    assert Asks.seen is True


def test_not_in_ordinary_calls():
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            Asks()(torch.ones(2, 2, requires_grad=True))
            assert Asks.seen is False
    torch.utils.checkpoint.checkpoint(Asks(), torch.ones(2, requires_grad=True), use_reentrant=False)
    assert Asks.seen is False
