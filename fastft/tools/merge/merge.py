"""`fastft merge`: base + LoRA adapter -> a plain 16-bit checkpoint, shard by shard, and proof that the adapter is in
it.

    W' = round16(W + s B A)        computed in float32, in blocks of rows: at any time one tensor of the result is in
                                   memory, no model

A base in bitsandbytes' 4-bit is expanded first (the adapter was trained on the expanded weights). What the adapter
holds is read, and held against the names and shapes of the base, before anything is computed. Where an adapter changes
one of two embeddings that the base ties, the result is untied. Shards are written into `DIR.partial`, which becomes DIR
only when everything, the check included, has gone well: an interrupted merge leaves nothing complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastft.errors import AdapterError, FolderExistsError, ProofError
from fastft.tools.merge.adapter_parts import AdapterWeights, read_adapter
from fastft.tools.merge.base import (
    CONFIGS,
    INDEX,
    base_folder,
    differs,
    found_already,
    other_tokenizer,
    read_json,
)
from fastft.tools.merge.merge_plan import MergePlan, make_plan
from fastft.tools.merge.reference import load_base, load_reference
from fastft.tools.new_folder import check_room, new_folder
from fastft.tools.shard_writer import ShardWriter


class MergeError(ProofError):
    """The merged checkpoint is not base + adapter."""


@dataclass(frozen=True)
class Check:
    """Largest differences of logits, relative to the largest logit: merged against base + adapter; the exact merged
    weights rounded to 16 bit against the same; base alone against the same (what losing the adapter would look
    like)."""

    error: float
    rounding: float
    adapter: float
    dtype: str

    @property
    def ok(self) -> bool:
        """Is the merged checkpoint base + adapter, to the rounding of its dtype?"""
        return self.error <= 1.01 * self.rounding + 1e-6 and (self.adapter == 0.0 or self.error < 0.5 * self.adapter)

    def __str__(self) -> str:
        return (
            f"merged against base + adapter: {self.error:.2e} of the largest logit; rounding to {self.dtype} alone: "
            f"{self.rounding:.2e}; "
            f"without the adapter it would be {self.adapter:.2e}"
        )


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    check: bool = True,
    other_base: bool = False,
) -> Check | None:
    """Write base + adapter to the folder `out` as a plain `dtype` checkpoint, and check it (None with check=False).

    Args:
        adapter: the adapter's folder.
        out: the new folder.
        base: instead of the one named in the adapter; it has to be the same model, in whatever precision, unless
            `other_base` says that another one is meant.
    Raises:
        AdapterError: a damaged adapter, or a part of it that is not known or that the base has no place for.
        ModelNotFoundError: no base, or a damaged one.
        MergeError: the check failed.
        FolderExistsError, WriteError: `out` is there, or cannot be written.
    After any error nothing is left at `out`."""
    adapter, out = Path(adapter), Path(out)
    if os.path.lexists(out):
        raise FolderExistsError(f"merge: {str(out)!r} exists; give a new folder")
    found = read_adapter(adapter)
    source = base_folder(base or found.config.base_model_name_or_path, found.config.revision)
    plan = make_plan(source, found)
    if not other_base:
        check_base(adapter, found, source)
    check_room(out, plan.bytes_in(dtype), "merge")
    with new_folder(out, "merge") as partial:
        write_merged(partial, plan, dtype)
        write_configs(source, adapter, partial, dtype, plan)
        result = check_merge(source, adapter, partial, dtype, plan) if check else None
        if result is not None and not result.ok:
            raise MergeError(f"merge: the merged folder is not base + adapter: {result}")
    return result


def check_base(adapter: Path, found: AdapterWeights, source: Path) -> bool:
    """AdapterError where `source` is another model than the adapter was trained on. False where nothing could be
    compared: the named base is not on this machine."""
    named = found_already(found.config.base_model_name_or_path, found.config.revision)
    is_same = named is not None and named.resolve() == source.resolve()
    why = None if named is None or is_same else differs(named, source)
    why = why or other_tokenizer(adapter, source)
    if why is not None:
        raise AdapterError(
            f"merge: the base {str(source)!r} is another model than "
            f"{found.config.base_model_name_or_path!r}, on which the adapter was trained: {why}; give that one with "
            "--base, or --other-base if it is meant"
        )
    return named is not None


def write_merged(
    to: Path, plan: MergePlan, dtype: torch.dtype, step: Callable[[int], None] = lambda count: None
) -> None:
    """The shards and their index. `step`: called with the bytes of each tensor that was written."""
    weight_map, total = {}, 0
    for path in plan.files:
        with safe_open(path, "pt") as f:
            names = set(f.keys())
        head = {plan.head[0]} if plan.head is not None and plan.head[1] in names else set()
        with ShardWriter(to / path.name, names | head) as shard:
            for name, merged in plan.tensors(path, dtype):
                shard.add(name, merged)
                total += merged.nbytes
                step(merged.nbytes)
                weight_map[name] = path.name
                del merged
    if len(plan.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (to / INDEX).write_text(json.dumps(index, indent=2))


def write_configs(source: Path, adapter: Path | None, to: Path, dtype: torch.dtype, plan: MergePlan) -> None:
    """The base's configuration without its quantisation; the tokenizer, from the adapter's folder where it has one."""
    for folder in (source, *([adapter] if adapter is not None else [])):
        for pattern in CONFIGS:
            for path in folder.glob(pattern):
                if path.name != INDEX and not path.name.startswith("adapter_") and path.name != "README.md":
                    shutil.copy(path, to / path.name)
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    parts = [config, *(c for c in config.values() if isinstance(c, dict))]
    if plan.is_untied:
        config["tie_word_embeddings"] = False
        for part in (c for c in parts if "tie_word_embeddings" in c):
            part["tie_word_embeddings"] = False
    if plan.vocab is not None:
        for part in (c for c in parts if "vocab_size" in c):
            part["vocab_size"] = plan.vocab
    (to / "config.json").write_text(json.dumps(config, indent=2))


def check_merge(base: Path, adapter: Path | None, merged: Path, dtype: torch.dtype, plan: MergePlan) -> Check:
    """Logits in float32 on a few random tokens, trained ones among them: the merged folder, reloaded in plain
    transformers, beside base + adapter in plain PEFT."""
    from transformers import AutoConfig, AutoModelForCausalLM

    vocab = AutoConfig.from_pretrained(base).get_text_config().vocab_size
    ids = torch.randint(0, vocab, (2, 16), generator=torch.Generator().manual_seed(0))
    for index, _ in plan.adapter.tokens.values():
        ids[0, : min(8, len(index))] = index[:8]
    with torch.no_grad():
        alone = load_base(base, plan)(input_ids=ids).logits
        model = load_reference(base, adapter, plan)
        reference = model(input_ids=ids).logits
        if adapter is not None:
            model = model.merge_and_unload()
        for p in model.parameters():
            p.data = p.data.to(dtype).float()
        rounded = model(input_ids=ids).logits
        del model
        reloaded: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        ours = reloaded(input_ids=ids).logits
    unit = float(reference.abs().max()) or 1.0
    far = lambda a: float((a - reference).abs().max()) / unit
    return Check(far(ours), far(rounded), far(alone), str(dtype).removeprefix("torch."))
