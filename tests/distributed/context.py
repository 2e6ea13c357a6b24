"""Context parallelism on CPUs: each process has a part of every row, and attention sends keys and values around.

Torch sends them for the attention kernels of GPUs alone. Here its own ring (`_templated_ring_attention`) runs over the
CPU's kernel, so that two processes compute what they would on GPUs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.big_modeling import _attach_context_parallel_hooks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention as cp

import fastft
from fastft.errors import DroppedMaskError
from fastft.patching.patcher import innermost
from fastft.tools.verify.ranks.batches import tokens_of
from fastft.tools.verify.ranks.strategies import mean_of
from tests.distributed.models import make, whole

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
GIVEN = ("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal")


def ring(op: Any, args: tuple, kwargs: dict) -> Any:
    """The CPU's kernel on one part of the keys and values after another."""
    first = next(t for t in args if isinstance(t, DTensor))
    group, sequence = first.device_mesh.get_group(), 2
    local = [t.to_local() if isinstance(t, DTensor) else t for t in args]
    if op is FORWARD:
        names = ("query", "key", "value", "dropout_p", "is_causal")
        found = cp._templated_ring_attention(
            group, sequence, op, scale=kwargs.get("scale"), **{"is_causal": False} | dict(zip(names, local))
        )
    else:
        found = cp._templated_ring_attention_backward(
            group, sequence, op, grad_out_name="grad_out", scale=kwargs.get("scale"), **dict(zip(GIVEN, local))
        )
    return tuple(DTensor.from_local(t, first.device_mesh, first.placements, run_check=False) for t in found)


@contextlib.contextmanager
def split(batch: dict[str, torch.Tensor]):
    """As Accelerate's `maybe_context_parallel`: inside, each tensor of the batch is this process's part of it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    tensors, before = list(batch.values()), dict(cp.custom_ops)
    cp.custom_ops.update({FORWARD: ring, BACKWARD: ring})
    try:
        with context_parallel(
            mesh, buffers=tensors, buffer_seq_dims=[1] * len(tensors), no_restore_buffers=set(tensors)
        ):
            yield
    finally:
        cp.custom_ops.clear()
        cp.custom_ops.update(before)


def hook(model: nn.Module) -> None:
    """As Accelerate prepares a model for it."""
    _attach_context_parallel_hooks(innermost(model))


def prepared(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers' Trainer gives it: with positions and shifted labels."""
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]).clone()
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    return {**batch, "position_ids": positions, "shift_labels": shifted}


def loss_of_parts(wrapped: nn.Module, draw: int) -> torch.Tensor:
    """This process's part of the loss, times the processes whose mean FSDP2 takes."""
    batch = prepared(whole(draw))
    with split(batch):
        loss = wrapped(**batch, num_items_in_batch=tokens_of(whole(draw))).loss * dist.get_world_size()
        loss.backward()
    return mean_of(loss)


def lost_masks() -> dict[str, str]:
    """What a patched model says to rows whose mask context parallelism would lose; and the loss of one whole row, whose
    parts are no documents, beside that of one process ("one")."""
    model = fastft.patch(make("llama-lora"))
    row = prepared({k: v[:1] for k, v in whole().items() if k != "attention_mask"})
    begins = {"whole": None, "inside": 5, "between": 4}  # where a second document begins: within a piece, or with one
    found = {}
    one = float(model(**row, num_items_in_batch=15).loss)
    hook(model)
    for name, at in begins.items():
        batch = {k: v.clone() for k, v in row.items()}
        if at is not None:
            batch["position_ids"][:, at:] -= at
        with split(batch):
            found[name] = _said(model, batch)
    config: Any = innermost(model).config
    config.layer_types = ["full_attention", "sliding_attention"]
    batch = {k: v.clone() for k, v in row.items()}
    with split(batch):
        found["window"] = _said(model, batch)
    return found | {"one": repr(one), "notes": "; ".join(fastft.report(model).notes)}


def _said(model: nn.Module, batch: dict[str, torch.Tensor]) -> str:
    try:
        loss = model(**batch, num_items_in_batch=15).loss
    except DroppedMaskError as e:
        return str(e)
    return repr(float(mean_of(loss)) * dist.get_world_size())
