"""The products of an FP8 weight: the specification's numbers, errors that rounding alone explains, and planted defects
that both find."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastft_kernels.lora.lora_linear import Adapter, Projection, lora_linear
from fastft_kernels.numerics import compare
from fastft_kernels.quant import scaled_product
from fastft_kernels.quant.fp8 import quantize_e4m3_blocks, quantize_e4m3_rows
from fastft_kernels.quant.scaled_product import specified, why_dense
from fastft_kernels.quant.weights import Float8
from fastft_kernels.runtime.compat import scaled_mm
from fastft_kernels.runtime.dispatch import INTERPRETED, planned_for_cuda

OUT, IN, TOKENS, RANK = 48, 48, (3, 21), 4
DENSE = "its products are dense on this device in this dtype"


def case(dtype, device, products="both", out=OUT, width=IN):
    """x, dense W, its FP8 form, an adapter, dy. Rows of W and tokens of very different sizes, as a scale that is left
    out or another's is then far off."""
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device)
    x = (draw(*TOKENS, width) * torch.exp2(draw(*TOKENS, 1))).to(dtype).requires_grad_()
    w = draw(out, width) * width**-0.5 * torch.exp2(1.5 * draw(out, 1))
    weight = Float8(*quantize_e4m3_rows(w), None, products)
    A, B = draw(RANK, width) * width**-0.5, draw(out, RANK) * 0.3
    adapter = Adapter(A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_(), 2.0)
    return x, w, weight, adapter, draw(*TOKENS, out).to(dtype)


def results(y, x, adapter, dy):
    names = ("y", "dx", "dA", "dB")
    return dict(zip(names, (y.detach(), *torch.autograd.grad(y, (x, adapter.A, adapter.B), dy.to(y.dtype)))))


def ours(x, weight, adapter, dy):
    return results(lora_linear(x, [Projection(weight, None, (adapter,))])[0], x, adapter, dy)


def plain(x, adapter, dy, base, dtype):
    """base(x) and the adapter, in `dtype`."""
    wide = lambda t: t.detach().to(dtype).requires_grad_()
    x, a = wide(x), Adapter(wide(adapter.A), wide(adapter.B), adapter.scaling)
    return results(base(x) + (x @ a.A.t() @ a.B.t()) * a.scaling, x, a, dy.to(dtype))


def judged(dtype, device, products="both", made=None):
    """(the judge's verdict beside the specification, {result: our error / the error of rounding operands alone}).
    made: the weight, where another one than the case's is multiplied."""
    x, w, weight, adapter, dy = case(dtype, device, products)
    layout = weight.layout()
    found = ours(x, made(weight) if made else weight, adapter, dy)
    as_specified = lambda x: specified(x, layout, weight.q, weight.scale)
    truth = plain(x, adapter, dy, as_specified, torch.float64)
    verdict = compare(found, truth, plain(x, adapter, dy, as_specified, dtype))
    exact = plain(x, adapter, dy, lambda x: x @ w.to(x.dtype).t(), torch.float64)
    off = lambda r: {k: float((r[k].double() - exact[k]).norm()) for k in ("y", "dx")}
    rounding, mine = off(truth), off(found)
    return verdict, {k: mine[k] / rounding[k] for k in mine}


def in_fp8(dtype, device):
    return not why_dense(case(dtype, device)[2].layout(), dtype, torch.device(device))


@pytest.mark.parametrize("products", ["both", "forward"])
def test_error_is_that_of_rounding(products, dtype, device):
    """As exact as the specification in plain torch; against unrounded numbers, at most 1.2 times what rounding operands
    to e4m3 explains."""
    if not in_fp8(dtype, device):
        pytest.skip(DENSE)
    verdict, ratio = judged(dtype, device, products)
    assert verdict, str(verdict)
    assert all(0.8 < r < 1.2 for r in ratio.values()), ratio


def _other_row(weight):
    return Float8(weight.q, weight.scale.roll(1, 0), None, weight.products)


def _left_out(monkeypatch):
    real = scaled_product.quantized
    monkeypatch.setattr(scaled_product, "quantized", lambda x, columns=None: real(x))


def _after_the_product(monkeypatch):
    def wrong(dy, q, scale, dtype, underflow=None):
        one = torch.ones_like(scale)
        return real(dy, q, one, dtype) * scale.view(-1).to(dtype)

    real = scaled_product.input_gradient
    monkeypatch.setattr(scaled_product, "input_gradient", wrong)


def _untransposed(monkeypatch):
    monkeypatch.setattr(scaled_product, "transpose_8bit", lambda q, out=None: q.clone())


def _stale(monkeypatch):
    other = quantize_e4m3_rows(torch.randn(IN, OUT, generator=torch.Generator().manual_seed(8)))[0]
    monkeypatch.setattr(scaled_product, "transpose_8bit", lambda q, out=None: other.to(q.device))


PLANTED = {
    "left out": _left_out,
    "after the product": _after_the_product,
    "untransposed": _untransposed,
    "stale": _stale,
}


@pytest.mark.parametrize("what", ["other row", *PLANTED])
def test_planted_defects_are_seen(what, dtype, device, monkeypatch):
    if not in_fp8(dtype, device):
        pytest.skip(DENSE)
    if what in PLANTED:
        PLANTED[what](monkeypatch)
    verdict, ratio = judged(dtype, device, made=None if what in PLANTED else _other_row)
    assert not verdict
    assert max(ratio.values()) > 1.2, ratio


def test_siblings_share_what_they_round(dtype, device, monkeypatch):
    """x is rounded once for all of them; each of their outputs and gradients is its own."""
    if not in_fp8(dtype, device):
        pytest.skip(DENSE)
    x, _, first, adapter, dy = case(dtype, device)
    _, _, second, other, dz = case(dtype, device, out=32)
    counted, real = [], scaled_product.quantized
    monkeypatch.setattr(scaled_product, "quantized", lambda *a: counted.append(a) or real(*a))
    y, z = lora_linear(x, [Projection(first, None, (adapter,)), Projection(second, None, (other,))])
    assert len(counted) == 1
    (dx,) = torch.autograd.grad([y, z], x, [dy, dz])
    assert len(counted) == 3
    alone = [ours(x, w, a, d) for w, a, d in ((first, adapter, dy), (second, other, dz))]
    assert torch.equal(y, alone[0]["y"]) and torch.equal(z, alone[1]["y"])
    total = alone[0]["dx"].float() + alone[1]["dx"].float()
    assert (dx.float() - total).norm() <= 4 * torch.finfo(dtype).eps * total.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is what runs")
def test_torchs_product_is_the_references():
    """torch._scaled_mm on a CPU, row by row, beside the product that runs there."""
    x, _, weight, _, _ = case(torch.float32, "cpu")
    rounded = scaled_product.quantized(x.detach().reshape(-1, IN))
    mine = scaled_product.product(rounded, weight.q, weight.scale, torch.float32)
    torchs = scaled_mm(
        rounded.q,
        weight.q.t(),
        scale_a=rounded.scale,
        scale_b=weight.scale.t(),
        out_dtype=torch.float32,
        use_fast_accum=False,
    )
    assert (mine - torchs).abs().max() <= 1e-6 * torchs.abs().max()


def test_where_products_are_dense(device):
    w = torch.randn(48, 40, device=device)
    rows, blocks = quantize_e4m3_rows(w), quantize_e4m3_blocks(w, (16, 16))
    why = lambda weight, compute=torch.bfloat16, on=device: why_dense(weight.layout(), compute, torch.device(on))
    assert "(48, 40) is no multiple of 16" in why(Float8(*rows, None, "both"))
    assert "blocks of 16 x 16" in why(Float8(*blocks, (16, 16), "both"))
    assert "asked for" in why(Float8(*rows))
    even = Float8(*quantize_e4m3_rows(torch.randn(48, 32, device=device)), None, "both")
    assert why(even, on="cpu") == "" and why(even, torch.float32, "cpu") == ""
    assert why(even, on="meta") == scaled_product.NO_UNITS
    assert "float16" in why(even, torch.float16, "meta")
    assert why_dense(even.layout(), torch.bfloat16, torch.device("cpu"), planned=True) == ""
    assert "float32" in why_dense(even.layout(), torch.float32, torch.device("cpu"), planned=True)


@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 0, 5)])
def test_few_tokens(tokens, dtype, device):
    _, w, weight, adapter, _ = case(dtype, device)
    x = torch.randn(*tokens, IN, device=device).to(dtype).requires_grad_()
    (y,) = lora_linear(x, [Projection(weight, w[:, 0].contiguous().to(dtype), (adapter,))])
    assert y.shape == (*tokens, OUT)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.shape == x.shape and dx.isfinite().all()


def test_a_nan_stays_in_its_row(dtype, device):
    x, _, weight, adapter, _ = case(dtype, device)
    with torch.no_grad():
        x[0, 3, 5] = float("nan")
    y = lora_linear(x, [Projection(weight, None, (adapter,))])[0]
    assert y[0, 3].isnan().all() and y.isnan().sum() == OUT


@pytest.mark.skipif(INTERPRETED, reason="fake tensors launch nothing")
def test_one_transposed_weight_at_a_time():
    """Of three layers of an 8B decoder: FP8 weights cost 1.01 bytes an element, what is kept for the backward is what
    a dense layer keeps, and there is never more than one transposed weight."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    class Live(TorchDispatchMode):
        made, most = weakref.WeakSet(), 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float8_e4m3fn and out.shape in SIDES:
                if func is torch.ops.aten.new_empty.default:
                    Live.made.add(out)
            Live.most = max(Live.most, len(Live.made))
            return out

    shapes = [(14336, 4096), (14336, 4096), (4096, 4096)]
    SIDES = {(b, a) for a, b in shapes}
    with FakeTensorMode(), planned_for_cuda():
        x = torch.empty(2048, 4096, dtype=torch.bfloat16, requires_grad=True)
        kept = {}
        for name in ("fp8", "dense"):
            projections, weights = [], []
            for out, width in shapes:
                w = torch.empty(out, width, dtype=torch.bfloat16)
                adapter = Adapter(
                    torch.empty(16, width, dtype=torch.bfloat16, requires_grad=True),
                    torch.empty(out, 16, dtype=torch.bfloat16, requires_grad=True),
                    2.0,
                )
                weight = Float8(*quantize_e4m3_rows(w), None, "both") if name == "fp8" else w
                held = weight.tensors() if name == "fp8" else (w,)
                weights += [*held, adapter.A, adapter.B]
                projections.append(Projection(weight, None, (adapter,)))
                if name == "fp8":
                    assert sum(t.nbytes for t in held) <= 1.01 * w.numel()
            saved, parameters = [], set(map(id, weights))
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                ys = lora_linear(x, projections)
            kept[name] = sum(t.nbytes for t in saved if id(t) not in parameters)
            with Live():
                torch.autograd.grad(ys, x, [torch.empty_like(y) for y in ys])
    assert kept["fp8"] == kept["dense"]
    assert Live.most == 1


def test_what_underflows_is_counted(device):
    """Of what is not zero; in as many backwards and tokens as are looked at; by shape."""
    meter = scaled_product.Underflow()
    weight = Float8(*quantize_e4m3_rows(torch.ones(32, 16, device=device)), None, "both", meter)
    x = torch.randn(4, 16, device=device, dtype=torch.bfloat16).requires_grad_()
    if why_dense(weight.layout(), x.dtype, torch.device(device)):
        pytest.skip(DENSE)
    dy = torch.zeros(4, 32, device=device, dtype=torch.bfloat16)
    dy[:, 0], dy[:, 1], dy[:, 2] = 448.0, 2.0**-11, 2.0**-9  # what is below half of the smallest number is lost
    assert meter.shares() == {}
    for _ in range(meter.backwards + 3):
        (y,) = lora_linear(x, [Projection(weight)])
        torch.autograd.grad(y, x, dy)
    assert meter.shares() == {(32, 16): pytest.approx(1 / 3)}
    assert meter.seen[32, 16][1].tolist() == [4 * meter.backwards, 12 * meter.backwards]
