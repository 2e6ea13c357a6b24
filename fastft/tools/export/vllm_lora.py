"""--to vllm-lora: the adapter as vLLM reads it. It takes plain LoRA on linear layers, with one rank and one scaling for
all: where an adapter has several, B takes the scaling and zeros fill the rank. What vLLM would ignore or refuse is
refused here, with the merged way named. The folder is loaded by PEFT again and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastft.errors import ExportError, ProofError
from fastft.tools.export import prompts, proof
from fastft.tools.export.reference import logits_of
from fastft.tools.export.source import ExportSource, write_json
from fastft.tools.export.stages import Stages
from fastft.tools.merge.adapter_parts import AdapterWeights, Delta
from fastft.tools.merge.reference import load_base, load_reference

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices of --max-lora-rank
USUAL_RANK = 16
INSTEAD = "use --to merged, and serve the merged model"


def export_vllm_lora(source: ExportSource, folder: Path, given: Path | None, stages: Stages) -> dict[str, Any]:
    """Write the adapter into `folder` and prove it; returns figures for export.json.

    Raises:
        ExportError: an adapter that vLLM would not serve as it was trained.
        ProofError: it was written and is not the adapter."""
    assert source.adapter is not None
    parts = source.parts
    if (reason := next(_unserved(source, parts), None)) is not None:
        raise ExportError(f"export: {reason}: {INSTEAD}")
    rank = max(d.A.shape[0] for d in parts.deltas.values())
    alpha, tensors, is_same = _uniform(parts, rank)
    with stages.stage("writing the adapter"):
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        stored = json.loads((source.adapter / "adapter_config.json").read_text())
        stored |= {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
        stored |= {"target_modules": sorted({n.rpartition(".")[2] for n in parts.deltas}), "layers_to_transform": None}
        stored |= {"use_rslora": is_same and parts.config.use_rslora, "inference_mode": True}
        stored |= {"exclude_modules": None, "layers_pattern": None}
        write_json(folder / "adapter_config.json", stored)
        tokenizer = source.tokenizer()
        if source.tokenizer_folder == source.adapter:
            tokenizer.save_pretrained(folder)
    most = next(r for r in RANKS if r >= rank)
    notes = [f"serve with --max-lora-rank {most}"] if most > USUAL_RANK else []
    if not is_same:
        notes.append(f"ranks and scalings by pattern are written as rank {rank} for all, the scaling in lora_B")
    for note in notes:
        stages.say(f"note: {note}")
    with stages.stage("loaded again by PEFT, beside the adapter"):
        found = _prove(source, folder, tokenizer, given)
    stages.say(found["logits"].pop("said"))
    return {"rank": rank, "max_lora_rank": most, "notes": notes, "proof": found}


def _unserved(source: ExportSource, parts: AdapterWeights) -> Any:
    """Reasons why vLLM would not serve the adapter as it was trained."""
    linear = _linear_modules(source)
    if parts.whole:
        name = next(iter(parts.whole))
        yield f"the adapter saves {name!r} whole, which vLLM ignores (modules_to_save, biases, resized embeddings)"
    if parts.config.target_parameters:
        yield "the adapter has target_parameters (LoRA on experts' stacks), which vLLM ignores"
    if parts.tokens:
        yield f"the adapter trains single tokens of {next(iter(parts.tokens))!r}, which vLLM ignores"
    for module, delta in parts.deltas.items():
        if delta.magnitude is not None:
            yield "the adapter is DoRA, which vLLM does not have"
        if delta.bias is not None:
            yield f"the adapter has lora_bias on {module!r}, which vLLM does not have"
        if delta.transposed or module not in linear:
            yield f"the adapter changes {module!r}, which is no linear layer within the decoder's layers"
    if not parts.deltas:
        yield "the adapter has no LoRA"
    elif (rank := max(d.A.shape[0] for d in parts.deltas.values())) > RANKS[-1]:
        yield f"the adapter's rank is {rank}, vLLM's largest is {RANKS[-1]}"


def _linear_modules(source: ExportSource) -> set[str]:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    head = model.get_output_embeddings()
    return {n for n, m in model.named_modules() if type(m) is torch.nn.Linear and m is not head}


def _uniform(parts: AdapterWeights, rank: int) -> tuple[float, dict[str, torch.Tensor], bool]:
    """(lora_alpha, tensors, whether they are the adapter's own): one rank and scaling for all."""
    scalings = {d.scaling for d in parts.deltas.values()}
    is_same = len(scalings) == 1 and len({d.A.shape[0] for d in parts.deltas.values()}) == 1
    tensors = {}
    for module, delta in parts.deltas.items():
        A, B = (delta.A, delta.B) if is_same else _padded(delta, rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.contiguous()
    if not is_same:
        return rank, tensors, False
    own = scalings.pop() * (rank**0.5 if parts.config.use_rslora else rank)
    return int(own) if own == int(own) else own, tensors, True


def _padded(delta: Delta, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and s B [out, rank], in float32."""
    more = rank - delta.A.shape[0]
    pad = torch.nn.functional.pad
    return pad(delta.A.float(), (0, 0, 0, more)), pad(delta.scaling * delta.B.float(), (0, more))


def _prove(source: ExportSource, folder: Path, tokenizer: Any, given: Path | None) -> dict[str, Any]:
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None) or prompts.ROW
    rows = proof.make_questions(tokenizer, prompts.texts(given), source.stops(tokenizer), longest).rows
    reference = logits_of(load_reference(source.base, source.adapter, source.plan), rows)
    ours = logits_of(load_reference(source.base, folder, source.plan), rows)
    alone = logits_of(load_base(source.base, source.plan), rows)
    figures = proof.measure("the adapter", reference, reference, ours)
    lost = float((alone - reference).abs().max())
    if not figures.largest_error <= 1e-4 * float(reference.abs().max()) or figures.largest_error > 0.5 * lost > 0:
        raise ProofError(
            f"export: the written adapter is not the one that was trained: the largest error of a logit is "
            f"{figures.largest_error / figures.std:.2e} of their deviation; nothing is published"
        )
    return {
        "read_by": "PEFT",
        "logits": {
            "positions": figures.positions,
            "std": figures.std,
            "largest_error": figures.largest_error,
            "without_the_adapter": lost,
            "said": f"largest error of a logit {figures.largest_error / figures.std:.2e} of their deviation; without "
            f"the adapter it would be {lost / figures.std:.2e}",
        },
    }
