"""rope against the formulas of transformers: values, gradients of q and k, strides, partial and grouped heads, every
layout."""

import importlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastft_kernels.numerics import compare
from fastft_kernels.rotary.rope import rope, rope_single
from fastft_kernels.rotary.rope_kernels import LAYOUTS
from fastft_kernels.runtime.dispatch import INTERPRETED

from .examples import examples


def halves(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def twice(t):
    return t.repeat_interleave(2, dim=-1)


def eager_one(x, cos, sin, layout="half", unsqueeze_dim=1, sign=1):
    """The stock formulas, rounding as they do."""
    if unsqueeze_dim is not None:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if layout in ("interleaved_first", "interleaved_to_half"):
        cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    if layout in ("half_narrow", "interleaved_to_half"):
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    if layout.startswith(("interleaved_narrow", "interleaved_first")):
        cos, sin = twice(cos), twice(sin)
    r = cos.shape[-1]
    x, passed = (x[..., -r:], x[..., :-r]) if layout.endswith("tail") else (x[..., :r], x[..., r:])
    if layout == "interleaved_to_half":
        x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    rotate = halves if "half" in layout else neighbours
    y = x * cos + sign * rotate(x) * sin
    return torch.cat((passed, y) if layout.endswith("tail") else (y, passed), dim=-1)


def eager(q, k, cos, sin, **kwargs):
    return eager_one(q, cos, sin, **kwargs), eager_one(k, cos, sin, **kwargs)


def run(fn, q, k, cos, sin, dq, dk, **kwargs):
    """[q rotated, k rotated, gradient of q, of k], from fresh leaves that keep the strides of q and k."""
    q, k = (x.detach().requires_grad_() for x in (q, k))
    yq, yk = fn(q, k, cos, sin, **kwargs)
    grads = torch.autograd.grad((yq, yk), (q, k), (dq.to(yq.dtype), dk.to(yk.dtype)))
    return [yq.detach(), yk.detach(), *grads]


def judge(q, k, cos, sin, dq, dk, **kwargs):
    ours = run(rope, q, k, cos, sin, dq, dk, **kwargs)
    theirs = [y.to(o.dtype) for y, o in zip(run(eager, q, k, cos, sin, dq, dk, **kwargs), ours)]
    reference = run(eager, *(x.double() for x in (q, k, cos, sin, dq, dk)), **kwargs)
    verdict = compare(ours, reference, theirs)
    assert verdict, verdict
    return ours


def heads(batch, count, length, dim, dtype, device, axis=1):
    """q or k as an attention makes it: [B, H, S, D], a transposed view of [B, S, H, D] (axis 2: the latter itself)."""
    x = torch.randn(batch, length, count, dim, device=device).to(dtype)
    return x.transpose(1, 2) if axis == 1 else x


def tables(batch, length, width, dtype, device):
    """Unstructured: both columns of every pair differ, and so do cos and sin from a cosine."""
    return tuple(torch.randn(batch, length, width, device=device).to(dtype) for _ in range(2))


def draw(
    layout, dtype, device, *, batch=2, q_heads=3, k_heads=2, length=2, dim=16, r=None, axis=1, table=None, shared=False
):
    r = dim if r is None else r
    q, dq = (heads(batch, q_heads, length, dim, dtype, device, axis) for _ in range(2))
    k, dk = (heads(batch, k_heads, length, dim, dtype, device, axis) for _ in range(2))
    width = r // 2 if LAYOUTS[layout].columns == "narrow" else r
    cos, sin = tables(1 if shared else batch, length, width, table or dtype, device)
    return q, k, cos, sin, dq, dk


@pytest.mark.parametrize(("r", "sign"), [(16, 1), (6, -1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, r, sign, dtype, device):
    """Whole and partial, either way round."""
    judge(*draw(layout, dtype, device, r=r), layout=layout, sign=sign)


@pytest.mark.parametrize("layout", ["half", "interleaved_narrow"])
def test_heads_after_tokens(layout, dtype, device):
    judge(*draw(layout, dtype, device, axis=2), layout=layout, unsqueeze_dim=2)


@pytest.mark.parametrize(("q_heads", "k_heads"), [(1, 1), (1, 3), (5, 1), (33, 7)])
def test_head_counts(q_heads, k_heads, dtype, device):
    judge(*draw("half", dtype, device, q_heads=q_heads, k_heads=k_heads, length=1))


def test_other_head_dims(dtype, device):
    """q and k of different widths, the tables narrower than both; a head dim that is no power of two; heads in several
    tiles."""
    q, _, cos, sin, dq, _ = draw("half", dtype, device, dim=24, r=10)
    _, k, _, _, _, dk = draw("half", dtype, device, dim=12)
    judge(q, k, cos, sin, dq, dk)
    judge(*draw("interleaved", dtype, device, dim=80, length=2))
    judge(*draw("half", dtype, device, dim=256, q_heads=12, k_heads=9, length=1, batch=1))


def test_shared_table_and_one_token(dtype, device):
    judge(*draw("half", dtype, device, shared=True))
    judge(*draw("half", dtype, device, shared=True, length=1))
    judge(*draw("half", dtype, device, batch=1, length=1))


@pytest.mark.parametrize("layout", ["half", "interleaved_to_half"])
def test_wider_tables(layout, dtype, device):
    """float32 tables: the output stays in the dtype of q, rounded once; out_dtype gives what eager's promotion
    gives."""
    args = draw(layout, dtype, device, table=torch.float32, batch=1)
    assert all(y.dtype == dtype for y in judge(*args, layout=layout))
    for out_dtype in (torch.float32, torch.float16):
        yq, yk, gq, gk = run(rope, *args, layout=layout, out_dtype=out_dtype)
        assert (yq.dtype, yk.dtype, gq.dtype, gk.dtype) == (out_dtype, out_dtype, dtype, dtype)
    ours, theirs = run(rope, *args, layout=layout, out_dtype=torch.float32), run(eager, *args, layout=layout)
    verdict = compare(ours, run(eager, *(x.double() for x in args), layout=layout), theirs)
    assert verdict, verdict


def test_dtypes_of_q_and_k_may_differ(dtype, device):
    q, k, cos, sin, dq, dk = draw("half", dtype, device)
    assert [y.dtype for y in judge(q, k.float(), cos, sin, dq, dk)] == [dtype, torch.float32] * 2


@pytest.mark.parametrize("name", ["contiguous", "fused", "expanded", "strided", "permuted"])
def test_memory_order_is_kept(name, dtype, device):
    """Inputs are read where they lie; outputs and gradients come dense, in the same order of memory, whatever
    upstream's."""
    q, k, cos, sin, dq, dk = draw("half", dtype, device, q_heads=4, dim=8)
    fused = torch.randn(2, 2, 4 + 2 + 2, 8, device=device).to(dtype)
    q, k = {
        "contiguous": lambda: (q.contiguous(), k.contiguous()),
        "fused": lambda: (fused[:, :, :4].transpose(1, 2), fused[:, :, 4:6].transpose(1, 2)),
        "expanded": lambda: (q[:1].expand(2, 4, 2, 8), k[:, :1].expand(2, 2, 2, 8)),
        "strided": lambda: (torch.randn(2, 4, 2, 16, device=device).to(dtype)[..., ::2], k),
        "permuted": lambda: (torch.randn(8, 2, 4, 2, device=device).to(dtype).permute(3, 2, 1, 0), k),
    }[name]()
    before = q.clone(), k.clone()
    for upstream in ((dq, dk), (dq.contiguous(), dk.contiguous()))[: 1 if INTERPRETED else 2]:
        yq, yk, gq, gk = judge(q, k, cos, sin, *upstream)
        assert yq.stride() == gq.stride() == torch.empty_like(q).stride()
        assert yk.stride() == gk.stride() == torch.empty_like(k).stride()
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


@pytest.mark.parametrize("name", ["expanded", "per head", "sliced"])
def test_upstream_gradients(name, dtype, device):
    q, k, cos, sin, _, _ = draw("interleaved_first", dtype, device, r=6)
    dq, dk = (
        {
            "expanded": lambda x: torch.full((), 0.7, device=device, dtype=dtype).expand(x.shape),
            "per head": lambda x: torch.randn(2, x.shape[1], 1, 1, device=device).to(dtype).expand(x.shape),
            "sliced": lambda x: torch.randn(*x.shape[:-1], 40, device=device).to(dtype)[..., 3:35:2],
        }[name](q),
        torch.randn_like(k),
    )
    judge(q, k, cos, sin, dq, dk, layout="interleaved_first")


def test_other_ranks(dtype, device):
    """[S, H, D] with tables [S, R], as vision towers have it; [S, B, H, D] with tables ready to broadcast; no heads at
    all."""
    r = lambda *shape: torch.randn(*shape, device=device).to(dtype)
    judge(r(3, 5, 8), r(3, 2, 8), r(3, 8), r(3, 8), r(3, 5, 8), r(3, 2, 8), unsqueeze_dim=-2)
    judge(r(2, 3, 5, 8), r(2, 3, 5, 8), r(2, 1, 1, 8), r(2, 1, 1, 8), r(2, 3, 5, 8), r(2, 3, 5, 8), unsqueeze_dim=None)
    judge(r(2, 3, 8), r(2, 3, 8), r(2, 3, 8), r(2, 3, 8), r(2, 3, 8), r(2, 3, 8), unsqueeze_dim=None)
    judge(r(2, 8), r(2, 8), r(2, 8), r(2, 8), r(2, 8), r(2, 8), unsqueeze_dim=None)


def test_strided_tables(dtype, device):
    """Real and imaginary part of a complex table (Llama-4, DeepSeek-V2); tables whose strides differ."""
    q, k, cos, sin, dq, dk = draw("interleaved_narrow", dtype, device, axis=2, table=torch.float32)
    turn = torch.complex(cos, sin)
    judge(q, k, turn.real, turn.imag, dq, dk, layout="interleaved_narrow", unsqueeze_dim=2)
    wide = torch.cat((cos, cos), dim=-1)
    judge(q, k, wide[..., : cos.shape[-1]], sin, dq, dk, layout="interleaved_narrow", unsqueeze_dim=2)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 2, 0), (2, 0, 3)])
def test_empty(shape, dtype, device):
    batch, count, length = shape
    args = draw("half", dtype, device, batch=batch, q_heads=count, length=length)
    assert judge(*args)[0].shape == (batch, count, length, 16)


@settings(
    max_examples=examples(5, 30),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_shape(dtype, device, data):
    layout, axis = data.draw(st.sampled_from(sorted(LAYOUTS))), data.draw(st.sampled_from([1, 2]))
    batch, q_heads, k_heads, length = (
        data.draw(st.integers(1, n)) for n in ((2, 5, 3, 2) if INTERPRETED else (3, 9, 5, 5))
    )
    r = 2 * data.draw(st.integers(1, 10))
    dim, sign = r + data.draw(st.integers(0, 9)), data.draw(st.sampled_from([1, -1]))
    table, shared = data.draw(st.sampled_from([None, torch.float32])), data.draw(st.booleans())
    args = draw(
        layout,
        dtype,
        device,
        batch=batch,
        q_heads=q_heads,
        k_heads=k_heads,
        length=length,
        dim=dim,
        r=r,
        axis=axis,
        table=table,
        shared=shared,
    )
    judge(*args, layout=layout, sign=sign, unsqueeze_dim=axis)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single(layout, dtype, device):
    """One tensor alone: the same bits as in a pair."""
    q, k, cos, sin, dq, dk = draw(layout, dtype, device, r=10, batch=1)
    yq, _, gq, _ = run(rope, q, k, cos, sin, dq, dk, layout=layout)
    x = q.detach().requires_grad_()
    y = rope_single(x, cos, sin, layout=layout)
    y.backward(dq)
    assert torch.equal(y, yq)
    assert torch.equal(x.grad, gq)
    assert (y.stride(), x.grad.stride()) == (yq.stride(), gq.stride())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_is_exact(layout, device):
    q, k, cos, sin, _, _ = draw(layout, torch.float64, device, length=2, dim=8, r=6)
    q, k = q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, layout=layout, sign=-1), (q, k))
    for ours, theirs in zip(rope(q, k, cos, sin, layout=layout), eager(q, k, cos, sin, layout=layout)):
        assert torch.equal(ours, theirs)


def test_only_what_is_asked_for(dtype, device):
    q, k, cos, sin, dq, dk = draw("half", dtype, device)
    gq, gk = run(rope, q, k, cos, sin, dq, dk)[2:]
    a = q.detach().requires_grad_()
    yq, yk = rope(a, k, cos, sin)
    assert not yk.requires_grad
    yq.backward(dq)
    assert torch.equal(a.grad, gq)
    a, b = q.detach().requires_grad_(), k.detach().requires_grad_()
    rope(a, b, cos, sin)[1].backward(dk)  # q rotated is not used
    assert a.grad is None or not a.grad.any()
    assert torch.equal(b.grad, gk)
    with torch.no_grad():
        assert not rope(a, b, cos, sin)[0].requires_grad


def test_saves_the_tables_alone(dtype, device):
    q, k, cos, sin, _, _ = draw("half", dtype, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope(q.requires_grad_(), k.requires_grad_(), cos, sin)
        rope_single(q, cos, sin)
    assert [t.data_ptr() for t in saved] == [cos.data_ptr(), sin.data_ptr()] * 2


def test_same_bits_twice(dtype, device):
    args = draw("half", dtype, device, r=10)
    assert all(torch.equal(a, b) for a, b in zip(run(rope, *args), run(rope, *args)))


def test_compiles_as_one_graph(dtype, device):
    args = draw("half", dtype, device, r=10)

    def fn(q, k, cos, sin):
        q, k = rope(q, k, cos, sin)
        return q * 2, rope_single(k, cos, sin, sign=-1)

    ours = run(torch.compile(fn, fullgraph=True, backend="aot_eager"), *args)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(ours, run(fn, *args)))


@pytest.mark.parametrize("axis", [1, 2])
def test_fake_tensors_have_the_real_layout(axis, dtype, device):
    args = draw("half", dtype, device, axis=axis)
    kept = run(rope, *args, unsqueeze_dim=axis)
    with FakeTensorMode() as mode:
        made = run(rope, *(mode.from_tensor(x) for x in args), unsqueeze_dim=axis)
    for r, f in zip(kept, made):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def test_errors(device):
    q, k, cos, sin, _, _ = draw("half", torch.float32, device)
    for bad in (
        lambda: rope(q, k, cos, sin, layout="thirds"),
        lambda: rope(q, k, cos, sin, sign=2),
        lambda: rope(q, k, cos, sin, unsqueeze_dim=3),
        lambda: rope(q, k, cos, sin, unsqueeze_dim=2),  # 2 tokens are not 3 heads
        lambda: rope(q, k[:, :, :1], cos, sin),
        lambda: rope(q, k, cos, sin[:, :1]),
        lambda: rope(q, k, cos[..., :5], sin[..., :5]),
        lambda: rope(q, k, cos, sin, layout="half_narrow"),  # 32 channels of 16
        lambda: rope(q, k, cos.long(), sin),
        lambda: rope(q[0], k[0], cos, sin),
        lambda: rope(q, k, cos.requires_grad_(), sin),
        lambda: rope_single(q, cos, sin.requires_grad_()),
    ):
        with pytest.raises(ValueError, match="want"):
            bad()
    with torch.no_grad():
        rope(q, k, cos, sin)


STOCK = (  # module, function, layout, sign, width of the tables against that of the rotation, dim of the heads
    ("llama", "apply_rotary_pos_emb", "half", 1, 1, 1),
    ("phi3", "apply_rotary_pos_emb", "half", 1, 1, 1),
    ("gpt_oss", "apply_rotary_pos_emb", "half_narrow", 1, 2, 1),
    ("cohere", "apply_rotary_pos_emb", "interleaved", 1, 1, 1),
    ("glm", "apply_rotary_pos_emb", "interleaved_first", 1, 1, 1),
    ("deepseek_v3", "apply_rotary_pos_emb_interleave", "interleaved_to_half", 1, 1, 1),
    ("nanochat", "apply_rotary_pos_emb", "half", -1, 1, 1),
    ("llama4", "apply_rotary_emb", "interleaved_narrow", 1, 2, 2),
)


@pytest.mark.skipif(INTERPRETED, reason="no kernel runs in it")
@pytest.mark.parametrize(("family", "name", "layout", "sign", "ratio", "axis"), STOCK, ids=[f"{s[0]}" for s in STOCK])
def test_formulas_are_those_of_transformers(family, name, layout, sign, ratio, axis, device):
    """What the other tests take for eager is what the installed library computes."""
    pytest.importorskip("transformers")
    stock = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    q, k, cos, sin, _, _ = draw(layout, torch.float32, device, axis=axis, table=torch.float32)
    if family in ("llama4",):
        theirs = stock(q, k, torch.complex(cos, sin))
    else:
        theirs = stock(q, k, cos, sin, unsqueeze_dim=axis)
    mine = eager(q, k, cos, sin, layout=layout, sign=sign, unsqueeze_dim=axis)
    reference = eager(*(x.double() for x in (q, k, cos, sin)), layout=layout, sign=sign, unsqueeze_dim=axis)
    verdict = compare(mine, reference, theirs)
    assert verdict, verdict
    assert cos.shape[-1] * ratio == q.shape[-1]


def test_offsets_beyond_31_bits(dtype, device):
    """Four tokens, heads, channels 2^30 elements apart: each stride fits in 32 bits, the offsets do not."""
    far = 1 << 30
    memory = torch.empty(3 * far + 16, device=device, dtype=dtype)  # on a CPU untouched memory costs nothing
    _, k, cos, sin, _, dk = draw("half", dtype, device, batch=1, length=4, dim=8)
    for shape, strides in (
        ((1, 2, 4, 8), (16, 8, far, 1)),
        ((1, 4, 2, 8), (16, far, 8, 1)),
        ((1, 2, 2, 4), (16, 8, 4, far)),
    ):
        q, n, r = memory.as_strided(shape, strides), shape[2], shape[3]
        q.copy_(torch.randn(shape, device=device))
        judge(q, k[:, :, :n], cos[:, :n, :r], sin[:, :n, :r], torch.randn(shape, device=device), dk[:, :, :n])
