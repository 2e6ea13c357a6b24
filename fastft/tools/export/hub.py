"""--push-to-hub: a model card with the figures, and the upload of the folder that has just been proven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastft.errors import ExportError

LIBRARY = {"merged": "transformers", "gguf": "gguf", "ollama": "gguf", "vllm-lora": "peft"}


def check_repository(name: str) -> None:
    """ExportError, before anything is written, for a name that the Hub does not take."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        ok = name.count("/") == 1
    except HFValidationError:
        ok = False
    if not ok:
        raise ExportError(f"export: --push-to-hub: want USER/NAME, got {name!r}")


def write_card(folder: Path, figures: dict[str, Any]) -> None:
    """README.md, with what was compared and what came of it."""
    head = ["---", f"library_name: {LIBRARY[figures['form']]}", "tags:", "- fastft"]
    base = figures.get("base")
    if base and not Path(base).exists():
        head.append(f"base_model: {base}")
    proof = figures["proof"]
    lines = [*head, "---", "", f"# {figures['source']}", "", _what(figures), ""]
    rows = {k: v for k, v in proof.items() if isinstance(v, dict) and "largest_error" in v}
    if rows:
        lines += ["Compared with base + adapter in float32:", "", "| | " + " | ".join(COLUMNS) + " |"]
        lines += ["|---" * (len(COLUMNS) + 1) + "|"]
        for name, row in rows.items():
            shown = [f"{read(row):.3g}" if row.get(key) is not None else "" for key, read in COLUMNS.values()]
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
        lines.append("")
    for name in ("strings", "conversations", "modelfile"):
        if name in proof:
            lines.append(f"- {name}: {proof[name]['equal']} of {proof[name]['compared']} equal")
    lines += [f"- {note}" for note in figures.get("notes", ())]
    lines += ["", "All figures: `export.json`. " + ", ".join(f"{k} {v}" for k, v in figures["versions"].items()), ""]
    (folder / "README.md").write_text("\n".join(lines))


COLUMNS = {
    "largest error of a logit / deviation": ("largest_error", lambda r: r["largest_error"] / r["std"]),
    "KL, nats a token": ("kl_mean", lambda r: r["kl_mean"]),
    "likeliest token agrees, %": ("top1", lambda r: 100 * r["top1"]),
    "positions": ("positions", lambda r: r["positions"]),
}


def _what(figures: dict[str, Any]) -> str:
    of = f"an adapter on {figures['base']}" if figures.get("base") else "a model"
    onto = f", merged onto {figures['merged_onto']}" if figures.get("merged_onto") else ""
    return f"Exported by fastft from {of}{onto}: {figures['form']}, {figures['quant'] or 'as trained'}."


def upload(folder: Path, name: str, private: bool) -> str:
    """The address of the commit. ExportError, in one line, where the Hub refuses; the folder stays."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export by fastft"))
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as e:
        said = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise ExportError(
            f"export: {str(folder)!r} is written and proven, and could not be uploaded ({said}): "
            f"hf upload {name} {folder}"
        ) from e
