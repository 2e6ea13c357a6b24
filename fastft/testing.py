"""For suites that test gradient parity of their own models: the judge as one assertion, and as a pytest fixture.

    from fastft.testing import assert_parity          a function
    from fastft.testing import parity                 a fixture: `def test_my_model(parity): parity(model, batch)`

The fixture is imported, in a test file or in conftest.py, rather than installed for every suite on the machine: nothing
changes for those who do not ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastft.proving.clone import clone
from fastft.tools.verify.runner import judge

if TYPE_CHECKING:
    from fastft_kernels.numerics import Verdict

    parity: Callable[[], Any]

__all__ = ["assert_parity", "parity"]


def assert_parity(stock: nn.Module, patched: nn.Module, batch: dict[str, torch.Tensor]) -> Verdict:
    """Assert that two models of the same weights give the same loss and the same gradient of every trainable parameter,
    by the judge: `patched` may be at most twice as far from a float64 copy of `stock` as `stock` itself is, and one
    unit in the last place.

    Args:
        stock, patched: on one device, dropout off.
        batch: keyword arguments with labels.

    Returns:
        The verdict.

    Raises:
        AssertionError: it fails; the message names the worst gradient.
    """
    verdict = judge(stock, patched, batch)
    assert verdict, f"patched and stock differ: {verdict}"
    return verdict


def _check(
    model: nn.Module, batch: dict[str, torch.Tensor], change: Callable[[nn.Module], Any] | None = None
) -> Verdict:
    """Assert parity of `model` with a copy of it that `change` was applied to (None: `fastft.patch`). Neither model nor
    batch is changed.

    model: stock, dropout off. change: returns the changed model, or None where it changes it in place. Raises as
    `assert_parity`."""
    from fastft.api import patch

    copied = clone(model)
    changed = (change or patch)(copied)
    return assert_parity(model, copied if changed is None else changed, batch)


def __getattr__(name: str) -> Any:
    """The fixture is made when it is first asked for: pytest is needed by those who use it alone."""
    if name != "parity":
        raise AttributeError(f"module 'fastft.testing' has no attribute {name!r}")
    import pytest

    @pytest.fixture(name="parity")
    def parity() -> Callable[..., Verdict]:
        """`parity(model, batch, change=None)`: assert that `change(copy of model)` trains as `model` does."""
        return _check

    globals()["parity"] = parity
    return parity
