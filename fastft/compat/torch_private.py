"""PyTorch's names beside its documented interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.autograd import forward_ad as _forward_ad
from torch.nn.modules.dropout import _DropoutNd as AnyDropout
from torch.nn.parallel import distributed
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = [
    "CALL_HOOKS",
    "COMPILED_CALL",
    "COMPILED_MODULE",
    "HOOK_TABLES",
    "REPLICA",
    "SHARDED",
    "TENSOR_HOOKS",
    "TENSOR_METHODS",
    "TENSOR_PROPERTIES",
    "AnyDropout",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "KeepsDtypes",
    "TorchDispatchMode",
    "call_hooks",
    "current_backward",
    "fake_device",
    "fake_tensor",
    "forward_ad",
    "function_modes",
    "hooks_on_saved_tensors",
    "is_ddp_sink",
    "is_under_fake_tensors",
    "operator_name",
    "schema_name",
    "storage_id",
    "subclass_of",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "unset_fake_temporarily",
    "will_run",
    "without_memory",
    "without_modes",
    "without_overrides",
]

_C: Any = torch._C

# Tensor subclasses

# context manager: `__torch_function__` is not called inside. Lazy logits and masks ask their own tensors this way.
without_overrides = _C.DisableTorchFunctionSubclass
# attributes that answer about a tensor without its values; lazy logits answer them as the tensor that they stand for
TENSOR_PROPERTIES = ("_version", "_base")
TENSOR_METHODS = ("_is_view",)
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def without_memory(cls: type, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A wrapper tensor of the subclass `cls`: shape, dtype and device, and no values. Its strides are 0, as there is no
    memory that a kernel could be given."""
    return torch.Tensor._make_wrapper_subclass(
        cls, shape, strides=(0,) * len(shape), dtype=dtype, device=device, requires_grad=False
    )


def subclass_of(cls: type, data: torch.Tensor) -> Any:
    """A tensor of the subclass `cls` that shares the memory of `data`."""
    return torch.Tensor._make_subclass(cls, data)


# The autograd engine

# (True) -> the innermost pair of hooks on saved tensors, or None: who sees what autograd saves now?
hooks_on_saved_tensors: Callable[[bool], tuple | None] = _C._autograd._top_saved_tensors_default_hooks
current_backward: Callable[[], int] = _C._current_graph_task_id  # -1 outside a backward
will_run: Callable[[Any], bool] = _C._will_engine_execute_node  # will this backward come to that node of the graph?
forward_ad: Any = _forward_ad  # ._current_level: of forward-mode differentiation, -1 outside


# Modes

# how many TorchFunctionModes listen (fastft_kernels.runtime.compat counts TorchDispatchModes)
function_modes: Callable[[], int] = _C._len_torch_function_stack
without_modes = _disable_current_modes  # context manager: no TorchDispatchMode listens inside


def is_under_fake_tensors() -> bool:
    """Does a FakeTensorMode listen?"""
    return any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())


def operator_name(operator: Any) -> str:
    """Of `torch.ops.fastft.rms_norm.default`: "rms_norm"."""
    return operator._opname


def schema_name(operator: Any) -> str:
    """Of `torch.ops.aten.add.Tensor`: "aten::add"."""
    return operator._schema.name


# Memory


def storage_id(storage: torch.UntypedStorage) -> int:
    """What tells a live storage from all others, on fake tensors too (their data_ptr cannot be read)."""
    return storage._cdata


def fake_device(t: Any) -> torch.device:
    """The device that a fake tensor stands on, without asking an operator for it."""
    return t.fake_device


def fake_tensor(
    mode: FakeTensorMode,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    storage: torch.UntypedStorage | None = None,
    offset: int = 0,
) -> torch.Tensor:
    """A fake tensor of `mode`, made without an operator; on `storage` of another one, from `offset` elements on, where
    that is given."""
    with in_kernel_invocation_manager(mode):
        made = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        if storage is not None:
            made.set_(storage, offset, shape, strides)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return FakeTensor(mode, made, device)


# What an nn.Module keeps in its __dict__

CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOK_TABLES = (
    *CALL_HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
COMPILED_CALL = "_compiled_call_impl"  # what `module.compile()` leaves: called in the place of hooks and forward
COMPILED_MODULE = "_orig_mod"  # the child of what `torch.compile(module)` returns
REPLICA = "_is_replica"  # set on DataParallel's copies


class KeepsDtypes:
    """Mixin of an nn.Module: of the parameters named in `kept`, `.to()`, `.half()`, `.bfloat16()` and so on change the
    device alone, as their values would be others in another dtype. `_cast_to` hears of the dtype of each floating
    tensor that was cast."""

    kept: frozenset[str] = frozenset()

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        module: Any = self
        kept = {id(module._parameters[n]) for n in self.kept}

        def without_cast(t: torch.Tensor) -> torch.Tensor:
            new = fn(t)
            if new.dtype == t.dtype:
                return new
            self._cast_to(new.dtype)
            return t.to(new.device) if id(t) in kept else new

        base: Any = super()
        return base._apply(without_cast, recurse)

    def _cast_to(self, dtype: torch.dtype) -> None:
        raise NotImplementedError


# Distributed training

SHARDED = ("ds_id", "_fsdp_flattened")  # on parameters whose values are elsewhere: DeepSpeed's, and those of FSDP 1
_DDP_SINK = getattr(distributed, "_DDPSink", None)


def is_ddp_sink(node: Any) -> bool:
    """Is this the autograd function by which DistributedDataParallel clones all outputs of a model? Its backward hands
    every gradient on, absent ones too."""
    return _DDP_SINK is not None and getattr(type(node), "_forward_cls", None) is _DDP_SINK


def call_hooks(module: nn.Module) -> tuple[dict, ...]:
    """The tables of hooks that a call of `module` runs, before or after its forward and around its backward."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
