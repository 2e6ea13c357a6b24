"""glu against the eager product of transformers: values, both gradients, strides, clamps, extremes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastft_kernels.mlp.activation import ACTIVATIONS
from fastft_kernels.mlp.glu import glu, glu_bwd_recompute, glu_recompute
from fastft_kernels.numerics import compare

from .examples import examples

# the interpreter's, where inf is right
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
EAGER = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swiglu_oai": lambda x: x * torch.sigmoid(x * 1.702),
}


def eager(gate, up, activation="silu", alpha=None, limit=None, up_offset=0.0):
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    a = EAGER[activation](gate) if alpha is None else gate * torch.sigmoid(gate * alpha)
    return a * (up + up_offset if up_offset else up)


def run(fn, gate, up, dh, **kwargs):
    """[h, dgate, dup], with gradients of fresh leaves that keep the strides of gate and up."""
    gate, up = (x.detach().requires_grad_() for x in (gate, up))
    h = fn(gate, up, **kwargs)
    return [h.detach(), *torch.autograd.grad(h, (gate, up), dh.to(h.dtype))]


def judge(gate, up, dh, **kwargs):
    return judge_all([(gate, up, dh)], **kwargs)


def judge_all(draws, **kwargs):
    """Judges the errors of several inputs as one sample: of a single number, eager's error may by chance be none. The
    last results."""
    ours = [run(glu, *d, **kwargs) for d in draws]
    theirs = [run(eager, *d, **kwargs) for d in draws]
    reference = [run(eager, *(x.double() for x in d), **kwargs) for d in draws]
    one = lambda results: [torch.cat([x.flatten() for x in xs]) for xs in zip(*results)]
    verdict = compare(one(ours), one(reference), one(theirs))
    assert verdict, verdict
    assert all(o.shape == t.shape for o, t in zip(ours[-1], reference[-1]))
    return ours[-1]


def draw(shape, dtype, device, scale=1.0, form="apart"):
    """gate, up as models hand them over."""
    *lead, n = shape
    if form == "chunk":
        both = torch.randn(*lead, 2 * n, device=device) * scale
        return both.to(dtype).chunk(2, dim=-1)
    if form == "interleaved":
        both = (torch.randn(*lead, 2 * n, device=device) * scale).to(dtype)
        return both[..., ::2], both[..., 1::2]
    if form == "transposed":  # the last dim is not the fastest, leading dims are not evenly spaced
        g, u = ((torch.randn(n, *lead, device=device) * scale).to(dtype) for _ in range(2))
        return g.movedim(0, -1), u.movedim(0, -1)
    if form == "mixed":
        return draw(shape, dtype, device, scale, "interleaved")[0], draw(shape, dtype, device, scale, "apart")[1]
    return tuple((torch.randn(shape, device=device) * scale).to(dtype) for _ in range(2))


FORMS = ["apart", "chunk", "interleaved", "transposed", "mixed"]


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, scale, dtype, device):
    gate, up = draw((3, 5, 67), dtype, device, scale)
    judge(gate, up, torch.randn(3, 5, 67, device=device, dtype=dtype), activation=activation)


@pytest.mark.parametrize("form", FORMS)
def test_strides_are_read_in_place(form, dtype, device):
    gate, up = draw((2, 3, 50), dtype, device, 2.0, form)
    before = gate.clone(), up.clone()
    ours = judge(gate, up, torch.randn(2, 3, 50, device=device, dtype=dtype), activation="gelu_tanh")
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])
    assert ours[0].is_contiguous()


def test_wider_than_a_block(dtype, device):
    for form in ("apart", "chunk"):
        gate, up = draw((3, 1300), dtype, device, 1.0, form)
        judge(gate, up, torch.randn(3, 1300, device=device, dtype=dtype))


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("variant", ["gpt_oss", "clamped silu", "alpha"])
def test_clamped(variant, scale, dtype, device):
    settings = {
        "gpt_oss": {"activation": "swiglu_oai", "limit": 7.0, "up_offset": 1.0},
        "clamped silu": {"limit": 1.5},
        "alpha": {"alpha": 1.3, "up_offset": 1.0},
    }[variant]
    gate, up = draw((4, 129), dtype, device, scale, "interleaved")
    judge(gate, up, torch.randn(4, 129, device=device, dtype=dtype), **settings)


def test_gradient_at_the_limit(dtype, device):
    """As torch.clamp: one at the limit, zero beyond it."""
    gate = torch.tensor([[1.99, 2.0, 2.01, -5.0, -2.0]], device=device, dtype=dtype)
    up = torch.tensor([[2.0, -2.0, 2.01, -2.01, 0.5]], device=device, dtype=dtype)
    _, dgate, dup = judge(gate, up, torch.ones_like(gate), limit=2.0, up_offset=1.0)
    assert (dgate != 0).tolist() == [[True, True, False, True, True]]
    assert (dup != 0).tolist() == [[True, True, False, False, True]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [30.0, 1e4, 6e4])
def test_large_inputs(activation, size, dtype, device):
    gate = torch.tensor([size, -size, 0.0, 1.0, -1.0] * 4, device=device, dtype=dtype)
    up = torch.tensor([0.0, 1.0, -1.0, 1e-3, 0.5], device=device, dtype=dtype).repeat_interleave(4)
    for x in run(glu, gate, up, torch.ones_like(up), activation=activation):
        assert not x.isnan().any()
    if size < 100:
        judge(gate, up, torch.ones_like(up), activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes_of_float32(activation, device):
    """Where x^2 overflows: saturated, not NaN. A square that overflows is inf, as in eager."""
    gate = torch.tensor([1e20, -1e20, 1e38, -1e38, 1e-40, -1e-40], device=device)
    up = torch.full_like(gate, 0.5)
    ours = run(glu, gate, up, torch.ones_like(up), activation=activation)
    reference = run(eager, gate.double(), up.double(), torch.ones_like(up), activation=activation)
    verdict = compare(ours, reference, [t.float() for t in reference])  # eager itself gives NaN here and there
    assert verdict, verdict


def test_nan_stays_nan(dtype, device):
    gate = torch.tensor([float("nan"), 1.0], device=device, dtype=dtype)
    for activation in ACTIVATIONS:
        assert glu(gate, torch.ones_like(gate), activation, limit=2.0).isnan().tolist() == [True, False]
        assert glu(torch.ones_like(gate), gate, activation, limit=2.0).isnan().tolist() == [True, False]


@pytest.mark.parametrize("upstream", ["expanded", "row", "transposed", "sliced"])
def test_upstream_gradients(upstream, dtype, device):
    gate, up = draw((4, 5, 6), dtype, device)
    dh = {
        "expanded": lambda: torch.full((), 0.7, device=device, dtype=dtype).expand(4, 5, 6),
        "row": lambda: torch.randn(4, 5, 1, device=device, dtype=dtype).expand(4, 5, 6),
        "transposed": lambda: torch.randn(6, 5, 4, device=device, dtype=dtype).permute(2, 1, 0),
        "sliced": lambda: torch.randn(4, 5, 18, device=device, dtype=dtype)[..., 2:14:2],
    }[upstream]()
    judge(gate, up, dh)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (1,), (1, 1), (5, 1), (2, 0, 3), (1, 1, 1, 9)])
def test_small_shapes(shape, dtype, device):
    draws = [(*draw(shape, dtype, device), torch.randn(shape, device=device, dtype=dtype)) for _ in range(16)]
    for x in judge_all(draws):
        assert x.shape == shape


@settings(
    max_examples=examples(20, 40),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_shape(dtype, device, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=2))) + (data.draw(st.integers(1, 40)),)
    form, activation = data.draw(st.sampled_from(FORMS)), data.draw(st.sampled_from(ACTIVATIONS))
    limit = data.draw(st.sampled_from([None, 0.5, 7.0]))
    scale, offset = data.draw(st.sampled_from([0.1, 1.0, 10.0])), data.draw(st.sampled_from([0.0, 1.0]))
    draws = [
        (*draw(shape, dtype, device, scale, form), torch.randn(shape, device=device, dtype=dtype))
        for _ in range(min(16, 1 + 64 // math.prod(shape)))
    ]
    judge_all(draws, activation=activation, limit=limit, up_offset=offset)


def test_mixed_dtypes(dtype, device):
    gate, up = draw((3, 20), torch.float32, device)
    h, dgate, dup = judge(gate.to(dtype), up, torch.randn(3, 20, device=device))
    assert (h.dtype, dgate.dtype, dup.dtype) == (torch.float32, dtype, torch.float32)


def test_float64_is_exact(device):
    gate, up = (x.requires_grad_() for x in draw((3, 7), torch.float64, device))
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda g, u: glu(g, u, activation, limit=1.1, up_offset=1.0), (gate, up))  # noqa: B023


@pytest.mark.parametrize("want", [(True, False), (False, True)])
def test_only_what_is_asked_for(want, dtype, device):
    gate, up = draw((3, 20), dtype, device)
    dh = torch.randn(3, 20, device=device, dtype=dtype)
    both = run(glu, gate, up, dh)[1:]
    leaves = [x.detach().requires_grad_(w) for x, w in zip((gate, up), want)]
    glu(*leaves).backward(dh)
    for leaf, w, full in zip(leaves, want, both):
        assert torch.equal(leaf.grad, full) if w else leaf.grad is None


def test_saves_gate_and_up_alone(dtype, device):
    gate, up = (x.requires_grad_() for x in draw((3, 20), dtype, device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        glu(gate, up, "gelu", limit=3.0)
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recomputed_bits(activation, dtype, device):
    """The same bits every time, from the forward, from glu_recompute, and from the backward that also gives h."""
    gate, up = draw((5, 77), dtype, device, 3.0, "chunk")
    dh = torch.randn(5, 77, device=device, dtype=dtype)
    for kwargs in ({}, {"limit": 2.0, "up_offset": 1.0}):
        first, second = (run(glu, gate, up, dh, activation=activation, **kwargs) for _ in range(2))
        dgate, dup, h = glu_bwd_recompute(dh, gate, up, activation, **kwargs)
        for x in (second, [glu_recompute(gate, up, activation, **kwargs)], [h, dgate, dup]):
            assert all(torch.equal(a, b) for a, b in zip(first, x))
    needs = gate.clone().requires_grad_()
    assert not glu_recompute(needs, up, activation).requires_grad
    assert not any(x.requires_grad for x in glu_bwd_recompute(dh, needs, up, activation))


def test_compiles_as_one_graph(dtype, device):
    gate, up = draw((4, 33), dtype, device)
    dh = torch.randn(4, 33, device=device, dtype=dtype)
    compiled = torch.compile(lambda g, u: glu(g, u, "silu", limit=2.0) * 2, fullgraph=True, backend="aot_eager")
    ours = run(compiled, gate, up, dh)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(lambda g, u: glu(g, u, limit=2.0) * 2, gate, up, dh)))


def test_fake_tensors_have_the_real_layout(dtype, device):
    real = draw((3, 5, 20), dtype, device, form="transposed")
    kept = run(glu, *real, torch.ones(3, 5, 20, device=device)) + list(glu_bwd_recompute(real[0], *real))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in real]
        made = run(glu, *fake, torch.ones(3, 5, 20, device=device)) + list(glu_bwd_recompute(fake[0], *fake))
    for r, f in zip(kept, made):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def test_autocast_changes_nothing(device):
    gate, up = draw((3, 20), torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(glu(gate, up), h := glu_recompute(gate, up))
    assert torch.equal(glu(gate, up), h)


def test_errors(device):
    x = torch.randn(3, 4, device=device)
    for bad in (
        lambda: glu(x, x[:, :2]),
        lambda: glu(x[0, 0], x[0, 0]),
        lambda: glu(x, x, "swish9"),
        lambda: glu(x, x, "gelu", alpha=2.0),
        lambda: glu(x, x, limit=0.0),
        lambda: glu(x.long(), x),
        lambda: glu_bwd_recompute(x[:2], x, x),
    ):
        with pytest.raises(ValueError, match="want"):
            bad()


def test_offsets_beyond_31_bits(dtype, device):
    """Four rows 2^30 elements apart: each stride fits in 32 bits, the offsets do not. (On a CPU untouched memory costs
    nothing.)"""
    far = 1 << 30
    gate, up = torch.empty(3 * far + 64, device=device, dtype=dtype).as_strided((2, 4, 32), (32, far, 1))
    gate.copy_(torch.randn(4, 32, device=device))
    up.copy_(torch.randn(4, 32, device=device))
    judge(gate, up, torch.randn(4, 32, device=device, dtype=dtype))
