"""layer_norm against torch.nn.functional.layer_norm, in float64 and in the dtype itself: y and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastft_kernels.norm import layer_norm as module
from fastft_kernels.norm.layer_norm import layer_norm, layer_norm_recompute, layer_norm_ref, layer_norm_with_stats
from fastft_kernels.numerics import compare
from fastft_kernels.runtime import rows as _rows
from fastft_kernels.runtime.dispatch import INTERPRETED, use_triton
from fastft_kernels.runtime.rows import RowTile

from .examples import examples

EPS = 1e-5


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


def stock(x, w, b, eps):
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def run(f, x, w, b, dy, eps=EPS, **kwargs):
    """y and the gradients of what is there."""
    leaves = {k: t.detach().requires_grad_() for k, t in {"dx": x, "dw": w, "db": b}.items() if t is not None}
    y = f(leaves["dx"], leaves.get("dw"), leaves.get("db"), eps, **kwargs)
    return {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))))}


def reference_of(x, w, b, dy, eps=EPS):
    return run(stock, *(None if t is None else t.double() for t in (x, w, b, dy)), eps)


def sample(shape, dtype, device, parameter_dtype=None):
    x = (torch.randn(shape, device=device) * 2 + 1).to(dtype)
    w = (torch.randn(shape[-1], device=device) * 0.5 + 1).to(parameter_dtype or dtype)
    b = torch.randn(shape[-1], device=device).to(parameter_dtype or dtype)
    return x, w, b, torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize("shape", [(0, 8), (1, 5), (3, 7), (2, 3, 64), (2, 5, 3, 16), (37, 130), (3, 1000)], ids=str)
def test_against_stock(shape, dtype, device):
    x, w, b, dy = sample(shape, dtype, device)
    verdict = compare(run(layer_norm, x, w, b, dy), reference_of(x, w, b, dy), run(stock, x, w, b, dy))
    assert verdict, verdict


@pytest.mark.parametrize("has", ["neither", "weight", "bias"])
@pytest.mark.parametrize("wide", [False, True])
def test_without_parameters(has, wide, dtype, device, request):
    if wide:
        request.getfixturevalue("narrow")
    x, w, b, dy = sample((6, 33), dtype, device)
    w, b = w if has == "weight" else None, b if has == "bias" else None
    verdict = compare(run(layer_norm, x, w, b, dy), reference_of(x, w, b, dy), run(stock, x, w, b, dy))
    assert verdict, verdict


def test_wide_rows(dtype, device, narrow):
    """Rows of several blocks, the last one partial, with very different means; several rows a program."""
    x, w, b, dy = sample((7, 45), dtype, device)
    x[:, :16] += 8
    verdict = compare(run(layer_norm, x, w, b, dy), reference_of(x, w, b, dy), run(stock, x, w, b, dy))
    assert verdict, verdict


def test_many_rows_a_program(dtype, device, narrow):
    x, w, b, dy = sample((37, 16), dtype, device)
    verdict = compare(run(layer_norm, x, w, b, dy), reference_of(x, w, b, dy), run(stock, x, w, b, dy))
    assert verdict, verdict


def test_the_widest_block(dtype, device):
    """More columns than any block of the launch table."""
    x, w, b, dy = sample((2, 16500), dtype, device)
    verdict = compare(run(layer_norm, x, w, b, dy), reference_of(x, w, b, dy), run(stock, x, w, b, dy))
    assert verdict, verdict


@pytest.mark.parametrize("wide", [False, True])
def test_mean_much_larger_than_the_deviation(wide, device, request):
    """E[x^2] - E[x]^2 would lose every digit here."""
    if wide:
        request.getfixturevalue("narrow")
    x, w, b, dy = sample((30, 60), torch.float32, device)
    x = x * 0.1 + 1000
    verdict = compare(run(layer_norm, x, w, b, dy), reference_of(x, w, b, dy), run(stock, x, w, b, dy))
    assert verdict, verdict


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
def test_mixed_dtypes(parameter_dtype, out_dtype, dtype, device):
    if INTERPRETED and parameter_dtype == torch.bfloat16:
        return  # the interpreter is wrong about bfloat16
    x, w, b, dy = sample((5, 40), dtype, device, parameter_dtype)
    ours = run(layer_norm, x, w, b, dy, out_dtype=out_dtype)
    dtypes = [ours[k].dtype for k in ("y", "dx", "dw", "db")]
    assert dtypes == [out_dtype or dtype, dtype, parameter_dtype, parameter_dtype]
    verdict = compare(ours, reference_of(x, w, b, dy), run(layer_norm_ref, x, w, b, dy, out_dtype=out_dtype))
    assert verdict, verdict


def test_float64_is_the_reference(device):
    x, w, b, dy = sample((5, 40), torch.float64, device)
    for key, value in run(layer_norm, x, w, b, dy).items():
        assert (value - reference_of(x, w, b, dy)[key]).abs().max() < 1e-13


def views(x):
    """Layouts of [B, H, S, D] with a contiguous last dimension, and some without."""
    b, h, _, d = x.shape
    yield "transposed", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "sliced", torch.cat([x, x], -1)[..., :d]
    fused = torch.cat([x, x[:, :1]], 1).transpose(1, 2).contiguous()  # [B, S, H + 1, D]
    yield "heads of a fused projection", fused[:, :, :h].transpose(1, 2)
    yield "expanded", x[:1].expand(b, -1, -1, -1)
    yield "last dimension strided", x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("index", range(5))
def test_strided(index, dtype, device):
    """Any layout of x and of the upstream gradient; from a kernel with the same bits as for contiguous tensors."""
    x, w, b, dy = sample((2, 3, 5, 16), dtype, device)
    name, view = list(views(x))[index]
    for dy_name, upstream in [("contiguous", dy), *views(dy), ("one number", dy[:1, :1, :1, :1].expand(dy.shape))]:
        want = run(layer_norm, view.contiguous(), w, b, upstream.contiguous())
        got = run(layer_norm, view, w, b, upstream)
        verdict = compare(got, reference_of(view, w, b, upstream), want)
        assert verdict, (name, dy_name, verdict)
        if use_triton(x):
            assert all(torch.equal(got[key], want[key]) for key in want), (name, dy_name)
    y, mean, rstd = layer_norm_with_stats(view, w, b, EPS)
    assert y.stride(-1) == 1
    assert name != "transposed" or y.stride() == view.stride()
    torch.testing.assert_close((mean, rstd), layer_norm_with_stats(view.contiguous(), w, b, EPS)[1:])


@settings(
    deadline=None,
    max_examples=examples(6, 20),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(lead=st.lists(st.integers(1, 6), max_size=3), n=st.integers(1, 150), bias=st.booleans(), swap=st.booleans())
def test_any_shape(dtype, device, lead, n, bias, swap):
    """eps is as large as the variance: for n = 2 the gradient is otherwise all cancellation, and the judge sees
    noise."""
    x, w, b, dy = sample((*lead, n), dtype, device)
    b = b if bias else None
    if swap and len(lead) > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    verdict = compare(run(layer_norm, x, w, b, dy, 4.0), reference_of(x, w, b, dy, 4.0), run(stock, x, w, b, dy, 4.0))
    assert verdict, verdict


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_infinities_stay_in_their_row(dtype, device):
    x, w, b, _ = sample((4, 64), dtype, device)
    x[1, 3], x[2, 5] = float("inf"), float("nan")
    y = layer_norm(x, w, b, EPS)
    assert y[[0, 3]].isfinite().all()
    assert y[1, 3].isnan()
    assert y[2].isnan().all()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("has", ["both", "weight", "neither"])
def test_recompute_has_the_same_bits(has, wide, dtype, device, request):
    if wide:
        request.getfixturevalue("narrow")
    x, w, b, _ = sample((1, 2, 3, 40), dtype, device)
    x = x.transpose(1, 2)
    w, b = w if has != "neither" else None, b if has == "both" else None
    y, mean, rstd = layer_norm_with_stats(x, w, b, EPS)
    assert [(s.shape, s.dtype) for s in (mean, rstd)] == [((6,), torch.float32)] * 2
    again = layer_norm_recompute(x.requires_grad_(), mean, rstd, w, b)
    assert torch.equal(again, y)
    assert again.stride() == y.stride()
    assert not again.requires_grad
    assert torch.equal(layer_norm(x, w, b, EPS), y)


def test_same_bits_twice(dtype, device):
    x, w, b, dy = sample((300 if not INTERPRETED else 40, 24), dtype, device)
    first, second = run(layer_norm, x, w, b, dy), run(layer_norm, x, w, b, dy)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_saves_x_weight_and_stats_only(dtype, device):
    x, w, b, _ = sample((6, 40), dtype, device)
    x.requires_grad_(), w.requires_grad_(), b.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, mean, rstd = layer_norm_with_stats(x, w, b, EPS)
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in (x, w, mean, rstd))
    assert not mean.requires_grad
    assert not rstd.requires_grad


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("wanted", ["x", "w", "b", "wb"])
def test_only_the_gradients_asked_for(wanted, wide, dtype, device, request):
    if wide:
        request.getfixturevalue("narrow")
    x, w, b, dy = sample((5, 40), dtype, device)
    all_of_them = run(layer_norm, x, w, b, dy)
    leaves = {k: t for k, t in {"x": x, "w": w, "b": b}.items() if k in wanted}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = layer_norm(x, w, b, EPS)
    y.backward(dy, retain_graph=True)
    for k, leaf in leaves.items():
        assert torch.equal(leaf.grad, all_of_them["d" + k])
    y.backward(dy)
    assert all(torch.equal(leaf.grad, 2 * all_of_them["d" + k]) for k, leaf in leaves.items())
    assert all(t.grad is None for k, t in {"x": x, "w": w, "b": b}.items() if k not in leaves)


def test_no_graph_without_grad_and_a_graph_of_the_gradient(device):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    with torch.no_grad():
        assert not layer_norm(x).requires_grad
    (g,) = torch.autograd.grad(layer_norm(x).square().sum(), x, create_graph=True)
    (g * torch.arange(8, device=device)).sum().backward()  # its values: tests/kernels/test_higher_order.py
    assert x.grad.isfinite().all() and x.grad.any()


def test_autocast_changes_nothing(dtype, device):
    x, w, b, dy = sample((6, 40), dtype, device)
    want = run(layer_norm, x, w, b, dy)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run(layer_norm, x, w, b, dy)
    for key in want:
        assert got[key].dtype == want[key].dtype
        assert torch.equal(got[key], want[key])


@pytest.mark.parametrize("transposed", [False, True])
def test_compiles_in_one_graph(transposed, dtype, device):
    x, w, b, dy = sample((2, 3, 5, 16), dtype, device)
    if transposed:
        x = x.transpose(1, 2)
    dy = dy.view(x.shape)

    def f(x, w, b, eps):
        y, mean, rstd = layer_norm_with_stats(x, w, b, eps)
        return y * 2 + layer_norm_recompute(x, mean, rstd, w, b)

    torch.compiler.reset()
    want = run(f, x, w, b, dy)
    got = run(torch.compile(f, fullgraph=True, backend="aot_eager"), x, w, b, dy)
    for key in want:
        assert torch.equal(got[key], want[key]), key


def test_operators_are_registered_right(dtype, device):
    x, w, b, _ = sample((2, 3, 5, 16), dtype, device)
    checks = ("test_schema", "test_faketensor")
    for view in (x, x.transpose(1, 2), x[..., :8].transpose(1, 2)):
        weight, bias = (t[: view.shape[-1]].contiguous() for t in (w, b))
        y, mean, rstd = module._fwd(view, weight, bias, EPS, dtype)
        torch.library.opcheck(
            torch.ops.fastft.layer_norm_fwd.default, (view, weight, bias, EPS, dtype), test_utils=checks
        )
        torch.library.opcheck(
            torch.ops.fastft.layer_norm_recompute.default, (view, mean, rstd, weight, bias, dtype), test_utils=checks
        )
        for need in ((True, True, True), (True, False, False), (False, False, True)):
            torch.library.opcheck(
                torch.ops.fastft.layer_norm_bwd.default, (y, view, mean, rstd, weight, *need), test_utils=checks
            )


def test_fake_tensors(dtype):
    with FakeTensorMode():
        x = torch.empty(2, 5, 3, 16, dtype=dtype, requires_grad=True)
        w, b = (torch.empty(16, dtype=torch.float32, requires_grad=True) for _ in range(2))
        y, mean, rstd = layer_norm_with_stats(x.transpose(1, 2), w, b, EPS)
        y.sum().backward()
        assert (y.shape, y.dtype, mean.shape, rstd.shape) == ((2, 3, 5, 16), dtype, (30,), (30,))
        assert (x.grad.shape, x.grad.dtype, w.grad.dtype, b.grad.dtype) == (
            x.shape,
            dtype,
            torch.float32,
            torch.float32,
        )


def test_arguments_are_checked(device):
    x, w = torch.randn(3, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match=r"want x \[..., N\], weight and bias \[N\] or None, got \[\[3, 8\], \[7\]\]"):
        layer_norm(x, w[:7])
    with pytest.raises(TypeError, match="floating"):
        layer_norm(x, w, w.int())
    with pytest.raises(ValueError, match=r"want mean and rstd \[3\]"):
        layer_norm_recompute(x, torch.ones(3, device=device), torch.ones(4, device=device), w)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(dtype, device):
    """Rows 2^30 elements apart (memory between them is never touched): int32 offsets would wrap."""
    torch.use_deterministic_algorithms(False)  # which would fill the memory
    step, n = 2**30 + 16, 64
    x = torch.empty(2 * step + n, dtype=dtype, device=device).as_strided((3, n), (step, 1))
    x.copy_(torch.randn(3, n))
    _, w, b, dy = sample((3, n), dtype, device)
    far, mean, rstd = layer_norm_with_stats(x, w, b, EPS)
    assert torch.equal(far, layer_norm(x.clone(), w, b, EPS))
    need = (True, True, True)
    for far, near in zip(module._bwd(dy, x, mean, rstd, w, *need), module._bwd(dy, x.clone(), mean, rstd, w, *need)):
        assert torch.equal(far, near)
