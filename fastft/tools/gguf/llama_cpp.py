"""llama.cpp asked about a GGUF file: ids of texts, rendered conversations, logits, activations, greedy answers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastft.errors import ProofError


@dataclass(frozen=True)
class LlamaCppAnswer:
    """ids: of each text, with and without what is put before and after it. rendered: of each conversation, in the
    file's template. logits: of all positions of all rows, one after the other. stages: of the first row, by llama.cpp's
    names, [positions, width]. greedy: of each prompt."""

    ids: list[list[list[int]]]
    rendered: list[str]
    logits: torch.Tensor
    stages: dict[str, torch.Tensor] = field(default_factory=dict)
    greedy: list[list[int]] = field(default_factory=list)


def is_installed() -> bool:
    """Whether llama-cpp-python is there."""
    return importlib.util.find_spec("llama_cpp") is not None


def ask(
    gguf: Path,
    *,
    texts: list[str] = [],  # noqa: B006 (only read)
    conversations: list[Any] = [],  # noqa: B006
    rows: list[list[int]] = [],  # noqa: B006
    watched: list[str] = [],  # noqa: B006
    prompts: list[list[int]] = [],  # noqa: B006
    stops: list[int] = [],  # noqa: B006
    new_tokens: int = 24,
    scratch: Path | None = None,
) -> LlamaCppAnswer:
    """Everything in one process, which loads the file once.

    Args:
        gguf: the file.
        texts: to be encoded.
        conversations: lists of messages, to be rendered.
        rows: token ids, of whose positions all logits are wanted; `watched`: activations of the first of them.
        prompts: token ids to be continued greedily by at most `new_tokens`, up to one of `stops`.
        scratch: where questions and answers are put for the while.
    Raises:
        ProofError: llama.cpp cannot load or run the file, with its own words."""
    longest = max([0, *map(len, rows), *(len(p) + new_tokens for p in prompts)])
    job = {
        "gguf": str(gguf),
        "texts": texts,
        "conversations": conversations,
        "rows": rows,
        "watched": watched,
        "prompts": prompts,
        "stops": stops,
        "new_tokens": new_tokens,
        "positions": -(-max(longest, 1) // 64) * 64,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job))
        run = subprocess.run(
            [sys.executable, "-m", "fastft.tools.gguf.llama_cpp_worker", name], capture_output=True, text=True
        )
        if run.returncode != 0:
            said = [line.strip() for line in run.stderr.splitlines() if line.strip()] or [f"exit code {run.returncode}"]
            told = [x for x in said if "error" in x or "ASSERT" in x or "failed" in x] or said[-1:]
            raise ProofError(f"export: llama.cpp does not run the file ({told[0][:300]}); nothing is published")
        found = json.loads((folder / "answer.json").read_text())
        read = lambda path: torch.from_numpy(np.load(path))
        stages = {p.stem.removeprefix("stage-"): read(p) for p in folder.glob("stage-*.npy")}
        return LlamaCppAnswer(found["ids"], found["rendered"], read(folder / "logits.npy"), stages, found["greedy"])
