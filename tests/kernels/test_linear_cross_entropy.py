"""linear_cross_entropy against float64 and against cross_entropy of the logits in the same dtype."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastft_kernels.lm_head import linear_cross_entropy as module
from fastft_kernels.lm_head.linear_cross_entropy import keeps_weight_gradient, linear_cross_entropy
from fastft_kernels.lm_head.tiles import tile_bytes
from fastft_kernels.numerics import compare
from fastft_kernels.runtime.dispatch import INTERPRETED

from .head_cases import SCALINGS, TILE, Count, N, V, head, leaves, logits_of

LOSSES = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z": {"z_loss": 0.01},
    "both": {"label_smoothing": 0.2, "z_loss": 0.003},
}


def eager(
    hidden, weight, target, bias=None, *, reduction="mean", label_smoothing=0.0, z_loss=0.0, items=None, **scaling
):
    """The loss from whole logits, by row in hidden's dtype, reduced in float32 as the trainers do."""
    z = logits_of(hidden, weight, bias, **scaling)
    rows = torch.nn.functional.cross_entropy(z, target, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        rows = rows + z_loss * z.logsumexp(-1).square().masked_fill(target == -100, 0)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if reduction == "none":
        return rows
    return rows.sum() / (1 if reduction == "sum" else items or (target != -100).sum())


def ours(hidden, weight, target, bias=None, *, items=None, **kwargs):
    return linear_cross_entropy(hidden, weight, target, bias, num_items_in_batch=items, **{"tile": TILE, **kwargs})


def gradients(fn, tensors, target, dtype, trained, upstream, **kwargs):
    hidden, weight, bias = xs = leaves(tensors, dtype, trained)
    loss = fn(hidden, weight, target, bias, **kwargs)
    return torch.autograd.grad(loss, [x for x in xs if x.requires_grad], upstream.to(loss.dtype)), loss


def judge(tensors, target, dtype, trained, upstream, **kwargs):
    got, loss = gradients(ours, tensors, target, dtype, trained, upstream, **kwargs)
    kwargs.pop("compact", None)
    reference, true_loss = gradients(eager, tensors, target, torch.float64, trained, upstream, **kwargs)
    base, base_loss = gradients(eager, tensors, target, dtype, trained, upstream, **kwargs)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    verdict = compare(loss, true_loss, base_loss, "loss")
    assert verdict, str(verdict)
    for name, *gs in zip(("dh", "dW", "db"), got, reference, base):
        assert gs[0].dtype == dtype
        verdict = compare(*gs, name)
        assert verdict, str(verdict)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_gradients(dtype, device, trained, loss, reduction):
    hidden, weight, target, bias = head(dtype=dtype, device=device)
    upstream = torch.randn(N, device=device) if reduction == "none" else torch.tensor(1.7, device=device)
    compact = reduction == "mean"
    judge(
        (hidden, weight, bias), target, dtype, trained, upstream, reduction=reduction, compact=compact, **LOSSES[loss]
    )


@pytest.mark.parametrize("scaling", ["scaled", "capped"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_scaled_and_capped(dtype, device, trained, scaling):
    hidden, weight, target, bias = head(dtype=dtype, device=device)
    judge((hidden, weight, bias), target, dtype, trained, torch.tensor(2.0), reduction="sum", **SCALINGS[scaling])
    judge((hidden, weight, bias), target, dtype, trained, torch.tensor(2.0), **LOSSES["both"], **SCALINGS[scaling])


@pytest.mark.parametrize(
    ("needs", "reduction", "loss", "units"),
    [
        ("", "mean", "both", 1),
        ("h", "mean", "plain", 2),
        ("h", "none", "z", 2),
        ("h", "none", "both", 2),
        ("hw", "mean", "plain", 3),
        ("hwb", "sum", "both", 3),
        ("w", "mean", "plain", 2),
        ("hw", "none", "plain", 4),
    ],
)
def test_products(device, needs, reduction, loss, units):
    hidden, weight, target, bias = head(h=6 if INTERPRETED else 24, device=device, ignored=())
    for name, x in zip("hwb", (hidden, weight, bias)):
        x.requires_grad_(name in needs)

    def step():
        out = ours(hidden, weight, target, bias, reduction=reduction, **LOSSES[loss])
        if needs:
            out.sum().backward()

    with Count() as count:
        step()
    assert count.products == units * 2 * N * hidden.shape[1] * V
    assert count.largest < N * V, "a (tokens, vocabulary) tensor"
    assert all((x.grad is not None) == (name in needs) for name, x in zip("hwb", (hidden, weight, bias)))
    if device.type == "cpu":
        with FlopCounterMode(display=False) as flops:
            step()
        assert flops.get_total_flops() == count.products


def test_trained_with_a_large_weight_takes_four_products(device, monkeypatch):
    """Where dW in float32 is too large to keep, the same gradients by recomputation."""
    hidden, weight, target, bias = head(device=device, ignored=())
    monkeypatch.setattr(module, "keeps_weight_gradient", lambda tokens, weight: False)
    with Count() as count:
        hidden.requires_grad_(), weight.requires_grad_()
        ours(hidden, weight, target, bias).backward()
    assert count.products == 4 * 2 * N * hidden.shape[1] * V
    hidden, weight = hidden.detach(), weight.detach()
    judge((hidden, weight, bias), target, torch.float32, True, torch.tensor(1.0), **LOSSES["both"])


def test_what_is_kept_follows_the_shapes():
    weight = lambda v, h: torch.empty(v, h, device="meta")
    assert keeps_weight_gradient(8, weight(128256, 2048))
    assert not keeps_weight_gradient(512, weight(151936, 4096))
    assert keeps_weight_gradient(2048, weight(151936, 4096))


def test_memory_of_resident_logits(device):
    """Beside inputs, outputs and the saved J and dW: the logits of a token tile over all columns, one tile of dz, one
    accumulator."""
    n, h, v, tile = (8, 16, 300, (4, 128)) if INTERPRETED else (512, 64, 5000, (128, 1024))
    hidden, weight, target, bias = head(n, h, v, device=device)
    hidden.requires_grad_(), weight.requires_grad_()
    with Count() as count:
        ours(hidden, weight, target, bias, tile=tile, compact=False).backward()
    kept = 4 * (n * h + v * h) * 2  # J and dW in float32; dh and dW
    bound = tile_bytes(tile, h, 4) + 4 * tile[0] * v + 100 * n * 4 + 4096
    assert 4 * tile[0] * v <= count.peak - kept + 4 * (n * h + v * h) <= bound + 4 * (n * h + v * h)
    assert module.RESIDENT_BYTES + tile_bytes((640, 8064), 4096, 2) <= 0.7 * 2**30


@pytest.mark.parametrize("items", [7, "tensor"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_num_items_in_batch(device, trained, items):
    hidden, weight, target, bias = head(device=device)
    items = torch.tensor(9) if items == "tensor" else items
    judge((hidden, weight, bias), target, torch.float32, trained, torch.tensor(1.0), items=items)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_shift(device, trained, reduction):
    hidden, weight, target, bias = head(n=6, device=device)
    hidden, target = hidden.reshape(2, 3, -1), target.reshape(2, 3)
    upstream = torch.randn(2, 2, device=device) if reduction == "none" else torch.tensor(1.0, device=device)

    def shifted(hidden, weight, target, bias, reduction):
        rows = eager(hidden[:, :-1].flatten(0, 1), weight, target[:, 1:].flatten(), bias, reduction=reduction)
        return rows.reshape(2, 2) if reduction == "none" else rows

    args = (hidden, weight, bias), target
    got, loss = gradients(ours, *args, torch.float32, trained, upstream, reduction=reduction, shift=True)
    reference, true_loss = gradients(shifted, *args, torch.float64, trained, upstream, reduction=reduction)
    base, base_loss = gradients(shifted, *args, torch.float32, trained, upstream, reduction=reduction)
    for abc in ((loss, true_loss, base_loss), *zip(got, reference, base)):
        verdict = compare(*abc)
        assert verdict, str(verdict)


@pytest.mark.parametrize("loss", ["plain", "both"])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("n", [0, 3])
def test_no_row_to_score(device, n, trained, compact, loss):
    """A mean over nothing is nan, a sum 0, as torch.nn.functional.cross_entropy's; no gradient is nan."""
    hidden, weight, _, bias = head(n=max(n, 1), device=device)
    target = torch.full((n,), -100, device=device)
    for reduction in ("mean", "sum", "none"):
        xs = leaves((hidden[:n], weight, bias), torch.float32, trained)
        got = ours(xs[0], xs[1], target, xs[2], reduction=reduction, compact=compact, **LOSSES[loss])
        assert got.shape == ((n,) if reduction == "none" else ())
        assert got.isnan() if reduction == "mean" else not got.any()
        got.sum().backward()
        for x in xs:
            assert (x.grad is not None) == x.requires_grad
            assert x.grad is None or not x.grad.any()
    xs = leaves((hidden[:n], weight, bias), torch.float32, trained)
    ours(xs[0], xs[1], target, xs[2], compact=compact, items=torch.tensor(0), **LOSSES[loss]).backward()
    assert not any(x.grad.any() for x in xs if x.requires_grad)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_one_token_and_ragged_shapes(device, trained):
    hidden, weight, target, bias = head(n=1, v=131, h=5, device=device, ignored=())
    judge((hidden, weight, bias), target, torch.float32, trained, torch.tensor(1.0), **LOSSES["z"])
    judge((hidden, weight, bias), target, torch.float32, trained, torch.tensor(1.0), **LOSSES["both"])


def test_columns_masked_by_the_bias(device):
    hidden, weight, target, bias = head(device=device, ignored=())
    bias[::2] = -float("inf")
    target = target // 2 * 2 + 1
    target[target >= V] = 1
    for trained in (False, True):
        for kwargs in ({}, LOSSES["z"]):
            judge((hidden, weight, bias), target, torch.float32, trained, torch.tensor(1.0), **kwargs)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_bits_repeat_and_backwards_in_reverse_order(dtype, device, trained):
    hidden, weight, target, bias = head(dtype=dtype, device=device)
    one = torch.tensor(1.0, device=device)
    alone, loss = gradients(ours, (hidden, weight, bias), target, dtype, trained, one)
    xs, ys = leaves((hidden, weight, bias), dtype, trained), leaves((hidden / 2, weight, bias), dtype, trained)
    first, second = (ours(x[0], x[1], target, x[2]) for x in (xs, ys))
    torch.autograd.grad(second, ys[0])
    again = torch.autograd.grad(first, [x for x in xs if x.requires_grad], retain_graph=True)
    twice = torch.autograd.grad(first, [x for x in xs if x.requires_grad])
    assert torch.equal(first, loss)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(alone, again, twice))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_scaled_loss_in_float16(device, trained):
    """A loss scaled by 2^16 is finite in the backward where its float16 gradients are."""
    hidden, weight, target, bias = head(dtype=torch.float16, device=device)
    tensors = (hidden, weight, bias)
    big, _ = gradients(ours, tensors, target, torch.float16, trained, torch.tensor(2.0**14), reduction="mean")
    one, _ = gradients(ours, tensors, target, torch.float32, trained, torch.tensor(1.0), reduction="mean")
    for a, b in zip(big, one):
        assert torch.isfinite(a).all()
        assert (a.float() / 2**14 - b).norm() <= 1e-3 * b.norm()


def test_no_graph_without_grad_and_autocast(device):
    hidden, weight, target, bias = head(device=device)
    with torch.no_grad():
        assert not ours(hidden.requires_grad_(), weight, target, bias).requires_grad
    alone = torch.autograd.grad(ours(hidden, weight, target, bias), hidden)[0]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = ours(hidden, weight, target, bias)
        assert torch.equal(torch.autograd.grad(loss, hidden)[0], alone)


def test_errors(device):
    hidden, weight, target, _ = head(device=device)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, weight, target, reduction="average")
    with pytest.raises(ValueError, match="num_items_in_batch"):
        linear_cross_entropy(hidden, weight, target, reduction="sum", num_items_in_batch=3)
    with pytest.raises(ValueError, match="label_smoothing"):
        linear_cross_entropy(hidden, weight, target, label_smoothing=1.5)
    with pytest.raises(ValueError, match="shift"):
        linear_cross_entropy(hidden[0], weight, target[0], shift=True)
    with pytest.raises(TypeError, match="int64"):
        linear_cross_entropy(hidden, weight, target.float())
    if device.type == "cpu":
        target[0] = V
        with pytest.raises(IndexError, match="outside of the vocabulary"):
            linear_cross_entropy(hidden, weight, target)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_fake_tensors(trained, reduction):
    with FakeTensorMode():
        xs = [torch.empty(shape, dtype=torch.bfloat16) for shape in ((3, 100, 64), (V, 64), (V,))]
        for i, x in enumerate(xs):
            x.requires_grad_(i == 0 or trained)
        target = torch.zeros(3, 100, dtype=torch.int64)
        ours(xs[0], xs[1], target, xs[2], reduction=reduction, shift=True, tile=(200, 128)).sum().backward()
        assert all(x.grad.shape == x.shape and x.grad.dtype == x.dtype for x in xs if x.requires_grad)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_compiles_whole(device, trained):
    hidden, weight, target, bias = head(device=device)
    step = lambda hidden, weight, bias: ours(
        hidden, weight, target, bias, z_loss=0.01, items=torch.tensor(5), compact=False, tile=(N // 2 + 1, V // 2 + 1)
    )
    xs, ys = (leaves((hidden, weight, bias), torch.float32, trained) for _ in range(2))
    want, got = step(*xs), torch.compile(step, fullgraph=True, backend="aot_eager")(*ys)
    assert torch.equal(got, want)
    want.backward()
    got.backward()
    for x, y in zip(xs, ys):
        assert (x.grad is None and y.grad is None) or torch.equal(x.grad, y.grad)
