"""Kernels of Liger on a patched model: refused in one line, whichever came first.

`use_liger_kernel=True` lets the trainer bind Liger's forwards on the model's instances just before the first step, over
whatever class they have: fastft's kernels would be silent without a word, and its report wrong. Nothing of
transformers, TRL or Liger is touched to see it: a bound forward says where it comes from. The patch looks at every
module; a forward of a patched model at one module of each class."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn

from fastft.errors import LigerError

PACKAGE = "liger_kernel"


def refuse(modules: Iterable[nn.Module], remedy: str) -> None:
    """LigerError if a forward bound on one of the modules is Liger's."""
    for module in modules:
        bound = module.__dict__.get("forward")
        if bound is not None and _is_ligers(bound):
            raise LigerError(
                f"use_liger_kernel: Liger's kernels stand on this model ({bound.__qualname__}), where fastft's cannot "
                f"run; {remedy}"
            )


def _is_ligers(bound: object) -> bool:
    module = getattr(getattr(bound, "__func__", bound), "__module__", None) or ""
    return module.partition(".")[0] == PACKAGE


def one_of_each_class(base: nn.Module) -> tuple[weakref.ref, ...]:
    """One module of each class in `base`, held weakly."""
    return tuple(weakref.ref(m) for m in {type(m): m for m in base.modules()}.values())
