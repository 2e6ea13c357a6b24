"""Triton where it is installed; elsewhere names that let the kernel files import (their kernels are then never
launched)."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    HAS_TRITON = True
except ImportError:  # macOS, Windows without triton-windows: the torch references run
    HAS_TRITON = False
    InterpretedFunction = ()

    class _Absent:
        """Decorators return what they decorate; annotations resolve to this object."""

        def __call__(self, fn=None, **_):
            return fn if fn is not None else self

        def __getattr__(self, name: str):
            return self

    triton = tl = _Absent()  # type: ignore[assignment]

__all__ = ["HAS_TRITON", "InterpretedFunction", "tl", "triton"]
