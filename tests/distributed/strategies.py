"""How each strategy prepares, trains and saves a model in two processes."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

import fastft
from fastft.patching import patcher
from fastft.proving.prove import Proof
from fastft.swapping.swap import stock_class
from fastft.tools.verify.ranks.batches import tokens_of
from fastft.tools.verify.ranks.checks import equal_on_all
from fastft.tools.verify.ranks.strategies import gathered, mean_of, plain
from tests.distributed.context import hook, loss_of_parts
from tests.distributed.models import half, name_of, whole
from tests.linear.lora_models import DRAWS, Results

LEARNING_RATE = 0.1


@dataclass
class Trained:
    """A model after one step: results are the gathered loss and gradients from before it."""

    model: nn.Module
    results: Results
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # what learned, whole
    saved: dict[str, torch.Tensor] | None = None

    def checks(self) -> dict[str, Any]:
        """Are the weights equal on all ranks? Is what was saved what was trained?"""
        found: dict[str, Any] = {"adapters_equal": equal_on_all("", self.weights, "ends with").ok}
        if self.saved is not None:
            names = {n: n.replace(".default", "") for n in self.weights}
            found["saved_equal"] = set(names.values()) == set(self.saved) and all(
                torch.equal(self.weights[n], self.saved[s]) for n, s in names.items()
            )
        return found


class Strategy:
    """mixed: parameters are computed with in another dtype than they are kept in: stock is then run the same way."""

    mixed = False
    dtype = torch.float32

    def prepare(self, model: nn.Module, patched: bool) -> nn.Module:
        raise NotImplementedError

    def train(self, model: nn.Module, patched: bool) -> Trained:
        """A step that is thrown away, as the first begins with other code (a guard, lazy initialisation); one of each
        batch on the same weights; then the optimizer's."""
        wrapped, results = self.prepare(model, patched), {}
        for i in (0, *range(DRAWS)):
            wrapped.zero_grad(set_to_none=True)
            results[name_of("loss", i)] = self.backward(wrapped, i)
            for n, p in wrapped.named_parameters():
                if p.requires_grad and p.grad is not None:
                    results[name_of(f"d {plain(n)}", i)] = gathered(p.grad)
        learning = [p for p in wrapped.parameters() if p.requires_grad]
        torch.optim.SGD(learning, lr=LEARNING_RATE).step()
        weights = {plain(n): gathered(p) for n, p in wrapped.named_parameters() if p.requires_grad}
        return Trained(model, results, weights, self.save(model))

    def backward(self, wrapped: nn.Module, draw: int) -> torch.Tensor:
        """As transformers' Trainer scales it: by all tokens of the step, times the processes whose mean is taken."""
        batch = half(dist.get_rank(), draw)
        loss = wrapped(**batch, num_items_in_batch=tokens_of(whole(draw))).loss * dist.get_world_size()
        loss.backward()
        return mean_of(loss)

    def save(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        """The adapters, by PEFT's own function, from the first process."""
        if not hasattr(model, "peft_config"):
            return None
        state = self.state(model)
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if dist.get_rank() == 0:
                model.save_pretrained(folder, state_dict=state)
                saved = load_file(Path(folder) / "adapter_model.safetensors")
            everybody = [saved]
            dist.broadcast_object_list(everybody, 0)
            return everybody[0]

    def state(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        return None


@contextlib.contextmanager
def bad_norms():
    """No proof of a norm is good."""
    before = patcher.proof_of
    bad = Proof(False, reason="planted")
    patcher.proof_of = lambda kind, *rest: bad if kind == "norm" else before(kind, *rest)
    try:
        yield
    finally:
        patcher.proof_of = before


class DDP(Strategy):
    """DistributedDataParallel over a patched model."""

    def __init__(self, **settings):
        self.settings = settings

    def prepare(self, model: nn.Module, patched: bool) -> nn.Module:
        if patched:
            fastft.patch(model)
        return nn.parallel.DistributedDataParallel(model, **self.settings)


@dataclass
class FSDP2(Strategy):
    """fully_shard by layer and at the root. before: the patch comes first."""

    before: bool = True
    reshard: bool | None = None
    mp: MixedPrecisionPolicy | None = None
    offload: bool = False
    units: str = "layers"  # or, each by itself, "linears" or "norms"; or "head", or, as accelerate does, the "tail"
    checkpoint: bool = False
    outside: bool = False  # the loss is computed from the logits that the model returns, as TRL's trainers do
    planted: bool = False  # one process finds its norms' proofs bad
    dtype: torch.dtype = torch.float32

    @property
    def mixed(self) -> bool:
        return self.mp is not None or self.dtype != torch.float32

    def prepare(self, model: nn.Module, patched: bool) -> nn.Module:
        if patched and self.before:
            fastft.patch(model)
        if self.checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        settings: dict[str, Any] = dict(
            reshard_after_forward=self.reshard,
            mp_policy=self.mp or MixedPrecisionPolicy(),
            offload_policy=CPUOffloadPolicy(pin_memory=False) if self.offload else OffloadPolicy(),
        )
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        if self.units == "norms":
            for m in list(base.modules()):
                if stock_class(m).__name__ == "LlamaRMSNorm":
                    fully_shard(m, **settings)
        if self.units == "linears":
            for m in list(base.modules()):
                if hasattr(m, "in_features") and hasattr(m, "base_layer"):
                    fully_shard(m, **settings)
        for layer in base.model.layers:
            fully_shard(layer, **settings)
        if self.units == "tail":
            fully_shard(base.model.embed_tokens, **settings)
            fully_shard([base.model.norm, base.lm_head], **settings | {"reshard_after_forward": False})
        elif self.units == "head":
            fully_shard(base.lm_head, **settings)
            fully_shard(base.model.norm, **settings)
        fully_shard(model, **settings)
        if patched and not self.before:
            fastft.patch(model)
        return model

    def train(self, model: nn.Module, patched: bool) -> Trained:
        with bad_norms() if self.planted and dist.get_rank() == 1 else contextlib.nullcontext():
            return super().train(model, patched)

    def backward(self, wrapped: nn.Module, draw: int) -> torch.Tensor:
        if not self.outside:
            return super().backward(wrapped, draw)
        batch = half(dist.get_rank(), draw)
        labels = batch["labels"][:, 1:]
        logits = wrapped(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].float()
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")
        loss = loss / tokens_of(whole(draw)) * dist.get_world_size()
        loss.backward()
        return mean_of(loss)

    def state(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return state if dist.get_rank() == 0 else {}


@dataclass
class Zero(Strategy):
    """DeepSpeed's engine. before: the patch comes first."""

    stage: int
    before: bool = True
    dtype: torch.dtype = torch.float32

    def train(self, model: nn.Module, patched: bool) -> Trained:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

        if patched and self.before:
            fastft.patch(model)
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0},
        }
        learning = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(learning, lr=LEARNING_RATE), config=settings
        )
        if patched and not self.before:
            fastft.patch(model)
        results = {}
        for i in (0, *range(DRAWS)):  # the first is thrown away, as it begins with other code
            engine.optimizer.zero_grad()
            batch, count = half(dist.get_rank(), i), tokens_of(whole(i))
            loss = engine(**batch, num_items_in_batch=count).loss * dist.get_world_size()
            engine.backward(loss)
            results[name_of("loss", i)] = mean_of(loss)
            for n, p in model.named_parameters():
                if p.requires_grad:
                    found = safe_get_full_grad(p).detach().clone().reshape(getattr(p, "ds_shape", p.shape))
                    results[name_of(f"d {n}", i)] = found
        engine.step()
        weights = {
            n: safe_get_full_fp32_param(p).detach().clone().reshape(getattr(p, "ds_shape", p.shape))
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        self.engine = engine
        return Trained(model, results, weights, self.save(model))

    def state(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        if self.stage < 3:
            return None
        return self.engine._zero3_consolidated_16bit_state_dict() or {}


@dataclass
class Context(FSDP2):
    """Each process has a part of every row; parameters are sharded over all of them, as Accelerate does it."""

    def prepare(self, model: nn.Module, patched: bool) -> nn.Module:
        wrapped = super().prepare(model, patched)
        hook(model)
        return wrapped

    def backward(self, wrapped: nn.Module, draw: int) -> torch.Tensor:
        return loss_of_parts(wrapped, draw)


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
STRATEGIES: dict[str, Strategy] = {
    "ddp": DDP(),
    "ddp-unused": DDP(find_unused_parameters=True),
    "fsdp2-before": FSDP2(True),
    "fsdp2-after": FSDP2(False),
    "fsdp2-before-reshard": FSDP2(True, True),
    "fsdp2-after-reshard": FSDP2(False, True),
    "fsdp2-no-reshard": FSDP2(False, False),
    "fsdp2-tail": FSDP2(False, True, units="tail"),
    "fsdp2-head": FSDP2(False, True, units="head"),
    "fsdp2-head-before": FSDP2(True, True, units="head"),
    "fsdp2-linears": FSDP2(False, True, units="linears"),
    "fsdp2-checkpoint": FSDP2(False, True, checkpoint=True),
    "fsdp2-bf16": FSDP2(False, True, BF16),
    "fsdp2-bf16-before": FSDP2(True, True, BF16),
    "fsdp2-qlora": FSDP2(False, True, dtype=torch.bfloat16),
    "fsdp2-qlora-before": FSDP2(True, True, dtype=torch.bfloat16),
    "fsdp2-qlora-bf16": FSDP2(True, True, BF16, dtype=torch.bfloat16),
    "fsdp2-offload": FSDP2(False, True, offload=True),
    "fsdp2-outside": FSDP2(False, True, outside=True),
    "fsdp2-outside-head": FSDP2(False, True, outside=True, units="head"),
    "fsdp2-outside-tail": FSDP2(True, True, outside=True, units="tail"),
    "fsdp2-norms": FSDP2(False, True, units="norms"),
    "fsdp2-planted": FSDP2(False, planted=True),
    "context": Context(False, True),
    "context-before": Context(True, True),
    "zero2": Zero(2),
    "zero3": Zero(3),
    "zero3-after": Zero(3, False),
}
