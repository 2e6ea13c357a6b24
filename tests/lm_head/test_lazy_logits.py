"""Lazy logits answer as the logits would: judged against stock's operations in float32, with a float64 run as the
reference, gradients included; and no tensor of tokens x vocabulary exists meanwhile. Everything else gets the logits,
exactly stock's."""

import copy
import io
import pickle
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_pt_utils import LabelSmoother
from trl.trainer.utils import entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy

from fastft.lm_head import lazy_divergences as lazy_rowwise
from fastft.lm_head.lazy_logits import defer
from fastft.lm_head.lazy_logits_type import LazyLogits
from fastft.lm_head.lazy_rows import LazyRows
from fastft.lm_head.lazy_tensor import LazyTensor
from fastft.proving.float64 import float64_reference
from fastft_kernels.numerics import compare
from fastft_kernels.recompute.recomputation import Recomputation, attach

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from trl.experimental.gkd import GKDTrainer

B, L, H, V = 3, 7, 20, 131
LABELS = torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(1))
MASKED = LABELS.masked_fill(LABELS % 4 == 0, -100)
KEEP = torch.arange(B * L).view(B, L) % 3 > 0


def hf_loss(z):
    z = z.float()
    labels = F.pad(MASKED, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(z.view(-1, V), labels.view(-1), ignore_index=-100, reduction="sum") / torch.tensor(9)


def shifted(z):
    return torch.nn.CrossEntropyLoss()(z[..., :-1, :].contiguous().view(-1, V), MASKED[..., 1:].reshape(-1))


def older_trl(z):
    p, z = torch.softmax(z, dim=-1), z
    return torch.logsumexp(z, dim=-1) - torch.sum(p * z, dim=-1)


def halves(z):
    first, second = z.split([1, 2], dim=0)
    return selective_log_softmax(first, LABELS[:1]), selective_log_softmax(second, LABELS[1:])


PATTERNS = {
    "hf loss": hf_loss,
    "shifted": shifted,
    "soft-cap": lambda z: hf_loss(torch.tanh(z / 3.0) * 3.0),
    "negative cap": lambda z: shifted((z * -0.5).tanh() / 0.2),
    "scale": lambda z: hf_loss(z / 2.5),
    "scale, 0-dim": lambda z: hf_loss(torch.tensor(0.3) * z),
    "cap, temperature": lambda z: selective_log_softmax(torch.tanh(z / 3.0) * 3.0 / 0.7, LABELS),
    "smoothing": lambda z: F.cross_entropy(z.view(-1, V), MASKED.view(-1), label_smoothing=0.1),
    "none": lambda z: F.cross_entropy(z.flatten(0, 1), MASKED.flatten(), reduction="none"),
    "nll": lambda z: F.nll_loss(z.log_softmax(-1).view(-1, V), MASKED.view(-1)),
    "mask": lambda z: F.cross_entropy(z[KEEP], LABELS[KEEP]),
    "index": lambda z: F.cross_entropy(z[torch.tensor([0, 2]), torch.tensor([1, 5])], LABELS[:2, 0]),
    "one sample": lambda z: F.cross_entropy(z[1], LABELS[1]),
    "last": lambda z: F.cross_entropy(z[:, -1, :], LABELS[:, -1]),
    "one token": lambda z: F.cross_entropy(z[0, 0], LABELS[0, 0]),
    "log_softmax, gather": lambda z: torch.gather(
        F.log_softmax(z[:, :-1], dim=-1), 2, LABELS[:, 1:].unsqueeze(2)
    ).squeeze(2),
    "log_softmax, take_along_dim": lambda z: torch.take_along_dim(
        z.log_softmax(dim=-1), LABELS.unsqueeze(-1), dim=2
    ).squeeze(-1),
    "gather - lse": lambda z: z.gather(-1, LABELS.unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1),
    "selected alone": lambda z: z.gather(-1, LABELS.unsqueeze(-1)) * 2.0,
    "selected, capped": lambda z: (torch.tanh(z * 0.8 / 2.0) * 2.0).gather(-1, LABELS.unsqueeze(-1)),
    "z-loss": lambda z: z.logsumexp(dim=-1, keepdim=True).square(),
    "selective": lambda z: selective_log_softmax(z, LABELS),
    "selective, temperature": lambda z: selective_log_softmax(z, LABELS, temperature=0.6, row_mask=KEEP),
    "chunks": halves,
    "entropy": lambda z: entropy_from_logits(z, chunk_size=5),
    "entropy, softmax": older_trl,
    "both": lambda z: selective_log_softmax_and_entropy(z, LABELS),
    "label smoother": lambda z: LabelSmoother(0.2)({"logits": z}, LABELS, shift_labels=True),
    "mean": lambda z: z.mean(-1),
    "mean of all": lambda z: (z * 1.5).mean(),
    "capped mean": lambda z: ((torch.tanh(z.detach() / 3.0) * 3.0).mean(dim=-1), z[0].mean()),
}


def jsd(beta, **settings):
    """TRL's distillation loss beside a teacher whose logits exist."""
    teacher = torch.randn(B, L, V, generator=torch.Generator().manual_seed(4))

    def loss(z):
        labels = settings.get("labels", MASKED)
        return GKDTrainer.generalized_jsd_loss(z, teacher.to(z.dtype), **{**settings, "labels": labels, "beta": beta})

    return loss


DIVERGENCES = {
    "jsd 0.5": jsd(0.5, temperature=0.7),
    "jsd 0": jsd(0),
    "jsd 1": jsd(1, num_items_in_batch=torch.tensor(11)),
    "jsd of all": jsd(0.2, labels=None),
    "kl by token": lambda z: F.kl_div(
        F.log_softmax(z, 2), F.log_softmax(z.detach() * 0.3, 2).exp(), reduction="none"
    ).sum(-1),
    "of itself": lambda z: F.kl_div(
        (z * 0.5).log_softmax(-1), z.log_softmax(-1), reduction="none", log_target=True
    ).sum(),
}


def draw(bias, grads=(True, True, True), dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    h, w, b = torch.randn(B, L, H, generator=g), torch.randn(V, H, generator=g) * H**-0.5, torch.randn(V, generator=g)
    tensors = [h.to(dtype), w.to(dtype), b.to(dtype) if bias else None]
    return [t if t is None else t.requires_grad_(grad) for t, grad in zip(tensors, grads)]


def results(pattern, head, leaves):
    out = pattern(head(*leaves))
    out = list(out if isinstance(out, tuple) else (out,))
    ups = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3 + i)).to(x.dtype) for i, x in enumerate(out)]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    grads = torch.autograd.grad(sum((x * u).sum() for x, u in zip(out, ups)), wanted, allow_unused=True)
    return [(x + 0.0).detach() for x in out] + list(grads)


def whole(verdict_of, reference, eager):
    """Single numbers are judged together with the rest, each by its own size: one of stock's may be exact by luck."""
    flat = lambda r: torch.cat([(x / float(t.abs().max())).flatten() for x, t in zip(r, reference)])
    return compare(flat(verdict_of), flat(reference), flat(eager))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", [*PATTERNS, *DIVERGENCES])
def test_answers(name, bias, trained, monkeypatch):
    monkeypatch.setattr(lazy_rowwise, "ELEMENTS", 4 * V)
    pattern = (PATTERNS | DIVERGENCES)[name]
    grads = (True, trained, trained)
    with float64_reference():
        reference = results(pattern, F.linear, draw(bias, grads, torch.float64))
    eager = results(pattern, F.linear, draw(bias, grads))
    count = Counter()
    ours = results(pattern, lambda *t: defer(*t, count), draw(bias, grads))
    assert not count, count
    verdict = whole(ours, reference, eager)
    assert verdict, str(verdict)
    assert [x.dtype for x in ours] == [x.dtype for x in eager]


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation returns, views of the weight apart."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.largest = weight.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if (
                isinstance(t, torch.Tensor)
                and not isinstance(t, LazyTensor)
                and t.device.type != "meta"
                and t.data_ptr() != self.weight
            ):
                self.largest = max(self.largest, t.numel())
        return out


def test_the_logits_never_exist(monkeypatch):
    """In tiles of few columns, as a vocabulary of many columns has them."""
    from fastft.lm_head import product as head_product
    from fastft_kernels.lm_head import tiles as head_tiles

    monkeypatch.setattr(head_tiles, "VOCAB_TILE", 32)
    monkeypatch.setattr(head_product, "VOCAB_TILE", 32)
    ours = lambda *t: defer(*t, Counter())
    for name, pattern in {**PATTERNS, "argmax": lambda z: (z.mean(), z.argmax(-1).float())}.items():
        if name in ("selected alone", "selected, capped", "index"):
            continue
        leaves = draw(False, (True, False, False))
        with Sizes(leaves[1]) as seen:
            results(pattern, ours, leaves)
        assert seen.largest < B * (L - 1) * V // 2, name
        with Sizes(leaves[1]) as seen:
            results(pattern, F.linear, leaves)
        assert seen.largest >= V, name


@pytest.mark.parametrize("name", ["kl by token", "of itself"])
def test_a_divergence_exists_for_some_tokens_at_a_time(name, monkeypatch):
    monkeypatch.setattr(lazy_rowwise, "ELEMENTS", 4 * V)
    leaves = draw(False, (True, False, False))
    with Sizes(leaves[1]) as seen:
        results(DIVERGENCES[name], lambda *t: defer(*t, Counter()), leaves)
    assert seen.largest <= max(4 * V, B * L * H)
    with Sizes(leaves[1]) as seen:
        results(DIVERGENCES[name], F.linear, leaves)
    assert seen.largest == B * L * V


@pytest.mark.parametrize("trained", [True, False])
def test_a_divergence_of_no_token_is_a_connected_zero(trained):
    leaves = draw(True, (True, trained, trained))
    loss = jsd(0.5, labels=torch.full((B, L), -100))(defer(*leaves, count := Counter()))
    assert loss == 0 and not count
    loss.backward()
    assert all(not t.grad.any() for t in leaves if t.requires_grad)


def test_a_divergence_between_two_heads():
    """Student and teacher both lazy: the teacher without a graph, or trained too."""
    loss = lambda z, teacher: GKDTrainer.generalized_jsd_loss(z, teacher, MASKED, beta=0.3)
    for grads in ((True, False, False), (True, True, True)):
        for teacher_learns in (False, True):

            def both(head, dtype, grads=grads, teacher_learns=teacher_learns):
                student, other = (
                    draw(True, grads, dtype),
                    [t.detach().flip(0).requires_grad_(teacher_learns) for t in draw(True, dtype=dtype)],
                )
                with torch.set_grad_enabled(teacher_learns):
                    teacher = head(*other)
                out = loss(head(*student), teacher)
                del teacher  # kept, it would be made by the backward, before a trained head learns
                return [out.detach(), *torch.autograd.grad(out, [t for t in (*student, *other) if t.requires_grad])]

            with float64_reference():
                reference = both(F.linear, torch.float64)
            count = Counter()
            verdict = whole(both(lambda *t: defer(*t, count), torch.float32), reference, both(F.linear, torch.float32))  # noqa: B023
            assert verdict and not count, str(verdict)


def test_a_divergence_and_writes():
    """Logits written to after a divergence was recorded count for what they were; a constant written to is an error
    that says so."""
    h, w, _ = draw(False)
    teacher = torch.randn(B, L, V).log_softmax(-1)
    kl = lambda z: F.kl_div(z.log_softmax(-1), teacher, reduction="none", log_target=True)

    def writing(z):
        parts = kl(z)
        z[:, 2:] = 0.0
        return parts.sum(-1)

    assert torch.allclose(writing(defer(h, w, None, Counter())), writing(F.linear(h, w)), rtol=1e-5, atol=1e-5)
    parts = kl(defer(h, w, None, Counter()))
    teacher.add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place after kl_div"):
        parts.sum()


def test_one_product_where_parts_belong_together():
    from torch.utils.flop_counter import FlopCounterMode

    unit = 2 * B * L * H * V

    def products(pattern, grad):
        h, w, _ = draw(False, (True, False, False))
        with FlopCounterMode(display=False) as count, torch.set_grad_enabled(grad):
            out = pattern(defer(h, w, None, Counter()))
            out = sum((x * 1.0).sum() for x in (out if isinstance(out, tuple) else (out,)))
            if grad:
                out.backward()
        return count.get_total_flops() / unit

    for name in ("hf loss", "log_softmax, gather", "selective", "gather - lse"):
        assert products(PATTERNS[name], True) <= 2.01 and products(PATTERNS[name], False) <= 1.01, name
    both = lambda z: selective_log_softmax_and_entropy(z, LABELS, entropy_requires_grad=False)
    assert products(both, True) <= 2.01 and products(both, False) <= 1.01
    assert products(lambda z: z.mean(), False) < 0.2


@pytest.mark.parametrize("trained", [True, False])
def test_everything_else_is_stock_to_the_bit_and_counted(trained):
    def odd(z):
        z = torch.tanh(z / 3.0) * 3.0
        z = z.float()[:, 1:]
        return (
            z.softmax(-1).pow(2).sum(-1),
            z.topk(3).values,
            z[..., 5],
            F.kl_div(z.log_softmax(-1), z.detach().softmax(-1), reduction="batchmean"),
            z.max(-1).values,
        )

    leaves = draw(True, (True, trained, trained))
    eager = results(odd, F.linear, leaves)
    count = Counter()
    ours = results(odd, lambda *t: defer(*t, count), leaves)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager)) and sum(count.values()) == 1


def test_writes_reach_all_views_as_in_stock():
    def writing(z):
        before, half, copied, wide = z.logsumexp(-1), z / 2.0, z.clone(), z.double().float()
        tail = z[:, 1:]
        z[:, :, 3:9] = -5.0
        tail.mul_(2.0)
        z /= 1.5
        before = torch.cat([before, half[..., 0], copied[..., 4], wide[:, :, 5]])
        return before, F.cross_entropy(z.view(-1, V), LABELS.view(-1)), tail.argmax(-1).float(), z.logsumexp(-1)

    h, w, _ = draw(False)
    eager = writing(F.linear(h, w))
    ours = writing(defer(h, w, None, Counter()))
    assert torch.allclose(ours[0], eager[0]) and all(torch.equal(a, b) for a, b in zip(ours[1:], eager[1:]))


def test_writes_to_results_by_token_leave_the_logits_unmade():
    def writing(z):
        lse = z.logsumexp(-1)
        double, column, other = (
            -lse,
            lse.unsqueeze(-1),
            z.gather(-1, LABELS.unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1),
        )
        column.mul_(2.0)
        lse[KEEP] = 0.0
        other.masked_fill_(KEEP, 0.0)
        torch.zeros(B, L).copy_(other.detach())
        return lse, double, column, other

    h, w, _ = draw(False)
    ours, eager = writing(defer(h, w, None, count := Counter())), writing(F.linear(h, w))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(ours, eager)) and not count


@pytest.mark.parametrize("columns", [8192, 32])
def test_argmax(columns, monkeypatch):
    from fastft.lm_head import product as head_product

    monkeypatch.setattr(head_product, "VOCAB_TILE", columns)
    h, w, b = draw(True)
    z = F.linear(h, w, b)
    d = defer(h, w, b, count := Counter())
    for f in (
        lambda z: z.argmax(-1),
        lambda z: (z * -1.0).argmax(dim=-1, keepdim=True),
        lambda z: torch.tanh(z / 40.0)[:, :-1].argmax(2),
    ):
        assert torch.equal(f(d), f(z))
    assert not count


def test_no_grad_slices_first():
    from torch.utils.flop_counter import FlopCounterMode

    h, w, _ = draw(False)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        d = defer(h, w, None, Counter())
        last = d[:, -1, :].to(copy=True, dtype=torch.float32).softmax(-1) * 1.0
    assert flops.get_total_flops() == 2 * B * H * V and not last.requires_grad
    assert torch.equal(last, F.linear(h[:, -1], w).softmax(-1))


def test_it_is_a_tensor():
    h, w, _ = draw(False)
    z, d = F.linear(h, w), defer(h, w, None, count := Counter())
    assert isinstance(d, torch.Tensor) and torch.is_tensor(d)
    assert (d.shape, d.dtype, d.device, d.requires_grad, d.size(-1), d.dim(), d.ndim, len(d), d.numel()) == (
        z.shape,
        torch.float32,
        z.device,
        True,
        V,
        3,
        3,
        B,
        B * L * V,
    )
    assert d.grad_fn is not None and not d.is_leaf and not d.is_contiguous() and not d.detach().requires_grad
    assert type(d.float()) is LazyLogits and type(d.view(-1, V)) is LazyLogits and type(d.logsumexp(-1)) is LazyRows
    assert not count
    assert (
        torch.equal(d.detach().cpu(), z)
        and torch.equal(torch.zeros_like(d) + d, z)
        and torch.equal(pickle.loads(pickle.dumps(d)), z)
    )
    assert torch.equal(copy.deepcopy(defer(h, w, None, count).detach()), z) and repr(d) == repr(d.node.value())
    buffer = io.BytesIO()
    torch.save(d.detach(), buffer)
    buffer.seek(0)
    assert type(torch.load(buffer)) is torch.Tensor
    assert torch.equal(torch.stack(list(defer(h, w, None, count))), z)
    assert (defer(h, w, None, count).detach().numpy() == z.detach().numpy()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(-1,), (-1, 4), (B, -1), (-1, V)])
def test_a_slice_in_one_piece_can_be_viewed(shape, dtype):
    """Also where somebody has another default dtype."""
    h, w, _ = draw(False)
    cut = lambda z: z[:, :4].contiguous().view(shape)
    torch.set_default_dtype(dtype)
    try:
        ours, stock = cut(defer(h, w, None, Counter())), cut(F.linear(h, w))
        assert ours.shape == stock.shape and torch.equal(ours + 0, stock + 0)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), (h, w)) for y in (ours, stock))):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)
    z = defer(h, w, None, Counter())
    assert z.contiguous() is z and type(z[:, 1:].contiguous()) is LazyLogits


def test_a_gradient_that_comes_from_outside_python():
    """C++ code that is given the wrapper finds a graph; what flows back into it reaches hidden and weight."""

    class Foreign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    h, w, _ = draw(False)
    run = lambda z: torch.autograd.grad((Foreign.apply(z) * LABELS.unsqueeze(-1)).sum(), (h, w))
    for a, b in zip(run(defer(h, w, None, Counter())), run(F.linear(h, w))):
        assert torch.equal(a, b)


def test_weights_changed_since_are_an_error():
    h, w, _ = draw(False)
    d = defer(h, w, None, Counter())
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(RuntimeError, match="before the optimizer's step"):
        d.argmax(-1)
    with pytest.raises(RuntimeError, match="before the optimizer's step"):
        d.sum()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_dtypes_are_stocks(low):
    h, w, _ = draw(False, dtype=low)
    for name in ("hf loss", "none", "selective", "entropy", "mean", "z-loss"):
        ours, stock = PATTERNS[name](defer(h, w, None, Counter())), PATTERNS[name](F.linear(h, w))
        assert ours.dtype == stock.dtype, name
    h, w, _ = draw(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        d, z = defer(h, w, None, Counter()), F.linear(h, w)
        assert d.dtype == z.dtype == torch.bfloat16
        for name in ("hf loss", "none", "nll", "entropy"):
            ours, stock = PATTERNS[name](d), PATTERNS[name](z)
            assert ours.dtype == stock.dtype, name
        flat = lambda z: z.float().sum()
    assert torch.equal(flat(d), flat(z))  # made under the autocast of the head's call


def test_bfloat16_is_nearer_to_the_reference_than_stock():
    wide = [None if t is None else t.detach().double().requires_grad_() for t in draw(False, dtype=torch.bfloat16)]
    with float64_reference():
        reference = results(PATTERNS["hf loss"], F.linear, wide)
    eager = results(PATTERNS["hf loss"], F.linear, draw(False, dtype=torch.bfloat16))
    ours = results(PATTERNS["hf loss"], lambda *t: defer(*t, Counter()), draw(False, dtype=torch.bfloat16))
    assert compare(ours, reference, eager)


def test_hidden_lives_as_long_as_the_logits():
    """Where a norm made it, which second derivatives can ask again; what nobody can compute again is kept, as stock
    keeps it."""
    import weakref

    h, w, _ = draw(False, (True, False, False))
    hidden = h * 1.0
    attach(hidden, Recomputation((h,), lambda x: x * 1.0))
    gone = weakref.ref(hidden)
    d = defer(hidden, w, None, Counter())
    loss = hf_loss(d)
    del hidden
    assert gone() is not None
    del d
    assert gone() is None and loss.requires_grad
