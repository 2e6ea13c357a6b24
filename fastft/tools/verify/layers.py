"""A model too large for a float64 copy, verified layer by layer: every decoder layer on what it received, then what
comes after the last.

At no time is there more than one layer in float64, beside the model itself and what its layers received. The rest, from
the last layer's output to the loss and back, is the model's own forward with its list of layers emptied, given that
output as `inputs_embeds`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fastft.proving.float64 import float64_reference
from fastft.tools.verify.modules import in_float64

Tail = dict[str, torch.Tensor]


def decoder_layers(base: nn.Module) -> tuple[str, list[nn.Module]]:
    """(name of the longest list of modules, its members); ("", []) for a model without one."""
    lists = [(n, m) for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return "", []
    name, layers = max(lists, key=lambda nm: len(nm[1]))
    return name, list(layers)


@contextlib.contextmanager
def without_layers(base: nn.Module) -> Iterator[None]:
    """The base model with its list of decoder layers emptied, inside."""
    name, _ = decoder_layers(base)
    parent, key = base.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    layers = parent._modules[key]
    parent._modules[key] = nn.ModuleList()
    try:
        yield
    finally:
        parent._modules[key] = layers


def tail_of(base: nn.Module, batch: dict, hidden: torch.Tensor, *, exact: bool = False) -> Tail:
    """Loss, its gradient in `hidden` [rows, tokens, width] (the last layer's output) and in the trainable parameters
    after it. exact: in float64."""
    with without_layers(base):
        model = in_float64(base) if exact else base
        leaf = (hidden.double() if exact else hidden).detach().requires_grad_()
        rest = {k: v for k, v in batch.items() if k not in ("input_ids", "inputs_embeds")}
        leaves = {"hidden": leaf} | {n: p for n, p in model.named_parameters() if p.requires_grad}
        with float64_reference() if exact else contextlib.nullcontext():
            loss = model(inputs_embeds=leaf, **rest).loss
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {"loss": loss.detach()} | {f"d {n}": g for n, g in zip(leaves, grads) if g is not None}
    return {k: v.double() for k, v in found.items()} if exact else found
