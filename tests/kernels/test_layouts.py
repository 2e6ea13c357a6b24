"""The same values in any strides, at any storage offset, give the same result: every public function, every tensor that
it takes.

The reference is the function in float64 on contiguous tensors (the reference), the baseline the function itself on
contiguous ones."""

import functools

import pytest
import torch

from fastft_kernels.lm_head.linear_cross_entropy import linear_cross_entropy
from fastft_kernels.lm_head.linear_logprob import linear_logprob
from fastft_kernels.lm_head.linear_logsumexp import linear_logsumexp
from fastft_kernels.lora.lora_linear import Adapter, Projection, lora_linear
from fastft_kernels.mlp.activation import activation
from fastft_kernels.mlp.glu import glu
from fastft_kernels.norm.gated_rms_norm import gated_rms_norm
from fastft_kernels.norm.layer_norm import layer_norm
from fastft_kernels.norm.rms_norm import rms_norm
from fastft_kernels.numerics import compare
from fastft_kernels.quant.int8 import dequantize_e4m3, dequantize_int8
from fastft_kernels.quant.nf4 import dequantize_4bit
from fastft_kernels.rotary.rope import rope, rope_single
from fastft_kernels.runtime.dispatch import INTERPRETED

ROWS, WIDTH, VOCAB = (2, 3), 16, 21  # of the head: a full tile and a part of one, both ways


def transposed(t):
    return t.mT.contiguous().mT if t.dim() > 1 else every_other(t)


def every_other(t):
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), 9.0)
    wide[..., ::2] = t
    return wide[..., ::2]


def odd_offset(t):
    return torch.cat((t.new_full((1,), 9.0), t.reshape(-1)))[1:].view(t.shape)


def channels_last(t):
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def odd_unit_strides(t):
    """A leading dimension of one element with a stride that means nothing."""
    return t.as_strided(t.shape, [13 if n == 1 else s for n, s in zip(t.shape, t.stride())]) if t.is_contiguous() else t


LAYOUTS = (transposed, every_other, odd_offset, channels_last, odd_unit_strides)


def targets(x):
    return (torch.arange(x.shape[:-1].numel(), device=x.device) * 5 % VOCAB).view(x.shape[:-1])


def adapted(w, bias, a, b):
    return Projection(w, bias, (Adapter(a, b, 1.5),))


def two(x, w, bias, a, b, w2):
    return lora_linear(x, [adapted(w, bias, a, b), Projection(w2)])


X, V, W, B = (*ROWS, WIDTH), (WIDTH,), (VOCAB, WIDTH), (VOCAB,)
LORA = (X, W, B, (4, WIDTH), (VOCAB, 4), W)
CASES = {
    "rms_norm": (lambda x, w: rms_norm(x, w), (X, V)),
    "rms_norm of one row": (lambda x, w: rms_norm(x, w), ((1, 1, WIDTH), V)),
    "layer_norm": (lambda x, w, b: layer_norm(x, w, b), (X, V, V)),
    "gated_rms_norm": (lambda x, g, w: gated_rms_norm(x, g, w, gate_first=True, groups=2), (X, X, V)),
    "norm, then gate": (lambda x, g, w: gated_rms_norm(x, g, w, gate_first=False), (X, X, V)),
    "glu": (lambda g, u: glu(g, u), (X, X)),
    "glu of one column": (lambda g, u: glu(g, u), ((2, 3, 1), (2, 3, 1))),
    "activation": (lambda x: activation(x, "gelu_tanh"), (X,)),
    "rope": (lambda q, k: rope(q, k, *tables(q)), ((2, 4, 3, WIDTH), (2, 2, 3, WIDTH))),
    "rope_single": (lambda q: rope_single(q, *tables(q)), ((1, 4, 3, WIDTH),)),
    "log-probabilities": (lambda h, w, b: linear_logprob(h, w, targets(h), b, tile=(4, 16)).log_probs, (X, W, B)),
    "cross-entropy": (lambda h, w, b: linear_cross_entropy(h, w, targets(h), b, tile=(4, 16)), (X, W, B)),
    "cross-entropies": (
        lambda h, w, b: linear_cross_entropy(h, w, targets(h), b, reduction="none", tile=(4, 16)),
        (X, W, B),
    ),
    "smoothed": (lambda h, w: linear_cross_entropy(h, w, targets(h), label_smoothing=0.1, tile=(4, 16)), (X, W)),
    "logsumexp": (lambda h, w, b: linear_logsumexp(h, w, b, tile=(4, 16)), (X, W, B)),
    "lora_linear": (two, LORA),
}


def tables(q, layout=lambda t: t):
    angle = torch.arange(q.shape[-2], device=q.device)[:, None] * torch.arange(q.shape[-1], device=q.device) / 7
    return layout(angle.cos().to(q.dtype)[None]), layout(angle.sin().to(q.dtype)[None])


def run(f, tensors, upstream, trained):
    xs = [t.detach().requires_grad_(i == 0 or trained) for i, t in enumerate(tensors)]
    out = f(*xs)
    outs = out if isinstance(out, tuple) else (out,)
    live = [y for y in outs if y.requires_grad]
    grads = torch.autograd.grad(live, [x for x in xs if x.requires_grad], [upstream(y) for y in live])
    return [*(y.detach() for y in outs), *grads]


def dense_gradient(y):
    return torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view(y.shape).to(y.dtype)


def expanded_gradient(y):
    return torch.full((), 0.7, device=y.device, dtype=y.dtype).expand(y.shape)


def laid_out(layout):
    def upstream(y):
        return layout(dense_gradient(y)) if y.dim() else dense_gradient(y)

    upstream.__name__ = layout.__name__
    return upstream


@functools.cache
def expected(case, upstream, trained, device):
    """(tensors, reference, baseline): of all layouts alike, and the interpreter takes a second for each."""
    f, shapes = CASES[case]
    g = torch.Generator().manual_seed(3)
    tensors = [torch.randn(s, generator=g).to(device) for s in shapes]
    return tensors, run(f, [t.double() for t in tensors], upstream, trained), run(f, tensors, upstream, trained)


def judge(case, layout, upstream, trained, device):
    tensors, reference, base = expected(case, dense_gradient, trained, device)
    if upstream is not dense_gradient and upstream(tensors[0]).ne(dense_gradient(tensors[0])).any():  # other values
        tensors, reference, base = expected(case, upstream, trained, device)
    got = run(CASES[case][0], [layout(t) for t in tensors], upstream, trained)
    verdict = compare(got, reference, base, case)
    assert verdict, str(verdict)


def pairs(options):
    """Of each case with each option, frozen and trained; the interpreter takes a second for each and gets every pair of
    a case and an option, of an option and frozen or trained, of a case and frozen or trained."""
    every = [(c, o, t) for c in range(len(CASES)) for o in range(len(options)) for t in range(2)]
    return [
        pytest.param(
            case := list(CASES)[c], options[o], bool(t), id=f"{case}-{options[o].__name__}-{('frozen', 'trained')[t]}"
        )
        for c, o, t in every
        if not INTERPRETED or (c + o + t) % 2
    ]


@pytest.mark.parametrize(("case", "layout", "trained"), pairs(LAYOUTS))
def test_any_layout(device, case, layout, trained):
    judge(case, layout, dense_gradient, trained, device)


@pytest.mark.parametrize(("case", "upstream", "trained"), pairs([expanded_gradient, *map(laid_out, LAYOUTS)]))
def test_any_gradient(device, case, upstream, trained):
    judge(case, lambda t: t, upstream, trained, device)


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=lambda f: f.__name__)
def test_tables_of_rope(device, layout):
    q = torch.randn(2, 4, 3, WIDTH, device=device)
    cos, sin = tables(q)
    want = rope_single(q, cos, sin)
    assert torch.equal(rope_single(q, layout(cos), sin), want)
    assert torch.equal(rope_single(q, layout(cos), layout(sin)), want)
    assert torch.equal(rope_single(q, cos.expand(2, -1, -1), sin.expand(2, -1, -1)), want)


@pytest.mark.parametrize("layout", [every_other, odd_offset])
def test_scales_of_quantised_weights(device, layout):
    g = torch.Generator().manual_seed(0)
    scale = torch.rand(6, generator=g).to(device)
    q = torch.randint(-127, 128, (6, 32), generator=g, dtype=torch.int8).to(device)
    assert torch.equal(dequantize_int8(q, layout(scale), torch.float32), dequantize_int8(q, scale, torch.float32))
    f8 = torch.randn(6, 32, generator=g).to(device).to(torch.float8_e4m3fn)
    assert torch.equal(dequantize_e4m3(f8, layout(scale), torch.float32), dequantize_e4m3(f8, scale, torch.float32))
    packed, code = (
        torch.randint(0, 256, (96,), generator=g, dtype=torch.uint8).to(device),
        torch.linspace(-1, 1, 16, device=device),
    )
    want = dequantize_4bit(packed, scale[:3], code, 64, (6, 32), torch.float32)
    assert torch.equal(dequantize_4bit(packed, layout(scale[:3]), layout(code), 64, (6, 32), torch.float32), want)
    absmax8, code2, absmax2 = packed[:3], torch.rand(256, generator=g).to(device), scale[:1]
    nested = lambda f: (f(absmax2), f(code2), 256, torch.tensor(0.1, device=device))
    want = dequantize_4bit(packed, absmax8, code, 64, (6, 32), torch.float32, nested=nested(lambda t: t))
    assert torch.equal(
        dequantize_4bit(
            packed, absmax8.repeat_interleave(2)[::2], code, 64, (6, 32), torch.float32, nested=nested(layout)
        ),
        want,
    )
