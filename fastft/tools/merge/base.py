"""The base of an adapter: where it lies, its tensors one by one, and whether it is the model that was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastft.errors import AdapterError, ModelNotFoundError
from fastft.tools.merge.adapter_parts import said
from fastft_kernels.quant.fp8 import quantize_e4m3_rows
from fastft_kernels.quant.int8 import dequantize_e4m3

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIGS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
SAMPLED, VALUES = 12, 1 << 16  # tensors, and values of each, by which two bases are told apart
SAME_BITS, SAME_CODES = 0.02, 0.05  # share of bfloat16 values that may differ; relative difference after quantisation


def read_json(path: Path) -> dict[str, Any]:
    """ModelNotFoundError, with the file's name, for what is no JSON."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ModelNotFoundError(
            f"merge: want JSON in {str(path)!r}, which cannot be read ({said(e)}): copy or save it again"
        ) from e
    return found


def shards(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, in order. ModelNotFoundError without any, for one that is missing and for one
    that is damaged."""
    if (folder / INDEX).is_file():
        found = [folder / n for n in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]
    elif (folder / SINGLE).is_file():
        found = [folder / SINGLE]
    else:
        raise ModelNotFoundError(
            f"merge: want a base with safetensors files, got none in {str(folder)!r}: save it once with save_pretrained"
        )
    for path in found:
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as e:
            raise ModelNotFoundError(
                f"merge: the base's {str(path)!r} cannot be read ({said(e)}): download or save it again"
            ) from e
    return found


def base_folder(name: str | None, revision: str | None) -> Path:
    """Where the base lies; fetched from the Hub if it is a name. ModelNotFoundError where there is none."""
    if not name:
        raise AdapterError("merge: the adapter names no base; give one with --base")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    from fastft.loading.checkpoint import is_path, not_found

    if is_path(name):
        raise ModelNotFoundError(f"merge: the base {name!r} is no folder here: give the base's with --base")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", *CONFIGS]))
    except HFValidationError as e:
        raise ModelNotFoundError(f"merge: the base {name!r} is no folder and no name of the Hub: give --base") from e
    except OSError as e:
        raise ModelNotFoundError(f"merge: {not_found(name, e)}; or give the base's folder with --base") from e


def found_already(name: str | None, revision: str | None) -> Path | None:
    """The base's folder if it is one here or lies in the local cache; nothing is fetched."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        kept = snapshot_download(
            name, revision=revision, allow_patterns=["*.safetensors", *CONFIGS], local_files_only=True
        )
    except Exception:  # whatever keeps it from being there
        return None
    return Path(kept)


def weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of one shard; what bitsandbytes stored in 4 bits is expanded. The file, which is mapped into
    memory, is opened anew for each, so that what was read does not stay."""
    with safe_open(path, "pt") as f:
        names = list(f.keys())
    parts = {n for n in names if any(n.startswith(q + ".") for q in packed(names))}
    for n in names:
        if n not in parts:
            yield n, one_weight(path, n, parts)


def packed(names: list[str]) -> set[str]:
    """Of a shard's names, the weights that bitsandbytes stored in 4 bits."""
    return {n.split(".weight.quant_state.")[0] + ".weight" for n in names if ".weight.quant_state." in n}


def one_weight(path: Path, name: str, parts: set[str]) -> torch.Tensor:
    """One tensor of a shard, expanded if it is in 4 bits; `parts` are the names of the shard's quantisation states."""
    with safe_open(path, "pt") as f:
        t = f.get_tensor(name)
        state = {p.removeprefix(name + "."): f.get_tensor(p) for p in parts if p.startswith(name + ".")}
    return expand(t, state) if state else t


def expand(values: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """bitsandbytes' 4-bit values as they are multiplied in training."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    return dequantize_4bit(values, QuantState.from_dict(state, device=torch.device("cpu")))


def in_four_bits(weight: torch.Tensor, quant_type: str = "nf4", double: bool = True) -> torch.Tensor:
    """A weight after bitsandbytes' quantisation and back, in its own dtype: what training in 4 bits multiplies."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values, state = quantize_4bit(weight.contiguous(), compress_statistics=double, quant_type=quant_type)
    return dequantize_4bit(values, state)


def as_trained(weight: torch.Tensor, kind: str, double: bool) -> torch.Tensor:
    """A weight [out, in] as training multiplies it: "nf4", "fp4": through bitsandbytes' 4 bits and back, in its own
    dtype; "fp8": through e4m3 with a scale for each row, float32, as nothing rounds it again before the adapter."""
    if kind != "fp8":
        return in_four_bits(weight, kind, double)
    q, scale = quantize_e4m3_rows(weight)
    return dequantize_e4m3(q, scale, torch.float32)


def differs(trained_on: Path, given: Path) -> str | None:
    """Why `given` is another model than `trained_on`, in words; None if it is the same one, in whatever precision each
    is stored. From a sample of the tensors that both have."""
    where = [{n: p for p in shards(folder) for n in _names(p)} for folder in (trained_on, given)]
    common = [n for n in sorted(where[0].keys() & where[1].keys()) if ".weight." not in n]
    if not common:
        return f"no tensor of {str(given)!r} has a name of {str(trained_on)!r}"
    several = [n for n in common if "norm" not in n] or common  # norms hardly differ between models of one family
    for n in several[:: max(1, len(several) // SAMPLED)][:SAMPLED]:
        a, b = (_sample(w[n], n) for w in where)
        length = min(a[0].numel(), b[0].numel())
        x, y = a[0][:length].float(), b[0][:length].float()
        if a[1] == b[1]:
            far = (x.bfloat16() != y.bfloat16()).float().mean()
            if far > SAME_BITS:
                return f"{n} has other values ({100 * far:.0f}% of them)"
        else:
            full, four, kind = (y, x, a[1]) if a[1] else (x, y, b[1])
            far = (in_four_bits(full, str(kind)) - four).norm() / four.norm()
            if far > SAME_CODES:
                return f"{n} has other values (by {100 * far:.0f}%)"
    return None


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as f:
        return list(f.keys())


def _sample(path: Path, name: str) -> tuple[torch.Tensor, str | None]:
    """The first values of a tensor, and its 4-bit type if it is stored so."""
    names = _names(path)
    parts = {n for n in names if n.startswith(name + ".")} if name in packed(names) else set()
    if parts:
        kind = "fp4" if any(n.endswith("__fp4") for n in parts) else "nf4"
        return one_weight(path, name, parts).flatten()[:VALUES], kind
    with safe_open(path, "pt") as f:
        rows = f.get_slice(name)
        shape = rows.get_shape()
        width = 1
        for size in shape[1:]:
            width *= size
        t = rows[: max(1, VALUES // max(1, width))] if shape else f.get_tensor(name)
    return t.flatten()[:VALUES], None


def other_tokenizer(adapter: Path, base: Path) -> str | None:
    """Why the tokenizer that was saved beside the adapter is not the base's, in words; None where it is, or where one
    of them has none."""
    files = [folder / "tokenizer.json" for folder in (adapter, base)]
    if not all(f.is_file() for f in files):
        return None
    ours, theirs = (read_json(f).get("model", {}).get("vocab") for f in files)
    if not isinstance(ours, dict) or not isinstance(theirs, dict) or not theirs:
        return None
    differ = sum(ours.get(token) != at for token, at in theirs.items())
    return (
        f"{differ} of its {len(theirs)} tokens are others than those beside the adapter"
        if differ > 0.01 * len(theirs)
        else None
    )
