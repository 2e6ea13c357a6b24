"""What a saved LoRA adapter holds, part by part, as changes to the base's tensors; a part that is not known is named
before anything is computed or written.

    X.lora_A, X.lora_B        W + s B A             (alpha and rank by pattern, rsLoRA)
    X.lora_magnitude_vector   m / |W + s B A| (W + s B A), norms of rows (DoRA)
    X.lora_B.bias             b + s b_B
    X.lora_embedding_A, _B    W + s (B A)^T
    X.weight, X.bias          in the place of the base's: modules_to_save, saved embeddings, trained biases
    X.lora_A, X.lora_B        of experts' stacks: `expert_parts`
    X.token_adapter           in the place of single rows: trainable_token_indices
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from fastft.errors import AdapterError
from fastft.tools.merge import expert_parts
from fastft.tools.merge.expert_parts import ExpertsDelta, Parts

if TYPE_CHECKING:
    from peft import LoraConfig

BLOCK_BYTES = 64 << 20  # float32 scratch of one block of rows
BY_PEFT = "load base and adapter with PEFT and call merge_and_unload()"
# Fields of LoraConfig that this file carries out, or that say nothing of the merged weights; any other that is set is
# named.
KNOWN = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "use_dora",
    "lora_bias",
    "eva_config",
    "qalora_group_size",
    "megatron_core",
    "ensure_weight_tying",
    "runtime_config",
    "use_qalora",
}
PLAIN_STARTS = (
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # initialisations that leave the base's weights as they are
LAYER_PARTS = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".token_adapter.trainable_tokens_delta",
)


@dataclass(frozen=True)
class Delta:
    """s B A of one module: A [r, in], B [out, r]; bias: of lora_B, magnitude: of DoRA [out], or None. transposed: the
    weight is [in, out]."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that it is added to."""
        out, into = self.B.shape[0], self.A.shape[1]
        return (into, out) if self.transposed else (out, into)

    def add_to(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The sum in `dtype`, computed in float32, block by block of rows."""
        result = torch.empty(weight.shape, dtype=dtype)
        by_row = self.transposed and self.magnitude is not None  # a norm is over all that one output takes
        source, target = (weight.t(), result.t()) if by_row else (weight, result)
        A, B = (
            (self.A.float(), self.B.float())
            if by_row or not self.transposed
            else (self.B.t().float(), self.A.t().float())
        )
        step = max(1, BLOCK_BYTES // (4 * max(1, source.shape[1])))
        for i in range(0, source.shape[0], step):
            rows = slice(i, i + step)
            block = source[rows].float() + torch.mm(B[rows], A) * self.scaling
            if self.magnitude is not None:
                block = (self.magnitude[rows].float() / torch.linalg.norm(block, dim=1))[:, None] * block
            target[rows] = block
        return result


@dataclass
class AdapterWeights:
    """whole: tensors by the name of the base's that they replace. tokens: (row numbers, rows) by module. pairs: of
    experts' stacks, as they were saved; stacks: the same by the stack's name, once the base is known."""

    config: LoraConfig
    deltas: dict[str, Delta] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    pairs: Parts = field(default_factory=dict)
    stacks: dict[str, ExpertsDelta] = field(default_factory=dict)

    def touches(self, module: str) -> bool:
        return module in self.deltas or module in self.tokens or f"{module}.weight" in self.whole

    def is_saved(self, module: str) -> bool:
        """By modules_to_save: a copy of the module's own, also where the base ties it to another."""
        return any(module == m or module.endswith(f".{m}") for m in self.config.modules_to_save or ())

    def apply(self, name: str, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The merged tensor in the place of the base's `t`."""
        if (changed := expert_parts.add(self.stacks, name, t, dtype)) is not None:
            return changed
        module, _, kind = name.rpartition(".")
        t, delta = self.whole.get(name, t), self.deltas.get(module)
        if kind == "bias" and delta is not None and delta.bias is not None:
            return (t.float() + delta.scaling * delta.bias.float()).to(dtype)
        if kind == "weight" and delta is not None:
            t = delta.add_to(t, dtype)
        t = t.to(dtype) if t.is_floating_point() else t
        if kind == "weight" and module in self.tokens:
            index, rows = self.tokens[module]
            t = t.index_copy(0, index, rows.to(dtype))
        return t


def read_adapter(folder: Path) -> AdapterWeights:
    """AdapterError, in one line with the part's name, for what is no LoRA adapter and for every part of one that is not
    known here."""
    if not (folder / "adapter_config.json").is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/adapter_config.json")) if folder.is_dir() else []
        there = (
            f"; there are {len(inside)} adapters in it ({', '.join(inside[:4])}): give the folder of one"
            if inside
            else ""
        )
        raise AdapterError(f"merge: want an adapter's folder with adapter_config.json, got {str(folder)!r}{there}")
    adapter = AdapterWeights(_config(folder))
    tensors = _tensors(folder)
    for key, t in tensors.items():
        if t.is_floating_point() and not t.isfinite().all():
            raise AdapterError(
                f"merge: {key!r} of the adapter {str(folder)!r} holds NaN or infinity: its training diverged; take an "
                "earlier checkpoint"
            )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, t in tensors.items():
        name = key.removeprefix("base_model.model.")
        part = next((p for p in LAYER_PARTS if name.endswith(p)), None)
        if part is not None:
            parts.setdefault(name.removesuffix(part), {})[part] = t
        elif ".lora_" in name or "trainable_tokens" in name:
            raise AdapterError(
                f"merge: want the parts of plain LoRA or DoRA, got {key!r}, which is not known here: {BY_PEFT}"
            )
        elif ".original_module." not in name:
            name = _plain(name)
            if name in adapter.whole and not torch.equal(adapter.whole[name], t):
                raise AdapterError(
                    f"merge: want one tensor for {name!r}, got two that differ: save the adapter anew with "
                    "save_pretrained"
                )
            adapter.whole[name] = t
    for module, found in parts.items():
        if expert_parts.is_stacked(module, adapter.config):
            adapter.pairs[module] = found
        else:
            _add(adapter, module, found)
    return adapter


def _plain(name: str) -> str:
    """The base's name of a tensor that PEFT saved from inside its wrappers."""
    for wrapper in (".token_adapter.", ".base_layer.", ".modules_to_save."):
        name = name.replace(wrapper, ".")
    return name


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """AdapterError, with the file's name, for one that is missing or cannot be read."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    files = [p for n in ("adapter_model.safetensors", "adapter_model.bin") if (p := folder / n).is_file()]
    if not files:
        raise AdapterError(
            f"merge: want adapter_model.safetensors in {str(folder)!r}, which has none: save the adapter with "
            "save_pretrained"
        )
    path = files[0]
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, EOFError) as e:
        raise AdapterError(f"merge: the adapter's {str(path)!r} is damaged ({said(e)}): copy or save it again") from e


def said(e: Exception) -> str:
    """The first line of another library's message."""
    return (str(e).splitlines() or [type(e).__name__])[0][:160]


def _config(folder: Path) -> LoraConfig:
    from peft import LoraConfig, PeftConfig

    path = folder / "adapter_config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise AdapterError(f"merge: the adapter's {str(path)!r} is damaged ({said(e)}): copy or save it again") from e
    if raw.get("peft_type") != "LORA":
        raise AdapterError(
            f"merge: want a LoRA adapter, got one of type {raw.get('peft_type')}: {BY_PEFT}, where it can be merged"
        )
    plain = {f.name: getattr(LoraConfig(), f.name) for f in fields(LoraConfig)}
    for name, value in raw.items():
        if name not in KNOWN and value and value != plain.get(name):
            raise AdapterError(f"merge: the adapter has {name}={_short(value)}, which is not known here: {BY_PEFT}")
    if (start := raw.get("init_lora_weights", True)) not in PLAIN_STARTS:
        raise AdapterError(
            f"merge: the adapter has init_lora_weights={start!r}, which changed the base's weights too, so it does not "
            "fit the base as it is saved: "
            "save it with path_initial_model_for_weight_conversion=, or " + BY_PEFT
        )
    if raw.get("use_qalora"):
        raise AdapterError(f"merge: the adapter has use_qalora=True, which is not known here: {BY_PEFT}")
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    return config


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _add(adapter: AdapterWeights, module: str, found: dict[str, torch.Tensor]) -> None:
    config, magnitude = adapter.config, found.get(".lora_magnitude_vector", found.get(".lora_magnitude_vector.weight"))
    rows = found.get(".token_adapter.trainable_tokens_delta")
    if rows is not None:
        index = _token_indices(config, module)
        if len(index) != rows.shape[0]:
            raise AdapterError(
                f"merge: {module!r} has {rows.shape[0]} trained tokens, its config names {len(index)}: save it anew "
                "with save_pretrained"
            )
        adapter.tokens[module] = torch.tensor(index), rows
    A, B, transposed = found.get(".lora_A.weight"), found.get(".lora_B.weight"), config.fan_in_fan_out
    if ".lora_embedding_A" in found or ".lora_embedding_B" in found:
        A, B, transposed = found.get(".lora_embedding_A"), found.get(".lora_embedding_B"), True
    if A is None and B is None and magnitude is None:
        return
    is_odd_dora = magnitude is not None and (".lora_embedding_A" in found or not config.use_dora)
    if A is None or B is None or A.dim() != 2 or B.dim() != 2 or is_odd_dora:
        got = ", ".join(f"{k.removeprefix('.')} {tuple(v.shape)}" for k, v in found.items())
        raise AdapterError(
            f"merge: want lora_A [r, in] and lora_B [out, r] of a linear layer or an embedding for {module!r}, got "
            f"{got}: {BY_PEFT}"
        )
    if config.use_dora and magnitude is None:
        raise AdapterError(
            f"merge: the adapter has use_dora=True, but no lora_magnitude_vector for {module!r}: save it anew with "
            "save_pretrained"
        )
    if magnitude is not None:
        magnitude = magnitude.reshape(-1)
    adapter.deltas[module] = Delta(
        A, B, _scaling(config, module, A.shape[0]), found.get(".lora_B.bias"), magnitude, transposed
    )


def _token_indices(config: LoraConfig, module: str) -> list[int]:
    indices = config.trainable_token_indices or []
    # a name that ends as the module's does; the embedding's serve a head that is tied to it
    if isinstance(indices, dict):
        return next(
            (v for k, v in indices.items() if module == k or module.endswith(f".{k}")),
            next(iter(indices.values())) if len(indices) == 1 else [],
        )
    return list(indices)


def _scaling(config: LoraConfig, module: str, r: int) -> float:
    """PEFT's: alpha / r, or alpha / sqrt(r) for rsLoRA, both by pattern."""
    from peft.utils.other import get_pattern_key

    patterns: dict[str, int] = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config.lora_alpha)
    return alpha / (r**0.5 if config.use_rslora else r)


def misfits(adapter: AdapterWeights, shapes: dict[str, tuple[int, ...] | None], quantised: set[str]) -> Iterator[str]:
    """What of the adapter the base, whose tensors have these shapes (None: not known before it is expanded), cannot
    take."""
    for module, delta in adapter.deltas.items():
        if f"{module}.weight" not in shapes:
            yield f"no weight for the adapted module {module!r}: it is another base, or it stores them fused"
        elif (shape := shapes[f"{module}.weight"]) is not None and shape != delta.shape:
            yield f"{module}.weight is {shape}, the adapter's {delta.shape}: it is another base"
        if delta.bias is not None and f"{module}.bias" not in shapes:
            yield f"the adapter has lora_bias on {module!r}, whose base layer has no bias to take it"
    for name, t in adapter.whole.items():
        if name not in shapes:
            yield f"no {name!r}, which the adapter saves whole (modules_to_save, a saved embedding or a trained bias)"
        elif shapes[name] is not None and shapes[name] != tuple(t.shape):
            yield (
                f"{name} is {shapes[name]}, the adapter's {tuple(t.shape)}: resize the base's embeddings first, and "
                "save it"
            )
        elif name in quantised:
            yield f"{name} in 4 bits, and the adapter saves it whole"
    for module, (index, rows) in adapter.tokens.items():
        shape = shapes.get(f"{module}.weight")
        if f"{module}.weight" not in shapes:
            yield f"no weight for {module!r}, of which the adapter trained single tokens"
        elif shape is not None and (shape[1:] != tuple(rows.shape[1:]) or int(index.max()) >= shape[0]):
            yield (
                f"{module}.weight is {shape}, the adapter trained {tuple(rows.shape)} of its rows, up to "
                f"{int(index.max())}: it is another base"
            )
