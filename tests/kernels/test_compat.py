"""Each of torch's private names in `runtime/compat.py` still is what the package takes it for."""

import pytest
import torch
from packaging.version import Version
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastft_kernels.quant.scaled_product import has_units
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


def test_one_launch_for_many_tensors():
    to, of = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.full((3,), 2.0)]
    compat.copy_each(to, of)
    assert all(map(torch.equal, to, of)), "torch._foreach_copy_"
    compat.scale_each(to, [2.0, 3.0])
    assert [t.tolist() for t in to] == [[2.0, 2.0], [6.0, 6.0, 6.0]], "torch._foreach_mul_"


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert type(torch.ones(1)) is compat.FakeTensor
    assert type(torch.ones(1)) is not compat.FakeTensor


def test_products_of_groups_of_rows():
    assert compat.grouped_mm is not None
    whole = lambda *shape: torch.randint(-2, 3, shape).to(torch.bfloat16)  # whose products and sums are exact
    a, b = whole(3, 8), whole(2, 8, 16)
    got = compat.grouped_mm(a, b, offs=torch.tensor([1, 3], dtype=torch.int32))
    want = torch.cat([a[:1] @ b[0], a[1:] @ b[1]])
    assert torch.equal(got, want)
    assert compat.has_grouped_mm(9)
    assert not compat.has_grouped_mm(7)


def test_what_a_view_is_of():
    x = torch.ones(4, 2, requires_grad=True)
    assert compat.viewed(x[1:].view(-1)) is x and compat.viewed(x) is None and compat.viewed(x * 2) is None


def test_products_of_8_bit_matrices(device):
    """With a scale for each row of the first and each column of the second; on a CPU, where we do not call it, older
    torch knows one scale for each matrix."""
    if device.type == "cuda" and not has_units(device):
        pytest.skip("no FP8 units")
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 32, generator=g).to(device, torch.float8_e4m3fn) for n in (16, 48))
    by_row = device.type == "cuda" or Version(torch.__version__) >= Version("2.13")
    of_a, of_b = (torch.rand(s if by_row else (), generator=g).to(device) for s in ((16, 1), (1, 48)))
    y = compat.scaled_mm(a, b.t(), scale_a=of_a, scale_b=of_b, out_dtype=torch.bfloat16, use_fast_accum=False)
    wanted = (a.double() @ b.double().t()) * of_a * of_b
    assert y.dtype == torch.bfloat16 and ((y - wanted).abs() <= wanted.abs() * 2**-8 + 1e-6).all()
