"""torch's own `fully_shard` on a model of fake tensors, in the units that accelerate makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastft.checkpointing.layer_stack import stacks
from fastft.patching.patcher import innermost


def shard(model: nn.Module, ranks: int, low: torch.dtype | None) -> None:
    """Every layer is a unit, the input embeddings one, the final norm and the head one that stays whole between forward
    and backward, and what is left the last. low: the dtype of mixed precision, in which parameters are gathered and
    gradients summed; None: their own. Inside the process group of the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    settings: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (ranks,)),
        "mp_policy": MixedPrecisionPolicy() if low is None else MixedPrecisionPolicy(low, low, low),
    }
    quantised = [(m, dict(vars(p))) for m in model.modules() for p in m._parameters.values() if _is_quantised(p)]
    base: Any = innermost(model)
    for stack in stacks(base):
        for layer in stack.alive():
            fully_shard(layer, **settings, reshard_after_forward=True)
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    tail = [m for m in (_final_norm(base), head) if m is not None]
    if embeddings is not None and head is not None and embeddings.weight is head.weight:
        tail.insert(0, embeddings)
    elif embeddings is not None:
        fully_shard(embeddings, **settings, reshard_after_forward=True)
    if tail:
        fully_shard(tail, **settings, reshard_after_forward=False)
    fully_shard(model, **settings)
    if quantised:
        _say_what_is_quantised(model, quantised)


def _final_norm(base: nn.Module) -> nn.Module | None:
    """As accelerate finds it: the last norm among the children of the model without its head."""
    inner = getattr(base, getattr(base, "base_model_prefix", ""), base)
    found = [m for m in inner.children() if "Norm" in type(m).__name__]
    return found[-1] if found else None


def _is_quantised(p: nn.Parameter | None) -> bool:
    return getattr(p, "quant_state", None) is not None


def _say_what_is_quantised(model: nn.Module, quantised: list[tuple[Any, dict[str, Any]]]) -> None:
    """A gathered weight is a plain parameter, which bitsandbytes makes its own again by the state on its module. (A
    subclass would hide that it is fake: it gets the attributes.)"""
    from torch.distributed.fsdp import FSDPModule

    wrapped = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in wrapped:
        module.unshard()
    for module, attributes in quantised:
        vars(module.weight).update(attributes)
    for module in wrapped:
        module.reshard()
