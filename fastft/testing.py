"""For suites that test gradient parity of their own models: the judge as one assertion."""

from __future__ import annotations

import torch
from torch import nn

from fastft.tools.verify import judge

__all__ = ["assert_parity"]


def assert_parity(stock: nn.Module, patched: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Assert that two models of the same weights give the same loss and the same gradient of every trainable parameter, by the judge:
    `patched` may be at most twice as far from a float64 copy of `stock` as `stock` itself is, and one unit in the last place.

    stock, patched: on one device, dropout off; batch: keyword arguments with labels. Raises AssertionError that names the worst gradient.
    """
    verdict = judge(stock, patched, batch)
    assert verdict, f"patched and stock differ: {verdict}"
