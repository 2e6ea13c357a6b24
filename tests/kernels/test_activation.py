"""activation against eager: value and gradient, strides, extremes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastft_kernels.mlp.activation import ACTIVATIONS, activation
from fastft_kernels.numerics import compare
from tests.kernels.test_glu import EAGER

from .examples import examples

# the interpreter's, where inf is right
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def run(fn, x, dy):
    x = x.detach().requires_grad_()
    y = fn(x)
    return [y.detach(), *torch.autograd.grad(y, x, dy.to(y.dtype))]


def judge(x, dy, name, alpha=None):
    stock = EAGER[name] if alpha is None else lambda x: x * torch.sigmoid(alpha * x)
    ours = run(lambda x: activation(x, name, alpha=alpha), x, dy)
    verdict = compare(ours, run(stock, x.double(), dy.double()), run(stock, x, dy))
    assert verdict, verdict
    return ours


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, scale, dtype, device):
    x = (torch.randn(3, 5, 67, device=device) * scale).to(dtype)
    judge(x, torch.randn(3, 5, 67, device=device).to(dtype), name)


def test_alpha(dtype, device):
    x = torch.randn(4, 40, device=device).to(dtype)
    judge(x, torch.randn_like(x), "silu", 2.5)
    judge(x, torch.randn_like(x), "swiglu_oai", 0.7)


@settings(
    max_examples=examples(12, 30),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_shape(dtype, device, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 9), min_size=0, max_size=3)))
    wide = torch.randn(*shape, 70, device=device).to(dtype)
    x = data.draw(st.sampled_from([wide, wide[..., 3:40], wide[..., ::2], wide.movedim(-1, 0)]))
    before = x.clone()
    dy = data.draw(st.sampled_from([torch.randn_like(x), torch.ones((), device=device, dtype=dtype).expand(x.shape)]))
    y, dx = judge(x, dy, data.draw(st.sampled_from(ACTIVATIONS)))
    assert y.is_contiguous()
    assert dx.is_contiguous()
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_extremes(name, dtype, device):
    big = torch.finfo(dtype).max / 4
    x = torch.tensor([big, -big, 1e4, -1e4, 88.0, -88.0, 0.0, 1e-6, float("nan")], device=device, dtype=dtype)
    for v in run(lambda x: activation(x, name), x, torch.ones_like(x)):
        assert v.isnan().tolist()[:-1] == [False] * 8
    assert activation(x, name)[-1].isnan()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_same_bits(name, dtype, device):
    x, dy = (torch.randn(5, 33, device=device).to(dtype) for _ in range(2))
    first, second = (run(lambda x: activation(x, name), x, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_float64_is_exact(device):
    x = torch.randn(3, 7, dtype=torch.float64, device=device, requires_grad=True)
    for name in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda x: activation(x, name), (x,))  # noqa: B023


def test_saves_x_alone(dtype, device):
    x = torch.randn(3, 7, device=device).to(dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        activation(x, "gelu_tanh")
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_compiles_as_one_graph(dtype, device):
    x, dy = (torch.randn(4, 33, device=device).to(dtype) for _ in range(2))
    fn = lambda x: activation(x, "gelu") * 2
    ours = run(torch.compile(fn, fullgraph=True, backend="aot_eager"), x, dy)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(fn, x, dy)))


def test_fake_tensors_have_the_real_layout(dtype, device):
    x, dy = torch.randn(5, 3, device=device).to(dtype).t(), torch.randn(3, 5, device=device).to(dtype)
    with FakeTensorMode() as mode:
        made = run(activation, mode.from_tensor(x), mode.from_tensor(dy))
    for r, f in zip(run(activation, x, dy), made):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def test_errors(device):
    x = torch.randn(3, device=device)
    for bad in (lambda: activation(x, "tanhh"), lambda: activation(x, "relu", alpha=1.0), lambda: activation(x.long())):
        with pytest.raises(ValueError, match="want"):
            bad()
