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
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open

from fastft.errors import AdapterError, FastftError, ModelNotFoundError
from fastft.tools.merge import expert_parts
from fastft.tools.merge.adapter_parts import BY_PEFT, AdapterWeights, misfits, read_adapter
from fastft.tools.shard_writer import ShardWriter

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIGS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")


class MergeError(FastftError):
    """The merged checkpoint is not base + adapter."""


class FolderExistsError(FastftError, FileExistsError):
    """The new folder is there already."""


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
        return self.error <= 1.01 * self.rounding + 1e-6 and (self.adapter == 0.0 or self.error < 0.5 * self.adapter)

    def __str__(self) -> str:
        return (
            f"merged against base + adapter: {self.error:.2e} of the largest logit; rounding to {self.dtype} alone: "
            f"{self.rounding:.2e}; "
            f"without the adapter it would be {self.adapter:.2e}"
        )


def shards(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, in order. ModelNotFoundError without any."""
    if (folder / INDEX).is_file():
        return [folder / n for n in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ModelNotFoundError(
        f"merge: want a base with safetensors files, got none in {str(folder)!r}: save it once with save_pretrained"
    )


def _base_folder(name: str | None, revision: str | None) -> Path:
    if not name:
        raise AdapterError("merge: the adapter names no base; give one with --base")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", *CONFIGS]))


def _weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of one shard; what bitsandbytes stored in 4 bits is expanded. The file, which is mapped into
    memory, is opened anew for each, so that what was read does not stay."""
    with safe_open(path, "pt") as f:
        names = list(f.keys())
    quantised = {n.split(".weight.quant_state.")[0] + ".weight" for n in names if ".weight.quant_state." in n}
    parts = {n for n in names if any(n.startswith(q + ".") for q in quantised)} if quantised else set()
    for n in names:
        if n in parts:
            continue
        with safe_open(path, "pt") as f:
            t = f.get_tensor(n)
            yield (
                n,
                _expand(t, {p.removeprefix(n + "."): f.get_tensor(p) for p in parts if p.startswith(n + ".")})
                if n in quantised
                else t,
            )


def _expand(packed: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    return dequantize_4bit(packed, QuantState.from_dict(state, device=torch.device("cpu")))


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    check: bool = True,
) -> Check | None:
    """Write base + adapter to the folder `out` as a plain `dtype` checkpoint, and check it (None with check=False).

    base: instead of the one named in the adapter. Raises AdapterError (a part of the adapter that is not known, or that
    the base has no place for: before anything is written), ModelNotFoundError, MergeError (the check failed; nothing is
    left at `out`, nor is it for any other error), FolderExistsError for an `out` that is there."""
    adapter, out = Path(adapter), Path(out)
    if out.exists():
        raise FolderExistsError(f"merge: {str(out)!r} exists; give a new folder")
    found = read_adapter(adapter)
    source = _base_folder(base or found.config.base_model_name_or_path, found.config.revision)
    plan = make_plan(source, found)
    partial = out.with_name(out.name + ".partial")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(partial, plan, dtype)
        _write_configs(source, adapter, partial, dtype, plan.is_untied)
        result = check_merge(source, adapter, partial, dtype, found) if check else None
        if result is not None and not result.ok:
            raise MergeError(f"merge: the merged folder is not base + adapter: {result}")
        partial.rename(out)
    return result


@dataclass
class MergePlan:
    """What is written: every tensor of the base, changed where the adapter changes it; and where the base ties its
    output embedding to its input embedding and the adapter changes one of them, both. `head`: (name of the output's
    weight, name of the tensor it begins from)."""

    adapter: AdapterWeights
    files: list[Path]
    head: tuple[str, str] | None = None
    drop: set[str] = field(default_factory=set)  # the base's own copy of a tied head

    @property
    def is_untied(self) -> bool:
        return self.head is not None


def make_plan(source: Path, adapter: AdapterWeights) -> MergePlan:
    """From names and shapes alone. AdapterError, in one line, for what the base cannot take."""
    files, shapes, quantised = shards(source), {}, set()
    if not (source / "config.json").is_file():
        raise ModelNotFoundError(
            f"merge: want a base with config.json, got none in {str(source)!r}: save it once with save_pretrained"
        )
    config = json.loads((source / "config.json").read_text())
    for path in files:
        with safe_open(path, "pt") as f:
            names = list(f.keys())
            packed = {n.split(".quant_state.")[0] for n in names if ".weight.quant_state." in n}
            shapes |= {n: None if n in packed else tuple(f.get_slice(n).get_shape()) for n in names}
            quantised |= packed
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
    plan = MergePlan(adapter, files)
    if config.get("model_type") and (tied := _tied_embeddings(source)) is not None:
        plan = _untie(plan, *tied, shapes)
    if wrong := next(chain(misfits(adapter, shapes, quantised), expert_parts.misfits(adapter.stacks, shapes)), None):
        raise AdapterError(f"merge: in the base {str(source)!r}: {wrong}; or {BY_PEFT}")
    return plan


def _tied_embeddings(source: Path) -> tuple[str, str] | None:
    """The module names of the input and the output embedding, if the base ties them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    if not (
        getattr(config, "tie_word_embeddings", False) or getattr(config.get_text_config(), "tie_word_embeddings", False)
    ):
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {m: n for n, m in model.named_modules()}
    into, out = model.get_input_embeddings(), model.get_output_embeddings()
    return (names[into], names[out]) if out is not None and into in names and out in names else None


def _untie(plan: MergePlan, into: str, out: str, shapes: dict[str, tuple[int, ...] | None]) -> MergePlan:
    """As PEFT runs them: an adapter on one of two tied embeddings changes that one alone, and so does a copy of
    modules_to_save; trained tokens and embeddings that were only saved along change the tensor that both share."""
    adapter, names = plan.adapter, (f"{into}.weight", f"{out}.weight")
    if not (adapter.touches(into) or adapter.touches(out)):
        return plan
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
        return plan
    if shared is not None:  # both begin from it
        for name in names:
            adapter.whole.setdefault(name, shared)
    if names[0] in shapes:
        shapes[names[1]] = shapes[names[0]]
    plan.head = names[1], names[0]
    return plan


def _write(to: Path, plan: MergePlan, dtype: torch.dtype) -> None:
    weight_map, total = {}, 0
    for path in plan.files:
        with safe_open(path, "pt") as f:
            names = set(f.keys())
        head = plan.head if plan.head is not None and plan.head[1] in names else None
        with ShardWriter(to / path.name, names | ({head[0]} if head else set())) as shard:
            for name, t in _weights(path):
                if name in plan.drop:
                    continue
                for target in (name, head[0]) if head is not None and name == head[1] else (name,):
                    merged = plan.adapter.apply(target, t, dtype)
                    shard.add(target, merged)
                    total += merged.numel() * merged.element_size()
                    weight_map[target] = path.name
                    del merged
    if len(plan.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (to / INDEX).write_text(json.dumps(index, indent=2))


def _write_configs(source: Path, adapter: Path, to: Path, dtype: torch.dtype, is_untied: bool) -> None:
    """The base's configuration without its quantisation; the tokenizer, from the adapter's folder where it has one."""
    for folder in (source, adapter):
        for pattern in CONFIGS:
            for path in folder.glob(pattern):
                if path.name != INDEX and not path.name.startswith("adapter_") and path.name != "README.md":
                    shutil.copy(path, to / path.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if is_untied:
        config["tie_word_embeddings"] = False
        for part in (c for c in config.values() if isinstance(c, dict) and "tie_word_embeddings" in c):
            part["tie_word_embeddings"] = False
    (to / "config.json").write_text(json.dumps(config, indent=2))


def check_merge(base: Path, adapter: Path, merged: Path, dtype: torch.dtype, parts: AdapterWeights) -> Check:
    """Logits in float32 on a few random tokens, trained ones among them: the merged folder, reloaded in plain
    transformers, beside base + adapter in plain PEFT."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    quantised = "quantization_config" in json.loads((base / "config.json").read_text())
    config = AutoConfig.from_pretrained(base)
    vocab = config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (2, 16), generator=torch.Generator().manual_seed(0))
    for index, _ in parts.tokens.values():
        ids[0, : min(8, len(index))] = index[:8]
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stock = load(base)
    if quantised:
        stock = stock.dequantize().float()
    with torch.no_grad():
        alone = stock(input_ids=ids).logits
        model = PeftModel.from_pretrained(stock, str(adapter)).eval()
        reference = model(input_ids=ids).logits
        model = model.merge_and_unload()
        for p in model.parameters():
            p.data = p.data.to(dtype).float()
        rounded = model(input_ids=ids).logits
        del model, stock
        ours = load(merged)(input_ids=ids).logits
    unit = float(reference.abs().max()) or 1.0
    far = lambda a: float((a - reference).abs().max()) / unit
    return Check(far(ours), far(rounded), far(alone), str(dtype).removeprefix("torch."))
