"""A proven unquantised file in K-quants. llama.cpp does it, in a process of its own; then every tensor is held against
the file that it came from."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastft.errors import ExportError, ProofError
from fastft.tools.gguf.families import TensorNames, family_of, in_file

K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
# the most that storing may change a tensor, of its norm, by the bits of a value
MOST = {2: 0.5, 3: 0.3, 4: 0.15, 5: 0.08, 6: 0.05, 8: 0.02, 16: 0.005, 32: 1e-6}


def quantize(source: Path, target: Path, quant: str) -> list[str]:
    """Write `target`; returns what a user should know of it, one line each.

    Raises:
        ExportError: llama.cpp refuses.
        ProofError: a tensor that is not the source's."""
    import gguf

    job = {"from": str(source), "to": str(target), "ftype": int(gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"])}
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        (Path(name) / "job.json").write_text(json.dumps({"quantize": job}))
        run = subprocess.run(
            [sys.executable, "-m", "fastft.tools.gguf.llama_cpp_worker", name], capture_output=True, text=True
        )
    if run.returncode != 0 or not target.is_file():
        said = [x for x in run.stderr.splitlines() if "error" in x or "failed" in x or "ASSERT" in x]
        raise ExportError(f"export: llama.cpp cannot quantise to {quant} ({(said or ['no reason given'])[0][:200]})")
    return _compare(source, target, quant)


def _compare(source: Path, target: Path, quant: str) -> list[str]:
    before = dict(_tensors(source))
    others: dict[str, int] = {}
    for name, (t, kind) in _tensors(target):
        was = before.pop(name)[0]
        far = float((t - was).norm() / (was.norm() + 1e-30))
        if not far <= MOST[int("".join(c for c in kind.split("_")[0] if c.isdigit()))]:
            raise ProofError(
                f"export: {name} in {quant} is not the tensor it came from (by {far:.2g}); nothing is published"
            )
        if t.dim() > 1 and "_K" not in kind:
            others[kind] = others.get(kind, 0) + 1
    if before:
        raise ProofError(f"export: {next(iter(before))} is missing after quantisation; nothing is published")
    return [
        f"{n} tensors are in {kind}: their rows are no multiple of 256, which K-quants need"
        for kind, n in others.items()
    ]


def _tensors(path: Path) -> Iterator[tuple[str, tuple[torch.Tensor, str]]]:
    import gguf

    for t in gguf.GGUFReader(path).tensors:
        data = gguf.quants.dequantize(t.data, t.tensor_type)
        yield t.name, (torch.from_numpy(data.astype("float32")), t.tensor_type.name)


def stored(path: Path, names: list[str], config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(the model's name, tensor as the model has it) of what a file stores, one at a time."""
    family = family_of(config)
    known = TensorNames(family, config.num_hidden_layers)
    found = {known[n]: n for n in names}
    for name, (t, _) in _tensors(path):
        if name not in found:
            continue
        places = torch.arange(t.shape[0], dtype=torch.float64)
        is_rows = t.dim() > 1 or (".attn_" in name and "norm" not in name)
        moved = in_file(name, places, family, config) if is_rows else places
        back = torch.empty_like(t)
        back[moved.long()] = t
        offset = in_file(name, torch.zeros(1), family, config) if t.dim() == 1 and "norm" in name else 0.0
        yield found[name], back - offset
