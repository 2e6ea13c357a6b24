"""create_graph=True: first derivatives as ever, and second ones that finite differences confirm."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from fastft_kernels.lm_head.linear_cross_entropy import linear_cross_entropy
from fastft_kernels.lm_head.linear_logprob import linear_logprob
from fastft_kernels.lora.lora_linear import Adapter, Projection, lora_linear
from fastft_kernels.norm.rms_norm import rms_norm, rms_norm_recompute, rms_norm_with_rstd
from fastft_kernels.numerics import compare
from fastft_kernels.recompute.recomputation import Recomputation, attach, recomputation_of

from .test_layouts import CASES, adapted

SMALL = {2: 1, 3: 2, 4: 2, 16: 4, 37: 5}


def picked(h):
    return (torch.arange(h.shape[:-1].numel(), device=h.device) * 3 % 5).view(h.shape[:-1])


def seeded(f, seed=5):
    """f, drawing the same dropout each time."""

    def again(*xs):
        torch.manual_seed(seed)
        return f(*xs)

    return again


def dropping(x, w, bias, a, b, w2):
    two = (Adapter(a, b, 1.5, dropout=0.4), Adapter(a * 2, b, 0.5, bias=bias))
    return lora_linear(x, [Projection(w, bias, two), Projection(w2)])


MORE = {
    "dropout": (seeded(dropping), CASES["lora_linear"][1]),
    "entropy": (
        lambda h, w, b: tuple(linear_logprob(h, w, picked(h), b, outputs=("log_probs", "entropy"), softcap=3.0)[:2]),
        CASES["logsumexp"][1],
    ),
    "every term of the loss": (
        lambda h, w, b: linear_cross_entropy(
            h, w, picked(h), b, label_smoothing=0.1, z_loss=0.02, temperature=0.7, ignore_index=0
        ),
        CASES["logsumexp"][1],
    ),
}
ALL = {
    **{
        k: v for k, v in CASES.items() if k not in ("log-probabilities", "cross-entropy", "cross-entropies", "smoothed")
    },
    **MORE,
}
ALL |= {
    "log-probabilities": (lambda h, w, b: linear_logprob(h, w, picked(h), b).log_probs, CASES["logsumexp"][1]),
    "cross-entropies": (
        lambda h, w, b: linear_cross_entropy(h, w, picked(h), b, reduction="none"),
        CASES["logsumexp"][1],
    ),
}


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("case", ALL)
def test_second_derivatives(case, trained):
    f, shapes = ALL[case]
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn([SMALL.get(n, n) for n in s], generator=g, dtype=torch.float64) for s in shapes]
    xs = [x.requires_grad_(i == 0 or trained) for i, x in enumerate(xs)]
    live = lambda *xs: tuple(y for y in out if y.requires_grad) if isinstance(out := f(*xs), tuple) else out
    assert gradcheck(live, xs)
    assert gradgradcheck(live, xs)


def stock_linear(x, w, bias, a, b):
    return F.linear(x, w, bias) + 1.5 * F.linear(F.linear(x, a), b)


STOCK = {
    "logsumexp": lambda h, w, b: F.linear(h, w, b).logsumexp(-1),
}


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("case", CASES)
def test_first_derivatives_under_create_graph(device, case, trained):
    """In float32 on what runs there (the kernels, in the interpreter or on a GPU): the same numbers, connected."""
    f, shapes = CASES[case]
    g = torch.Generator().manual_seed(3)
    tensors = [torch.randn(s, generator=g).to(device) for s in shapes]

    def both(dtype, create_graph, f=f):
        xs = [t.to(dtype).requires_grad_(i == 0 or trained) for i, t in enumerate(tensors)]
        out = f(*xs)
        live = [y for y in (out if isinstance(out, tuple) else (out,)) if y.requires_grad]
        wanted = [x for x in xs if x.requires_grad]
        loss = sum(y.square().sum() for y in live)
        first = torch.autograd.grad(loss, wanted, create_graph=create_graph)
        if not create_graph:
            return list(first), None
        second = torch.autograd.grad(sum(d.square().sum() for d in first), wanted, allow_unused=True)
        return [d.detach() for d in first], list(second)

    stock = STOCK.get(case, f)  # where our own rounding is finer than autograd's
    plain, (first, second), (reference, reference2) = (
        both(torch.float32, False, stock)[0],
        both(torch.float32, True),
        both(torch.float64, True),
    )
    verdict = compare(first, reference, plain, case)
    assert verdict, str(verdict)
    assert all((a is None) == (b is None) for a, b in zip(second, reference2))
    assert all(
        b is None or torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
        for a, b in zip(second, reference2)
    )


def normed(x, weight):
    y, rstd = rms_norm_with_rstd(x, weight)
    attach(y, Recomputation((x, rstd, weight), rms_norm_recompute, lambda x, rstd, weight: rms_norm(x, weight)))
    return y


CONSUMERS = {
    "group": lambda y, w, a, b: lora_linear(y, [adapted(w, None, a, b)], recomputation=recomputation_of(y))[0],
    "head": lambda y, w, a, b: linear_logprob(y, w, picked(y)).log_probs,
    "loss": lambda y, w, a, b: linear_cross_entropy(y.flatten(0, 1), w, picked(y).flatten()),
    "loss of a slice": lambda y, w, a, b: linear_cross_entropy(y[:, 1:], w, picked(y)[:, 1:]),
    "loss of a transposed view": lambda y, w, a, b: linear_cross_entropy(y.transpose(0, 1)[1:], w, picked(y).t()[1:]),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_through_a_recomputation(consumer):
    """The consumer saved the norm's inputs, not its own: they are connected all the same, and hidden itself is not
    kept."""
    shapes = ((2, 2, 4), (4,), (5, 4), (2, 4), (5, 2))
    g = torch.Generator().manual_seed(1)
    x, weight, w, a, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    trained = (a.requires_grad_(), b.requires_grad_()) if consumer in ("group", "mlp") else ()
    frozen = lambda *ab: ab if ab else (a, b)
    f = lambda x, weight, *ab: CONSUMERS[consumer](normed(x, weight), w, *frozen(*ab))
    assert gradgradcheck(f, (x.requires_grad_(), weight.requires_grad_(), *trained))
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
        y = normed(x, weight)
        out = CONSUMERS[consumer](y, w, a, b)
    assert out.requires_grad and y.data_ptr() not in seen


def test_an_input_kept_in_fewer_bits(device):
    """A float32 input under autocast is kept in 16 bits; its gradient is differentiable all the same."""
    g = torch.Generator().manual_seed(1)
    x, w, a, b = (torch.randn(s, generator=g).to(device) for s in ((3, 8), (6, 8), (2, 8), (6, 2)))
    x.requires_grad_(), a.requires_grad_(), b.requires_grad_()

    def second(function):
        first = torch.autograd.grad(function(x).square().sum(), (x, a, b), create_graph=True)
        return torch.autograd.grad(sum(d.square().sum() for d in first), (x, a, b))

    bf16 = torch.bfloat16
    projections = [Projection(w.to(bf16), None, (Adapter(a, b, 1.5),))]
    got = second(lambda x: lora_linear(x, projections, compute_dtype=bf16, out_dtype=torch.float32)[0])
    eager = second(lambda x: stock_linear(*(t.to(bf16) for t in (x, w)), None, *(t.to(bf16) for t in (a, b))).float())
    x, a, b = (t.detach().double().requires_grad_() for t in (x, a, b))
    reference = second(lambda x: stock_linear(x, w.double(), None, a, b))
    verdict = compare(got, reference, eager)
    assert verdict, str(verdict)


def test_what_was_not_kept_is_an_error(device):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    w, a = torch.randn(6, 8, device=device), torch.randn(2, 8, device=device)
    b = torch.randn(6, 2, device=device, requires_grad=True)
    (y,) = lora_linear(x, [adapted(w, None, a, b)])
    with pytest.raises(RuntimeError, match=r"fastft\.unpatch"):
        torch.autograd.grad(y.sum(), b, create_graph=True)
