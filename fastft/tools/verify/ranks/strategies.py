"""How a model is wrapped, trained, gathered, saved and resumed in several processes: by torch's own DDP and FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastft.compat.sharding_private import fsdp_module
from fastft.errors import ProcessesError
from fastft.parsing import parse_dtype
from fastft.patching.patcher import innermost
from fastft.tools.verify.layers import decoder_layers
from fastft.tools.verify.ranks.batches import Batch, draw, part, tokens_of
from fastft.tools.verify.ranks.training import Recipe, Results, loss_of, optimizer_of, trained

OPTIMIZER = "optimizer.pt"


def gathered(t: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor, of a sharded one too. Every process comes here alike."""
    whole: Any = getattr(t, "full_tensor", None)
    return (whole() if whole is not None else t).detach().clone()


def put(p: nn.Parameter, value: torch.Tensor) -> None:
    """A whole value into a parameter, sharded or not."""
    if hasattr(p, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = p
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements)
    p.data.copy_(value)


def plain(name: str) -> str:
    """A parameter's name without what DDP puts in front."""
    return name.removeprefix("module.")


def mean_of(loss: torch.Tensor) -> torch.Tensor:
    """Of all processes."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


class Strategy:
    """A model in several processes. Made anew for each model. `model` is what was loaded, `wrapped` what is called."""

    is_split = True  # each process has its own rows

    def __init__(self, model: Any, recipe: Recipe):
        self.model, self.recipe = model, recipe
        self.wrapped: Any = self.wrap(model)
        self.optimizer: Any = self.made_optimizer()

    @classmethod
    def quantised(cls, dtype: str) -> dict[str, Any]:
        """How a base in NF4 is loaded."""
        return {"load_in_4bit": True}

    @classmethod
    def placed(cls, model: Any, recipe: Recipe, again: Callable[..., Any]) -> Any:
        """The stock model that is trained, with the values of this one. again: loads it anew, with more arguments for
        `from_pretrained`."""
        return model

    def wrap(self, model: Any) -> Any:
        """The model as this strategy calls it; shards it in place where it does."""
        raise NotImplementedError

    def made_optimizer(self) -> Any:
        """Of the wrapped model."""
        return optimizer_of(self.wrapped, self.recipe.rate)

    def close(self) -> None:
        """The model is not trained further."""

    def rows(self, step: int) -> tuple[Batch, int]:
        """(this process's rows of a step, the tokens of all processes together)."""
        whole = draw(innermost(self.model), self.recipe.rows, self.recipe.seq, step)
        mine = part(whole, dist.get_rank(), dist.get_world_size()) if self.is_split else whole
        return mine, tokens_of(whole)

    def step(self, step: int) -> Results:
        """One optimizer step. As transformers' Trainer scales it: by the tokens of all, times the processes whose mean
        is taken. Returns the loss and every gradient, whole."""
        batch, tokens = self.rows(step)
        scale = dist.get_world_size() if self.is_split else 1
        loss = loss_of(self.wrapped, batch, tokens, self.recipe.counts) * scale
        self.backward(loss)
        results = {f"{step}:loss": mean_of(loss)} | {f"{step}:{n}": g for n, g in self.gradients().items()}
        self.update()
        return results

    def backward(self, loss: torch.Tensor) -> None:
        """Of this process's loss; gradients are reduced in it."""
        loss.backward()

    def update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> Results:
        """Of every parameter that trains, whole."""
        named = self.wrapped.named_parameters()
        return {plain(n): gathered(p.grad) for n, p in named if p.requires_grad and p.grad is not None}

    def weights(self) -> Results:
        """Every parameter that trains, whole, as this process has it."""
        return {plain(n): gathered(p) for n, p in self.wrapped.named_parameters() if p.requires_grad}

    def units(self) -> list[nn.Module]:
        """The modules in whose forward their parameters are whole."""
        return [self.wrapped]

    def state(self) -> dict[str, torch.Tensor] | None:
        """What the first process passes to `save_pretrained`; None where the model holds its weights itself."""
        return None

    def save(self, folder: Path) -> None:
        """As a trainer does: by `save_pretrained`, from the first process."""
        state = self.state()
        if dist.get_rank() == 0:
            self.model.save_pretrained(folder, state_dict=state)
        dist.barrier()

    def save_optimizer(self, folder: Path) -> None:
        """Its whole state, by the first process."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.wrapped, self.optimizer, options=options)
        if dist.get_rank() == 0:
            torch.save(state, folder / OPTIMIZER)
        dist.barrier()

    def load_optimizer(self, folder: Path) -> None:
        """What `save_optimizer` wrote, into the optimizer of a model that was loaded anew."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = torch.load(folder / OPTIMIZER, weights_only=True)
        set_optimizer_state_dict(self.wrapped, self.optimizer, state, options=options)


class DDP(Strategy):
    """DistributedDataParallel around the patched model."""

    def wrap(self, model: Any) -> Any:
        """DDP sends the first process's parameters to all."""
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=self.recipe.unused)


class FSDP2(Strategy):
    """`fully_shard` of every decoder layer, then of the rest."""

    @classmethod
    def quantised(cls, dtype: str) -> dict[str, Any]:
        """With the 4-bit weights stored as floats, as FSDP2 shards no other."""
        from transformers import BitsAndBytesConfig

        compute = parse_dtype(dtype) or torch.bfloat16
        how: dict[str, Any] = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        how |= dict(bnb_4bit_compute_dtype=compute, bnb_4bit_quant_storage=compute)
        return {"quantization_config": BitsAndBytesConfig(**how)}

    def wrap(self, model: Any) -> Any:
        """Shards the model where it stands."""
        from torch.distributed.fsdp import fully_shard

        for layer in decoder_layers(innermost(model))[1]:
            fully_shard(layer, reshard_after_forward=True)
        return fully_shard(model, reshard_after_forward=True)

    def units(self) -> list[nn.Module]:
        """What was wrapped."""
        return [m for m in self.wrapped.modules() if isinstance(m, fsdp_module())]

    def state(self) -> dict[str, torch.Tensor] | None:
        """Gathered on the first process; the others get nothing, and write nothing."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_model_state_dict(self.model, options=options)
        return state


class TP(Strategy):
    """transformers' own tensor parallelism: each process has a part of every layer's weights, and takes all rows."""

    is_split = False

    @classmethod
    def placed(cls, model: Any, recipe: Recipe, again: Callable[..., Any]) -> Any:
        """Loaded with a `DistributedConfig`. Raises ProcessesError where stock cannot take a step."""
        from transformers.distributed.configuration_utils import DistributedConfig

        try:
            parts = again(distributed_config=DistributedConfig(tp_size=dist.get_world_size()), device_map=None)
            for (_, p), (_, whole) in zip(trained(parts).items(), trained(model).items(), strict=True):
                put(p, whole.detach())
            batch = draw(innermost(parts), recipe.rows, recipe.seq, 0)
            loss_of(parts.train(), batch, tokens_of(batch), recipe.counts).backward()
        except (RuntimeError, ValueError, TypeError, AttributeError) as e:  # each process alike
            said = str(e).strip().splitlines()[0][:200] if str(e).strip() else ""
            raise ProcessesError(
                f"verify: --strategy tp: stock cannot train this model so ({type(e).__name__}: {said}): adapt the "
                "layers that its tp_plan splits by columns alone, or use --no-lora"
            ) from e
        parts.zero_grad()
        return parts

    def wrap(self, model: Any) -> Any:
        """Loaded so."""
        return model

    def save(self, folder: Path) -> None:
        """By `save_pretrained` of every process, which gathers."""
        self.model.save_pretrained(folder)
        dist.barrier()
