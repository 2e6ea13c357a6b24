"""A recipe belongs to one tensor object at one version."""

import gc
import weakref

import torch

from fastft_kernels.recipe import Recipe, attach, recipe_of


def doubled(device):
    x = torch.randn(3, device=device)
    return x, x * 2, Recipe((x,), lambda t: t * 2)


def test_attached_and_found(device):
    _, y, recipe = doubled(device)
    assert recipe_of(y) is None
    attach(y, recipe)
    assert recipe_of(y) is recipe
    assert torch.equal(recipe_of(y).recompute(*recipe.tensors), y)


def test_another_object_has_none(device):
    _, y, recipe = doubled(device)
    attach(y, recipe)
    assert recipe_of(y.clone()) is None
    assert recipe_of(y.view(3, 1)) is None
    assert recipe_of(y.detach()) is None


def test_void_after_a_change(device):
    _, y, recipe = doubled(device)
    attach(y, recipe)
    y.add_(1)
    assert recipe_of(y) is None
    attach(y, recipe)
    y.view(3, 1).mul_(2)
    assert recipe_of(y) is None


def test_nothing_without_gradients(device):
    _, y, recipe = doubled(device)
    with torch.no_grad():
        attach(y, recipe)
    assert recipe_of(y) is None


def test_nothing_while_compiling(device):
    def f(x):
        y = x * 2
        attach(y, Recipe((x,), lambda t: t * 2))
        return y + (1 if recipe_of(y) is None else 0)

    x = torch.randn(3, device=device)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x * 2 + 1)


def test_dies_with_its_tensor(device):
    _, y, recipe = doubled(device)
    attach(y, recipe)
    gone = weakref.ref(recipe)
    del y, recipe
    gc.collect()
    assert gone() is None
