"""A model as it was before a strategy wrapped it: FSDP2 has no way back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from fastft.compat.sharding_private import forget_fsdp


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards every module of `model` has the class, the attributes, the parameters and the hooks that it had. (Each
    table keeps its identity, as handles of hooks know theirs by it.)"""
    before = []
    for module in model.modules():
        tables = {k: (v, dict(v)) for k, v in vars(module).items() if isinstance(v, dict)}
        before.append((module, type(module), dict(vars(module)), tables))
    try:
        yield
    finally:
        for module, cls, attributes, tables in before:
            forget_fsdp(module)
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            for table, held in tables.values():
                table.clear()
                table.update(held)
