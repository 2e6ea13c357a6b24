"""A copy computes with its own parameters, also where a trainer or a user has bound a forward on the instance."""

import functools
import types

import torch
from torch import nn

from fastft.proving.clone import clone


def doubled(module: nn.Module) -> nn.Module:
    copy = clone(module)
    with torch.no_grad():
        copy.weight.mul_(2)
    return copy


def linear() -> tuple[nn.Linear, torch.Tensor]:
    return nn.Linear(4, 3, bias=False), torch.randn(2, 4)


def test_a_forward_that_wraps_the_originals_is_left_behind():
    """As TRL binds its fused head, and Accelerate its autocast."""
    module, x = linear()
    original = module.forward

    @functools.wraps(type(module).forward)
    def wrapper(self, *args):
        return original(*args)

    module.forward = types.MethodType(wrapper, module)
    assert torch.equal(doubled(module)(x), 2 * module(x))
    assert module.forward.__func__ is wrapper


def test_a_forward_of_the_users_own_comes_along():
    module, x = linear()
    module.forward = types.MethodType(lambda self, x: 4 * (x @ self.weight.T), module)
    assert torch.equal(doubled(module)(x), 2 * module(x))
