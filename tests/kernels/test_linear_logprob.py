"""linear_logprob against float64 and against log_softmax of the logits in the same dtype: outputs, gradients, products, memory."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastft_kernels._runtime import INTERPRETED
from fastft_kernels.head_tiles import tile_bytes, tile_sizes
from fastft_kernels.linear_logprob import OUTPUTS, linear_logprob
from fastft_kernels.numerics import compare

# Several tiles both ways at test size; the interpreter takes a millisecond an instruction and gets few rows.
N, V, TILE = (7, 197, (4, 128)) if INTERPRETED else (37, 997, (20, 128))
SCALINGS = {
    "plain": {},
    "scaled": {"scale": 0.0625, "temperature": 0.7},
    "capped": {"softcap": 3.0, "scale": 1.5, "temperature": 1.3},
}


def head(n=N, h=24, v=V, dtype=torch.float32, device="cpu", bias=True, spread=1.0, ignored=(3, 6)):
    """(hidden, weight, target, bias) with values exact in dtype."""
    g = torch.Generator().manual_seed(n * 1000 + h)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    hidden, weight, b = rand(n, h) * spread, rand(v, h) / h**0.5 * 2, rand(v) * 0.5
    target = torch.randint(0, v, (n,), generator=g)
    for i in ignored:
        if i < n:
            target[i] = -100
    tensors = (x.to(device=device, dtype=dtype) for x in (hidden, weight, b))
    hidden, weight, b = tensors
    return hidden, weight, target.to(device), b if bias else None


def eager(hidden, weight, target, bias=None, *, scale=1.0, softcap=None, temperature=1.0, ignore_index=-100):
    """What every output means, from whole logits in hidden's dtype."""
    z = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    valid = target != ignore_index
    log_p = z.log_softmax(-1)
    t = target.clamp(min=0).unsqueeze(-1)
    out = {
        "log_probs": log_p.gather(-1, t).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == target,
    }
    return {k: x.masked_fill(~valid, 0) for k, x in out.items()}


def leaves(tensors, dtype, trained):
    """Copies of (hidden, weight, bias) that need gradients: hidden, and the head if trained."""
    return [None if x is None else x.detach().to(dtype).requires_grad_(i == 0 or trained) for i, x in enumerate(tensors)]


def gradients(fn, tensors, dtype, trained, weights, **kwargs):
    """Gradients of sum_k <weights_k, output_k> and the outputs; weights: {output: tensor}."""
    hidden, weight, bias = xs = leaves(tensors, dtype, trained)
    out = fn(hidden, weight, bias, **kwargs)
    loss = sum((out[k].to(torch.promote_types(dtype, torch.float32)) * w.to(out[k].device)).sum() for k, w in weights.items())
    wanted = [x for x in xs if x is not None and x.requires_grad]
    return torch.autograd.grad(loss, wanted), out


def ours(target, tile=TILE, **fixed):
    def fn(hidden, weight, bias, **kwargs):
        return linear_logprob(hidden, weight, target, bias, tile=tile, **fixed, **kwargs)._asdict()

    return fn


def stock(target):
    return lambda hidden, weight, bias, **kwargs: eager(hidden, weight, target, bias, **kwargs)


def judge(tensors, target, dtype, trained, weights, scaling, **fixed):
    wanted = tuple(k for k in OUTPUTS if k in weights)
    got, got_out = gradients(ours(target, outputs=wanted, **fixed), tensors, dtype, trained, weights, **scaling)
    truth, truth_out = gradients(stock(target), tensors, torch.float64, trained, weights, **scaling)
    base, base_out = gradients(stock(target), tensors, dtype, trained, weights, **scaling)
    for k in wanted:
        assert got_out[k].dtype == torch.promote_types(dtype, torch.float32)
        verdict = compare(got_out[k], truth_out[k].double(), base_out[k].to(got_out[k].dtype), k)
        assert verdict, str(verdict)
    for name, *gs in zip(("dh", "dW", "db"), got, truth, base):
        assert gs[0].dtype == dtype
        verdict = compare(*gs, name)
        assert verdict, str(verdict)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_gradients(dtype, device, trained, scaling):
    hidden, weight, target, bias = head(dtype=dtype, device=device)
    g = torch.randn(len(target), device=device)
    judge((hidden, weight, bias), target, dtype, trained, {"log_probs": g}, SCALINGS[scaling])


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_entropy_gradients(dtype, device, trained, scaling):
    hidden, weight, target, bias = head(dtype=dtype, device=device)
    g, ge = torch.randn(2, len(target), device=device)
    judge((hidden, weight, bias), target, dtype, trained, {"log_probs": g, "entropy": ge}, SCALINGS[scaling])
    judge((hidden, weight, bias), target, dtype, trained, {"entropy": ge}, SCALINGS[scaling])


@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_output(dtype, device, scaling):
    hidden, weight, target, bias = head(dtype=dtype, device=device)
    with torch.no_grad():
        z = hidden.double() @ weight.double().T + bias.double()
        target[0], target[2] = z[0].argmax(), z[2].argmax()
        got = linear_logprob(hidden, weight, target, bias, outputs=OUTPUTS, tile=TILE, **SCALINGS[scaling])._asdict()
        truth = eager(hidden.double(), weight.double(), target, bias.double(), **SCALINGS[scaling])
        base = eager(hidden, weight, target, bias, **SCALINGS[scaling])
    assert torch.equal(got.pop("is_top1"), truth["is_top1"]) and truth["is_top1"].sum() >= 2
    for k, x in got.items():
        verdict = compare(x, truth[k], base[k].to(x.dtype), k)
        assert verdict, str(verdict)


def test_first_maximum_wins(device):
    hidden, weight = torch.ones(3, 1, device=device), torch.zeros(300, 1, device=device)
    weight[[7, 50, 290]] = 1.0
    target = torch.tensor([7, 50, 290], device=device)
    assert linear_logprob(hidden, weight, target, outputs=("is_top1",), tile=TILE).is_top1.tolist() == [True, False, False]
