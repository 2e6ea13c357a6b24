"""Swapping on the instance and taking it back: class, __dict__, copies, pickles, Accelerate's hooks."""

import copy
import io

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from fastft.swapping.rebind import global_calls, rebind
from fastft.swapping.swap import KEY, Fast, install, is_fast, obstacle, order, slot_of, stock_class, uninstall


@order(10)
class Doubling:
    def forward(self, x):
        return 2 * super().forward(x)


@order(20)
class Negating:
    def forward(self, x):
        return -super().forward(x)


def test_install_and_uninstall_are_exact():
    m, other = nn.Linear(3, 4), nn.Linear(3, 4)
    x, keys, state = torch.randn(2, 3), list(m.__dict__), {k: v.clone() for k, v in m.state_dict().items()}
    before = m(x)
    install(m, "double", Doubling, None)
    install(m, "negate", Negating, None)
    assert torch.equal(m(x), -2 * before)
    assert isinstance(m, nn.Linear) and isinstance(m, Fast) and is_fast(m, "double") and stock_class(m) is nn.Linear
    assert type(other) is nn.Linear and list(m.state_dict()) == list(state)
    uninstall(m, "double")
    assert torch.equal(m(x), -before)
    uninstall(m)
    assert type(m) is nn.Linear and list(m.__dict__) == keys and torch.equal(m(x), before)


def test_order_is_the_mixins_not_the_callers():
    x = torch.randn(2, 3)
    a = nn.Linear(3, 3)
    b = copy.deepcopy(a)
    install(a, "double", Doubling, None)
    install(a, "negate", Negating, None)
    install(b, "negate", Negating, None)
    install(b, "double", Doubling, None)
    assert type(a) is type(b) and torch.equal(a(x), b(x))


def test_deepcopy_is_swapped_and_independent():
    m = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    state = {"sibling": m[1]}
    install(m[0], "double", Doubling, state)
    c = copy.deepcopy(m)
    assert is_fast(c[0], "double") and slot_of(c[0]).state("double")["sibling"] is c[1]
    uninstall(c[0])
    assert type(c[0]) is nn.Linear and is_fast(m[0], "double")


def test_a_pickled_module_is_stock():
    m = nn.Sequential(nn.Linear(3, 3))
    install(m[0], "double", Doubling, None)
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    back = torch.load(buffer, weights_only=False)
    assert type(back[0]) is nn.Linear and KEY not in back[0].__dict__ and torch.equal(back[0].weight, m[0].weight)


def test_accelerate_hook_in_front_of_the_class():
    """A device map puts `forward` on the instance, which calls the bound forward that it kept."""
    m, x = nn.Linear(3, 4), torch.randn(2, 3)
    before = m(x)
    add_hook_to_module(m, ModelHook())
    old = m._old_forward
    install(m, "double", Doubling, None)
    assert torch.equal(m(x), 2 * before)
    uninstall(m)
    assert m._old_forward == old and torch.equal(m(x), before)
    remove_hook_from_module(m)
    assert torch.equal(m(x), before)


def test_a_foreign_forward_on_the_instance_is_an_obstacle():
    m = nn.Linear(3, 4)
    m.forward = lambda x: x
    assert "bound on the instance" in obstacle(m)
    assert obstacle(nn.Linear(1, 1)) == ""


def test_someone_else_changed_the_class():
    m = nn.Linear(3, 4)
    install(m, "double", Doubling, None)
    m.__class__ = nn.Linear
    with pytest.raises(RuntimeError, match="changed by someone else"):
        uninstall(m)


def helper(x):
    return x + 1


def decorated(fn):
    import functools

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn(*args, **kwargs) * 10

    return wrapper


class Calls(nn.Module):
    def forward(self, x):
        return helper(x)


class Decorated(nn.Module):
    @decorated
    def forward(self, x):
        return helper(x)


@pytest.mark.parametrize(("cls", "factor"), [(Calls, 1), (Decorated, 10)])
def test_rebind_changes_one_name_for_one_copy(cls, factor):
    assert global_calls(cls.forward) == {"helper": helper}
    fast = rebind(cls.forward, {"helper": lambda x: x + 100})
    m, x = cls(), torch.zeros(1)
    assert fast(m, x).item() == 100 * factor
    assert cls.forward(m, x).item() == 1 * factor and helper(x).item() == 1
    assert fast.__qualname__ == cls.forward.__qualname__


def test_rebind_refuses_what_it_cannot_see_through():
    with pytest.raises(TypeError, match="want a Python function"):
        rebind(len, {})
