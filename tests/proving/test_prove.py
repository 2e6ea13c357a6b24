"""The proof passes equals and fails near-equals: a scaling of 1e-6, gelu for its tanh form, a clamp that shows at large
inputs only."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastft.proving.float64 import float64_reference
from fastft.proving.prove import prove


class Upcasting(nn.Module):
    def __init__(self, act=F.gelu, factor=1.0):
        super().__init__()
        self.linear, self.act, self.factor = nn.Linear(8, 8), act, factor

    def forward(self, x):
        y = self.act(self.linear(x).to(torch.float32)) * self.factor
        return torch.softmax(y, -1, dtype=torch.float32).to(x.dtype) + y.to(x.dtype)


def draw(g, scale):
    return [torch.randn(4, 8, generator=g, dtype=torch.float64) * scale]


def becomes(**changes):
    return lambda m: m.__dict__.update(changes)


def test_reference_is_float64_although_the_module_casts_down():
    m = Upcasting().double()
    x = torch.randn(4, 8, dtype=torch.float64)
    with float64_reference():
        y = m(x)
    z = F.gelu(m.linear(x))
    assert y.dtype == torch.float64 and (y - (z.softmax(-1) + z)).abs().max() < 1e-14
    assert (m(x) - (z.softmax(-1) + z)).abs().max() > 1e-9  # without the mode it rounds to float32 inside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_passes(dtype):
    p = prove(Upcasting(), lambda m: None, draw, dtype=dtype)
    assert p.ok and p.dtype == str(dtype)[6:] and p.error == p.stock_error


@pytest.mark.parametrize(
    "change",
    [
        dict(factor=1.000001),
        dict(act=lambda x: F.gelu(x, approximate="tanh")),
        dict(act=lambda x: F.gelu(x).clamp(max=20.0)),
    ],
)
def test_near_equal_fails(change):
    p = prove(Upcasting(), becomes(**change), draw, dtype=torch.bfloat16, scales=(1.0, 100.0))
    assert not p.ok and "another formula" in p.reason


def test_worse_numerics_fail():
    coarse = lambda x: F.gelu(x if x.dtype == torch.float64 else x.bfloat16().to(x.dtype))
    p = prove(Upcasting(), becomes(act=coarse), draw, dtype=torch.float32)
    assert not p.ok and "FAIL" in p.reason


def test_a_candidate_that_raises_is_no_proof():
    def broken(x):
        raise ValueError("no")

    p = prove(Upcasting(), becomes(act=broken), draw, dtype=torch.float32)
    assert not p.ok and "ValueError: no" in p.reason


def test_a_dropped_gradient_fails():
    detached = lambda x: F.gelu(x) * x.detach() / x
    p = prove(Upcasting(lambda x: F.gelu(x) * x / x), becomes(act=detached), draw, dtype=torch.float32)
    assert not p.ok


def test_stock_is_left_alone():
    m = Upcasting().requires_grad_(False)
    state = {k: v.clone() for k, v in m.state_dict().items()}
    prove(m, becomes(factor=2.0), draw, dtype=torch.bfloat16)
    assert (
        m.factor == 1.0
        and not m.linear.weight.requires_grad
        and all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    )
