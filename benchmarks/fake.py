"""One training step of a real model at full size, without its memory: parameters are fake tensors, the code is the real
code.

What is counted: floating-point operations (torch's own counter), operators that launch something (views are free; one
of fastft's registered operators is one launch), the bytes that those operators read and write (`Traffic`), and the
bytes that autograd keeps for the backward, once per storage, parameters left out."""

from __future__ import annotations

import contextlib
import math
import types
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from fastft.swapping.rebind import rebind
from fastft.tools.plan.fake import to_fake
from fastft.tools.report import in_fp8
from fastft_kernels.runtime.dispatch import planned_for_cuda

Patch = Callable[[nn.Module], nn.Module]
_FREE = {
    "view",
    "_unsafe_view",
    "reshape",
    "t",
    "transpose",
    "permute",
    "expand",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "detach",
    "alias",
    "split",
    "split_with_sizes",
    "unbind",
    "as_strided",
    "_reshape_alias",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "lift_fresh",
    "unfold",
    "chunk",
    "diagonal",
    "device",
    "_local_scalar_dense",
}


def _attention(q, k, v, dropout_p=0.0, is_causal=False, *args, out_shape=None, **kwargs) -> int:
    b, h, s, d = q
    return 4 * b * h * s * k[-2] * d // (2 if is_causal else 1)


def _attention_backward(go, q, k, v, o, lse, dropout_p=0.0, is_causal=False, *args, out_shape=None, **kwargs) -> int:
    return 5 * _attention(q, k, v, dropout_p, is_causal) // 2


_aten = torch.ops.aten


def _product(into, a, b, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(a) * b[-1]


# torch counts neither the CPU's flash attention (the causal half is counted here) nor products added in place
FORMULAS = {
    _aten.addmm_: _product,
    _aten.baddbmm_: _product,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _Launches(TorchDispatchMode):
    """Counts the operators that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if name not in _FREE:
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))


# of their first operand
_WRITES_ONLY = {"copy_", "_foreach_copy_", "zero_", "fill_", "bernoulli_", "normal_", "uniform_"}


def _bytes(t: torch.Tensor) -> int:
    """Of the elements that a view shows, each once: an expanded dimension repeats what is there."""
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride()) if stride or n == 0)


class Traffic(TorchDispatchMode):
    """Counts the bytes that pass between the chip and its memory if each operator reads each of its operands once and
    writes each of its results once: what was there before is read by an operator in place, not by one that only
    overwrites (beta=0, a copy)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if name not in _FREE:
            read = args[1:] if name in _WRITES_ONLY or (args and kwargs.get("beta") == 0) else args
            operands = [t for t in tree_leaves((read, kwargs)) if isinstance(t, torch.Tensor)]
            views = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t for t in operands}
            written = args[0] if name in _WRITES_ONLY else out
            results = [t for t in tree_leaves(written) if isinstance(t, torch.Tensor)]
            self.bytes[name] += sum(map(_bytes, (*views.values(), *results)))
        return out


class Live(TorchDispatchMode):
    """Bytes of the storages made while it is active: those that live now, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor):
                continue
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.known or key in given or not size:
                continue
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)
        return out


@dataclass
class Cost:
    """flops, and by operator; launches: operators that launch something; saved: bytes kept for the backward; traffic:
    bytes read and written (`Traffic`)."""

    flops: float = 0.0
    launches: float = 0.0
    saved: float = 0.0
    traffic: float = 0.0
    operators: dict[str, int] = field(default_factory=dict)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.flops - other.flops,
            self.launches - other.launches,
            self.saved - other.saved,
            self.traffic - other.traffic,
        )

    def per(self, n: float) -> Cost:
        return Cost(self.flops / n, self.launches / n, self.saved / n, self.traffic / n)


@contextlib.contextmanager
def counting(known: list[torch.Tensor]):
    """Yields a Cost that is filled at the end. known: tensors whose storages do not count as saved."""
    cost, sizes, keep = Cost(), {}, []
    skip = {t.untyped_storage()._cdata for t in known}

    def pack(t):
        s = t.untyped_storage()
        if s._cdata not in skip and s._cdata not in sizes:
            sizes[s._cdata] = s.nbytes()
            keep.append(s)  # an address must not be used again while we count
        return t

    flops, launches, traffic = FlopCounterMode(display=False, custom_mapping=FORMULAS), _Launches(), Traffic()
    with flops, launches, traffic, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield cost
    cost.operators = {str(k): n for k, n in flops.get_flop_counts().get("Global", {}).items()}
    cost.flops, cost.launches, cost.saved = flops.get_total_flops(), sum(launches.ops.values()), sum(sizes.values())
    cost.traffic = sum(traffic.bytes.values())


def build(
    config: PretrainedConfig,
    lora: LoraConfig | None,
    fp32_adapters: bool,
    attention: str | None = "sdpa",
    fp8: bool = False,
) -> nn.Module:
    """On the meta device, with adapters: the model as TRL trains it (bfloat16 base; adapters in float32 or
    bfloat16). lora None: no adapters, and nothing learns. fp8: the base's linear layers in FP8."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    if fp8:
        in_fp8(model)
    if lora is None:
        return model.requires_grad_(False).train()
    model = get_peft_model(model, lora, autocast_adapter_dtype=fp32_adapters, low_cpu_mem_usage=True)
    if not fp32_adapters:
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(torch.bfloat16)
    return model.train()


def _causal(backbone: nn.Module) -> None:
    """Whether rows are packed is a question that fake tensors cannot answer, and a dense mask is the careful answer.
    Here nothing is packed: this instance's forward makes no mask, as a real run makes none."""
    backbone.forward = types.MethodType(
        rebind(type(backbone).forward, {"create_causal_mask": lambda **kwargs: None}), backbone
    )


def _step(base: nn.Module, ids: torch.Tensor, autocast: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
    hidden.sum().backward()


def layer_cost(
    make_config: Callable[[int], PretrainedConfig],
    batch: tuple[int, int],
    *,
    patch: Patch | None = None,
    autocast: bool = True,
    dropout: float = 0.0,
    checkpointing: bool = False,
    rank: int = 16,
    fp8: bool = False,
) -> Cost:
    """What one decoder layer adds to a step (forward and backward): four layers less two, halved.
    make_config(layers). rank 0: without adapters, the gradient goes through to the layer's input. fp8: a base in FP8 on
    a GPU that multiplies in it; the second step."""
    costs = []
    for layers in (2, 4):
        lora = None
        if rank:
            lora = LoraConfig(
                r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
            )
        model = build(make_config(layers), lora, fp32_adapters=autocast, fp8=fp8)
        if patch is not None:
            model = patch(model)
        with FakeTensorMode(allow_non_fake_inputs=True), planned_for_cuda() if fp8 else contextlib.nullcontext():
            to_fake(model)
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
            base = model.get_base_model() if rank else model
            _causal(base.model)
            ids = torch.zeros(batch, dtype=torch.long)
            if fp8:  # the first step finds out whose output is to be rounded where it is made
                _step(base, ids, autocast)
                model.zero_grad(set_to_none=True)
            with counting([*model.parameters(), *model.buffers(), ids]) as cost:
                _step(base, ids, autocast)
        costs.append(cost)
    return (costs[1] - costs[0]).per(2)
