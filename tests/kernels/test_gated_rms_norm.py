"""gated_rms_norm against the formula in float64, and no worse than the formula in the dtype itself: y and every
gradient."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastft_kernels.norm.gated_rms_norm import gated_rms_norm, gated_rms_norm_ref
from fastft_kernels.numerics import compare
from fastft_kernels.runtime.dispatch import INTERPRETED

EPS = 1e-5
DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _on_device(device, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", device)


def draw(shape, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, gate, dy = (torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype) for _ in range(3))
    return x, gate, (torch.randn(shape[-1], generator=g, dtype=torch.float64) * 0.3 + 1).to(DEVICE, dtype), dy


def stock(x, gate, weight, eps, *, activation, gate_first, groups):
    """As models write it: rounded to the dtype of x before the product with the weight."""
    act = torch.sigmoid if activation == "sigmoid" else torch.nn.functional.silu
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    h, a = x.to(wide), act(gate.to(wide))
    h = h * a if gate_first else h
    parts = h.reshape(*h.shape[:-1], groups, -1)
    parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)
    y = weight * parts.reshape(h.shape).to(x.dtype)
    return y if gate_first else (y * a).to(x.dtype)


def results(f, tensors, **kwargs):
    *inputs, dy = tensors
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = f(*inputs, EPS, **kwargs)
    return {"y": y.detach(), **dict(zip(("dx", "dgate", "dweight"), torch.autograd.grad(y, inputs, dy)))}


def judge(shape, dtype, **kwargs):
    tensors = draw(shape, dtype)
    reference = results(stock, [t.double() for t in tensors], **kwargs)
    verdict = compare(results(gated_rms_norm, tensors, **kwargs), reference, results(stock, tensors, **kwargs))
    assert verdict, str(verdict)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize(("shape", "groups"), [((3, 7, 24), 1), ((3, 7, 24), 3), ((1, 130), 2), ((40, 8), 1)])
def test_value_and_gradients(shape, groups, activation, gate_first, dtype):
    judge(shape, dtype, activation=activation, gate_first=gate_first, groups=groups)


@pytest.mark.parametrize("gate_first", [True, False])
def test_float64_is_the_formula(gate_first):
    tensors = draw((5, 12), torch.float64)
    kwargs = dict(activation="silu", gate_first=gate_first, groups=2)
    ours, reference = results(gated_rms_norm, tensors, **kwargs), results(stock, tensors, **kwargs)
    for k in reference:
        torch.testing.assert_close(ours[k], reference[k], rtol=1e-12, atol=1e-12)
    ref = gated_rms_norm_ref(*tensors[:3], EPS, **kwargs)
    torch.testing.assert_close(ref, reference["y"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate_first", [True, False])
def test_strides_and_an_expanded_gradient(gate_first, dtype):
    x, gate, w, _ = draw((6, 4, 16), dtype)
    kwargs = dict(activation="silu", gate_first=gate_first, groups=2)
    dy = torch.ones(1, 1, 16, dtype=dtype, device=x.device).expand(4, 6, 16)
    views = [x.transpose(0, 1), torch.cat([gate, gate], -1)[..., :16].transpose(0, 1), w, dy]
    whole = [*(t.contiguous() for t in views[:2]), w, dy.contiguous()]
    ours, same = results(gated_rms_norm, views, **kwargs), results(gated_rms_norm, whole, **kwargs)
    if x.device.type == "cpu" and not INTERPRETED:  # torch's own exp may differ by strides
        verdict = compare(ours, results(stock, [t.double() for t in whole], **kwargs), same)
        assert verdict, str(verdict)
        return
    for k in same:
        assert torch.equal(ours[k], same[k]), k


def test_only_the_gradients_that_are_wanted(dtype):
    x, gate, w, dy = draw((4, 8), dtype)
    whole = results(gated_rms_norm, (x, gate, w, dy), activation="silu", gate_first=True, groups=1)
    for i, name in enumerate(("dx", "dgate", "dweight")):
        tensors = [t.clone().requires_grad_(j == i) for j, t in enumerate((x, gate, w))]
        gated_rms_norm(*tensors, EPS, gate_first=True).backward(dy)
        assert torch.equal(tensors[i].grad, whole[name])
        assert [t.grad is not None for t in tensors] == [j == i for j in range(3)]


def test_empty_and_fake_and_compiled():
    x, gate, w, _ = draw((0, 8), torch.float32)
    assert gated_rms_norm(x, gate, w, gate_first=True).shape == (0, 8)
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
        y = gated_rms_norm(x, torch.empty_like(x), torch.empty(8), gate_first=False, out_dtype=torch.float32)
        y.sum().backward()
        assert y.dtype == torch.float32 and x.grad.shape == x.shape
    x, gate, w, _ = draw((4, 8), torch.float32)
    f = lambda x, gate, w: gated_rms_norm(x, gate, w, gate_first=True, groups=2)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x, gate, w), f(x, gate, w))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(gate=torch.ones(2, 4)), ValueError, "want x and gate"),
        (dict(weight=torch.ones(4)), ValueError, "want x and gate"),
        (dict(groups=3), ValueError, "want groups that divide 8"),
        (dict(activation="tan"), ValueError, "want one of"),
        (dict(x=torch.ones(2, 8, dtype=torch.int64)), TypeError, "want floating"),
    ],
)
def test_what_is_refused(change, error, text):
    given = dict(x=torch.ones(2, 8), gate=torch.ones(2, 8), weight=torch.ones(8), gate_first=True) | change
    with pytest.raises(error, match=text):
        gated_rms_norm(**given)
