"""A recomputation belongs to one tensor object at one version."""

import gc
import weakref

import torch

from fastft_kernels.recompute.recomputation import Recomputation, attach, recomputation_of


def doubled(device):
    x = torch.randn(3, device=device)
    return x, x * 2, Recomputation((x,), lambda t: t * 2)


def test_attached_and_found(device):
    _, y, recomputation = doubled(device)
    assert recomputation_of(y) is None
    attach(y, recomputation)
    assert recomputation_of(y) is recomputation
    assert torch.equal(recomputation_of(y).recompute(*recomputation.tensors), y)


def test_another_object_has_none(device):
    _, y, recomputation = doubled(device)
    attach(y, recomputation)
    assert recomputation_of(y.clone()) is None
    assert recomputation_of(y.view(3, 1)) is None
    assert recomputation_of(y.detach()) is None


def test_void_after_a_change(device):
    _, y, recomputation = doubled(device)
    attach(y, recomputation)
    y.add_(1)
    assert recomputation_of(y) is None
    attach(y, recomputation)
    y.view(3, 1).mul_(2)
    assert recomputation_of(y) is None


def test_nothing_without_gradients(device):
    _, y, recomputation = doubled(device)
    with torch.no_grad():
        attach(y, recomputation)
    assert recomputation_of(y) is None


def test_nothing_while_compiling(device):
    def f(x):
        y = x * 2
        attach(y, Recomputation((x,), lambda t: t * 2))
        return y + (1 if recomputation_of(y) is None else 0)

    x = torch.randn(3, device=device)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x * 2 + 1)


def test_dies_with_its_tensor(device):
    _, y, recomputation = doubled(device)
    attach(y, recomputation)
    gone = weakref.ref(recomputation)
    del y, recomputation
    gc.collect()
    assert gone() is None
