"""Which norms are recognised, as what; which are refused, and the reason given; what a swapped norm does with what it
does not take."""

import pytest
import torch
from torch import nn

from fastft.norm.recogniser import Norms
from fastft.patching.kind import Candidate, Context
from fastft.patching.observe import ModuleCall, Observation
from fastft.swapping.swap import slot_of

WIDTH = 16


class RMS(nn.Module):
    def __init__(self, *, cast="before", offset=0.0, weight=True, eps=1e-5, bias=False):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH)) if weight else None
        self.shift = nn.Parameter(torch.zeros(WIDTH)) if bias else None
        self.cast, self.offset, self.tiny = cast, offset, eps

    def forward(self, x):
        n = x.float()
        n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + self.tiny)
        if self.scale is None:
            return n.to(x.dtype)
        if self.cast == "before":
            return (self.offset + self.scale) * n.to(x.dtype)
        return (n * (self.offset + self.scale.float())).to(x.dtype)


class Mean(RMS):
    """Divides by the mean of absolute values."""

    def forward(self, x):
        return self.scale * x / (x.abs().mean(-1, keepdim=True) + self.tiny)


class Gated(nn.Module):
    def __init__(self, *, first=True, act=nn.functional.silu, groups=1):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(WIDTH)), 1e-5
        self.first, self.act, self.group_size = first, act, WIDTH // groups

    def forward(self, hidden, gate=None):
        h = hidden.float()
        if gate is not None and self.first:
            h = h * self.act(gate.float())
        parts = h.view(*h.shape[:-1], -1, self.group_size)
        parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        y = self.weight * parts.view(h.shape).to(hidden.dtype)
        return y if gate is None or self.first else (y * self.act(gate.float())).to(hidden.dtype)


class GateFirst(Gated):
    """Its gate is its first argument."""

    def forward(self, gate, hidden):
        return super().forward(hidden, gate)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * self.weight


class Capped(nn.Module):
    """A soft cap: it does not change where its input is large, either."""

    def forward(self, x):
        return 30.0 * torch.tanh(x / 30.0)


def recognise(module: nn.Module, *given: str):
    """given: how the model passes the tensors, "" by position."""
    seen = Observation()
    if given:
        inputs = [torch.empty(2, 3, WIDTH, device="meta") for _ in given]
        seen.calls[module] = [ModuleCall(0, None, inputs, None, given.count(""), tuple(n for n in given if n))]
    return Norms().recognise(module, Context(module, seen, {module: "norm"}))


@pytest.mark.parametrize(
    ("module", "kernel"),
    [
        (RMS(), "rms_norm(cast before)"),
        (RMS(cast="after"), "rms_norm(cast after)"),
        (RMS(cast="after", offset=1.0), "rms_norm(1 + w, cast after)"),
        (RMS(weight=False), "rms_norm(no weight)"),
        (nn.RMSNorm(WIDTH), "rms_norm(cast after)"),
        (nn.LayerNorm(WIDTH), "layer_norm(bias)"),
        (nn.LayerNorm(WIDTH, bias=False), "layer_norm(no bias)"),
        (nn.LayerNorm(WIDTH, elementwise_affine=False), "layer_norm(no weight)"),
    ],
)
def test_recognised_and_proven(module, kernel):
    found = recognise(module, "")
    assert isinstance(found, Candidate), found
    assert found.kernel == kernel
    assert (proof := found.prove()).ok, proof.reason


@pytest.mark.parametrize("how", [("", ""), ("", "gate")])
@pytest.mark.parametrize(
    ("settings", "kernel"),
    [
        ({}, "gated_rms_norm(silu before)"),
        ({"groups": 4}, "gated_rms_norm(silu before, 4 groups)"),
        ({"first": False}, "gated_rms_norm(silu after)"),
        ({"first": False, "act": torch.sigmoid, "groups": 2}, "gated_rms_norm(sigmoid after, 2 groups)"),
    ],
)
def test_gated_and_grouped(settings, kernel, how):
    found = recognise(Gated(**settings), *how)
    assert isinstance(found, Candidate), found
    assert found.kernel == kernel
    assert (proof := found.prove()).ok, proof.reason


def test_a_gate_that_is_the_first_argument():
    module = GateFirst()
    gate, x = torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH)
    before = module(gate, x)
    found = recognise(module, "", "")
    assert isinstance(found, Candidate), found
    assert (proof := found.prove()).ok, proof.reason
    found.apply(module)
    torch.testing.assert_close(module(gate, x), before)
    torch.testing.assert_close(module(hidden=x, gate=gate), before)
    assert not slot_of(module).fallbacks


def test_a_gated_norm_called_without_its_gate_goes_the_stock_way_counted():
    module, x = Gated(), torch.randn(2, 3, WIDTH)
    alone = module(x)
    found = recognise(module, "", "gate")
    found.apply(module)
    module(x, gate=torch.randn(2, 3, WIDTH))
    assert not slot_of(module).fallbacks
    assert torch.equal(module(x), alone)
    assert sum(slot_of(module).fallbacks.values()) == 1


@pytest.mark.parametrize(
    ("module", "given", "reason"),
    [
        (Mean(), [""], "no norm formula known here"),
        (RMS(bias=True), [""], None),
        (Gated(act=torch.tanh), ["", "gate"], "no gated norm formula known here"),
    ],
)
def test_refused_with_a_reason(module, given, reason):
    found = recognise(module, *given)
    if reason is None:  # a bias that its forward ignores: whatever is said, no kernel adds it
        assert not isinstance(found, Candidate) or found.prove().ok
    else:
        assert isinstance(found, str)
        assert found.startswith(reason)


@pytest.mark.parametrize(
    "module",
    [
        Scale(),
        Capped(),
        nn.Linear(WIDTH, WIDTH),
        nn.GELU(),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.Embedding(4, WIDTH),
        nn.Sequential(nn.LayerNorm(WIDTH)),
    ],
)
def test_no_norm_at_all(module):
    assert recognise(module, "") is None
