"""`fastft export`: the result is written into a hidden neighbour of its folder, loaded by the other side, compared, and
only then given its name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastft.errors import ExportError, FastftError, FolderExistsError, ModelNotFoundError
from fastft.loading.checkpoint import check_name
from fastft.tools.export.gguf_file import QUANTS, export_gguf
from fastft.tools.export.hub import check_repository, upload, write_card
from fastft.tools.export.merged import DTYPES, export_merged
from fastft.tools.export.ollama import add_modelfile
from fastft.tools.export.source import find_source, is_adapter, write_json
from fastft.tools.export.stages import Stages
from fastft.tools.export.vllm_lora import export_vllm_lora
from fastft.tools.new_folder import new_folder

# with the type that is taken without --quant
FORMS: dict[str, str | None] = {"merged": "bf16", "gguf": "q8_0", "ollama": "q8_0", "vllm-lora": None}
LIBRARIES = ("fastft", "torch", "transformers", "peft", "gguf", "llama-cpp-python")


@dataclass(frozen=True)
class ExportResult:
    """out: the new folder. figures: what its export.json holds."""

    out: Path
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the figures, and where they lie."""
        return {"out": str(self.out), **self.figures}


def export(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    quant: str | None = None,
    base: str | None = None,
    base_precision: str = "trained",
    other_base: bool = False,
    prompts: Path | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    console: Any = None,
) -> ExportResult:
    """Write an adapter on its base, or a model, in the form that a server reads, and prove that it is what was trained.

    Args:
        source: an adapter's folder, or a model's folder or name.
        out: the new folder.
        to: one of FORMS.
        quant: the type that weights are stored in; by default bf16 (merged) or q8_0 (gguf, ollama).
        base: instead of the one that the adapter names.
        base_precision: what the adapter is merged onto: "trained" (in 4 bits where it was trained so), "original" (as
            the base is stored, in 16 bits), "nf4", "fp4".
        other_base: `base` is meant to be another model than the one that was trained on.
        prompts: a file of texts to compare on, one a line; by default built-in ones.
        push_to_hub: USER/NAME of a repository that the proven folder is uploaded to, with a model card.
        private: whether that repository is private, if it is made now.
        console: a rich console for a line a stage; None for silence.
    Returns:
        the folder and its figures.
    Raises:
        ExportError, AdapterError, ModelNotFoundError: what cannot be exported, with the reason.
        ProofError: the result was compared and is not what was trained.
        FolderExistsError, WriteError: `out` is there, or cannot be written.
    After any error nothing is left at `out`."""
    out, stages = Path(out), Stages(console)
    _check_arguments(source, out, to, quant)
    if push_to_hub is not None:
        check_repository(push_to_hub)
    with _said_by_export():
        return _export(source, out, to, quant, base, base_precision, other_base, prompts, push_to_hub, private, stages)


def _check_arguments(source: str | Path, out: Path, to: str, quant: str | None) -> None:
    """What can be refused before anything is read."""
    if to not in FORMS:
        raise ExportError(f"export: --to: want one of {', '.join(FORMS)}, got {to!r}")
    if os.path.lexists(out):
        raise FolderExistsError(f"export: {str(out)!r} exists; give a new folder")
    if to == "vllm-lora" and quant is not None:
        raise ExportError(f"export: --to vllm-lora stores the adapter as it is: leave --quant {quant} out")
    types = DTYPES if to == "merged" else QUANTS
    if quant is not None and quant not in types:
        raise ExportError(f"export: --quant: want one of {', '.join(types)} for --to {to}, got {quant!r}")
    try:
        check_name(str(source), {})
    except ModelNotFoundError as e:
        raise ModelNotFoundError(f"export: {e}") from e
    if to == "vllm-lora" and not is_adapter(Path(source)):
        raise ExportError("export: --to vllm-lora wants an adapter's folder, got a model: vLLM serves it as it is")


@contextlib.contextmanager
def _said_by_export() -> Iterator[None]:
    """The parts that are the merge's name this command in their errors."""
    try:
        yield
    except FastftError as e:
        if not str(e).startswith("merge: "):
            raise
        raise type(e)("export: " + str(e).removeprefix("merge: ")) from e


def _export(
    source: str | Path, out: Path, to: str, quant: str | None, base: str | None, base_precision: str,
    other_base: bool, prompts: Path | None, push_to_hub: str | None, private: bool, stages: Stages,
) -> ExportResult:  # fmt: skip
    kind = quant or FORMS[to]
    with stages.stage("reading base and adapter"):
        found = find_source(source, base, other_base, base_precision)
    figures: dict[str, Any] = {
        "form": to,
        "quant": kind,
        "source": found.name,
        "base": found.base_name if found.adapter is not None else None,
        "base_is_the_one_trained_on": found.checked or None,
        "merged_onto": found.precision if found.adapter is not None else None,
        "versions": _versions(),
    }
    with new_folder(out, "export") as folder:
        if to == "vllm-lora":
            figures |= export_vllm_lora(found, folder, prompts, stages)
        elif to == "merged":
            figures |= export_merged(found, folder, out, str(kind), prompts, stages)
        else:
            figures |= export_gguf(found, folder, out, str(kind), prompts, stages)[1]
        if to == "ollama":
            figures["proof"] |= add_modelfile(found, folder, figures, stages)
        write_json(folder / "export.json", figures)
        if push_to_hub is not None:
            write_card(folder, figures)
    answers = figures["proof"].get("answers", ())
    if answers:
        stages.say(
            "greedy answers, to be read and not judged (one near-tie turns the rest round); judged is what is above"
        )
    for answer in answers:
        stages.say("\n".join(f"{k + ':':<16}{v!r}" for k, v in answer.items()))
    stages.say(f"{out}: written and proven" if "none" not in figures["proof"] else f"{out}: written, not proven")
    if push_to_hub is not None:
        with stages.stage(f"uploading to {push_to_hub}"):
            stages.say(upload(out, push_to_hub, private))
    return ExportResult(out, figures)


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
