"""Models that somebody else loads in parts: transformers by a `DistributedConfig`, Accelerate from one copy."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

import fastft
from fastft.tools.verify.ranks.batches import tokens_of
from tests.distributed.models import make, whole
from tests.distributed.strategies import FSDP2, Strategy, Trained
from tests.linear.lora_models import adapted


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """The first process's, known to all."""
    with tempfile.TemporaryDirectory() if dist.get_rank() == 0 else contextlib.nullcontext() as folder:
        shared: list[Any] = [folder]
        dist.broadcast_object_list(shared, 0)
        yield Path(shared[0])
        dist.barrier()


@dataclass
class Native(Strategy):
    """transformers' own parallelism. sizes: for DistributedConfig."""

    sizes: dict[str, int]

    def train(self, model: nn.Module, patched: bool) -> Trained:
        from transformers.distributed import DistributedConfig

        if not patched:
            return super().train(model, patched)
        with shared_folder() as folder:
            if dist.get_rank() == 0:
                model.save_pretrained(folder)
            dist.barrier()
            parts = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, distributed_config=DistributedConfig(**self.sizes)
            )
        return super().train(parts.train(), patched)

    def prepare(self, model: nn.Module, patched: bool) -> nn.Module:
        return fastft.patch(model)

    def backward(self, wrapped: nn.Module, draw: int) -> torch.Tensor:
        if "fsdp_size" in self.sizes:
            return super().backward(wrapped, draw)
        loss = wrapped(**whole(draw), num_items_in_batch=tokens_of(whole(draw))).loss
        loss.backward()
        return loss.detach()


@dataclass
class RamEfficient(FSDP2):
    """By Accelerate with `cpu_ram_efficient_loading`: the first process reads the weights, all others have none until
    FSDP2 has sharded them. before: the patch comes first."""

    def prepare(self, model: nn.Module, patched: bool) -> nn.Module:
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.utils import fsdp2_prepare_model

        if dist.get_rank():
            buffers = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]
            model.to("meta")
            for m, n, b in buffers:  # these are no part of a checkpoint, and every process has them
                m._buffers[n] = b
        if patched and self.before:
            fastft.patch(model)
        settings: dict[str, Any] = dict(auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True, **settings)
        accelerator = SimpleNamespace(  # the class itself takes FSDP2 for GPUs alone
            state=SimpleNamespace(fsdp_plugin=plugin),
            is_main_process=dist.get_rank() == 0,
            device=torch.device("cpu"),
            parallelism_config=None,
            mixed_precision="no",
        )
        model = fsdp2_prepare_model(accelerator, model)
        if patched and not self.before:
            fastft.patch(model)
        return model


def adapter_too_late() -> list[str]:
    """Notes on a model to which an adapter is added when it is sharded already."""
    from torch.distributed.fsdp import fully_shard

    model: Any = make("llama-full")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model = fastft.patch(adapted(model))
    return list(fastft.report(model).notes)


LOADED: dict[str, Strategy] = {
    "native-fsdp2": Native({"fsdp_size": 2}),
    "native-tp-ep": Native({"tp_size": 2, "ep_size": 2}),
    "native-fsdp2-ep": Native({"fsdp_size": 2, "ep_size": 2}),
    "ram-efficient": RamEfficient(False),
    "ram-efficient-before": RamEfficient(True),
}
