"""The modules and parameters below a module, as lists. `nn.Module.modules()` hands each module through one generator a
level: what looks at all modules of a large model many times walks them here."""

from __future__ import annotations

from torch import nn


def modules_of(root: nn.Module) -> list[nn.Module]:
    """`list(root.modules())`."""
    found: dict[nn.Module, None] = {}
    _walk(root, found)
    return list(found)


def _walk(module: nn.Module, found: dict[nn.Module, None]) -> None:
    found[module] = None
    inside = module._modules
    for name in inside:  # (by name: `values()` would be a call for each module)
        child = inside[name]
        if child is not None and child not in found:
            if child._modules:
                _walk(child, found)
            else:
                found[child] = None


def names_of(root: nn.Module) -> dict[nn.Module, str]:
    """`{module: name for name, module in root.named_modules()}`, in that order."""
    found: dict[nn.Module, str] = {}
    _walk_named(root, "", found)
    return found


def _walk_named(module: nn.Module, name: str, found: dict[nn.Module, str]) -> None:
    found[module] = name
    prefix = name + "." if name else ""
    for n, child in module._modules.items():
        if child is not None and child not in found:
            if child._modules:
                _walk_named(child, prefix + n, found)
            else:
                found[child] = prefix + n


def parameters_of(root: nn.Module) -> list[nn.Parameter]:
    """`list(root.parameters())`."""
    found: dict[int, nn.Parameter] = {}
    for module in modules_of(root):
        if parameters := module._parameters:
            for p in parameters.values():
                if p is not None:
                    found[id(p)] = p
    return list(found.values())
