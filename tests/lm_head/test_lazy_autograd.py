"""What somebody hangs on lazy logits, or wraps around them, gets the gradient that stock's logits would give it: before
the loss and after it, on the logits and on what is derived from them. Judged against stock, float64 as the
reference."""

import gc
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook
from torch.utils.checkpoint import checkpoint

from fastft.lm_head.lazy_logits import defer
from fastft.lm_head.lazy_logits_type import LazyLogits
from fastft.proving.float64 import float64_reference
from tests.lm_head.test_lazy_logits import LABELS, MASKED, B, H, L, Sizes, V, draw, whole

T = torch.Tensor
FLAT = MASKED.reshape(-1)


def ce(z, **settings):
    return F.cross_entropy(z.float().reshape(-1, V) if z.dtype != torch.float64 else z.reshape(-1, V), FLAT, **settings)


def leaves_of(*tensors):
    return [t for t in tensors if t is not None and t.requires_grad]


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, g):
        return g * 0.5


class Scaled(torch.autograd.Function):
    """Returns what was made of its input, not a copy of it."""

    @staticmethod
    def forward(ctx, z):
        return z * 2.0

    @staticmethod
    def backward(ctx, g):
        return g * 0.3


class Returned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z

    @staticmethod
    def backward(ctx, g):
        return g * 0.7


class Several(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, other):
        top = z.argmax(-1)
        ctx.mark_non_differentiable(top)
        return z.clone(), top, z.mean(-1), other * 2

    @staticmethod
    def backward(ctx, g, _, g_mean, g_other):
        return g * 0.5 + g_mean.unsqueeze(-1) * 0.25, g_other * 2


class OwnCrossEntropy(torch.autograd.Function):
    """Its forward asks what needs no logits; its backward gives a gradient of the logits all the same."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return -F.log_softmax(z, -1).gather(-1, LABELS.unsqueeze(-1)).sum()

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        p = z.softmax(-1)
        return (p - F.one_hot(LABELS, V).to(p.dtype)) * g * 0.5


class Detached(torch.autograd.Function):
    """Keeps nothing: the lazy tensor is gone when the gradient comes."""

    @staticmethod
    def forward(ctx, z):
        return z.logsumexp(-1) * 1.0

    @staticmethod
    def backward(ctx, g):
        return g.unsqueeze(-1).expand(B, L, V) / V


def through_function(function):
    def run(z):
        out = function.apply(z)
        return [ce(out) if out.dim() == 3 else out.sum()]

    return run


def function_several(z):
    out, _, mean, other = Several.apply(z, torch.ones(2, dtype=z.dtype, requires_grad=True))
    return [ce(out) + mean.square().sum() + other.sum()]


def hooked(pick, after, how="register_hook"):
    """pick: the lazy tensor that is hooked, of (z, [those on the way to the loss]). after: once the loss is there."""

    def run(z):
        zf = z.float() if z.dtype == torch.float32 else z * 1
        cut = zf[:, :-1]
        log_p = cut.log_softmax(-1)
        way = [z, zf, cut, log_p]
        seen = []
        hook = lambda g: (seen.append(g * 1), g * 0.5)[1]
        if not after:
            getattr(way[pick], how)(hook)
        chosen = log_p.gather(-1, LABELS[:, 1:].unsqueeze(-1)).squeeze(-1)
        if after:
            chosen = chosen * 1.0
            getattr(way[pick], how)(hook)
        return [chosen.square().sum()], seen

    return run


def retained(after):
    def run(z):
        zs = z[:, 1:]
        if not after:
            z.retain_grad(), zs.retain_grad()
        loss = F.cross_entropy(zs.reshape(-1, V), LABELS[:, 1:].reshape(-1))
        if after:
            z.retain_grad(), zs.retain_grad()
        loss.backward(retain_graph=True)
        assert z.retains_grad
        return [loss], [z.grad, zs.grad]

    return run


def node_hook(z):
    loss = ce(z)
    seen = []
    z.grad_fn.register_prehook(lambda g: (seen.append(g[0] * 1), (g[0] * 3,))[1])
    return [loss], seen


def hook_then_value(z):
    """Hooked when the value is there already, and another result was computed without it."""
    loss, part = ce(z), z[:, 1:]
    loss = loss + part.topk(3).values.sum() + part.logsumexp(-1).sum()
    seen = []
    z.register_hook(lambda g: (seen.append(g * 1), g * 0.5)[1])
    part.register_hook(lambda g: (seen.append(g * 1), g * 0.25)[1])
    return [loss], seen


def hook_then_write(z):
    z = z * 2.0  # the product itself may be a view in stock
    loss = ce(z)
    seen = []
    z.register_hook(lambda g: (seen.append(g * 1), g * 0.5)[1])
    z[..., 3] = 1.0
    return [loss + z.logsumexp(-1).sum()], seen


def checkpointed_and_hooked(z):
    """The part that runs again in the backward meets a hook that was not there before."""
    loss = checkpoint(lambda z: ce(z).square() + z.logsumexp(-1).square().sum(), z, use_reentrant=False)
    seen = []
    z.register_hook(lambda g: (seen.append(g * 1), g * 0.5)[1])
    return [loss], seen


def removed_hook(z):
    z.register_hook(lambda g: g * 0).remove()
    return [ce(z)]


def dropped_after_hook(z):
    seen = []
    zf = z * 2.0
    loss = ce(zf)
    zf.register_hook(lambda g: (seen.append(g * 1), g * 0.5)[1])
    del zf
    return [loss], seen


def multi_hook(z):
    seen = []
    zs = z * 2.0
    loss = ce(zs)
    register_multi_grad_hook((z, zs), lambda grads: seen.extend(g * 1 for g in grads))
    return [loss], seen


def entropy_hook(z):
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    seen = []
    log_p.register_hook(lambda g: (seen.append(g * 1), g * 0.5)[1])
    return [entropy.sum()], seen


def rows_hook(z):
    lse = z.logsumexp(-1)
    chosen = z.gather(-1, LABELS.unsqueeze(-1)).squeeze(-1) - lse
    seen = []
    lse.register_hook(lambda g: (seen.append(g * 1), g * 0.5)[1])
    return [chosen.sum()], seen


def divergence_hook(z):
    kl = F.kl_div(z.log_softmax(-1), (z.detach() * 0.3).softmax(-1), reduction="none").sum(-1)
    seen = []
    z.register_hook(lambda g: (seen.append(g * 1), g * 0.5)[1])
    return [kl.sum()], seen


def requires_grad_of_a_leaf(z):
    leaf = z.detach().requires_grad_()
    ce(leaf).backward()
    assert leaf.is_leaf
    other = z.detach()
    other.requires_grad = True
    other.logsumexp(-1).sum().backward()
    return [ce(z)], [leaf.grad, other.grad]


def detached_in_place(z):
    z = z * 2.0  # the product itself may be a view in stock, which refuses
    loss = ce(z)
    copy = z.clone()
    z.detach_()
    assert not z.requires_grad and z.grad_fn is None
    return [loss + (z.logsumexp(-1) * copy.logsumexp(-1)).sum()]


def grad_of(pick):
    def run(z):
        zf = z * 2.0
        zs = zf[:, :-1]
        loss = F.cross_entropy(zs.reshape(-1, V), MASKED[:, 1:].reshape(-1))
        found = torch.autograd.grad(loss, pick(z, zf, zs), retain_graph=True)
        return [loss], [g * 1 for g in found]

    return run


def grad_by_edge(z):
    loss = ce(z)
    return [loss], list(torch.autograd.grad(loss, [get_gradient_edge(z)], retain_graph=True))


def unused(z):
    loss = ce(z)
    other = z * 3.0
    a = torch.autograd.grad(loss, [z, other], retain_graph=True, allow_unused=True)
    b = torch.autograd.grad(loss, [z, other], retain_graph=True, materialize_grads=True)
    assert a[1] is None and not b[1].any() and b[1].shape == other.shape
    return [loss], [a[0], b[0]]


def backward_inputs(z):
    loss = ce(z)
    loss.backward(inputs=[z], retain_graph=True)
    return [loss], [z.grad]


def backward_of_logits(z):
    up = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z.dtype)
    return [(z * up).sum()], [*torch.autograd.grad(z, [z], up)]


def twice(z):
    loss = ce(z)
    loss.backward(retain_graph=True)
    seen = []
    z.register_hook(lambda g: (seen.append(g * 1), g * 0.5)[1])
    loss.backward(retain_graph=True)
    return [loss], seen


SITUATIONS = {
    "half": through_function(Half),
    "half of a float": lambda z: [ce(Half.apply(z.float() if z.dtype == torch.float32 else z))],
    "half of a slice": lambda z: [F.cross_entropy(Half.apply(z[:, 1:]).reshape(-1, V), LABELS[:, 1:].reshape(-1))],
    "half of halves": lambda z: [ce(Half.apply(Half.apply(z) * 2.0))],
    "scaled": through_function(Scaled),
    "returned": through_function(Returned),
    "several outputs": function_several,
    "own cross-entropy": through_function(OwnCrossEntropy),
    "own function that keeps nothing": through_function(Detached),
    "checkpointed loss": lambda z: [checkpoint(ce, z, use_reentrant=True)],
    "checkpointed loss, not reentrant": lambda z: [checkpoint(ce, z, use_reentrant=False)],
    "checkpointed and hooked": checkpointed_and_hooked,
    **{f"hook {i}, {when}": hooked(i, when == "after") for i in range(4) for when in ("before", "after")},
    "retained before": retained(False),
    "retained after": retained(True),
    "hook on the graph's node": node_hook,
    "hook, some values made": hook_then_value,
    "hook, then written to": hook_then_write,
    "removed hook": removed_hook,
    "dropped after the hook": dropped_after_hook,
    "multi hook": multi_hook,
    "hook on log p of an entropy": entropy_hook,
    "hook on a row's result": rows_hook,
    "hook, divergence": divergence_hook,
    "leaves": requires_grad_of_a_leaf,
    "detached in place": detached_in_place,
    "grad of the logits": grad_of(lambda z, zf, zs: z),
    "grad of all": grad_of(lambda z, zf, zs: [zs, z, zf]),
    "grad by edge": grad_by_edge,
    "grad, unused": unused,
    "backward of inputs": backward_inputs,
    "backward of logits": backward_of_logits,
    "twice": twice,
}


def results(run, head, leaves):
    out = run(head(*leaves))
    outputs, seen = out if isinstance(out, tuple) else (out, [])
    sum(x.sum() for x in outputs).backward()
    return [(x * 1.0).detach() for x in (*outputs, *seen)] + [t.grad for t in leaves_of(*leaves) if t.grad is not None]


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_as_stock(name, trained):
    run, grads = SITUATIONS[name], (True, trained, trained)
    with float64_reference():
        reference = results(run, F.linear, draw(True, grads, torch.float64))
    eager = results(run, F.linear, draw(True, grads))
    ours = results(run, lambda *t: defer(*t, Counter()), draw(True, grads))
    assert [x.shape for x in ours] == [x.shape for x in eager]
    verdict = whole(ours, reference, eager)
    assert verdict, str(verdict)


@pytest.mark.parametrize("name", ["removed hook", "retained after", "half"])
def test_the_comparison_sees_a_lost_factor(name):
    """Planted: a hook's or a function's factor that is lost is no rounding."""
    grads = (True, True, True)
    with float64_reference():
        reference = results(SITUATIONS[name], F.linear, draw(True, grads, torch.float64))
    eager = results(SITUATIONS[name], F.linear, draw(True, grads))
    lost = [x * (1.001 if i == len(eager) - 1 else 1.0) for i, x in enumerate(eager)]
    assert not whole(lost, reference, eager)


@pytest.mark.parametrize("block", [False, True], ids=["head", "block"])
def test_reentrant_checkpointing_around_the_head(block):
    """The head runs without a graph first, and again in the backward."""

    def run(head, leaves):
        h, w, b = leaves
        part = lambda x: head(torch.tanh(x) if block else x, w, b)
        loss = ce(checkpoint(part, h, use_reentrant=True)) + h.square().sum()
        loss.backward()
        return [loss.detach(), *(t.grad for t in leaves)]

    with float64_reference():
        reference = run(F.linear, draw(True, dtype=torch.float64))
    verdict = whole(run(lambda *t: defer(*t, Counter()), draw(True)), reference, run(F.linear, draw(True)))
    assert verdict, str(verdict)


def test_hooks_of_leaves_run_once():
    """The head's weight and its input carry hooks of their own: also where the logits were made, they see one
    gradient."""
    for use in (ce, lambda z: z.pow(2).sum()):
        found = []
        for head in (F.linear, lambda *t: defer(*t, Counter())):
            h, w, b = draw(True)
            x = h * 1.0
            for t in (x, w, b):
                t.register_hook(lambda g: g * 0.5)
            z = head(x, w, b)
            z.register_hook(lambda g: g * 2.0)
            use(z).backward()
            found.append([h.grad, w.grad, b.grad])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found))


def test_errors_are_stocks():
    def message(act, z):
        with pytest.raises(RuntimeError) as e:
            act(z)
        return str(e.value)

    h, w, b = draw(True)
    for act in (
        lambda z: z.register_post_accumulate_grad_hook(lambda t: None),
        lambda z: z.detach().register_hook(lambda g: g),
        lambda z: z.requires_grad_(False),
        lambda z: z.backward(),
        lambda z: torch.autograd.grad(ce(z.detach() * 1), z),
        lambda z: z.numpy(),
    ):
        assert message(act, defer(h, w, b, Counter())) == message(act, F.linear(h, w, b))


def test_second_derivatives_by_the_logits():
    """A gradient of the logits is differentiated again."""

    def run(head, leaves):
        z = head(*leaves)
        loss = F.cross_entropy((z * 2.0).reshape(-1, V), FLAT)
        (g,) = torch.autograd.grad(loss, z, create_graph=True)
        return [g.detach(), *torch.autograd.grad(g.square().sum() * 100, leaves_of(*leaves))]

    for grads in ((True, True, True), (True, False, False)):
        with float64_reference():
            reference = run(F.linear, draw(True, grads, torch.float64))
        verdict = whole(
            run(lambda *t: defer(*t, Counter()), draw(True, grads)), reference, run(F.linear, draw(True, grads))
        )
        assert verdict, str(verdict)


def test_what_nobody_watches_stays_lazy(monkeypatch):
    """Reading grad_fn, a removed hook, metrics without a graph, gradients of hidden: no logits."""
    from fastft.lm_head import product as head_product
    from fastft_kernels.lm_head import tiles as head_tiles

    monkeypatch.setattr(head_tiles, "VOCAB_TILE", 32)
    monkeypatch.setattr(head_product, "VOCAB_TILE", 32)
    h, w, _ = draw(False, (True, False, False))
    x = h * 1.0
    with Sizes(w) as seen:
        z = defer(x, w, None, count := Counter())
        assert z.grad_fn is not None and z.requires_grad and not z.is_leaf and not z.retains_grad
        z.register_hook(lambda g: g * 0).remove()
        with torch.no_grad():
            z.argmax(-1), z.logsumexp(-1) * 1.0
        loss = F.cross_entropy(z.reshape(-1, V), FLAT)
        torch.autograd.grad(loss, [x], retain_graph=True)
        loss.backward()
    assert seen.largest < B * L * V // 2 and not count


def test_nothing_is_kept_when_all_is_gone():
    h, w, b = draw(True)
    x = h * 1.0
    z = defer(x, w, b, Counter())
    z.register_hook(lambda g: g * 0.5)
    loss = ce(z) + z.topk(2).values.sum()
    loss.backward()
    gone = [weakref.ref(t) for t in (x, z.node, z.made.grad_fn)]
    del x, z, loss
    gc.collect()
    assert [r() for r in gone] == [None] * 3


def test_types():
    h, w, b = draw(True)
    z = defer(h, w, b, Counter())
    z.retain_grad()
    assert type(z) is LazyLogits and hash(z) == hash(z) and z in {z: 1}
    z.topk(2)
    assert z in {z: 1} and h.shape[-1] == H
