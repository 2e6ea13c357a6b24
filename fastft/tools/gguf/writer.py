"""The GGUF file, tensor by tensor: at any time one tensor is in memory. The format's arithmetic and layout are the
`gguf` package's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fastft.errors import ExportError
from fastft.tools.gguf.families import TensorNames, context_length, family_of, head_dim, in_file
from fastft.tools.gguf.rope import add_rope
from fastft.tools.gguf.vocabulary import add_vocabulary, model_name

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # those that the package can write


def write_gguf(
    path: Path,
    config: Any,
    tokenizer: Any,
    shapes: dict[str, tuple[int, ...]],
    tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]],
    quant: str,
    *,
    name: str,
    stops: list[int],
    step: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """Write one file; returns what a user should know of it, one line each.

    Args:
        path: the new file.
        config: transformers' configuration of the language model, with the result's vocabulary.
        shapes: the shapes of the result's tensors by name, in the order in which `tensors()` gives them.
        tensors: gives (name, tensor in float32), one at a time.
        quant: f32, f16, bf16 or q8_0.
        name: of the model, as its metadata says it.
        stops: ids that end an answer.
        step: called with the bytes read, after each tensor.
    Raises:
        ExportError: what the format or llama.cpp cannot hold, before anything is written where that can be seen."""
    import gguf

    family = family_of(config)
    names = TensorNames(family, config.num_hidden_layers)
    notes = []
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.arch]])
    try:
        _add_sizes(writer, family, config, model_name(name, tokenizer))
        writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(TYPES[quant], f"MOSTLY_{TYPES[quant]}")])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        factors = add_rope(writer, family, config)
        notes += add_vocabulary(writer, tokenizer, config.vocab_size, stops)
        if (context := context_length(family, config)) < config.max_position_embeddings:
            notes.append(f"llama.cpp has no attention window for this family: the context ends with it, at {context}")
        kinds = {n: _kind(n, s, quant, notes) for n, s in shapes.items()}
        for n, f in factors.items():
            writer.add_tensor_info(n, f.shape, f.numpy().dtype, f.numel() * 4)
        for n, shape in shapes.items():
            size, of = gguf.GGML_QUANT_SIZES[kinds[n]]
            count = math.prod(shape) // size * of
            writer.add_tensor_info(names[n], shape, torch.zeros(0).numpy().dtype, count, raw_dtype=kinds[n])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for f in factors.values():
            writer.write_tensor_data(f.numpy())
        for n, t in tensors():
            writer.write_tensor_data(_encoded(n, in_file(names[n], t.float(), family, config), kinds[n]))
            step(4 * t.numel())
    finally:
        writer.close()
    return notes


def _add_sizes(writer: Any, family: Any, config: Any, name: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(context_length(family, config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if family.window == "layers":
        writer.add_sliding_window(config.sliding_window)
        if getattr(config, "final_logit_softcapping", None):
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    elif family.arch == "PHI3":
        writer.add_sliding_window(0)  # the key is asked for, its code has no window


def _kind(name: str, shape: tuple[int, ...], quant: str, notes: list[str]) -> Any:
    """The type that a tensor is stored in: vectors in float32; rows that no block divides in F16."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if len(shape) < 2:
        return kinds.F32
    kind = kinds[TYPES[quant]]
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        notes.append(f"{name} is in F16: its rows of {shape[-1]} are no multiple of {gguf.GGML_QUANT_SIZES[kind][0]}")
        return kinds.F16
    return kind


def _encoded(name: str, t: torch.Tensor, kind: Any) -> Any:
    import gguf

    if kind == gguf.GGMLQuantizationType.F16 and t.abs().max() > torch.finfo(torch.float16).max:
        raise ExportError(f"export: {name} has values too large for F16: use --quant bf16")
    return gguf.quants.quantize(t.contiguous().numpy(), kind)
