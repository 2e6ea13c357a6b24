"""A model at full size on fake tensors: the real modules and the real code, without memory for values.

Tensors of integers and reference values stay real, so that questions a forward asks of them (is a row padded? are rows
packed?) get the answers that they get in a run; every floating-point tensor is fake. So no architecture's mask code
needs to be known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from fastft.compat.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    fake_device,
    tree_map_only,
    unset_fake_temporarily,
)
from fastft.errors import PlanError, QuantizationError
from fastft.proving.tensors import tensors_in
from fastft.tools.plan.fake_ops import FakeOperators
from fastft.tools.report import in_fp8, on_meta

BLOCK, BLOCK_OF_BLOCKS = 64, 256  # bitsandbytes: values of one absmax, and absmax values of one absmax of theirs
REAL_ELEMENTS = 1 << 28  # a larger tensor of integers is fake after all


def build(
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    four_bit: bool = False,
    fp8: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model on the meta device, its linear layers in NF4 with double quantisation where `four_bit`, in FP8 with a
    scale for each row where `fp8`; without adapters."""
    model = on_meta(config, trust_remote_code, dtype)
    if four_bit:
        _quantise(model, dtype)
    elif fp8:
        in_fp8(model)
    return model


def _quantise(model: Any, dtype: torch.dtype) -> None:
    """As transformers' loader does it: every linear layer but the head."""
    try:
        from transformers import BitsAndBytesConfig
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        from transformers.quantizers.base import get_keys_to_not_convert
    except ImportError as e:
        raise QuantizationError(f"a plan for 4-bit needs bitsandbytes: {e}") from e
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    replace_with_bnb_linear(model, modules_to_not_convert=get_keys_to_not_convert(model), quantization_config=how)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = how.quantization_method()
    model.requires_grad_(False)


def to_fake(model: nn.Module) -> None:
    """Inside a FakeTensorMode: meta tensors become fake CPU tensors (tied ones stay tied), 4-bit weights what
    bitsandbytes stores."""
    known: dict[int, torch.Tensor] = {}

    def fake(t: torch.Tensor, owner: nn.Module) -> torch.Tensor:
        if t.device.type != "meta":
            return t
        if id(t) not in known:
            if hasattr(t, "quant_type"):
                known[id(t)] = _packed(t, owner)
            else:
                empty = torch.empty(t.shape, dtype=t.dtype, device="cpu")
                known[id(t)] = (
                    nn.Parameter(empty, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else empty
                )
        return known[id(t)]

    for module in model.modules():
        module.__dict__["_parameters"].update(
            {n: fake(p, module) for n, p in module._parameters.items() if p is not None}
        )
        module._buffers.update({n: fake(b, module) for n, b in module._buffers.items() if b is not None})


def _packed(weight: Any, owner: Any) -> torch.Tensor:
    """What a Params4bit of this shape is once it is quantised. (A fake tensor with its attributes: a subclass would
    hide that it is fake.)"""
    from bitsandbytes.functional import QuantState

    n = weight.numel()
    blocks = -(-n // BLOCK)
    nested = QuantState(
        absmax=torch.empty(-(-blocks // BLOCK_OF_BLOCKS)),
        code=torch.empty(256),
        blocksize=BLOCK_OF_BLOCKS,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type=weight.quant_type,
        dtype=weight.dtype,
        offset=torch.empty(()),
        state2=nested,
    )
    packed: Any = nn.Parameter(torch.empty(((n + 1) // 2, 1), dtype=torch.uint8), requires_grad=False)
    packed.__dict__.update(
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=True,
        quant_type=weight.quant_type,
        quant_storage=torch.uint8,
        bnb_quantized=True,
        module=owner,
    )
    owner.quant_state = state
    return packed


def quantisation_tensors(model: nn.Module) -> list[torch.Tensor]:
    """What 4-bit weights keep beside their packed values."""
    found = []
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        if state is not None:
            nested = [] if state.state2 is None else [state.offset, state.state2.absmax, state.state2.code]
            found += [state.absmax, state.code, *nested]
    return found


class RealIntegers(TorchDispatchMode):
    """On top of `fake`, an operator whose tensors are all real (integers, and single numbers such as an optimizer's
    count of steps) is really run; what it returns in floating point becomes fake, but for single numbers."""

    def __init__(self, fake: FakeTensorMode, remembered: FakeOperators):
        super().__init__()
        self.fake, self.remembered = fake, remembered

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return fake_device(args[0]) if isinstance(args[0], FakeTensor) else func(*args)
        if func is torch.ops.aten._unsafe_view.default:  # alike, and torch remembers its results
            func = torch.ops.aten.view.default
        tensors = tensors_in((args, kwargs))
        if any(isinstance(t, FakeTensor) for t in tensors):
            if func is torch.ops.aten.index.Tensor:  # a real mask selects as many rows as it holds
                with unset_fake_temporarily():
                    args = (args[0], [j for i in args[1] for j in (i.nonzero().unbind(1) if _is_mask(i) else (i,))])
            return self.remembered(lambda: func(*args, **kwargs), func, args, kwargs)
        if not tensors:  # something new: is it small enough, and of integers?
            out = func(*args, **kwargs)
            if not isinstance(out, torch.Tensor) or out.is_floating_point() or out.numel() > REAL_ELEMENTS:
                return out
        with unset_fake_temporarily():
            out = func(*args, **kwargs)
        return tree_map_only(
            torch.Tensor, lambda t: self.fake.from_tensor(t) if t.is_floating_point() and t.numel() > 1 else t, out
        )


def _is_mask(t: torch.Tensor | None) -> bool:
    return t is not None and t.dtype == torch.bool and not isinstance(t, FakeTensor)


class FakeRun:
    """Where one model is made fake and run: `with` it as often as there are runs. (A fake tensor belongs to one mode.)
    Raises PlanError where the model's code asks for a floating-point value, which is not there."""

    def __init__(self) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.remembered = FakeOperators(self.fake)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            with self.fake, RealIntegers(self.fake, self.remembered):
                yield
        except (DataDependentOutputException, DynamicOutputShapeException) as e:
            raise PlanError(f"this model cannot be planned: its code depends on computed values ({e.func})") from e


def batch(config: PretrainedConfig, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """What a collator makes of `rows` full rows: nothing is padded, every token is a label. Real tensors."""
    ids = torch.zeros((rows, tokens), dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
