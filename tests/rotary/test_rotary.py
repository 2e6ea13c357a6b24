"""Which rotations are recognised, as what; which are refused, and the reason given; what a rebound function does with
other calls."""

import pytest
import torch
from torch import nn

from fastft.patching.kind import Candidate, Context
from fastft.patching.observe import FunctionCall, Observation
from fastft.rotary.rotary import Rotary, is_rotary, make_fast
from fastft.swapping.swap import functions_of, slot_of

HEADS, TOKENS, WIDTH = 2, 5, 8


def halves(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def rotate_halves(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + halves(q) * sin, k * cos + halves(k) * sin


def rotate_reversed(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos - halves(q) * sin, k * cos - halves(k) * sin


def rotate_part(q, k, cos, sin, unsqueeze_dim=1):
    n = cos.shape[-1]
    turned = rotate_halves(q[..., :n], k[..., :n], cos, sin, unsqueeze_dim)
    return tuple(torch.cat((t, x[..., n:]), -1) for t, x in zip(turned, (q, k)))


def rotate_pairs(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = (t[..., : t.shape[-1] // 2].repeat_interleave(2, -1).unsqueeze(unsqueeze_dim) for t in (cos, sin))
    return q * cos + pairs(q) * sin, k * cos + pairs(k) * sin


def rotate_one(x, cos, sin):
    return x * cos.unsqueeze(1) + halves(x) * sin.unsqueeze(1)


def rotate_and_scale(q, k, cos, sin, unsqueeze_dim=1):
    q, k = rotate_halves(q, k, cos, sin, unsqueeze_dim)
    return 2 * q, k


def two_arguments(x, cos):
    return x * cos


class _Calls(nn.Module):
    """An attention that calls one of these functions."""


def attention(fn):
    source = {"rotary": fn}

    def forward(self, q, k, cos, sin):
        return rotary(q, k, cos, sin)  # noqa: F821

    forward = type(forward)(forward.__code__, source)
    return type("Attention", (_Calls,), {"forward": forward})()


def call_of(fn, width=WIDTH):
    q, k, t = torch.randn(1, HEADS, TOKENS, WIDTH), torch.randn(1, 1, TOKENS, WIDTH), torch.randn(1, TOKENS, width)
    xs = (q,) if fn is rotate_one else (q, k)
    return FunctionCall((*xs, t, t.flip(-1)), {}, None)


def recognise(fn, call=None):
    module, seen = attention(fn), Observation()
    if call is not None:
        seen.functions[module, "rotary"] = [call]
    return module, Rotary().recognise(module, Context(module, seen, {module: "attention"}))


@pytest.mark.parametrize(
    ("fn", "width", "kernel"),
    [
        (rotate_halves, WIDTH, "rope(half)"),
        (rotate_reversed, WIDTH, "rope(half, reversed)"),
        (rotate_part, WIDTH // 2, "rope(half)"),
        (rotate_one, WIDTH, "rope(half, single)"),
    ],
)
def test_recognised_and_proven(fn, width, kernel):
    _, found = recognise(fn, call_of(fn, width))
    assert isinstance(found, Candidate), found
    assert found.kernel == kernel
    assert (proof := found.prove()).ok, proof.reason


def test_interleaved_pairs():
    _, found = recognise(rotate_pairs, call_of(rotate_pairs))
    assert isinstance(found, Candidate), found
    assert "half" not in found.kernel
    assert found.prove().ok


def test_refused_with_a_reason():
    assert (
        recognise(rotate_and_scale, call_of(rotate_and_scale))[1] == "rotary: no rotation known here gives its result"
    )


def test_unobserved_is_proven_on_shapes_of_its_own_and_says_so():
    _, found = recognise(rotate_halves)
    assert isinstance(found, Candidate), found
    assert "as the observation did not reach it" in found.note
    assert found.prove().ok


@pytest.mark.parametrize(
    ("fn", "answer"), [(rotate_halves, True), (rotate_one, True), (two_arguments, False), (halves, False)]
)
def test_what_is_looked_at(fn, answer):
    assert is_rotary(fn) is answer


def test_an_instance_is_rebound_and_others_are_not():
    module, found = recognise(rotate_halves, call := call_of(rotate_halves))
    other = type(module)()
    found.apply(module)
    expected = other(*call.args)
    for ours, theirs in zip(module(*call.args), expected):
        torch.testing.assert_close(ours, theirs)
    (fast,) = functions_of(slot_of(module).parts["rotary"][0])
    assert fast.__wrapped__ is rotate_halves
    assert type(other).forward.__globals__["rotary"] is rotate_halves


def test_a_call_that_the_kernel_does_not_take_goes_the_stock_way_counted():
    from fastft.rotary.rotary import Variant

    fast = make_fast(rotate_halves, Variant("half", 1, ("q", "k"), 1, False))
    q, k, cos, sin = call_of(rotate_halves).args
    assert fast.fallbacks == 0
    fast(q, k, cos, sin)
    assert fast.fallbacks == 0
    fast(q.long(), k.long(), cos, sin)
    assert fast.fallbacks == 1
