"""adapted_mlp against PEFT's formula (eager) and the same in float64 (reference): y, dx and the gradients of the six
adapter matrices."""

import pytest
import torch

from fastft_kernels.lora.lora_linear import Adapter, Projection, lora_linear
from fastft_kernels.mlp import adapted_glu
from fastft_kernels.mlp.adapted_mlp import adapted_mlp
from fastft_kernels.mlp.glu import glu, glu_plain, glu_settings
from fastft_kernels.numerics import compare
from fastft_kernels.recompute.recomputation import Recomputation
from fastft_kernels.recompute.replay import again
from fastft_kernels.runtime.dispatch import INTERPRETED

SCALES = (1.7, 2.0, 0.6)  # of gate, up, down
FORMS = {"silu": {}, "gelu_tanh": {}, "clamped": {"limit": 0.7, "up_offset": 1.0, "alpha": 1.702}}


def draw(tokens, width, inner, ranks, dtype, device, out=None, bias=False, adapters=None):
    """x, three weights, three biases or None, three A, three B."""
    out = out or width
    shapes = ((inner, width), (inner, width), (out, inner))
    normal = lambda *shape: torch.randn(*shape, device=device)
    Ws = [(normal(*s) * s[1] ** -0.5).to(dtype) for s in shapes]
    bs = [normal(s[0]).to(dtype) if bias else None for s in shapes]
    As = [(normal(r, s[1]) * s[1] ** -0.5).to(adapters or dtype) for r, s in zip(ranks, shapes)]
    Bs = [(normal(s[0], r) * r**-0.5).to(adapters or dtype) for r, s in zip(ranks, shapes)]
    return normal(*tokens, width).to(dtype), Ws, bs, As, Bs


def projections(Ws, bs, As, Bs):
    return [Projection(W, b, (Adapter(A, B, s),)) for W, b, A, B, s in zip(Ws, bs, As, Bs, SCALES)]


def ours(x, Ws, bs, As, Bs, act, dtype, **form):
    return adapted_mlp(x, *projections(Ws, bs, As, Bs), act, compute_dtype=dtype, **form)


def stock(x, Ws, bs, As, Bs, act, dtype, **form):
    """As PEFT computes under autocast to `dtype`, one rounding after each operation."""

    def linear(x, i):
        y = torch.nn.functional.linear(x, Ws[i], bs[i])
        return y + (x @ As[i].to(dtype).t()) @ Bs[i].to(dtype).t() * SCALES[i]

    settings = glu_settings(act, form.get("alpha"), form.get("limit"), form.get("up_offset", 0.0))
    return linear(glu_plain(linear(x, 0), linear(x, 1), *settings), 2)


def gradients(fn, x, Ws, bs, As, Bs, act, dtype, dy, **form):
    """{"y", "dx", "dA0", ...} of fresh leaves."""
    x, *rest = (t.detach().requires_grad_() for t in (x, *As, *Bs))
    y = fn(x, Ws, bs, rest[:3], rest[3:], act, dtype, **form)
    names = ["dx", *(f"d{n}{i}" for n in "AB" for i in range(3))]
    return {"y": y.detach()} | dict(zip(names, torch.autograd.grad(y, [x, *rest], dy.to(y.dtype))))


def judge(draws, act="silu", **form):
    """Several draws as one sample."""
    found = []
    for drawn in draws:
        x, Ws, bs, As, Bs = drawn
        dy = torch.randn(*x.shape[:-1], Ws[2].shape[0], device=x.device).to(x.dtype)
        wide = lambda ts: [None if t is None else t.double() for t in ts]
        found.append(
            (
                gradients(ours, *drawn, act, x.dtype, dy, **form),
                gradients(
                    stock, x.double(), wide(Ws), wide(bs), wide(As), wide(Bs), act, torch.float64, dy.double(), **form
                ),
                gradients(stock, *drawn, act, x.dtype, dy, **form),
            )
        )
    one = lambda results: {k: torch.cat([r[k].flatten() for r in results]) for k in results[0]}
    verdict = compare(*map(one, zip(*found)))
    assert verdict, str(verdict)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [(16, 16, 16), (8, 3, 20)], ids=str)
def test_values_and_gradients(form, ranks, dtype, device):
    torch.manual_seed(0)
    act = "silu" if form == "clamped" else form
    bias = ranks != (16, 16, 16)
    judge([draw((2, 19), 24, 150, ranks, dtype, device, bias=bias) for _ in range(2)], act, **FORMS[form])


def test_float32_adapters_under_autocast(dtype, device):
    torch.manual_seed(1)
    judge([draw((40,), 32, 70, (4, 4, 4), dtype, device, adapters=torch.float32) for _ in range(3)])


def test_more_rows_than_one_program_walks(device, monkeypatch):
    monkeypatch.setattr(adapted_glu, "ROWS", 32)
    torch.manual_seed(2)
    judge([draw((71,), 8, 16, (2, 2, 2), torch.float32, device, out=5)])


@pytest.mark.parametrize("tokens", [(0,), (1,), (3, 0)], ids=str)
def test_few_tokens(tokens, device):
    drawn = draw(tokens, 8, 16, (2, 2, 2), torch.float32, device)
    dy = torch.randn(*tokens, 8, device=device)
    mine, theirs = (gradients(fn, *drawn, "silu", torch.float32, dy) for fn in (ours, stock))
    for k, v in theirs.items():
        torch.testing.assert_close(mine[k], v)


def test_is_what_the_functions_one_after_the_other_are(device):
    """The same adapters through lora_linear, glu, lora_linear; in float32, where a defect of 1e-4 shows."""
    torch.manual_seed(3)
    drawn = draw((50,), 24, 130, (16, 16, 16), torch.float32, device)

    def apart(x, Ws, bs, As, Bs, act, dtype):
        gate, up, down = projections(Ws, bs, As, Bs)
        return lora_linear(glu(*lora_linear(x, [gate, up]), act), [down])[0]

    dy = torch.randn(50, 24, device=device)
    a, b = (gradients(fn, *drawn, "silu", torch.float32, dy) for fn in (ours, apart))
    for k in a:
        assert (a[k] - b[k]).abs().max() <= 1e-5 * b[k].abs().max(), k


def test_the_same_bits_twice_and_in_a_replay(dtype, device):
    """A checkpointed run that keeps first and multiplies last gives the first run's gradients; so does an input that
    is recomputed."""
    torch.manual_seed(4)
    drawn = draw((33,), 24, 70, (4, 4, 4), dtype, device)
    dy = torch.randn(33, 24, device=device).to(dtype)

    def replayed(*args):
        with again():
            return ours(*args)

    def recomputed(x, Ws, bs, As, Bs, act, dtype):
        twice = Recomputation((x,), lambda x: x * 1)
        return adapted_mlp(x, *projections(Ws, bs, As, Bs), act, compute_dtype=dtype, recomputation=twice)

    runs = [gradients(fn, *drawn, "silu", dtype, dy) for fn in (ours, ours, replayed, recomputed)]
    for other in runs[1:]:
        assert all(torch.equal(runs[0][k], other[k]) for k in other)


def test_second_derivatives(device):
    torch.manual_seed(5)
    x, Ws, bs, As, Bs = draw((5,), 6, 9, (2, 2, 2), torch.float64, device)
    leaves = [t.requires_grad_() for t in (x, *As, *Bs)]
    fn = lambda x, *t: ours(x, Ws, bs, t[:3], t[3:], "silu", torch.float64)
    assert torch.autograd.gradgradcheck(fn, leaves)
    assert torch.autograd.gradcheck(fn, leaves)


def test_only_what_is_asked_for(device):
    x, Ws, bs, As, Bs = draw((5,), 6, 9, (2, 2, 2), torch.float32, device)
    for t in (*As, *Bs):
        t.requires_grad_()
    y = ours(x, Ws, bs, As, Bs, "silu", torch.float32)
    y.sum().backward()
    assert x.grad is None and all(t.grad is not None for t in (*As, *Bs))


@pytest.mark.parametrize("what", ["rank", "dropout", "trained weight", "frozen adapter", "none", "dtypes"])
def test_what_does_not_fit_is_said(what, device):
    x, Ws, bs, As, Bs = draw((5,), 6, 9, (33 if what == "rank" else 2, 2, 2), torch.float32, device)
    for t in (*As, *Bs):
        t.requires_grad_()
    if what == "trained weight":
        Ws[2].requires_grad_()
    if what == "frozen adapter":
        As[1].requires_grad_(False)
    if what == "dtypes":
        As[0] = As[0].detach().half().requires_grad_()
    three = projections(Ws, bs, As, Bs)
    if what == "dropout":
        three[1] = Projection(Ws[1], None, (Adapter(As[1], Bs[1], 1.0, dropout=0.1),))
    if what == "none":
        three[2] = Projection(Ws[2])
    with pytest.raises(ValueError, match="adapted_mlp: "):
        adapted_mlp(x, *three)


@pytest.mark.skipif(INTERPRETED, reason="the launchers' own path is looked at elsewhere")
def test_the_operators_know_their_results_before_they_run(dtype, device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    drawn = draw((33,), 24, 70, (4, 4, 4), dtype, device)
    real = gradients(ours, *drawn, "silu", dtype, torch.randn(33, 24, device=device))
    with FakeTensorMode() as mode:
        fake = lambda ts: [None if t is None else mode.from_tensor(t) for t in ts]
        x, Ws, bs, As, Bs = drawn
        found = gradients(
            ours,
            fake([x])[0],
            fake(Ws),
            fake(bs),
            fake(As),
            fake(Bs),
            "silu",
            dtype,
            torch.empty(33, 24, device=device),
        )
    assert {k: (v.shape, v.dtype, v.stride()) for k, v in found.items()} == {
        k: (v.shape, v.dtype, v.stride()) for k, v in real.items()
    }
