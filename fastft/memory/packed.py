"""Packed rows without a dense mask, padded batches without their padding: for one model, decided batch by batch.

Two hooks stand on the module that calls the layers. The first looks at a batch. A row of several documents (its position ids restart)
goes on with a `SegmentMask`; a padded batch is gathered into such a row. The second scatters the last hidden state back to [B, S, H], zeros
at the padding. Everything between works token by token, or is attention, which knows documents by then; `structure.proof_of` has shown that for
this model at the first such batch. Any other batch passes untouched: stock's path, bit for bit. What could have gone this way and did
not is counted with the reason.

A third hook, on the modules through which a forward enters, notes the labels: an unpadded batch has no hidden states at its padding, so
no label may ask for them.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers.utils import ModelOutput

from fastft.memory.interface import KIND, attentions, teach
from fastft.memory.rows import Labels, Unpadded, packed, unpadded
from fastft.memory.segments import SegmentMask
from fastft.memory.stack import stacks
from fastft.memory.structure import proof_of
from fastft.patching.oom import is_out_of_memory
from fastft.patching.patcher import record_of
from fastft.patching.prove import Proof
from fastft.patching.report import Row
from fastft.patching.swap import is_fast, stock_class, uninstall

PAYS = 0.02  # of a batch that is padding: less is not worth its gather
_KNOWN = frozenset({
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "cache", "past_key_values", "cache_position", "return_dict",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "num_items_in_batch", "logits_to_keep",
})  # fmt: skip
_TOKENWISE = ("make_inputs_require_grads", "make_inputs_require_grad", "output_capturing_hook")
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
_LENGTHS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})  # a packed row's, of no use to a padded batch


@dataclass
class Packing:
    """owner: the module that calls the layers. unpad: True also where dropout then draws other, equally likely values; False never;
    None where it is provably the same. entered: the labels of the forwards under way, outermost first."""

    base: weakref.ref[nn.Module]
    owner: weakref.ref[nn.Module]
    unpad: bool | None = None
    why_not: str = ""
    attentions: list[weakref.ref[nn.Module]] = field(default_factory=list)
    implementation: str = ""
    counts: Counter = field(default_factory=Counter)
    used: dict[str, str] = field(default_factory=dict)  # kernels, and why no faster ones
    proofs: dict[str, Proof] = field(default_factory=dict)
    entered: list[Labels | None] = field(default_factory=list)
    is_entrance: bool = False  # the owner is itself what the user calls

    def plan(self, module: nn.Module, given: dict) -> dict | Unpadded | None:
        """New keyword arguments for a packed row, the rows of a batch to unpad, or None: stock."""
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        x = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor) or x.device.type == "meta" or x.dim() < 2:
            return None
        if mask is None and isinstance(positions, torch.Tensor) and positions.dim() == 2 and positions.shape == x.shape[:2]:
            return self._pack(module, given, positions)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape == x.shape[:2] and module.training and self.unpad is not False:
            return self._unpad(module, given, mask)
        return None

    def _pack(self, module: nn.Module, given: dict, positions: torch.Tensor) -> dict | None:
        if positions.shape[0] > 1:
            return None
        segments = packed(positions)
        if segments is None:
            return None
        if why := self._obstacle(module, given, "packed", _KNOWN):
            self._count(f"a packed row: {why}")
            return None
        self.counts["packed"] += 1
        self.counts["packed tokens"] += segments.tokens
        self.counts["packed documents"] += len(segments.lengths)
        return {**given, "attention_mask": SegmentMask.of(replace(segments, used=self.used))}

    def _unpad(self, module: nn.Module, given: dict, mask: torch.Tensor) -> Unpadded | None:
        labels = Labels() if self.is_entrance else self.entered[-1] if self.entered else None
        found = unpadded(mask, labels or Labels(), given.get("input_ids"), getattr(module.config, "pad_token_id", None))
        if found is None:
            return None
        why = found if isinstance(found, str) else self._obstacle(module, given, "padded", _KNOWN - _LENGTHS)
        if not why and labels is None:
            why = "the labels are not seen, as the model's forward is entered by another way than at the patch: patch again"
        if not why and (p := given.get("position_ids")) is not None and (p.dim() != 2 or p.shape[1] != mask.shape[1]):
            why = "its position ids are not [rows, length]"
        if not why and isinstance(found, Unpadded) and found.segments.tokens > (1 - PAYS) * mask.numel():
            return None
        if why or isinstance(found, str):
            self._count(f"a padded batch: {why}")
            return None
        self.counts["unpadded"] += 1
        self.counts["real tokens"] += found.segments.tokens
        self.counts["padded tokens"] += mask.numel()
        return replace(found, segments=replace(found.segments, used=self.used))

    def _count(self, why: str) -> None:
        base = self.base()
        if base is not None and (record := record_of(base)) is not None:
            record.fallbacks[why] += 1

    def _obstacle(self, module: nn.Module, given: dict, kind: str, known: frozenset[str]) -> str:
        """Why this batch goes the stock way; empty when it need not."""
        if self.why_not:
            return self.why_not
        if given.get("cache") is not None or given.get("past_key_values") is not None or _caches(module, given):
            return "a cache is in use (use_cache)"
        config = module.config
        if wanted := sorted(n for n in {*given, *vars(config), *_OUTPUTS} if n.startswith("output_") and given.get(n, getattr(config, n, False))):
            return f"{', '.join(wanted)} is asked for"
        if more := sorted(n for n, v in given.items() if n not in known and not n.startswith("output_") and v is not None):
            return f"the model is given {', '.join(more)}"
        if given.get("return_dict", getattr(config, "return_dict", True)) is False:
            return "a tuple is asked for (return_dict=False)"
        if config._attn_implementation != self.implementation:
            return f"the attention implementation was changed to {config._attn_implementation} after the patch"
        if not all((m := r()) is not None and is_fast(m, KIND) for r in self.attentions):
            return "an attention was replaced after the patch"
        if hook := _foreign_hook(module):
            return f"the hook {hook} inside the model may look at rows"
        if kind == "padded" or module.training:
            if drops := _dropout(module, kind, [m for r in self.attentions if (m := r()) is not None]):
                if self.unpad is not True:
                    return f"{drops}, which would draw other values than in stock's batch (unpad=True allows it)"
        proof = self._proof(module, kind)
        return "" if proof.ok else proof.reason

    def _proof(self, module: nn.Module, kind: str) -> Proof:
        if kind not in self.proofs:
            try:
                self.proofs[kind] = proof_of(module, kind)
            except Exception as e:
                if not is_out_of_memory(e):
                    raise
                return Proof(False, reason="no memory was left for the proof")
        return self.proofs[kind]

    def rows(self) -> list[Row]:
        """For the report, from the first packed or padded batch on: one row for each class of attention."""
        proof = self.proofs.get("packed") or self.proofs.get("padded")
        if self.why_not or proof is None or not proof.ok:
            return []
        classes = Counter(stock_class(m).__name__ for r in self.attentions if (m := r()) is not None)
        note = "; ".join(dict.fromkeys(filter(None, self.used.values())))
        kernel = ", ".join(sorted(self.used)) or "within documents"
        return [Row(KIND, name, n, kernel, proof.error, proof.stock_error, proof.dtype, note) for name, n in classes.items()]

    def lines(self) -> list[str]:
        """For the report."""
        if self.why_not:
            return [f"packed rows and padding run as in stock: {self.why_not}"]
        c = self.counts
        lines = [f"{kind} rows run as in stock: {p.reason}" for kind, p in self.proofs.items() if not p.ok]
        if c["packed"]:
            lines.append(f"{c['packed']} packed rows ({c['packed documents']} documents, {c['packed tokens']} tokens) ran without a mask")
        if c["unpadded"]:
            share = c["real tokens"] / c["padded tokens"]
            lines.append(f"{c['unpadded']} padded batches ran unpadded: {c['real tokens']} of {c['padded tokens']} tokens ({share:.0%})")
        return lines

    def __deepcopy__(self, memo) -> Packing:
        base, owner = self.base(), self.owner()
        new = memo[id(self)] = Packing(self.base, self.owner, self.unpad, self.why_not, [], self.implementation, is_entrance=self.is_entrance)
        new.proofs, new.used = dict(self.proofs), dict(self.used)
        if base is not None and owner is not None:
            new.base, new.owner = weakref.ref(copy.deepcopy(base, memo)), weakref.ref(copy.deepcopy(owner, memo))
        new.attentions = [weakref.ref(copy.deepcopy(m, memo)) for r in self.attentions if (m := r()) is not None]
        return new


def _foreign_hook(owner: nn.Module) -> str:
    """The name of a hook below the owner that is not known to treat tokens alike: a user's, noise on embeddings, adapters by row."""
    for module in owner.modules():
        if module is owner:
            continue
        for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
            for hook in table.values():
                name = getattr(hook, "__name__", type(hook).__name__)
                home = (getattr(hook, "__module__", None) or type(hook).__module__).split(".")[0]
                if home != "fastft" and not (home in ("transformers", "peft") and name in _TOKENWISE):
                    return name
    return ""


def _caches(module: nn.Module, given: dict) -> bool:
    use = given.get("use_cache")
    use = getattr(module.config, "use_cache", False) if use is None else use
    recomputes = module.training and any(getattr(m, "gradient_checkpointing", False) for m in module.modules())
    return bool(use) and not recomputes  # transformers builds no cache beside checkpoints


def _dropout(module: nn.Module, kind: str, attentions: list[nn.Module]) -> str:
    """What is dropped at random in this forward, if anything is: a packed row keeps its shape but in the attention."""
    for m in attentions:
        if m.training and any("dropout" in n and isinstance(p, float) and p for n, p in m.__dict__.items()):
            return "the attention drops weights"
    if kind == "packed":
        return "the attention drops weights" if any(_drops(c) for m in attentions for c in m.children()) else ""
    return "dropout is on" if any(map(_drops, module.modules())) else ""


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training


class _Hook:
    """What all hooks share: a copy serves the copy of the model; a pickled model is a stock model, and needs the standard library."""

    def __init__(self, packing: Packing):
        self.packing = packing

    def __deepcopy__(self, memo):
        new = memo[id(self)] = type(self)(copy.deepcopy(self.packing, memo))
        return new

    def __reduce__(self):
        return getattr, (contextlib.nullcontext(), "__exit__")


class Look(_Hook):
    """Forward pre-hook of the owner."""

    def __init__(self, packing: Packing):
        super().__init__(packing)
        self.running: list[Unpadded | None] = []

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        if torch.compiler.is_compiling() or module is not self.packing.owner():  # a replica of DataParallel
            return None
        self.running.append(None)
        if any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack()):
            return None  # how rows are padded or packed is a question to values
        given = _named(module, args, kwargs)
        plan = None if given is None else self.packing.plan(module, given)
        if plan is None or given is None:
            return None
        if isinstance(plan, Unpadded):
            self.running[-1] = plan
            plan = plan.arguments(given)
        return (), plan


class Restore(_Hook):
    """Forward hook of the owner, called after an exception too."""

    def __init__(self, packing: Packing, look: Look | None = None):
        super().__init__(packing)
        self.look = look

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output):
        if torch.compiler.is_compiling() or self.look is None or not self.look.running or module is not self.packing.owner():
            return None
        rows = self.look.running.pop()
        if rows is not None and isinstance(output, ModelOutput):
            output["last_hidden_state"] = rows.pad(output["last_hidden_state"])
        return None

    def __deepcopy__(self, memo):
        new = memo[id(self)] = Restore(copy.deepcopy(self.packing, memo), copy.deepcopy(self.look, memo))
        return new


class Enter(_Hook):
    """Forward pre-hook of a module through which a forward enters: notes the labels."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling():
            return
        given = _named(module, args, kwargs)
        if given is None:
            self.packing.entered.append(None)
            return
        shifted = given.get("shift_labels")
        labels = given.get("labels") if shifted is None else shifted
        self.packing.entered.append(Labels(labels if isinstance(labels, torch.Tensor) else None, shifted is not None))


class Leave(_Hook):
    """Forward hook of such a module, called after an exception too."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if not torch.compiler.is_compiling() and self.packing.entered:
            self.packing.entered.pop()


def _named(module: nn.Module, args: tuple, kwargs: dict) -> dict | None:
    """All arguments by name; None where that cannot be told."""
    if not args:
        return kwargs
    names = [n for n, p in inspect.signature(type(module).forward).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    return None if len(args) > len(names) else {**dict(zip(names, args)), **kwargs}


def attach(model: nn.Module, base: nn.Module, unpad: bool | None = None) -> Packing | None:
    """Put the hooks on `base` (the innermost transformers model) and on the ways into it, in place of those that stand there; None for
    a model without layers."""
    before = packing_of(base)
    release(model, base)
    found = stacks(base)
    owner = max(found, key=lambda s: s.share).owner() if found else None
    if owner is None or not hasattr(owner, "config"):
        return None
    packing = Packing(weakref.ref(base), weakref.ref(owner), unpad)
    if before is not None:
        packing.unpad = before.unpad if unpad is None else unpad
        packing.counts, packing.used, packing.proofs = before.counts, before.used, before.proofs
    packing.implementation = owner.config._attn_implementation or ""
    packing.why_not = _prepare(packing, owner)
    look = Look(packing)
    owner.register_forward_pre_hook(look, with_kwargs=True)
    owner.register_forward_hook(Restore(packing, look), with_kwargs=True, always_call=True)
    for module in _entrances(model, base):
        if module is owner:
            packing.is_entrance = base is owner
            continue
        module.register_forward_pre_hook(Enter(packing), with_kwargs=True)
        module.register_forward_hook(Leave(packing), with_kwargs=True, always_call=True)
    return packing


def _prepare(packing: Packing, owner: nn.Module) -> str:
    """Teach the attentions; or why not."""
    name, cls = packing.implementation, type(owner)
    if name != "sdpa" and not (name == "eager" and not getattr(cls, "_supports_sdpa", True)):
        return f"the attention implementation is {name or 'unknown'}, which was chosen and stays"
    found = list(attentions(owner))
    if not found:
        return "its attention is not on transformers' attention interface"
    for module in found:
        uninstall(module, KIND)  # of a patch before: it goes over the swaps that are there now
        if why := teach(module):
            return why
    packing.attentions = [weakref.ref(m) for m in found]
    return ""


def _entrances(model: nn.Module, base: nn.Module) -> list[nn.Module]:
    tuner = getattr(model, "base_model", None) if hasattr(model, "peft_config") else None
    return [m for m in dict.fromkeys((model, tuner, base)) if isinstance(m, nn.Module)]


def packing_of(base: nn.Module) -> Packing | None:
    return next((hook.packing for _, _, hook in _hooks(base) if isinstance(hook, Look)), None)


def release(model: nn.Module, base: nn.Module) -> None:
    """The exact undo of `attach`, but for the attentions' classes, which `undo` restores with all others."""
    for root in {id(model): model, id(base): base}.values():
        for module, key, _ in list(_hooks(root)):
            for table in (
                module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks, module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):  # fmt: skip
                table.pop(key, None)


def _hooks(root: nn.Module) -> Iterator[tuple[nn.Module, int, _Hook]]:
    for module in root.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(table.items()):
                if isinstance(hook, _Hook):
                    yield module, key, hook
