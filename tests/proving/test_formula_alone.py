"""Proofs of a plan's model: the formula in float64 and nothing else, and never in the place of a whole proof."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastft.proving.proof_cache import proof_of
from fastft.proving.prove import Proof, formula_alone, formula_is_enough, prove


class Stock(nn.Module):
    """A linear layer and an activation."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return F.silu(F.linear(x, self.weight))


class Alike(Stock):
    """The same, written otherwise."""

    def forward(self, x):
        y = x @ self.weight.T
        return y * torch.sigmoid(y)


class Rough(Stock):
    """The same formula, with bad numerics in 16 and 32 bits."""

    def forward(self, x):
        y = super().forward(x)
        return y if x.dtype == torch.float64 else y * (1 + 1e-2)


class Wrong(Stock):
    """Another formula."""

    def forward(self, x):
        return super().forward(x) * (1 + 1e-6)


def proven(cls, dtype=torch.float32):
    def swap(module):
        module.__class__ = cls

    draw = lambda g, scale: [torch.randn(3, 8, generator=g, dtype=torch.float64) * scale]
    return prove(Stock(), swap, draw, dtype=dtype)


def test_only_the_formula_is_judged():
    assert proven(Alike).ok and not proven(Rough).ok and not proven(Wrong).ok
    with formula_alone():
        assert formula_is_enough()
        assert proven(Alike).ok and proven(Rough).ok and not proven(Wrong).ok
        assert proven(Alike, torch.bfloat16).dtype == "float64"
    assert not formula_is_enough()


def test_it_ends_with_an_exception():
    with pytest.raises(KeyError), formula_alone():
        raise KeyError
    assert not formula_is_enough()


def test_a_formula_never_stands_for_a_whole_proof():
    """Whichever came first; a whole proof answers for its formula too."""
    asked, cpu = [], torch.device("cpu")

    def ask(key):
        def run():
            asked.append("formula" if formula_is_enough() else "whole")
            return Proof(True)

        return proof_of("kind of this test", key, cpu, run)

    with formula_alone():
        ask("first the formula"), ask("first the formula")
    ask("first the formula"), ask("first the formula")
    assert asked == ["formula", "whole"]
    del asked[:]
    ask("first the whole")
    with formula_alone():
        ask("first the whole")
    assert asked == ["whole"]
