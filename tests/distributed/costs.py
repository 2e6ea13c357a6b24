"""What a training step keeps for its backward, by token, and how many operators it runs: one process beside FSDP2."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import fastft
from tests.distributed.models import VOCAB, make

LENGTHS = (16, 48)
NO_LAUNCH = ("view", "reshape", "t", "transpose", "detach", "expand", "slice", "select", "split", "unsqueeze", "alias")


class Operators(TorchDispatchMode):
    """Counts what computes, but for what FSDP2 does itself to gather and let go."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        frame: Any = sys._getframe(1)
        theirs = func.namespace in ("fsdp", "c10d", "_c10d_functional")
        while frame is not None and not theirs:
            theirs = "/distributed/fsdp/" in frame.f_code.co_filename and "hook" not in frame.f_code.co_name
            theirs = theirs and frame.f_code.co_name not in ("wrapped", "wrapper")
            frame = frame.f_back
        name = func.overloadpacket.__name__
        if not theirs and name.strip("_") not in NO_LAUNCH:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _step(model: nn.Module, length: int) -> None:
    ids = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()


def _kept(model: nn.Module, length: int) -> int:
    storages: dict[int, int] = {}
    alive = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if type(t) in (torch.Tensor, nn.Parameter):
            alive.append(t)  # so that no address comes twice
            storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _step(model, length)
    return sum(storages.values())


def costs(case: str) -> dict[str, list[float]]:
    """{"kept": [bytes by token in one process, under FSDP2], "launches": [operators of a step, ...]}."""
    found: dict[str, list[float]] = {"kept": [], "launches": []}
    one = make(case)
    two = copy.deepcopy(one)
    fastft.patch(one)
    fastft.patch(two)
    base: Any = two.get_base_model() if hasattr(two, "peft_config") else two
    for layer in base.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(two, reshard_after_forward=True)
    for model in (one, two):
        for length in LENGTHS:
            _step(model, length)
        short, long = (_kept(model, n) for n in LENGTHS)
        found["kept"].append((long - short) / (2 * (LENGTHS[1] - LENGTHS[0])))
        with Operators() as operators:
            _step(model, LENGTHS[0])
        found["launches"].append(len(operators.names))
    return found
