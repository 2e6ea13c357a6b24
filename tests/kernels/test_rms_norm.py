"""rms_norm against the formula in float64 and the stock modules of transformers: y and every gradient."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fastft_kernels.norm import rms_norm as module
from fastft_kernels.norm.rms_norm import rms_norm, rms_norm_recompute, rms_norm_ref, rms_norm_with_rstd
from fastft_kernels.numerics import compare
from fastft_kernels.quant.fp8 import quantize_rows_ref
from fastft_kernels.runtime import rows as _rows
from fastft_kernels.runtime.dispatch import INTERPRETED, use_triton
from fastft_kernels.runtime.rows import RowTile

from .examples import examples

EPS = 1e-5
STOCK = {
    "llama": (LlamaRMSNorm, {"cast": "before"}),
    "t5": (T5LayerNorm, {"cast": "before"}),
    "gemma": (GemmaRMSNorm, {"cast": "after", "offset": 1.0}),
    "olmo2": (Olmo2RMSNorm, {"cast": "after"}),
}


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def narrow(monkeypatch):
    """Blocks of 16 columns, so that short rows are wide; two programs share the rows."""
    monkeypatch.setattr(module, "FWD_TILES", (RowTile(16, 4, 4),))
    monkeypatch.setattr(module, "BWD_TILES", (RowTile(16, 4, 4),))
    monkeypatch.setattr(_rows, "PARTIALS", 2)


def reference_of(x, w, dy, offset=0.0, eps=EPS):
    """y, dx, dw in float64 by autograd through the formula as printed."""
    x, dy = x.detach().double().requires_grad_(), dy.double()
    w = None if w is None else w.detach().double().requires_grad_()
    y = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    if w is not None:
        y = y * (offset + w)
    return grads_of(y, x, w, dy)


def grads_of(y, x, w, dy):
    inputs = [t for t in (x, w) if t is not None]
    found = torch.autograd.grad(y, inputs, dy)
    return {"y": y, "dx": found[0], "dw": found[1] if w is not None else None}


def run(f, x, w, dy, **kwargs):
    x = x.detach().requires_grad_()
    w = None if w is None else w.detach().requires_grad_()
    y = f(x, w, EPS, **kwargs)
    return grads_of(y, x, w, dy.to(y.dtype))


def sample(shape, dtype, device, weight_dtype=None):
    x = torch.randn(shape, device=device).mul(2).to(dtype)
    w = (torch.randn(shape[-1], device=device) * 0.5 + 1).to(weight_dtype or dtype)
    dy = torch.randn(shape, device=device).to(torch.promote_types(dtype, weight_dtype or dtype))
    return x, w, dy


@pytest.mark.parametrize("shape", [(0, 8), (1, 5), (3, 7), (2, 3, 64), (2, 5, 3, 16), (37, 130), (3, 1000)], ids=str)
@pytest.mark.parametrize("kind", STOCK)
def test_against_stock(kind, shape, dtype, device):
    x, w, dy = sample(shape, dtype, device)
    cls, kwargs = STOCK[kind]
    norm = cls(shape[-1], eps=EPS).to(device, dtype)
    norm.weight.data.copy_(w)
    leaf = x.clone().requires_grad_()
    eager = grads_of(norm(leaf), leaf, norm.weight, dy)
    verdict = compare(run(rms_norm, x, w, dy, **kwargs), reference_of(x, w, dy, kwargs.get("offset", 0.0)), eager)
    assert verdict, verdict


@pytest.mark.parametrize("cast", ["before", "after"])
def test_without_weight(cast, dtype, device):
    x, _, dy = sample((6, 33), dtype, device)
    verdict = compare(
        run(rms_norm, x, None, dy, cast=cast), reference_of(x, None, dy), run(rms_norm_ref, x, None, dy, cast=cast)
    )
    assert verdict, verdict


@pytest.mark.parametrize("cast", ["before", "after"])
def test_wide_rows(cast, dtype, device, narrow):
    """Rows of several blocks, the last one partial; several rows a program."""
    x, w, dy = sample((7, 45), dtype, device)
    verdict = compare(
        run(rms_norm, x, w, dy, cast=cast, offset=1.0),
        reference_of(x, w, dy, 1.0),
        run(rms_norm_ref, x, w, dy, cast=cast, offset=1.0),
    )
    assert verdict, verdict


def test_many_rows_a_program(dtype, device, narrow):
    x, w, dy = sample((37, 16), dtype, device)
    verdict = compare(run(rms_norm, x, w, dy), reference_of(x, w, dy), run(rms_norm_ref, x, w, dy))
    assert verdict, verdict


def test_the_widest_block(dtype, device):
    """More columns than any block of the launch table."""
    x, w, dy = sample((2, 16500), dtype, device)
    verdict = compare(run(rms_norm, x, w, dy), reference_of(x, w, dy), run(rms_norm_ref, x, w, dy))
    assert verdict, verdict


@pytest.mark.parametrize("cast", ["before", "after"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes(cast, weight_dtype, dtype, device):
    """The result has torch's promoted dtype where the product comes last, that of x where the rounding does."""
    if INTERPRETED and weight_dtype == torch.bfloat16:
        return  # the interpreter is wrong about bfloat16
    x, w, dy = sample((5, 40), dtype, device, weight_dtype)
    ours = run(rms_norm, x, w, dy, cast=cast)
    assert ours["y"].dtype == ((x * w).dtype if cast == "before" else dtype)
    assert ours["dx"].dtype == dtype
    assert ours["dw"].dtype == weight_dtype
    dy = dy.to(ours["y"].dtype)
    verdict = compare(ours, reference_of(x, w, dy), run(rms_norm_ref, x, w, dy, cast=cast))
    assert verdict, verdict


@pytest.mark.parametrize("cast", ["before", "after"])
def test_out_dtype(cast, dtype, device):
    x, w, dy = sample((5, 40), dtype, device)
    ours = run(rms_norm, x, w, dy.float(), cast=cast, out_dtype=torch.float32)
    assert ours["y"].dtype == torch.float32
    verdict = compare(
        ours, reference_of(x, w, dy), run(rms_norm_ref, x, w, dy.float(), cast=cast, out_dtype=torch.float32)
    )
    assert verdict, verdict


def test_float64_is_the_reference(device):
    x, w, dy = sample((5, 40), torch.float64, device)
    for key, value in run(rms_norm, x, w, dy).items():
        assert (value - reference_of(x, w, dy)[key]).abs().max() < 1e-13


def views(x):
    """Layouts of [B, H, S, D] with a contiguous last dimension, and some without."""
    b, h, s, d = x.shape
    yield "transposed", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "sliced", torch.cat([x, x], -1)[..., :d]
    fused = torch.cat([x, x[:, :1]], 1).transpose(1, 2).contiguous()  # [B, S, H + 1, D]
    yield "heads of a fused projection", fused[:, :, :h].transpose(1, 2)
    yield "expanded", x[:1].expand(b, -1, -1, -1)
    yield "last dimension strided", x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield "every second", torch.cat([x, x], -1).view(b, h, s, d, 2)[..., 0]


@pytest.mark.parametrize("index", range(6))
def test_strided(index, dtype, device):
    """Any layout of x and of the upstream gradient; from a kernel with the same bits as for contiguous tensors."""
    x, w, dy = sample((2, 3, 5, 16), dtype, device)
    name, view = list(views(x))[index]
    for dy_name, upstream in [("contiguous", dy), *views(dy), ("one number", dy[:1, :1, :1, :1].expand(dy.shape))]:
        want = run(rms_norm, view.contiguous(), w, upstream.contiguous())
        got = run(rms_norm, view, w, upstream)
        verdict = compare(got, reference_of(view, w, upstream), want)
        assert verdict, (name, dy_name, verdict)
        if use_triton(x):
            assert all(torch.equal(got[key], want[key]) for key in want), (name, dy_name)
    y, rstd = rms_norm_with_rstd(view, w, EPS)
    assert y.stride(-1) == 1
    assert name != "transposed" or y.stride() == view.stride()
    torch.testing.assert_close(rstd, rms_norm_with_rstd(view.contiguous(), w, EPS)[1])


def test_more_leading_strides_than_a_kernel_takes(dtype, device):
    x, w, dy = sample((2, 3, 2, 4, 2, 8), dtype, device)
    x = x.permute(4, 2, 0, 3, 1, 5)
    dy = dy.view(x.shape)
    got = run(rms_norm, x, w, dy)
    assert got["y"].stride() == x.stride()
    verdict = compare(got, reference_of(x, w, dy), run(rms_norm_ref, x, w, dy))
    assert verdict, verdict


@settings(
    deadline=None,
    max_examples=examples(6, 20),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lead=st.lists(st.integers(1, 6), max_size=3),
    n=st.integers(1, 150),
    cast=st.sampled_from(["before", "after"]),
    offset=st.sampled_from([0.0, 1.0]),
    swap=st.booleans(),
)
def test_any_shape(dtype, device, lead, n, cast, offset, swap):
    """eps is as large as mean(x^2): for n = 1 the gradient is otherwise all cancellation, and the judge sees noise."""
    x, w, dy = sample((*lead, n), dtype, device)
    if swap and len(lead) > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)

    def f(function):
        return run(lambda x, w, _, **kw: function(x, w, 4.0, **kw), x, w, dy, cast=cast, offset=offset)

    verdict = compare(f(rms_norm), reference_of(x, w, dy, offset, eps=4.0), f(rms_norm_ref))
    assert verdict, verdict


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_large_and_small_values(dtype, device):
    """No overflow where the square exceeds the dtype's range; infinities and NaN stay in their row."""
    x, w, dy = sample((6, 64), dtype, device)
    scale = torch.tensor([1e-6, 1e-3, 1.0, 1e2, 5e3, 1.0], device=device)[:, None]
    x = (x * scale).to(dtype)
    verdict = compare(run(rms_norm, x, w, dy), reference_of(x, w, dy), run(rms_norm_ref, x, w, dy))
    assert verdict, verdict
    x[2, 3], x[4, 5] = float("inf"), float("nan")
    y = rms_norm(x, w, EPS)
    assert y[[0, 1, 3, 5]].isfinite().all()
    assert y[4].isnan().all()
    assert y[2, 3].isnan()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_recompute_has_the_same_bits(kind, wide, dtype, device, request):
    if wide:
        request.getfixturevalue("narrow")
    x, w, _ = sample((1, 2, 3, 40), dtype, device)
    x = x.transpose(1, 2)
    _, kwargs = STOCK[kind]
    y, rstd = rms_norm_with_rstd(x, w, EPS, **kwargs)
    assert rstd.shape == (6,)
    assert rstd.dtype == torch.float32
    again = rms_norm_recompute(x.requires_grad_(), rstd, w, **kwargs)
    assert torch.equal(again, y)
    assert again.stride() == y.stride()
    assert not again.requires_grad
    assert torch.equal(rms_norm(x, w, EPS, **kwargs), y)


def test_same_bits_twice(dtype, device):
    x, w, dy = sample((300 if not INTERPRETED else 40, 24), dtype, device)
    first, second = run(rms_norm, x, w, dy), run(rms_norm, x, w, dy)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_saves_x_weight_and_rstd_only(dtype, device):
    x, w, _ = sample((6, 40), dtype, device)
    x.requires_grad_(), w.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, rstd = rms_norm_with_rstd(x, w, EPS)
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in (x, w, rstd))
    assert not rstd.requires_grad


def test_saved_tensors_may_come_back_as_copies(dtype, device):
    """In another layout, too: an offloading hook keeps values, not strides."""
    x, w, dy = sample((2, 3, 5, 16), dtype, device)
    x = x.transpose(1, 2)
    dy = dy.view(x.shape)
    want = run(rms_norm, x, w, dy)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
        got = run(rms_norm, x, w, dy)
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("wanted", ["x", "w"])
def test_only_the_gradient_asked_for(wanted, wide, dtype, device, request):
    if wide:
        request.getfixturevalue("narrow")
    x, w, dy = sample((5, 40), dtype, device)
    both = run(rms_norm, x, w, dy)
    leaf = {"x": x, "w": w}[wanted].requires_grad_()
    y = rms_norm(x, w, EPS)
    assert [f is not None for f, _ in y.grad_fn.next_functions[:2]] == [wanted == "x", wanted == "w"]
    y.backward(dy, retain_graph=True)
    first = leaf.grad.clone()
    y.backward(dy)
    assert torch.equal(first, both["d" + wanted])
    assert torch.equal(leaf.grad, first + first)
    assert (x.grad is None) != (w.grad is None)


def test_unused_result(device):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    y, _ = rms_norm_with_rstd(x, None, EPS)
    with torch.no_grad():
        assert not rms_norm(x, None, EPS).requires_grad
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    g.sum().backward()  # of the gradient: tests/kernels/test_higher_order.py
    assert x.grad.isfinite().all() and x.grad.any()


def test_autocast_changes_nothing(dtype, device):
    x, w, dy = sample((6, 40), dtype, device)
    want = run(rms_norm, x, w, dy)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run(rms_norm, x, w, dy)
    for key in want:
        assert got[key].dtype == want[key].dtype
        assert torch.equal(got[key], want[key])


@pytest.mark.parametrize("transposed", [False, True])
def test_compiles_in_one_graph(transposed, dtype, device):
    x, w, dy = sample((2, 3, 5, 16), dtype, device)
    if transposed:
        x = x.transpose(1, 2)
    dy = dy.view(x.shape)

    def f(x, w, eps):
        y, rstd = rms_norm_with_rstd(x, w, eps, offset=1.0)
        return y * 2 + rms_norm_recompute(x, rstd, w, offset=1.0)

    torch.compiler.reset()
    want = run(f, x, w, dy)
    got = run(torch.compile(f, fullgraph=True, backend="aot_eager"), x, w, dy)
    for key in want:
        assert torch.equal(got[key], want[key]), key


def test_operators_are_registered_right(dtype, device):
    x, w, _ = sample((2, 3, 5, 16), dtype, device)
    for view in (x, x.transpose(1, 2), x[..., :8].transpose(1, 2)):
        weight = w[: view.shape[-1]].contiguous()
        y, rstd = module._fwd(view, weight, EPS, 0.0, True, dtype)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            torch.ops.fastft.rms_norm_fwd.default, (view, weight, EPS, 0.0, True, dtype), test_utils=checks
        )
        torch.library.opcheck(
            torch.ops.fastft.rms_norm_recompute.default, (view, rstd, weight, 0.0, True, dtype), test_utils=checks
        )
        for need_dx, need_dw in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                torch.ops.fastft.rms_norm_bwd.default, (y, view, rstd, weight, 0.0, need_dx, need_dw), test_utils=checks
            )


def test_fake_tensors(dtype):
    with FakeTensorMode():
        x = torch.empty(2, 5, 3, 16, dtype=dtype, requires_grad=True)
        w = torch.empty(16, dtype=torch.float32, requires_grad=True)
        y, rstd = rms_norm_with_rstd(x.transpose(1, 2), w, EPS)
        y.sum().backward()
        assert (y.shape, y.dtype, rstd.shape) == ((2, 3, 5, 16), torch.float32, (30,))
        assert (x.grad.shape, x.grad.dtype, w.grad.dtype) == (x.shape, dtype, torch.float32)


def test_arguments_are_checked(device):
    x, w = torch.randn(3, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match=r"want x \[..., N\] and weight \[N\] or None, got \[3, 8\] and \[7\]"):
        rms_norm(x, w[:7])
    with pytest.raises(TypeError, match="floating"):
        rms_norm(x.long(), w)
    with pytest.raises(ValueError, match="'sideways'"):
        rms_norm(x, w, cast="sideways")
    with pytest.raises(ValueError, match="offset 0 without a weight"):
        rms_norm(x, offset=1.0)
    with pytest.raises(ValueError, match=r"want rstd \[3\]"):
        rms_norm_recompute(x, torch.ones(4, device=device), w)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(dtype, device):
    """Rows 2^30 elements apart (memory between them is never touched): int32 offsets would wrap."""
    torch.use_deterministic_algorithms(False)  # which would fill the memory
    step, n = 2**30 + 16, 64
    storage = torch.empty(2 * step + n, dtype=dtype, device=device)
    x = storage.as_strided((3, n), (step, 1))
    x.copy_(torch.randn(3, n))
    w = torch.ones(n, dtype=dtype, device=device)
    assert torch.equal(rms_norm(x, w, EPS), rms_norm(x.clone(), w, EPS))
    dy = torch.randn(3, n, device=device).to(dtype)
    _, rstd = rms_norm_with_rstd(x, w, EPS)
    for far, near in zip(
        module._bwd(dy, x, rstd, w, 0.0, True, True), module._bwd(dy, x.clone(), rstd, w, 0.0, True, True)
    ):
        assert torch.equal(far, near)


ROUNDED = {
    "rows": lambda draw: draw(7, 24),
    "one row": lambda draw: draw(1, 5),
    "odd": lambda draw: draw(2, 3, 33),
    "heads of a view": lambda draw: draw(2, 3, 4, 16).transpose(1, 2),
    "wide": lambda draw: draw(3, 17000),
    "empty": lambda draw: draw(0, 8),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("shape", ROUNDED)
@pytest.mark.parametrize("weighted", [True, False])
def test_rounded_in_the_same_launch(shape, weighted, dtype, device):
    """y, r, the gradients and y's rows in e4m3 are the bits of the norm and of the quantisation one after the other."""

    def draw(*shape):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device)
        if x.numel() > 40:
            x.view(-1)[3], x.view(-1)[-2] = float("nan"), float("inf")
        return x.to(dtype)

    x = ROUNDED[shape](draw).detach().requires_grad_()
    w = torch.linspace(-2, 2, x.shape[-1], device=device, dtype=dtype).requires_grad_() if weighted else None
    for offset, before in ((0.0, True), (1.0 if weighted else 0.0, False)):
        form = (EPS, offset, before, dtype)
        y, rstd = module.run(x, w, *form)
        found = module.run_rounded(x, w, *form)
        assert not any(t.requires_grad for t in found[1:])
        q, scale = quantize_rows_ref(y.detach().reshape(-1, x.shape[-1]))
        for mine, theirs in zip(found, (y, rstd, q.view(torch.uint8), scale)):
            mine = mine.view(torch.uint8) if mine.dtype == q.dtype else mine
            assert mine.stride() == theirs.stride() and torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))
        given = torch.ones_like(y)
        inputs = [t for t in (x, w) if t is not None]
        for mine, theirs in zip(torch.autograd.grad(found[0], inputs, given), torch.autograd.grad(y, inputs, given)):
            assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))
