"""The families that are written as GGUF. This table is the file format's vocabulary: what llama.cpp calls them, and how
it wants their tensors, which its own code for each of them assumes.

permuted      rotary pairs are neighbours there and halves of a head here: the rows of q and k change places
offset        a norm that multiplies by 1 + w is stored as 1 + w
activation    what its MLP computes; another is refused
rope          which rotary scalings its code reads
window        "layers": some layers see a window; "none": its code has no window, so that the context ends where it does
heads_fill    its code wants heads that fill the hidden size together
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from fastft.errors import ExportError


@dataclass(frozen=True)
class GGUFFamily:
    """One family; see the module's first lines."""

    arch: str
    activation: str = "silu"
    permuted: bool = False
    offset: bool = False
    rope: tuple[str, ...] = ("default", "linear", "yarn")
    window: str = "none"
    heads_fill: bool = False


FAMILIES = {
    "llama": GGUFFamily("LLAMA", permuted=True, rope=("default", "linear", "llama3", "yarn")),
    "mistral": GGUFFamily("LLAMA", permuted=True, rope=("default", "linear", "llama3", "yarn")),
    "qwen2": GGUFFamily("QWEN2"),
    "qwen3": GGUFFamily("QWEN3"),
    "gemma3_text": GGUFFamily(
        "GEMMA3", activation="gelu_pytorch_tanh", offset=True, rope=("default", "linear"), window="layers"
    ),
    "phi3": GGUFFamily("PHI3", rope=("default", "longrope"), heads_fill=True),
}
WINDOW_PERIOD = 6  # of the family with windows: every so many layers one sees everything


def family_of(config: Any) -> GGUFFamily:
    """Args:
        config: transformers' configuration of the language model.
    Returns:
        the family.
    Raises:
        ExportError: none of them, or one with a trait that llama.cpp's code for it lacks, with the reason."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ExportError(
            f"export: {config.model_type!r} cannot be written as GGUF here (known are {', '.join(FAMILIES)}): "
            "use --to merged, and llama.cpp's own converter"
        )
    reason = next(iter(_lacking(family, config)), None)
    if reason is not None:
        raise ExportError(
            f"export: this {config.model_type} model cannot be written as GGUF: {reason}; use --to merged"
        )
    return family


def _lacking(family: GGUFFamily, config: Any) -> list[str]:
    head = head_dim(config)
    get = lambda name, plain=None: getattr(config, name, plain)
    act = get("hidden_act") or get("hidden_activation")
    found = []
    if family.window == "layers":
        act = get("hidden_activation") or act
        period = [
            "full_attention" if (i + 1) % WINDOW_PERIOD == 0 else "sliding_attention"
            for i in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != period:
            found.append(
                f"llama.cpp lets every {WINDOW_PERIOD}th layer see everything, which is not this model's order"
            )
        scale = config.hidden_size / config.num_attention_heads if config.num_hidden_layers == 62 else head
        if get("query_pre_attn_scalar", scale) != scale:
            found.append(f"attention is scaled by {config.query_pre_attn_scalar}, llama.cpp has {scale}")
        if get("attn_logit_softcapping") is not None:
            found.append("llama.cpp caps no attention scores there")
        if get("use_bidirectional_attention"):
            found.append("its attention is bidirectional")
    if act != family.activation:
        found.append(f"its activation is {act}, llama.cpp computes {family.activation}")
    if family.heads_fill and head * config.num_attention_heads != config.hidden_size:
        found.append(f"llama.cpp wants heads that fill the hidden size, got {config.num_attention_heads} of {head}")
    if get("num_local_experts") or get("num_experts"):
        found.append("it has experts")
    return found


def head_dim(config: Any) -> int:
    """Of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_length(family: GGUFFamily, config: Any) -> int:
    """Positions for which the file gives the model's own results: where llama.cpp has no window, no more than one."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    windowed = types is None or "sliding_attention" in types
    if family.window == "none" and window and windowed and getattr(config, "use_sliding_window", True):
        return min(int(window), config.max_position_embeddings)
    return config.max_position_embeddings


def permute(t: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from halves of a head to neighbours: [heads, 2, d/2, ...] -> [heads, d/2, 2, ...]."""
    return t.reshape(heads, 2, t.shape[0] // heads // 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)


def in_file(name: str, t: torch.Tensor, family: GGUFFamily, config: Any) -> torch.Tensor:
    """A tensor as the file holds it. `name`: the file's."""
    if family.permuted and re.search(r"\.attn_[qk]\.(weight|bias)$", name):
        return permute(t, config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads)
    if family.offset and name.endswith("norm.weight"):
        return t + norm_offset()
    return t


def norm_offset() -> float:
    """What a norm of 1 + w adds to w."""
    return 1.0


class TensorNames:
    """The file's names of a model's tensors, by the `gguf` package's own map."""

    def __init__(self, family: GGUFFamily, layers: int):
        import gguf

        self.family = family
        self.known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.arch], layers)

    def __getitem__(self, name: str) -> str:
        """ExportError for one that the format has no name for."""
        found = self.known.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(
                f"export: GGUF has no name for {name!r} in {self.family.arch.lower()} models: use --to merged"
            )
        return found
