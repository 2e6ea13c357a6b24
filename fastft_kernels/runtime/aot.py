"""Compile a kernel ahead of time for any GPU, with no GPU present, and read what the compiler knows: registers, spills,
shared memory, matrix instructions.

A kernel file says at its end which compilations stand for real models:

    AOT_CASES = (
        AotCase(_fwd_kernel, {"x_ptr": "*bf16", "n": "i32"}, {"BLOCK": 4096}, num_warps=8, note="Llama-3.1-8B hidden"),
    )

or, where the launch table depends on the architecture, as a function `AOT_CASES(arch) -> tuple[AotCase, ...]`. The test
of this package goes over every module and architecture; a module with kernels and without `AOT_CASES` fails.

Where the figures come from. NVIDIA: what `ptxas -v` printed while Triton made the binary (the ptxas of Triton's own
wheel).
AMD: the kernel's metadata in the assembly. Shared memory: Triton's metadata. Matrix instructions and approximate ones:
read in the PTX (the first in AMD's assembly as well)."""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from fastft_kernels.runtime.dispatch import INTERPRETED
from fastft_kernels.runtime.language import HAS_TRITON, triton

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

# Bytes of shared memory one program may use (the opt-in limit of the architecture).
SHARED_LIMIT = {
    "sm_75": 64 << 10,
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
# What PTX only approximates, products of float32 rounded to TF32, and subnormal numbers taken for zero.
_APPROXIMATE = re.compile(
    r"\b(?:ex2|lg2|rsqrt|sqrt|rcp|div|tanh|sin|cos)\.(?:approx|full)[.\w]*|\b\w+\.[.\w]*(?:ftz|tf32)[.\w]*"
)


@dataclass(frozen=True)
class AotCase:
    """One compilation that stands for a real use of a kernel.

    kernel      the @triton.jit function
    signature   {argument: type} of every argument that is not constexpr: "*bf16", "*fp32", "*u8", "i32", "i64", "fp32";
                a tuple
                of types where the argument is a tuple
    constexprs  {argument: value}; None is a value (an absent pointer is passed as the constexpr None, as the JIT does)
    num_warps, num_stages, options   as the launcher passes them
    note        the model and shape it stands for; shown when the case fails
    unaligned   integer arguments that are not multiples of 16 in this use (a row count, say); every other pointer and
                integer is
                marked divisible by 16, as the JIT marks it, and its loads are vectorised. i1 and floats are never
                marked.
    archs       the architectures it runs on (a kernel with a bfloat16 product, say, is not launched on sm_75)
    """

    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    unaligned: frozenset[str] | tuple[str, ...] = ()
    archs: tuple[str, ...] = ARCHS


@dataclass(frozen=True)
class CompileReport:
    """What the compiler knows of one kernel on one architecture. regs: per thread (VGPRs on AMD); spill_bytes: per
    thread;
    shared and shared_limit: bytes per program; mma: matrix instructions in the code; seconds: of compilation;
    approximate: the
        instructions of the PTX that are less exact than float32 can be (see `precise`)."""

    kernel: str
    arch: str
    regs: int
    spill_bytes: int
    shared: int
    shared_limit: int
    mma: int
    seconds: float
    approximate: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """No spills, and the shared memory within the limit."""
        return self.spill_bytes == 0 and self.shared <= self.shared_limit


def _target(arch: str):
    from triton.backends.compiler import GPUTarget

    if arch not in SHARED_LIMIT:
        raise ValueError(f"compile_for: want arch in {ARCHS}, got {arch!r}")
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def _ptxas_figures(log: str) -> tuple[int, int]:
    """(registers, bytes of spill stores + loads) of the worst function ptxas names."""
    regs = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not regs or not spills:
        raise RuntimeError(f"compile_for: ptxas printed no register counts: {log[-300:]!r}")
    return max(map(int, regs)), max(int(a) + int(b) for a, b in spills)


def _amd_figures(asm: str) -> tuple[int, int]:
    def worst(key: str) -> int:
        return max((int(x) for x in re.findall(rf"\.{key}:\s+(\d+)", asm)), default=0)

    return worst("vgpr_count"), max(4 * worst("vgpr_spill_count"), worst("private_segment_fixed_size"))


def _integers(kind: str | tuple[str, ...], path: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where pointers and integers are in an argument (an argument may be a tuple)."""
    if isinstance(kind, tuple):
        return [found for i, part in enumerate(kind) for found in _integers(part, (*path, i))]
    return [path] if kind.startswith("*") or kind in ("i32", "i64") else []


def compile_for(
    kernel: Any,
    signature: Mapping[str, str | tuple[str, ...]],
    constexprs: Mapping[str, Any],
    arch: str,
    *,
    num_warps: int = 4,
    num_stages: int | None = None,
    unaligned: tuple[str, ...] | frozenset[str] = (),
    **options: Any,
) -> CompileReport:
    """Compile `kernel` (a @triton.jit function) for `arch` (one of ARCHS); arguments as in `AotCase`.

    Compiles afresh, into a folder that is thrown away. Raises RuntimeError without Triton or under the Triton
    interpreter, TypeError where an argument is in neither mapping or unknown, ValueError for an unknown arch; the
    compiler's errors pass through."""
    if not HAS_TRITON or INTERPRETED:
        raise RuntimeError(
            "compile_for: want Triton's compiler, got " + ("the interpreter" if HAS_TRITON else "no triton")
        )
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    given = set(signature) | set(constexprs)
    if given != set(names) or set(signature) & set(constexprs):
        raise TypeError(
            f"compile_for: {kernel.__name__}: each argument once; missing {sorted(set(names) - given)}, "
            f"unknown {sorted(given - set(names))}, twice {sorted(set(signature) & set(constexprs))}"
        )
    sig = {n: signature.get(n, "constexpr") for n in names}
    marked = [path for n in names if n not in unaligned for path in _integers(sig[n], (names.index(n),))]
    source = ASTSource(
        fn=kernel,
        signature=sig,
        constexprs=dict(constexprs),
        attrs={path: [["tt.divisibility", 16]] for path in marked},
    )
    settings = {"num_warps": num_warps, "enable_fp_fusion": True, **options}
    if num_stages is not None:
        settings["num_stages"] = num_stages
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        triton.knobs.cache.scope(),
        triton.knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        triton.knobs.cache.dir = folder
        triton.knobs.nvidia.dump_ptxas_log = True
        start = time.perf_counter()
        binary = triton.compile(source, target=_target(arch), options=settings)
        seconds = time.perf_counter() - start
        asm = {k: v for k, v in binary.asm.items() if isinstance(v, str)}
    if arch.startswith("sm_"):
        regs, spills = _ptxas_figures(log.getvalue())
        mma = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", asm["ptx"]))
        approximate = tuple(sorted(set(_APPROXIMATE.findall(asm["ptx"]))))
    else:
        regs, spills = _amd_figures(asm["amdgcn"])
        mma = len(re.findall(r"^\s+v_(?:mfma|wmma|smfmac)", asm["amdgcn"], re.M))
        approximate = ()
    return CompileReport(
        kernel.__name__, arch, regs, spills, binary.metadata.shared, SHARED_LIMIT[arch], mma, seconds, approximate
    )


def compile_case(case: AotCase, arch: str) -> CompileReport:
    """`compile_for` of an `AotCase`."""
    return compile_for(
        case.kernel,
        case.signature,
        case.constexprs,
        arch,
        num_warps=case.num_warps,
        num_stages=case.num_stages,
        unaligned=case.unaligned,
        **case.options,
    )


def in_float32(case: AotCase) -> AotCase:
    """The same with every 16-bit tensor in float32."""
    wide = {name: "*fp32" if kind in ("*bf16", "*fp16") else kind for name, kind in case.signature.items()}
    return replace(case, signature=wide, note=f"{case.note}, in float32")


def kernels_of(module: ModuleType) -> list[str]:
    """Names of the @triton.jit kernels that `module` itself defines: those named `*_kernel` (others are functions they
    call)."""
    return [
        name
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "arg_names") and value.__module__ == module.__name__
    ]


def kernel_modules() -> Iterator[ModuleType]:
    """Every module of this package that defines a kernel (the probe of `dispatch`, an empty kernel, aside)."""
    for info in pkgutil.walk_packages([str(Path(__file__).parent.parent)], "fastft_kernels."):
        module = importlib.import_module(info.name)
        if set(kernels_of(module)) - {"_probe_kernel"}:
            yield module


def cases_of(module: ModuleType, arch: str) -> tuple[AotCase, ...]:
    """The cases `module` declares for `arch`. Raises AttributeError where it declares none."""
    cases: tuple[AotCase, ...] | Callable[[str], tuple[AotCase, ...]] = module.AOT_CASES
    return tuple(c for c in (cases(arch) if callable(cases) else cases) if arch in c.archs)
