"""`fastft merge`: base + LoRA adapter -> a plain 16-bit checkpoint, shard by shard, and proof that the adapter is in it.

    W' = round16(W + s B A)        computed in float32, in blocks of rows: at any time one tensor of the result is in memory, no model

A base in bitsandbytes' 4-bit is expanded first (the adapter was trained on the expanded weights). Shards are written into
`DIR.partial`, which becomes DIR only when everything, the check included, has gone well: an interrupted merge leaves nothing complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastft.errors import AdapterError, FastftError, ModelNotFoundError
from fastft.tools.shard_writer import ShardWriter

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BLOCK_BYTES = 64 << 20  # float32 scratch of one block of rows
CONFIGS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")


class MergeError(FastftError):
    """The merged checkpoint is not base + adapter."""


@dataclass(frozen=True)
class Delta:
    """s B A of one module: A [r, in], B [out, r]; bias: of lora_B, or None."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None

    def add_to(self, weight: torch.Tensor, dtype: torch.dtype, transposed: bool) -> torch.Tensor:
        out = torch.empty(weight.shape, dtype=dtype)
        A, B = (self.A.float(), self.B.float()) if not transposed else (self.B.t().float(), self.A.t().float())
        step = max(1, BLOCK_BYTES // (4 * max(1, weight.shape[1])))
        for i in range(0, weight.shape[0], step):
            rows = slice(i, i + step)
            out[rows] = weight[rows].float() + torch.mm(B[rows], A) * self.scaling
        return out


@dataclass(frozen=True)
class Check:
    """Largest differences of logits, relative to the largest logit: merged against base + adapter; the exact merged weights rounded to
    16 bit against the same; base alone against the same (what losing the adapter would look like)."""

    error: float
    rounding: float
    adapter: float
    dtype: str

    @property
    def ok(self) -> bool:
        return self.error <= 1.01 * self.rounding + 1e-6 and (self.adapter == 0.0 or self.error < 0.5 * self.adapter)

    def __str__(self) -> str:
        return (
            f"merged against base + adapter: {self.error:.2e} of the largest logit; rounding to {self.dtype} alone: {self.rounding:.2e}; "
            f"without the adapter it would be {self.adapter:.2e}"
        )


def read_adapter(folder: Path) -> tuple[object, dict[str, Delta], dict[str, torch.Tensor]]:
    """(its LoraConfig, the delta of every module by name, tensors that replace the base's). AdapterError for what is no plain LoRA."""
    from peft import LoraConfig, PeftConfig

    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"merge: want an adapter's folder with adapter_config.json, got {str(folder)!r}")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or config.use_dora or getattr(config, "target_parameters", None):
        raise AdapterError(
            f"merge: want plain LoRA on linear layers, got {config.peft_type} with use_dora={getattr(config, 'use_dora', False)}, "
            f"target_parameters={getattr(config, 'target_parameters', None)}: load it with PEFT and call merge_and_unload()"
        )
    if (folder / "adapter_model.safetensors").is_file():
        tensors = load_file(folder / "adapter_model.safetensors")
    else:
        tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for key, t in tensors.items():
        name = key.removeprefix("base_model.model.")
        for part in (".lora_A.weight", ".lora_B.weight", ".lora_B.bias"):
            if name.endswith(part):
                parts.setdefault(name.removesuffix(part), {})[part] = t
                break
        else:
            if ".lora_" in name:
                raise AdapterError(f"merge: {key} is no part of plain LoRA: load it with PEFT and call merge_and_unload()")
            whole[name] = t
    return (
        config,
        {n: Delta(p[".lora_A.weight"], p[".lora_B.weight"], _scaling(config, n, p), p.get(".lora_B.bias")) for n, p in parts.items()},
        whole,
    )


def _scaling(config, name: str, parts: dict[str, torch.Tensor]) -> float:
    """PEFT's: alpha / r, or alpha / sqrt(r) for rsLoRA, both by pattern."""
    from peft.utils.other import get_pattern_key

    r = parts[".lora_A.weight"].shape[0]
    key = get_pattern_key(config.alpha_pattern.keys(), name)
    alpha = config.alpha_pattern.get(key, config.lora_alpha)
    return alpha / (r**0.5 if config.use_rslora else r)


def shards(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, in order. ModelNotFoundError without any."""
    if (folder / INDEX).is_file():
        return [folder / n for n in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ModelNotFoundError(f"merge: want a base with safetensors files, got none in {str(folder)!r}: save it once with save_pretrained")


def _base_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.safetensors", *CONFIGS]))


def _weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of one shard; what bitsandbytes stored in 4 bits is expanded. The file, which is mapped into memory, is opened anew
    for each, so that what was read does not stay."""
    with safe_open(path, "pt") as f:
        names = list(f.keys())
    quantised = {n.split(".weight.quant_state.")[0] + ".weight" for n in names if ".weight.quant_state." in n}
    parts = {n for n in names if any(n.startswith(q + ".") for q in quantised)} if quantised else set()
    for n in names:
        if n in parts:
            continue
        with safe_open(path, "pt") as f:
            t = f.get_tensor(n)
            yield n, _expand(t, {p.removeprefix(n + "."): f.get_tensor(p) for p in parts if p.startswith(n + ".")}) if n in quantised else t


def _expand(packed: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    return dequantize_4bit(packed, QuantState.from_dict(state, device=torch.device("cpu")))


def merge(adapter: str | Path, out: str | Path, *, base: str | None = None, dtype: torch.dtype = torch.bfloat16, check: bool = True) -> Check | None:
    """Write base + adapter to the folder `out` as a plain `dtype` checkpoint, and check it (None with check=False).

    base: instead of the one named in the adapter. Raises AdapterError (no plain LoRA, or modules that the base does not have),
    ModelNotFoundError, MergeError (the check failed; nothing is left at `out`), FileExistsError for an `out` that is there.
    """
    adapter, out = Path(adapter), Path(out)
    if out.exists():
        raise FileExistsError(f"merge: {str(out)!r} exists; give a new folder")
    config, deltas, whole = read_adapter(adapter)
    source = _base_folder(base or config.base_model_name_or_path)
    partial = out.with_name(out.name + ".partial")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(source, partial, deltas, whole, dtype, config.fan_in_fan_out)
        _write_configs(source, adapter, partial, dtype)
        result = check_merge(source, adapter, partial, dtype) if check else None
        if result is not None and not result.ok:
            raise MergeError(f"merge: the merged folder is not base + adapter: {result}")
        partial.rename(out)
    return result


def _write(source: Path, to: Path, deltas: dict[str, Delta], whole: dict[str, torch.Tensor], dtype, transposed: bool) -> None:
    left, weight_map, total = set(deltas), {}, 0
    files = shards(source)
    for path in files:
        with safe_open(path, "pt") as f:
            names = f.keys()
        with ShardWriter(to / path.name, names) as shard:
            for name, t in _weights(path):
                module, _, kind = name.rpartition(".")
                delta = deltas.get(module)
                if name in whole:
                    t = whole[name].to(dtype)
                elif delta is not None and kind == "weight":
                    if sorted(t.shape) != sorted((delta.B.shape[0], delta.A.shape[1])):
                        got = delta.B.shape[0], delta.A.shape[1]
                        raise AdapterError(f"merge: {name} is {tuple(t.shape)}, the adapter's {got}: it is another base")
                    t = delta.add_to(t, dtype, transposed)
                    left.discard(module)
                elif delta is not None and kind == "bias" and delta.bias is not None:
                    t = (t.float() + delta.scaling * delta.bias.float()).to(dtype)
                elif t.is_floating_point():
                    t = t.to(dtype)
                shard.add(name, t)
                total += t.numel() * t.element_size()
                weight_map[name] = path.name
    if left:
        raise AdapterError(
            f"merge: the base in {str(source)!r} has no weight for {len(left)} adapted modules, such as {min(left)!r}: it is another base, or it "
            "stores them fused; load it with PEFT and call merge_and_unload()"
        )
    lost = [m for m, d in deltas.items() if d.bias is not None and f"{m}.bias" not in weight_map]
    if lost:
        raise AdapterError(f"merge: {lost[0]!r} has lora_bias, but its base layer has no bias to take it")
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (to / INDEX).write_text(json.dumps(index, indent=2))


def _write_configs(source: Path, adapter: Path, to: Path, dtype: torch.dtype) -> None:
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
    (to / "config.json").write_text(json.dumps(config, indent=2))


def check_merge(base: Path, adapter: Path, merged: Path, dtype: torch.dtype) -> Check:
    """Logits in float32 on a few random tokens: the merged folder, reloaded in plain transformers, beside base + adapter in plain PEFT."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    quantised = "quantization_config" in json.loads((base / "config.json").read_text())
    config = AutoConfig.from_pretrained(base)
    vocab = config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (2, 16), generator=torch.Generator().manual_seed(0))
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stock = load(base)
    if quantised:
        stock = stock.dequantize().float()
    with torch.no_grad():
        alone = stock(input_ids=ids).logits
        model = PeftModel.from_pretrained(stock, str(adapter)).eval()
        truth = model(input_ids=ids).logits
        model = model.merge_and_unload()
        for p in model.parameters():
            p.data = p.data.to(dtype).float()
        rounded = model(input_ids=ids).logits
        del model, stock
        ours = load(merged)(input_ids=ids).logits
    unit = float(truth.abs().max()) or 1.0
    far = lambda a: float((a - truth).abs().max()) / unit
    return Check(far(ours), far(rounded), far(alone), str(dtype).removeprefix("torch."))
