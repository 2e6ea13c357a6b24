"""fastft: Hugging Face models fine-tune faster and in less GPU memory, and prove on your machine that nothing else
changed.

Importing this module imports nothing else: names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_WHERE = {
    "FastModel": "fastft.loading.fast_model",
    "patch": "fastft.api",
    "unpatch": "fastft.api",
    "patched": "fastft.api",
    "report": "fastft.api",
    "PatchReport": "fastft.patching.report",
    "StrictError": "fastft.patching.patcher",
    "verify": "fastft.tools.verify.runner",
    "plan": "fastft.tools.plan.planner",
    "export": "fastft.tools.export.export",
    "FastftError": "fastft.errors",
}
__all__ = [
    "FastModel",
    "FastftError",
    "PatchReport",
    "StrictError",
    "export",
    "patch",
    "patched",
    "plan",
    "report",
    "unpatch",
    "verify",
]

if TYPE_CHECKING:
    from fastft.api import patch, patched, report, unpatch
    from fastft.errors import FastftError
    from fastft.loading.fast_model import FastModel
    from fastft.patching.patcher import StrictError
    from fastft.patching.report import PatchReport
    from fastft.tools.export.export import export
    from fastft.tools.plan.planner import plan
    from fastft.tools.verify.runner import verify


def __getattr__(name: str):
    if name == "testing":
        return importlib.import_module("fastft.testing")
    if name not in _WHERE:
        raise AttributeError(f"module 'fastft' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__():
    return sorted([*globals(), *__all__])
