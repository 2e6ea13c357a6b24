"""Packed rows without a dense mask, padded batches without their padding: for one model, decided batch by batch.

Two hooks stand on the module that calls the layers. The first looks at a batch. A row of several documents (its
position ids restart) goes on with a `DocumentMask`; a padded batch is gathered into such a row. The second scatters the
last hidden state back to [B, S, H], zeros at the padding. Everything between works token by token, or is attention,
which knows documents by then; `layer_proof` has shown that for this model at the first such batch. Any other
batch passes untouched: stock's path, bit for bit. What could have gone this way and did not is counted with the reason.

Two more hooks, on the modules through which a forward enters, see its labels and what it returns (`entrance`): an
unpadded batch has no hidden states at its padding, so nothing that leaves the forward may depend on them. A backbone
that a caller enters himself stays padded."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fastft.checkpointing.foreign_hooks import hooks_on, library_of
from fastft.compat.sharding_private import is_managed, only_gathers
from fastft.compat.torch_private import AnyDropout, FakeTensor
from fastft.compat.transformers_private import attention_implementation
from fastft.packing.batch import Labels, Unpadded, is_split, packed, refuse_lost_masks, unpadded
from fastft.packing.documents import DocumentMask
from fastft.packing.entrance import ActiveForwards, ForwardFrame, protect
from fastft.packing.interface import KIND
from fastft.packing.layer_proof import head_of, layer_proof
from fastft.packing.lengths import Lengths
from fastft.packing.model_proof import model_proof
from fastft.patching.patcher import record_of
from fastft.patching.report import Row
from fastft.proving.prove import Proof
from fastft.swapping.out_of_memory import is_out_of_memory
from fastft.swapping.swap import is_fast, stock_class
from fastft.swapping.walk import modules_of

PAYS = 0.02  # of a batch that is padding: less is not worth its gather
_KNOWN = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "use_cache",
        "cache",
        "past_key_values",
        "cache_position",
        "return_dict",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        "num_items_in_batch",
        "logits_to_keep",
        "shift_labels",
    }
)
_TOKENWISE = ("make_inputs_require_grads", "make_inputs_require_grad", "output_capturing_hook")
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
_LENGTHS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})  # a packed row's, of no use to a padded batch


@dataclass
class Packing:
    """owner: the module that calls the layers. unpad: True also where dropout then draws other, equally likely values;
    False never; None where it is provably the same. padded_now: why no batch runs without its padding any more."""

    base: weakref.ref[nn.Module]
    owner: weakref.ref[nn.Module]
    unpad: bool | None = None
    why_not: str = ""
    attentions: list[weakref.ref[nn.Module]] = field(default_factory=list)
    implementation: str = ""
    counts: Counter = field(default_factory=Counter)
    used: dict[str, str] = field(default_factory=dict)  # kernels, and why no faster ones
    proofs: dict[str, Proof] = field(default_factory=dict)
    proven: tuple[torch.device, torch.dtype] | None = None  # for whom: the owner's first parameter
    underway: ActiveForwards = field(default_factory=ActiveForwards)
    padded_now: str = ""
    lengths: Lengths = field(default_factory=Lengths)

    def plan(self, module: Any, given: dict) -> dict | Unpadded | None:
        """New keyword arguments for a packed row, the rows of a batch to unpad, or None: stock. Raises
        DroppedMaskError."""
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        x = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor) or x.device.type == "meta" or x.dim() < 2:
            return None
        if is_split(m for r in self.attentions if (m := r()) is not None):
            refuse_lost_masks(module, given)
            self.counts["split"] += 1
            return None
        if (
            mask is None
            and isinstance(positions, torch.Tensor)
            and positions.dim() == 2
            and positions.shape == x.shape[:2]
        ):
            return self._pack(module, given, positions)
        if (
            isinstance(mask, torch.Tensor)
            and mask.dim() == 2
            and mask.shape == x.shape[:2]
            and module.training
            and self.unpad is not False
        ):
            return self._unpad(module, given, mask)
        return None

    def _pack(self, module: nn.Module, given: dict, positions: torch.Tensor) -> dict | None:
        if positions.shape[0] > 1:
            return None
        documents = packed(positions)
        if documents is None:
            return None
        if why := self._obstacle(module, given, "packed", _KNOWN):
            self._count(f"a packed row: {why}")
            return None
        self.counts["packed"] += 1
        self.counts["packed tokens"] += documents.tokens
        self.counts["packed documents"] += len(documents.lengths)
        return {**given, "attention_mask": DocumentMask.of(replace(documents, used=self.used))}

    def _unpad(self, module: Any, given: dict, mask: torch.Tensor) -> Unpadded | None:
        if self.underway.padded:
            return None
        frame = self.underway.frames[-1] if self.underway.frames else None
        labels = None if frame is None else frame.labels
        found = unpadded(mask, labels or Labels(), given.get("input_ids"), _pad_id(module.config))
        if found is None:
            return None
        why = found if isinstance(found, str) else self.padded_now or self._leaves(frame, mask, given)
        why = why or self._obstacle(module, given, "padded", _KNOWN - _LENGTHS - {"logits_to_keep"})
        if not why and (p := given.get("position_ids")) is not None and (p.dim() != 2 or p.shape[1] != mask.shape[1]):
            why = "its position ids are not [rows, length]"
        if not why and isinstance(found, Unpadded):
            if found.documents.tokens > (1 - PAYS) * mask.numel():
                return None
            why = self.lengths.obstacle(module, found, given.get("position_ids"))
        if not why and frame is not None and (base := self.base()) is not None and not frame.is_fused(base):
            proof = self._proof(module, "labels" if frame.by_token else "pooled")
            why = "" if proof.ok else proof.reason
        if why or isinstance(found, str) or frame is None:
            self._count(f"a padded batch: {why}")
            return None
        frame.rows = found
        if frame.by_token and (entered := frame.module()) is not None:
            frame.note(entered)
        self.counts["unpadded"] += 1
        self.counts["real tokens"] += found.documents.tokens
        self.counts["padded tokens"] += mask.numel()
        return replace(found, documents=replace(found.documents, used=self.used))

    def _leaves(self, frame: ForwardFrame | None, mask: torch.Tensor, given: dict) -> str:
        """Why something that leaves the forward may be read at the padding; empty where it cannot."""
        base = self.base()
        if frame is None or base is None or base is self.owner():
            return (
                "its hidden states leave the model, and may be looked at where they are padded (a backbone entered by "
                "itself, or a forward called past its hooks)"
            )
        if frame.given is None:
            return "the names of its arguments cannot be told"
        labels, frame.by_token = frame.labels, False
        head = head_of(base)
        if labels is not None and (labels.targets is None or labels.targets.shape != mask.shape) and head is not None:
            return "its labels are of another shape than the attention mask"
        if frame.is_fused(base):
            return "" if labels is not None else "no labels are given"
        if hook := _hook_by_row(_outside(base, self.owner())):
            return f"the hook {hook} may look at rows"
        if labels is None or (head is None and labels.targets is not None and labels.targets.shape != mask.shape):
            if head is not None:
                return "no labels are given, so that its logits may be looked at where they are padded"
            if given.get("input_ids") is None or _pad_id(base.config) is None:
                return "a head cannot find the last token without token ids and the padding's id"
            return ""
        if is_managed(modules_of(base)):
            return (
                "its parameters are sharded: logits that are read would be a second forward, in which the other "
                "processes do not take part"
            )
        frame.by_token = True
        if head is None or not any(is_fast(m, "head") for m in head.modules()):
            return "its outputs by token are not lazy (the head is stock's)"
        return ""

    def was_read(self) -> None:
        self.padded_now = (
            "logits were read after a batch ran without its padding, which cost a second forward: from then on the "
            "padded one runs"
        )

    def leave(self, frame: ForwardFrame, output):
        """What the caller of this forward is given; None: its output as it is."""
        base = self.base()
        if frame.rows is None or base is None:
            return None
        head = head_of(base)
        biased = (
            any(getattr(m, "bias", None) is not None and m.bias.requires_grad for m in head.modules())
            if head is not None
            else False
        )
        found = protect(output, frame, self.underway, self.was_read, biased)
        if isinstance(found, str):
            self.padded_now = found
            self._count(f"a padded batch: {found}")
            return frame.again(self.underway)
        return found

    def _count(self, why: str) -> None:
        base = self.base()
        if base is not None and (record := record_of(base)) is not None:
            record.fallbacks[why] += 1

    def _obstacle(self, module: Any, given: dict, kind: str, known: frozenset[str]) -> str:
        """Why this batch goes the stock way; empty when it need not."""
        if self.why_not:
            return self.why_not
        if given.get("cache") is not None or given.get("past_key_values") is not None or _caches(module, given):
            return "a cache is in use (use_cache)"
        config = module.config
        if wanted := sorted(
            n
            for n in {*given, *vars(config), *_OUTPUTS}
            if n.startswith("output_") and given.get(n, getattr(config, n, False))
        ):
            return f"{', '.join(wanted)} is asked for"
        if more := sorted(
            n for n, v in given.items() if n not in known and not n.startswith("output_") and v is not None
        ):
            return f"the model is given {', '.join(more)}"
        if given.get("return_dict", getattr(config, "return_dict", True)) is False:
            return "a tuple is asked for (return_dict=False)"
        if (now := attention_implementation(config)) != self.implementation:
            return f"the attention implementation was changed to {now} after the patch"
        if not all((m := r()) is not None and is_fast(m, KIND) for r in self.attentions):
            return "an attention was replaced after the patch"
        if hook := _hook_by_row(m for m in module.modules() if m is not module):
            return f"the hook {hook} inside the model may look at rows"
        if kind == "padded" or module.training:
            if drops := _dropout(module, kind, [m for r in self.attentions if (m := r()) is not None]):
                if self.unpad is not True:
                    return f"{drops}, which would draw other values than in stock's batch (unpad=True allows it)"
        proof = self._proof(module, kind)
        return "" if proof.ok else proof.reason

    def _proof(self, module: nn.Module, kind: str) -> Proof:
        first = next(module.parameters())
        if self.proven != (first.device, first.dtype):  # moved or cast since
            self.proofs.clear()
            self.proven = first.device, first.dtype
        if kind not in self.proofs:
            try:
                base = self.base()
                self.proofs[kind] = (
                    layer_proof(module, kind)
                    if kind in ("packed", "padded") or base is None
                    else model_proof(base, module, kind)
                )
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
        return [
            Row(KIND, name, n, kernel, proof.error, proof.stock_error, proof.dtype, note) for name, n in classes.items()
        ]

    def lines(self) -> list[str]:
        """Lines for the report: batches that ran packed or unpadded, and why others did not."""
        if self.why_not:
            return [f"packed rows and padding run as in stock: {self.why_not}"]
        c = self.counts
        lines = [f"padded batches run padded: {self.padded_now}"] if self.padded_now else []
        lines += [f"{kind} rows run as in stock: {p.reason}" for kind, p in self.proofs.items() if not p.ok]
        if c["split"]:
            lines.append(f"in {c['split']} forwards rows were split over processes: stock's attention, padding kept")
        if c["packed"]:
            lines.append(
                f"{c['packed']} packed rows ({c['packed documents']} documents, {c['packed tokens']} tokens) ran "
                "without a mask"
            )
        if c["unpadded"]:
            share = c["real tokens"] / c["padded tokens"]
            lines.append(
                f"{c['unpadded']} padded batches ran unpadded: {c['real tokens']} of {c['padded tokens']} tokens "
                f"({share:.0%})"
            )
        return lines

    def __deepcopy__(self, memo) -> Packing:
        base, owner = self.base(), self.owner()
        new = memo[id(self)] = Packing(
            self.base, self.owner, self.unpad, self.why_not, [], self.implementation, padded_now=self.padded_now
        )
        new.proofs, new.used = dict(self.proofs), dict(self.used)
        if base is not None and owner is not None:
            new.base, new.owner = weakref.ref(copy.deepcopy(base, memo)), weakref.ref(copy.deepcopy(owner, memo))
        new.attentions = [weakref.ref(copy.deepcopy(m, memo)) for r in self.attentions if (m := r()) is not None]
        return new


def _hook_by_row(modules: Iterable[nn.Module]) -> str:
    """The name of a hook that is not known to treat all tokens alike (a user's, noise on embeddings, adapters by row);
    empty where there is none."""
    for hook in itertools.chain.from_iterable(map(hooks_on, modules)):
        name, library = getattr(hook, "__name__", type(hook).__name__), library_of(hook)
        if (
            library != "fastft"
            and not only_gathers(hook)
            and not (library in ("transformers", "peft") and name in _TOKENWISE)
        ):
            return name
    return ""


def _outside(base: nn.Module, owner: nn.Module | None) -> Iterator[nn.Module]:
    """The modules of `base` that are not below `owner`, which is among them."""
    yield base
    for child in base.children():
        if child is owner:
            yield child
        else:
            yield from _outside(child, owner)


def _pad_id(config) -> int | None:
    return (
        getattr(config.get_text_config(), "pad_token_id", None)
        if hasattr(config, "get_text_config")
        else getattr(config, "pad_token_id", None)
    )


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
    return isinstance(module, AnyDropout) and module.p > 0 and module.training
