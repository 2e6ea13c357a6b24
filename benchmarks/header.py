"""Where a result comes from: the device, the versions, the commit and whether the tree was dirty, the command."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "trl",
    "bitsandbytes",
    "liger_kernel",
    "unsloth",
    "fastft",
)


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}, "
        f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB)"
    )


def _git(*words: str) -> str:
    run = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return run.stdout.strip() if run.returncode == 0 else ""


def commit() -> str:
    """A short hash, " (dirty)" where tracked files are changed; "unknown" outside a repository."""
    try:
        found = _git("rev-parse", "--short", "HEAD")
        return (
            f"{found}{' (dirty)' if _git('status', '--porcelain', '--untracked-files=no') else ''}"
            if found
            else "unknown"
        )
    except FileNotFoundError:  # no git on this machine
        return "unknown"


def header(device: torch.device, command: str) -> dict[str, str]:
    versions = {p: version_of(p) for p in PACKAGES}
    cuda = {"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}
    return {
        "device": device_name(device),
        "command": command,
        "commit": commit(),
        "python": platform.python_version(),
        **cuda,
        **versions,
    }
