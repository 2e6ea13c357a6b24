"""--to gguf: one file, and llama.cpp's proof of it. A quantised file is proven beside an unquantised one, which is
written for that alone."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastft.errors import ExportError
from fastft.tools.export import prompts, proof
from fastft.tools.export.reference import STAGES, greedy, rounded, run
from fastft.tools.export.source import ExportSource
from fastft.tools.export.stages import Stages
from fastft.tools.gguf import llama_cpp
from fastft.tools.gguf.families import context_length, family_of
from fastft.tools.gguf.k_quants import K_QUANTS, quantize, stored
from fastft.tools.gguf.writer import TYPES, write_gguf
from fastft.tools.merge.reference import load_reference
from fastft.tools.new_folder import check_room

QUANTS = (*TYPES, *K_QUANTS)
MISSING = "llama-cpp-python is not installed (pip install 'fastft[gguf]')"


def export_gguf(
    source: ExportSource, folder: Path, out: Path, quant: str, given: Path | None, stages: Stages
) -> tuple[Path, dict[str, Any]]:
    """Write the file into `folder` and prove it.

    Args:
        source: base and adapter.
        folder: where it is written; `out`: its name to be, for messages.
        quant: one of QUANTS.
        given: a file of prompts, or None for the built-in texts.
    Returns:
        the file, and figures for export.json.
    Raises:
        ExportError: it cannot be written, with the reason.
        ProofError: it was written and is not base + adapter."""
    _need("gguf", "the gguf package is not installed (pip install 'fastft[gguf]')")
    if quant in K_QUANTS and not llama_cpp.is_installed():
        raise ExportError(f"export: {quant} is written by llama.cpp, and {MISSING}")
    config, tokenizer = source.config, source.tokenizer()
    family = family_of(config)
    shapes, stops = source.shapes(), source.stops(tokenizer)
    values = sum(map(math.prod, shapes.values()))
    plain = quant if quant in ("f32", "f16", "bf16") else "f16"
    check_room(out, values * (4 if quant in ("f32", "f16", "bf16") else 3), "export")

    def write(kind: str) -> tuple[Path, list[str]]:
        path = folder / f"{source.name}-{kind}.gguf"
        with stages.stage(f"writing {path.name}", 4 * values) as step:
            notes = write_gguf(
                path, config, tokenizer, shapes, lambda: source.tensors(set(shapes), torch.float32), kind,
                name=source.name, stops=stops, step=step,
            )  # fmt: skip
        return path, notes

    proves = llama_cpp.is_installed()
    first, notes = write(plain) if proves or quant == plain else (None, [])
    path = first
    if quant in K_QUANTS and first is not None:
        path = folder / f"{source.name}-{quant}.gguf"
        with stages.stage(f"quantising to {path.name}"):
            notes += quantize(first, path, quant)
    elif quant != plain:
        path, more = write(quant)
        notes += more
    assert path is not None
    notes = list(dict.fromkeys(notes))
    for note in notes:
        stages.say(f"note: {note}")
    found: dict[str, Any] = {"file": path.name, "family": config.model_type, "notes": notes}
    if not proves or first is None:
        stages.say(f"not proven: {MISSING}")
        found["proof"] = {"none": MISSING}
        return path, found
    found["proof"] = _prove(source, config, tokenizer, first, path, plain, quant, given, family, list(shapes), stages)
    if first != path:
        first.unlink()
    return path, found


def _need(module: str, otherwise: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ExportError(f"export: {otherwise}")


def _prove(
    source: ExportSource, config: Any, tokenizer: Any, first: Path, path: Path, plain: str, quant: str,
    given: Path | None, family: Any, names: list[str], stages: Stages,
) -> dict[str, Any]:  # fmt: skip
    longest = context_length(family, config)
    questions = proof.make_questions(tokenizer, prompts.texts(given), source.stops(tokenizer), longest)
    watched = ["embd", "inp_scaled"] if family.offset else ["embd"]  # scaled after it, there
    watched += [n.format(i) for i in range(config.num_hidden_layers) for n, _ in STAGES] + ["result_norm"]
    if family.offset:
        watched.remove("embd")
    ask = lambda file: llama_cpp.ask(
        file, texts=questions.texts, conversations=questions.conversations, rows=questions.rows, watched=watched,
        prompts=questions.prompts, stops=questions.stops, new_tokens=questions.new_tokens, scratch=path.parent,
    )  # fmt: skip
    with stages.stage("llama.cpp reads and runs it"):
        told = {file: ask(file) for file in dict.fromkeys((first, path))}
    for answer in told.values():
        proof.check_text(questions, answer)
    with stages.stage("base + adapter in transformers and PEFT"):
        model = load_reference(source.base, source.adapter, source.plan)
        reference = run(model, questions.rows)
        said = [greedy(model, p, questions.new_tokens, questions.stops) for p in questions.prompts]
        model = model.merge_and_unload() if source.adapter is not None else model
        explained = {}
        for kind in dict.fromkeys((plain, quant)):
            if kind in K_QUANTS:
                for name, t in stored(path, names, config):
                    model.get_parameter(name).data.copy_(t)
            with rounded(model, kind):
                explained[kind] = run(model, questions.rows)
        del model
    figures = proof.check_numbers(plain, reference, explained[plain], told[first])
    found: dict[str, Any] = {plain: asdict(figures)}
    stages.say(str(figures))
    if quant != plain:
        figures = proof.check_numbers(quant, reference, explained[quant], told[path], figures.largest_error)
        found[quant] = asdict(figures)
        stages.say(str(figures))
    found.update(proof.counts(questions))
    found["answers"] = proof.side_by_side(tokenizer, questions, said, told[path].greedy)
    return found
