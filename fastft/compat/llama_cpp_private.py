"""llama-cpp-python's names beside its documented interface. It is imported when they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def ggml() -> Any:
    """ggml's own library, which llama-cpp-python ships and does not wrap: a ctypes.CDLL."""
    import llama_cpp  # pyright: ignore[reportMissingImports]
    from llama_cpp import _ctypes_extensions  # pyright: ignore[reportMissingImports]

    return _ctypes_extensions.load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
