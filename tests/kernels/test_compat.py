"""Each of torch's private names in `runtime/compat.py` still is what the package takes it for."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastft_kernels.runtime import compat


class Noting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.factor, None


def seen_in(ask):
    """The answers of ask() outside, under torch.func.grad, in torch.jit.trace, under a dispatch mode and in make_fx."""
    answers = [ask()]
    note = lambda x: (answers.append(ask()), x.sum())[1]
    torch.func.grad(note)(torch.ones(2))
    torch.jit.trace(note, torch.ones(2), check_trace=False)
    with Noting():
        note(torch.ones(2))
    make_fx(note)(torch.ones(2))
    return answers


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("transforms_active", [False, True, False, False, False]),
        ("is_tracing", [False, False, True, False, False]),
        ("is_proxy_traced", [False, False, False, False, True]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_where_each_answers(name, want):
    assert [bool(a) for a in seen_in(getattr(compat, name))] == want


@pytest.mark.filterwarnings("ignore")
def test_dispatch_modes_are_counted():
    outside, _, _, inside, proxied = seen_in(compat.dispatch_modes)
    assert outside == 0
    assert inside == 1
    assert proxied > 0


def test_a_function_is_applied_directly():
    x = torch.ones(3, requires_grad=True)
    y = compat.apply_directly(Double)(x, 2.0)
    assert type(y.grad_fn).__name__ == "DoubleBackward"
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.full((3,), 2.0))


def test_outside_the_compiler():
    assert compat.is_dynamo_compiling() is False
    assert compat.compiler._is_exporting_flag is False
