"""What a merge writes, tensor by tensor, found from names and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open

from fastft.errors import AdapterError, ModelNotFoundError
from fastft.tools.merge import expert_parts
from fastft.tools.merge.adapter_parts import BY_PEFT, AdapterWeights, misfits
from fastft.tools.merge.base import as_trained, packed, read_json, shards, weights


@dataclass
class MergePlan:
    """What is written: every tensor of the base, changed where the adapter changes it; and where the base ties its
    output embedding to its input embedding and the adapter changes one of them, both.

    head: (name of the output's weight, name of the tensor it begins from). drop: the base's own copy of a tied head.
    values: of each tensor, how many. vocab: rows of the embeddings, where the adapter has others than the base.
    rounded: (names, type, double quantisation) of the weights that are taken through bitsandbytes' 4 bits, or FP8,
    first (`base.as_trained`)."""

    adapter: AdapterWeights
    files: list[Path]
    values: dict[str, int]
    head: tuple[str, str] | None = None
    drop: set[str] = field(default_factory=set)
    vocab: int | None = None
    rounded: tuple[frozenset[str], str, bool] | None = None

    @property
    def is_untied(self) -> bool:
        return self.head is not None

    def bytes_in(self, dtype: torch.dtype) -> int:
        """Of the result in `dtype`."""
        count = sum(n for name, n in self.values.items() if name not in self.drop)
        count += sum(max(0, t.numel() - self.values.get(n, 0)) for n, t in self.adapter.whole.items())
        return dtype.itemsize * count

    def names(self) -> Iterator[str]:
        """Of the result's tensors, in the order of `tensors` over all files."""
        for path in self.files:
            with safe_open(path, "pt") as f:
                names = list(f.keys())
            parts = packed(names)
            for name in names:
                if name not in self.drop and not any(name.startswith(p + ".") for p in parts):
                    yield name
                    if self.head is not None and name == self.head[1]:
                        yield self.head[0]

    def tensors(self, path: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor of the result) for one shard of the base, one at a time."""
        for name, t in weights(path):
            if name in self.drop:
                continue
            if self.rounded is not None and name in self.rounded[0]:
                t = as_trained(t, *self.rounded[1:])
            for target in (name, self.head[0]) if self.head is not None and name == self.head[1] else (name,):
                merged = self.adapter.apply(target, t, dtype)
                if merged.is_floating_point() and not merged.isfinite().all():
                    raise AdapterError(_not_finite(target, t, dtype))
                yield target, merged
                del merged


def _not_finite(name: str, t: torch.Tensor, dtype: torch.dtype) -> str:
    if not t.isfinite().all():
        return f"merge: the base's {name} holds NaN or infinity: download or save the base again"
    return f"merge: {name} has values too large for {str(dtype).removeprefix('torch.')}: use bfloat16"


def make_plan(source: Path, adapter: AdapterWeights) -> MergePlan:
    """From names and shapes alone. AdapterError, in one line, for what the base cannot take."""
    files, shapes, quantised, values = shards(source), {}, set(), {}
    if not (source / "config.json").is_file():
        raise ModelNotFoundError(
            f"merge: want a base with config.json, got none in {str(source)!r}: save it once with save_pretrained"
        )
    config = read_json(source / "config.json")
    for path in files:
        with safe_open(path, "pt") as f:
            names = list(f.keys())
            in_four = packed(names)
            for n in names:
                shape = tuple(f.get_slice(n).get_shape())
                shapes[n] = None if n in in_four else shape
                if not any(n.startswith(q + ".") for q in in_four):
                    values[n] = math.prod(shape) * (2 if n in in_four else 1)
            quantised |= in_four
    method = (config.get("quantization_config") or {}).get("quant_method")
    if (method is not None and not quantised) or any(
        n.endswith((".SCB", ".qweight", ".weight_scale_inv")) for n in shapes
    ):
        raise AdapterError(
            f"merge: want a base in 16 or 32 bits, or in bitsandbytes' 4 bits, got {method or 'a quantised one'}: "
            f"{BY_PEFT}"
        )
    if adapter.pairs:
        adapter.stacks, left = expert_parts.resolve(adapter.pairs, adapter.config, source)
        if left:
            raise AdapterError(
                f"merge: the adapter has target_parameters= on {left[0]!r}, which is no stack of experts' matrices: "
                f"{BY_PEFT}"
            )
    plan = MergePlan(adapter, files, values)
    if config.get("model_type"):
        _plan_embeddings(source, plan, shapes)
    if wrong := next(chain(misfits(adapter, shapes, quantised), expert_parts.misfits(adapter.stacks, shapes)), None):
        raise AdapterError(f"merge: in the base {str(source)!r}: {wrong}; or {BY_PEFT}")
    return plan


def _plan_embeddings(source: Path, plan: MergePlan, shapes: dict[str, tuple[int, ...] | None]) -> None:
    """Ties that are undone, and a vocabulary of another size than the base's: embeddings that the adapter saved whole,
    all with the same number of rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    tied = getattr(config, "tie_word_embeddings", False) or getattr(
        config.get_text_config(), "tie_word_embeddings", False
    )
    whole = plan.adapter.whole
    resized = {
        n
        for n, t in whole.items()
        if (shape := shapes.get(n)) is not None and shape[1:] == tuple(t.shape[1:]) and shape[0] != t.shape[0]
    }
    if not tied and not resized:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {m: n for n, m in model.named_modules()}
    into, out = model.get_input_embeddings(), model.get_output_embeddings()
    if out is None or into not in names or out not in names:
        return
    both = [f"{names[m]}.weight" for m in (into, out)]
    rows = {whole[n].shape[0] for n in both if n in whole}
    if resized and resized <= set(both) and len(rows) == 1 and (tied or resized == set(both)):
        plan.vocab = rows.pop()
        for n in both:
            if (shape := shapes.get(n)) is not None:
                shapes[n] = (plan.vocab, *shape[1:])
    if tied:
        _untie(plan, names[into], names[out], shapes)


def _untie(plan: MergePlan, into: str, out: str, shapes: dict[str, tuple[int, ...] | None]) -> None:
    """As PEFT runs them: an adapter on one of two tied embeddings changes that one alone, and so does a copy of
    modules_to_save; trained tokens and embeddings that were only saved along change the tensor that both share."""
    adapter, names = plan.adapter, (f"{into}.weight", f"{out}.weight")
    if not (adapter.touches(into) or adapter.touches(out)):
        return
    plan.drop = {names[1]}
    if adapter.config.ensure_weight_tying:
        raise AdapterError(
            f"merge: the adapter has ensure_weight_tying=True on {into!r} or {out!r}, which the base ties; not known "
            f"here: {BY_PEFT}"
        )
    apart = [m for m in (into, out) if m in adapter.deltas or (adapter.is_saved(m) and f"{m}.weight" in adapter.whole)]
    if adapter.tokens.keys() & {into, out}:
        rows = adapter.tokens.pop(out, None)  # PEFT saves them for the tied head once more
        if (
            apart
            or into not in adapter.tokens
            or (rows is not None and not all(map(torch.equal, rows, adapter.tokens[into])))
        ):
            raise AdapterError(
                f"merge: the adapter trains single tokens of {into!r} and {out!r}, which the base ties, apart from "
                f"each other: {BY_PEFT}"
            )
    shared = next(
        (adapter.whole[n] for m, n in zip((into, out), names) if n in adapter.whole and not adapter.is_saved(m)), None
    )
    if not apart:
        if names[1] in adapter.whole:
            adapter.whole.pop(names[1])
            adapter.whole[names[0]] = shared if shared is not None else adapter.whole[names[0]]
        return
    if shared is not None:  # both begin from it
        for name in names:
            adapter.whole.setdefault(name, shared)
    if names[0] in shapes:
        shapes[names[1]] = shapes[names[0]]
    plan.head = names[1], names[0]
