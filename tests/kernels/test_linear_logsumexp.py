"""linear_logsumexp judged against torch in the same dtype, with float64 as the reference; products counted; no graph
without gradients."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastft_kernels.lm_head.linear_logsumexp import linear_logsumexp
from fastft_kernels.numerics import compare

N, H, V = 13, 24, 101
SETTINGS = [{}, {"scale": 0.5, "temperature": 0.7}, {"softcap": 3.0, "scale": 2.0}]


def draw(dtype, device, bias, grads, up=None):
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(N, H, generator=g),
        torch.randn(V, H, generator=g) * H**-0.5,
        torch.randn(V, generator=g) if bias else None,
    ]
    tensors = [None if t is None else t.to(device, dtype).to(up or dtype) for t in tensors]
    return [t if t is None else t.requires_grad_(r) for t, r in zip(tensors, grads)]


def plain(h, w, b=None, *, scale=1.0, temperature=1.0, softcap=None):
    z = torch.nn.functional.linear(h, w, b) * scale
    z = z if softcap is None else torch.tanh(z / softcap) * softcap
    z = z if z.dtype == torch.float64 else z.float()
    return torch.logsumexp(z / temperature, -1)


def results(function, leaves, settings):
    out = function(*leaves, **settings)
    up = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, up)]


@pytest.mark.parametrize("settings", SETTINGS, ids=["", "scale", "cap"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_judged(dtype, device, bias, trained, settings):
    grads = (True, trained, trained)
    exact = results(plain, draw(dtype, device, bias, grads, torch.float64), settings)
    eager = results(plain, draw(dtype, device, bias, grads), settings)
    for tile in (None, (8, 32)):
        ours = results(linear_logsumexp, draw(dtype, device, bias, grads), {**settings, "tile": tile})
        verdict = compare(ours, exact, eager)
        assert verdict, str(verdict)


@pytest.mark.parametrize(("grads", "products"), [((False, False), 1), ((True, False), 2), ((True, True), 4)])
def test_products(device, grads, products):
    h, w, _ = draw(torch.float32, device, False, (*grads, False))
    with FlopCounterMode(display=False) as count:
        y = linear_logsumexp(h, w)
        if y.requires_grad:
            y.sum().backward()
    assert count.get_total_flops() == products * 2 * N * H * V and y.requires_grad == any(grads)


def test_edges(device):
    h, w, _ = draw(torch.float32, device, False, (True, False, False))
    assert linear_logsumexp(h[:0], w).shape == (0,) and linear_logsumexp(h.view(1, N, H), w).shape == (1, N)
    one = linear_logsumexp(h, w[:1])
    assert torch.allclose(one, h @ w[0]) and not linear_logsumexp(h.detach(), w).requires_grad
    with pytest.raises(ValueError, match="linear_logsumexp: want hidden"):
        linear_logsumexp(h[:, 1:], w)


def test_compiles_and_traces(device):
    h, w, _ = draw(torch.float32, device, False, (True, False, False))
    compiled = torch.compile(lambda h: linear_logsumexp(h, w).sum(), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(h), linear_logsumexp(h, w).sum())
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert linear_logsumexp(torch.empty(2, 3, H), torch.empty(V, H)).shape == (2, 3)
