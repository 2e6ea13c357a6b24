"""linear_logprob against float64 and against log_softmax of the logits in the same dtype: outputs, gradients, products,
bytes."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastft_kernels.lm_head import online_softmax as osm
from fastft_kernels.lm_head.linear_logprob import OUTPUTS, linear_logprob
from fastft_kernels.lm_head.tiles import tile_bytes, tile_sizes
from fastft_kernels.numerics import compare
from fastft_kernels.recompute.recomputation import Recomputation, attach
from fastft_kernels.runtime.dispatch import INTERPRETED

from .head_cases import SCALINGS, TILE, Count, N, V, head, leaves, logits_of

SIXTEEN = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter truncates bfloat16


def eager(hidden, weight, target, bias=None, *, ignore_index=-100, **scaling):
    """What every output means, from whole logits in hidden's dtype."""
    z = logits_of(hidden, weight, bias, **scaling)
    log_p = z.log_softmax(-1)
    out = {
        "log_probs": log_p.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == target,
    }
    return {k: x.masked_fill(target == ignore_index, 0) for k, x in out.items()}


def ours(hidden, weight, target, bias=None, **kwargs):
    return linear_logprob(hidden, weight, target, bias, **{"tile": TILE, **kwargs})._asdict()


def gradients(fn, tensors, target, dtype, trained, weights, **kwargs):
    """(gradients, outputs) of sum_k <weights_k, output_k>; weights: {output: upstream gradient}."""
    hidden, weight, bias = xs = leaves(tensors, dtype, trained)
    out = fn(hidden, weight, target, bias, **kwargs)
    loss = sum((out[k] * g.to(out[k].dtype)).sum() for k, g in weights.items())
    return torch.autograd.grad(loss, [x for x in xs if x.requires_grad]), out


def judge(tensors, target, dtype, trained, weights, scaling, **kwargs):
    wanted = tuple(k for k in OUTPUTS if k in weights)
    got, got_out = gradients(ours, tensors, target, dtype, trained, weights, outputs=wanted, **scaling, **kwargs)
    reference, reference_out = gradients(eager, tensors, target, torch.float64, trained, weights, **scaling)
    base, base_out = gradients(eager, tensors, target, dtype, trained, weights, **scaling)
    for k in wanted:
        assert got_out[k].dtype == torch.promote_types(dtype, torch.float32)
        verdict = compare(got_out[k], reference_out[k], base_out[k].to(got_out[k].dtype), k)
        assert verdict, str(verdict)
    for name, *gs in zip(("dh", "dW", "db"), got, reference, base):
        assert gs[0].dtype == dtype
        verdict = compare(*gs, name)
        assert verdict, str(verdict)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_gradients(dtype, device, trained, scaling):
    hidden, weight, target, bias = head(dtype=dtype, device=device)
    weights = {"log_probs": torch.randn(N, device=device)}
    judge((hidden, weight, bias), target, dtype, trained, weights, SCALINGS[scaling], compact=scaling == "scaled")


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_entropy_gradients(dtype, device, trained, scaling):
    hidden, weight, target, bias = head(dtype=dtype, device=device)
    g, ge = torch.randn(2, N, device=device)
    judge(
        (hidden, weight, bias),
        target,
        dtype,
        trained,
        {"log_probs": g, "entropy": ge},
        SCALINGS[scaling],
        compact=False,
    )
    if not INTERPRETED:
        judge((hidden, weight, bias), target, dtype, trained, {"entropy": ge}, SCALINGS[scaling])


@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_output(dtype, device, scaling):
    hidden, weight, target, bias = head(dtype=dtype, device=device)
    z = logits_of(hidden.double(), weight.double(), bias.double())
    target[0], target[2] = z[0].argmax(), z[2].argmax()
    got = ours(hidden, weight, target, bias, outputs=OUTPUTS, **SCALINGS[scaling])
    reference = eager(hidden.double(), weight.double(), target, bias.double(), **SCALINGS[scaling])
    base = eager(hidden, weight, target, bias, **SCALINGS[scaling])
    assert torch.equal(got.pop("is_top1"), reference["is_top1"])
    assert reference["is_top1"].sum() >= 2
    for k, x in got.items():
        verdict = compare(x, reference[k], base[k].to(x.dtype), k)
        assert verdict, str(verdict)


def test_first_maximum_wins(device):
    hidden, weight = torch.ones(3, 1, device=device), torch.zeros(300, 1, device=device)
    weight[[7, 50, 290]] = 1.0
    target = torch.tensor([7, 50, 290], device=device)
    assert linear_logprob(hidden, weight, target, outputs=("is_top1",), tile=TILE).is_top1.tolist() == [
        True,
        False,
        False,
    ]


def test_outputs_not_asked_are_none(device):
    hidden, weight, target, _ = head(device=device)
    got = linear_logprob(hidden, weight, target, outputs=("mean_logits",), tile=TILE)
    assert [x is None for x in got] == [True, True, True, False, True]


# -----------------------------------------------------------------------------------------------------------------
# precision


def confident_rows(rows, h, v, dtype, device):
    """Rows whose 1 - p_t runs from 1 down to below 1e-6, in values exact in dtype."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(v, h, generator=g, dtype=torch.float64) / h**0.5
    target = torch.randint(0, v, (rows,), generator=g)
    noise = torch.randn(rows, h, generator=g, dtype=torch.float64)
    hidden = noise + torch.linspace(0, 24, rows, dtype=torch.float64).unsqueeze(1) * weight[target]
    return hidden.to(device, dtype), weight.to(device, dtype), target.to(device)


def test_precision_by_confidence(device):
    """The relative error of dh does not grow where the model is sure; log-probabilities are right to 1e-5."""
    rows, h, v = (48, 64, 300) if INTERPRETED else (400, 256, 2000)
    hidden, weight, target = confident_rows(rows, h, v, SIXTEEN, device)
    x = hidden.clone().requires_grad_()
    got = linear_logprob(x, weight, target, tile=(rows, 256)).log_probs
    x64 = hidden.double().requires_grad_()
    want = logits_of(x64, weight.double()).log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
    assert (got - want).abs().max() <= 1e-5
    w = -torch.expm1(want.detach())
    g = 1 / w.clamp(min=1e-6) if torch.float16 == SIXTEEN else torch.ones_like(w)  # it does not hold a gradient of 1e-6
    (dx,) = torch.autograd.grad(got, x, g.float())
    (dx64,) = torch.autograd.grad(want, x64, g)
    edges = [0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.9, 1.1]
    for low, high in itertools.pairwise(edges):
        at = (w >= low) & (w < high)
        assert at.sum() >= 2, (low, int(at.sum()))
        error = (dx[at] - dx64[at]).norm() / dx64[at].norm()
        assert error <= 0.004, (low, float(error))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("size", [2.0**12, 2.0**-6], ids=["small", "large"])
def test_float16_range(device, size, trained, entropy):
    """float16 holds neither the 1e-7 of a sure row nor the 1e6 of a scaled loss: dh is right where dh itself is in
    range."""
    hidden, weight, target = confident_rows(16 if INTERPRETED else 40, 64, 300, torch.float16, device)
    hidden, weight = hidden / size, weight * size
    upstream = 1.0 if size > 1 else 1e6
    xs = [x.clone().requires_grad_(i == 0 or trained) for i, x in enumerate((hidden, weight))]
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    pick = lambda o: o["entropy"] if entropy else o["log_probs"]
    out = pick(linear_logprob(*xs, target, tile=TILE, outputs=("log_probs", "entropy"))._asdict())
    want = eager(*wide, target)
    (dx,) = torch.autograd.grad(out.sum() * upstream, xs[0])
    (dx64,) = torch.autograd.grad(pick(want).sum() * upstream, wide[0])
    assert torch.isfinite(dx).all()
    in_range = dx64.abs().amax(1) > 100 * torch.finfo(torch.float16).tiny
    assert ((dx - dx64).norm(dim=1) <= 4e-3 * dx64.norm(dim=1))[in_range].all()
    w = -torch.expm1(want["log_probs"])
    assert in_range[w < 1e-5].any() if size > 1 else w.max() * upstream > 65504


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_float16_keeps_small_and_large_gradients(device, trained, entropy):
    """float16 knows neither the 1e-7 of a sure row nor the 1e5 of a scaled loss."""
    hidden, weight, target = confident_rows(12 if INTERPRETED else 40, 64, 300, torch.float16, device)
    upstream = torch.logspace(4.6, 0, len(target), device=device).flip(0)  # the surest rows get the largest
    xs = [x.clone().requires_grad_(i == 0 or trained) for i, x in enumerate((hidden, weight))]
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    got = linear_logprob(*xs, target, tile=TILE, outputs=("log_probs", "entropy"))
    want = eager(*wide, target)
    pick = lambda o: o["entropy"] if entropy else o["log_probs"]
    dx = torch.autograd.grad((pick(got._asdict()) * upstream).sum(), [x for x in xs if x.requires_grad])
    dx64 = torch.autograd.grad((pick(want) * upstream).sum(), wide[: len(dx)])
    for a, b in zip(dx, dx64):
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= 1e-3 * b.norm()
    in_range = dx64[0].abs().amax(1) > 100 * torch.finfo(torch.float16).tiny  # else float16 cannot hold the result
    sure = (-torch.expm1(want["log_probs"]) < 1e-4) & in_range
    assert sure.any()
    assert ((dx[0] - dx64[0]).norm(dim=1) <= 4e-3 * dx64[0].norm(dim=1))[sure].all()


# --------------------------------------------------------------------------------------------------------- products and
# bytes


def steps(hidden, weight, target, bias, outputs=("log_probs",), **kwargs):
    """One forward, and a backward where a gradient is wanted, on everything asked for that is differentiable."""
    out = linear_logprob(hidden, weight, target, bias, outputs=outputs, **kwargs)
    if out.log_probs.requires_grad:
        sum(x.sum() for x in (out.log_probs, out.entropy) if x is not None).backward()
    return out


@pytest.mark.parametrize(
    ("needs", "outputs", "units"),
    [
        ("", OUTPUTS, 1),
        ("h", ("log_probs",), 2),
        ("h", ("log_probs", "is_top1"), 2),
        ("h", ("log_probs", "entropy"), 4),
        ("hw", ("log_probs",), 4),
        ("hwb", ("log_probs", "entropy"), 4),
        ("w", ("log_probs",), 3),
        ("b", ("log_probs",), 2),
        ("hb", ("log_probs",), 3),
    ],
)
def test_products(device, needs, outputs, units):
    hidden, weight, target, bias = head(h=6 if INTERPRETED else 24, device=device, ignored=())
    for name, x in zip("hwb", (hidden, weight, bias)):
        x.requires_grad_(name in needs)
    unit = 2 * N * hidden.shape[1] * V
    with Count() as count:
        steps(hidden, weight, target, bias, outputs, tile=TILE)
    assert count.products == units * unit
    assert count.largest < N * V, "a (tokens, vocabulary) tensor"
    for name, x in zip("hwb", (hidden, weight, bias)):
        assert (x.grad is not None) == (name in needs)
    if device.type == "cpu":
        with FlopCounterMode(display=False) as flops:
            steps(hidden, weight, target, bias, outputs, tile=TILE)
        assert flops.get_total_flops() == units * unit


def test_an_entropy_without_gradient_costs_nothing(device):
    hidden, weight, target, bias = head(device=device, ignored=())
    hidden.requires_grad_()
    with Count() as count:
        linear_logprob(
            hidden, weight, target, bias, outputs=("log_probs", "entropy"), tile=TILE
        ).log_probs.sum().backward()
    assert count.products == 2 * 2 * N * hidden.shape[1] * V


def test_ignored_rows_cost_nothing_when_compact(device):
    hidden, weight, target, bias = head(device=device)
    hidden.requires_grad_()
    with Count() as count:
        steps(hidden, weight, target, bias, tile=TILE, compact=True)
    assert count.products == 2 * 2 * int((target >= 0).sum()) * hidden.shape[1] * V


@pytest.mark.parametrize(
    "view", [lambda h: h, lambda h: h[:, 0:], lambda h: h.view(1, *h.shape)[0]], ids=["itself", "slice", "rows"]
)
def test_saves_the_jacobian_and_what_lives_anyway(device, view):
    """Beside the head, its input's recomputation and the targets: J and 1 - p. Never hidden, where something recomputes
    it."""
    x, weight, target, bias = head(device=device)
    hidden = x.requires_grad_() * 2
    attach(hidden, Recomputation((x,), lambda x: x * 2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear_logprob(view(hidden), weight, target, bias, tile=TILE, compact=False)
    given = {t.data_ptr() for t in (x, weight, bias)}
    fresh = [t for t in saved if t.data_ptr() not in given and t.is_floating_point()]
    assert sorted(t.numel() for t in fresh) == [N, hidden.numel()]
    assert not any(t.data_ptr() == hidden.data_ptr() for t in saved)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_memory(device, trained):
    """The docstring's formula bounds what lives beside inputs, outputs and J; at H = 4096 in bf16 it is under 0.7
    GiB."""
    n, h, v, tile = (8, 16, 300, (4, 128)) if INTERPRETED else (512, 64, 5000, (128, 1024))
    hidden, weight, target, bias = head(n, h, v, device=device)
    for x in (hidden, *((weight, bias) if trained else ())):
        x.requires_grad_()
    with Count() as count:
        steps(hidden, weight, target, bias, tile=tile, compact=False)
    kept = 4 * n * h + (4 * (n * h + v * h + v) if trained else 4 * n * h)  # J and dh; or dh, dW, db
    accumulators = 4 * h * (tile[1] + n) if trained else 0
    bound = tile_bytes(tile, h, 4) + accumulators + 100 * n * 4
    assert count.peak - kept <= bound + 4096
    assert count.peak - kept >= 4 * tile[0] * tile[1]  # the count counts
    tile = tile_sizes(8192, 151936, torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta"))
    assert tile_bytes(tile, 4096, 2) + 4 * 4096 * (tile[1] + 8192) + 400 * 8192 <= 0.7 * 2**30


def test_tiles_follow_shapes_and_dtype_alone():
    hidden = lambda h, dtype: torch.empty(8192, h, dtype=dtype, device="meta")
    assert tile_sizes(8192, 151936, hidden(4096, torch.bfloat16)) == (4096, 8064)
    for h, dtype in ((4096, torch.float32), (16384, torch.bfloat16)):
        tile = tile_sizes(8192, 151936, hidden(h, dtype))
        assert tile == (2048, 8064)
        assert tile_bytes(tile, h, dtype.itemsize) <= 1 << 28
    assert tile_sizes(5, 997, torch.empty(5, 8)) == (5, 997)
    assert tile_sizes(0, 1, torch.empty(0, 8)) == (1, 1)


# ----------------------------------------------------------------------------------------------------------------
# determinism


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_same_bits(dtype, device, trained):
    hidden, weight, target, bias = head(dtype=dtype, device=device)
    g = {"log_probs": torch.randn(N, device=device), "entropy": torch.randn(N, device=device)}
    a, b = (gradients(ours, (hidden, weight, bias), target, dtype, trained, g, outputs=tuple(g)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a[0], b[0]))
    assert all(torch.equal(a[1][k], b[1][k]) for k in g)


def test_two_graphs_backward_in_reverse_order(device):
    hidden, weight, target, bias = head(device=device)
    first, second = hidden.clone().requires_grad_(), (hidden * 0.5).requires_grad_()
    alone = [torch.autograd.grad(ours(x, weight, target, bias)["log_probs"].sum(), x)[0] for x in (first, second)]
    a, b = (ours(x, weight, target, bias)["log_probs"].sum() for x in (first, second))
    db, da = torch.autograd.grad(b, second), torch.autograd.grad(a, first)
    assert torch.equal(da[0], alone[0])
    assert torch.equal(db[0], alone[1])


def test_backward_twice(device):
    hidden, weight, target, bias = head(device=device)
    x = hidden.requires_grad_()
    loss = ours(x, weight, target, bias)["log_probs"].sum()
    a = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(a, torch.autograd.grad(loss, x)[0])


# ----------------------------------------------------------------------------------------------------------------- edge
# cases


@pytest.mark.parametrize("shape", [(1,), (2, 3), (1, 1, 4), ()])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_leading_shapes(device, shape, trained):
    count = torch.Size(shape).numel()
    hidden, weight, target, bias = head(n=count, device=device, ignored=())
    hidden, target = hidden.reshape(*shape, -1), target.reshape(shape)
    judge((hidden, weight, bias), target, torch.float32, trained, {"log_probs": torch.randn(shape, device=device)}, {})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter, on NaN
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("n", [0, 3])
def test_no_row_to_score_is_a_connected_zero(device, n, trained, compact):
    hidden, weight, _, bias = head(n=max(n, 1), device=device)
    target = torch.full((n,), -100, device=device)
    if compact or not trained:
        hidden[: n // 2] = float("nan")  # padding may hold anything (in dW stock multiplies it by 0, too)
    xs = leaves((hidden[:n], weight, bias), torch.float32, trained)
    got = ours(xs[0], xs[1], target, xs[2], outputs=OUTPUTS, compact=compact)
    assert all(x.shape == (n,) and not x.any() for x in got.values())
    (got["log_probs"].sum() + got["entropy"].sum()).backward()
    for x in xs:
        assert (x.grad is not None) == x.requires_grad
        assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_ignored_rows_may_hold_nan(device, trained):
    hidden, weight, target, bias = head(device=device)
    g = torch.ones(N, device=device)
    want, _ = gradients(ours, (hidden, weight, bias), target, torch.float32, trained, {"log_probs": g}, compact=False)
    g[3] = float("nan")  # as 0 / 0 of a masked mean gives
    got, _ = gradients(ours, (hidden, weight, bias), target, torch.float32, trained, {"log_probs": g}, compact=False)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_columns_masked_by_the_bias(device, trained):
    hidden, weight, target, bias = head(device=device, ignored=())
    bias[::2] = -float("inf")
    target = target // 2 * 2 + 1  # an odd column
    target[1] = target[1] - 1  # a masked one: -inf
    bias[:128] = -float("inf")  # a whole tile
    target[0] = 150 if V < 300 else 501
    target[target < 128] = 151
    target[1] = 2
    g = torch.randn(N, device=device)
    got, out = gradients(
        ours, (hidden, weight, bias), target, torch.float32, trained, {"log_probs": g}, outputs=OUTPUTS
    )
    reference, want = gradients(eager, (hidden, weight, bias), target, torch.float64, trained, {"log_probs": g})
    base, base_out = gradients(eager, (hidden, weight, bias), target, torch.float32, trained, {"log_probs": g})
    assert compare(out["log_probs"], want["log_probs"], base_out["log_probs"])
    assert out["log_probs"][1] == -float("inf")
    for name, *gs in zip(("dh", "dW", "db"), got, reference, base):
        verdict = compare(*gs, name)
        assert verdict, str(verdict)

    def entropy(dtype):  # eager's own is 0 * -inf
        p = logits_of(hidden.to(dtype), weight.to(dtype), bias.to(dtype)).softmax(-1)
        return torch.special.entr(p).sum(-1)

    verdict = compare(out["entropy"], entropy(torch.float64), entropy(torch.float32))
    assert verdict, str(verdict)


@pytest.mark.parametrize("v", [1, 2])
def test_tiny_vocabulary(device, v):
    hidden, weight, target, bias = head(n=3, v=v, device=device, ignored=())
    judge(
        (hidden, weight, bias),
        target,
        torch.float32,
        True,
        {"log_probs": torch.randn(3, device=device)},
        {},
        compact=False,
    )
    got = ours(hidden, weight, target, bias, outputs=OUTPUTS)
    want, base = eager(hidden.double(), weight.double(), target, bias.double()), eager(hidden, weight, target, bias)
    assert torch.equal(got.pop("is_top1"), want["is_top1"])
    for k, x in got.items():
        verdict = compare(x, want[k], base[k], k)
        assert verdict, str(verdict)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinite_and_nan_logits_propagate(device):
    hidden, weight, target, _ = head(device=device)
    hidden[1, 0] = float("nan")
    hidden[2, 0] = float("inf")
    got = ours(hidden, weight, target)["log_probs"]
    assert torch.isnan(got[1:3]).all()
    assert torch.isfinite(got[4:]).all()


def test_strides_and_expanded_gradients(device):
    hidden, weight, target, bias = head(device=device)
    x = hidden.t().contiguous().t().requires_grad_()
    wide = torch.stack((weight, weight), 1)[:, 0]
    got = ours(x, wide, target, bias)["log_probs"]
    (a,) = torch.autograd.grad(got, x, torch.ones(1, device=device).expand(N), retain_graph=True)
    (b,) = torch.autograd.grad(got, x, torch.ones(N, 2, device=device)[:, 0])
    y = hidden.clone().requires_grad_()
    (want,) = torch.autograd.grad(ours(y, weight, target, bias)["log_probs"].sum(), y)
    assert torch.equal(a, want)
    assert torch.equal(b, want)


def test_tied_weight(device):
    """The weight twice on the graph: as embedding and as head."""
    _, weight, target, _ = head(device=device, ignored=())
    tokens = target.roll(1)

    def step(w, fn):
        hidden = torch.nn.functional.embedding(tokens, w) * 3
        return torch.autograd.grad(fn(hidden, w, target)["log_probs"].sum(), w)[0]

    got = step(weight.clone().requires_grad_(), ours)
    reference = step(weight.double().requires_grad_(), eager)
    verdict = compare(got, reference, step(weight.clone().requires_grad_(), eager))
    assert verdict, str(verdict)


def test_weight_in_another_dtype_and_autocast(device):
    """16-bit hidden on a float32 weight: products as if it were cast, its gradient in float32; autocast changes
    nothing."""
    hidden, weight, target, bias = head(dtype=SIXTEEN, device=device)
    x, w = hidden.clone().requires_grad_(), weight.float().requires_grad_()
    got = torch.autograd.grad(ours(x, w, target, bias)["log_probs"].sum(), (x, w))
    y, u = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    want = torch.autograd.grad(ours(y, u, target, bias)["log_probs"].sum(), (y, u))
    assert torch.equal(got[0], want[0])
    assert got[1].dtype == torch.float32
    assert torch.equal(got[1].to(SIXTEEN), want[1])
    x, w = hidden.float().requires_grad_(), weight.float()
    alone = torch.autograd.grad(ours(x, w, target)["log_probs"].sum(), x)[0]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = ours(x, w, target)["log_probs"].sum()
        assert torch.equal(torch.autograd.grad(loss, x)[0], alone)


def test_inputs_are_not_modified_and_no_graph_without_grad(device):
    hidden, weight, target, bias = head(device=device)
    copies = [x.clone() for x in (hidden, weight, target, bias)]
    with torch.no_grad():
        assert not ours(hidden.requires_grad_(), weight, target, bias)["log_probs"].requires_grad
    ours(hidden, weight, target, bias)["log_probs"].sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(copies, (hidden, weight, target, bias)))


def test_errors(device):
    hidden, weight, target, bias = head(device=device)
    with pytest.raises(TypeError, match="int64"):
        linear_logprob(hidden, weight, target.int())
    with pytest.raises(TypeError, match="hidden and weight"):
        linear_logprob(hidden.long(), weight, target)
    with pytest.raises(ValueError, match=r"want hidden \(\.\.\., H\)"):
        linear_logprob(hidden[:, 1:], weight, target)
    with pytest.raises(ValueError, match="target of shape"):
        linear_logprob(hidden, weight, target[1:])
    with pytest.raises(ValueError, match="bias of shape"):
        linear_logprob(hidden, weight, target, bias[1:])
    with pytest.raises(ValueError, match="outputs"):
        linear_logprob(hidden, weight, target, outputs=("loss",))
    with pytest.raises(ValueError, match="tile"):
        linear_logprob(hidden, weight, target, tile=(4, 100000))
    for wrong in (V, -1):
        target[0] = wrong
        if device.type == "cpu":
            with pytest.raises(IndexError, match="outside of the vocabulary"):
                linear_logprob(hidden, weight, target)
        else:
            assert torch.isnan(linear_logprob(hidden, weight, target).log_probs[0])


# --------------------------------------------------------------------------------------------------------- tracing and
# launches


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_fake_tensors(trained):
    with FakeTensorMode():
        xs = [torch.empty(shape, dtype=torch.bfloat16) for shape in ((300, 64), (V, 64), (V,))]
        for i, x in enumerate(xs):
            x.requires_grad_(i == 0 or trained)
        got = ours(xs[0], xs[1], torch.zeros(300, dtype=torch.int64), xs[2], outputs=OUTPUTS, tile=(200, 128))
        (got["log_probs"].sum() + got["entropy"].sum()).backward()
        assert all(x.grad.shape == x.shape and x.grad.dtype == x.dtype for x in xs if x.requires_grad)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_compiles_whole(device, trained):
    hidden, weight, target, bias = head(device=device)

    def step(hidden, weight, bias):
        kwargs = {"outputs": ("log_probs", "entropy", "is_top1"), "tile": (N // 2 + 1, V // 2 + 1), "compact": False}
        out = ours(hidden, weight, target, bias, **kwargs)
        return out["log_probs"].sum() + 0.1 * out["entropy"].sum(), out["is_top1"]

    xs, ys = (leaves((hidden, weight, bias), torch.float32, trained) for _ in range(2))
    want, top = step(*xs)
    got, got_top = torch.compile(step, fullgraph=True, backend="aot_eager")(*ys)
    assert torch.equal(got, want)
    assert torch.equal(top, got_top)
    want.backward()
    got.backward()
    for x, y in zip(xs, ys):
        assert (x.grad is None and y.grad is None) or torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_launches_against_their_references(device, softcap):
    """Each launch by itself in float32, the optional states over two tiles included."""
    n, v, h = 5, 90, 12
    x, bias = torch.randn(2, n, v, device=device) * 3, torch.randn(2 * v, device=device)
    target = torch.tensor([3, 100, 50, -1, 2 * v], device=device)
    z_args, optional = (1.5, softcap, 0.8), [osm.BEFORE, osm.PZ, osm.SQ, osm.SUM]
    ours_state = ref_state = wide_state = None
    for i in range(2):
        b, at = bias[i * v : (i + 1) * v], i * v
        p, r, ours_state = osm.fold(x[i], b, target, ours_state, at, *z_args, torch.float32, optional)
        q, s, ref_state = osm.fold_ref(x[i], b, target, ref_state, at, *z_args, torch.float32, optional)
        pt, rt, wide_state = osm.fold_ref(
            x[i].double(), b.double(), target, wide_state, at, *z_args, torch.float64, optional
        )
        for name, *abc in (("p", p, pt, q), ("r", r, rt, s)):
            verdict = compare(*abc, name)
            assert verdict, str(verdict)
        for row in range(osm.STATES):
            seen = ~torch.isnan(wide_state[row])
            assert torch.equal(seen, ~torch.isnan(ours_state[row]))
            verdict = compare(ours_state[row][seen], wide_state[row][seen], ref_state[row][seen], f"state {row}")
            assert verdict, str(verdict)
    coef = torch.randn(6, n, device=device)
    coef[0], coef[1] = 6.0, 2.0
    got = osm.dlogits(x[0], bias[:v], target, coef, 0, *z_args, True, torch.float32)
    base = osm.dlogits_ref(x[0], bias[:v], target, coef, 0, *z_args, torch.float32)
    reference = osm.dlogits_ref(x[0].double(), bias[:v].double(), target, coef.double(), 0, *z_args, torch.float64)
    verdict = compare(got, reference, base)
    assert verdict, str(verdict)
    acc, weight = torch.randn(n, h, device=device), torch.randn(v, h, device=device)
    r = torch.tensor([1.0, 0.5, 0, 1, 2], device=device)
    want = acc * r.unsqueeze(1)
    osm.rescale(acc, r)
    assert torch.equal(acc, want)
    got = osm.jacobian(acc, weight, target, coef[2], coef[3], torch.float32)
    base = osm.jacobian_ref(acc, weight, target, coef[2], coef[3], torch.float32)
    assert compare(got, base.double(), base)
    assert not got[[1, 3, 4]].any()
