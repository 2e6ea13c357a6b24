"""Every kernel compiles for every architecture at the shapes of real models: no spills, shared memory in bounds, no
GPU."""

import ast
import dataclasses
import types
from pathlib import Path

import pytest

import fastft_kernels
from fastft_kernels.runtime import aot
from fastft_kernels.runtime import dispatch as _runtime
from fastft_kernels.runtime.dispatch import INTERPRETED
from fastft_kernels.runtime.language import HAS_TRITON, tl, triton

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="no triton here: nothing to compile"),
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: it replaces the compiler"),
]
MODULES = {m.__name__.rpartition(".")[2]: m for m in aot.kernel_modules()} if HAS_TRITON and not INTERPRETED else {}


@triton.jit
def _sum_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, (x / tl.sum(x, axis=0)).to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def _dot_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.dot(x, x))


SUM = {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32"}


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("stem", MODULES)
def test_module_compiles(stem, arch):
    """No spills, shared memory within the limit, tensor cores where promised."""
    for case in aot.cases_of(MODULES[stem], arch):
        report = aot.compile_case(case, arch)
        assert report.fits, f"{case.note}: {report}"
        assert not report.approximate, f"{case.note}: {report}"


@pytest.mark.parametrize("stem", MODULES)
def test_float32_is_exact(stem):
    """Torch's own kernels approximate nothing in float32: neither do ours (exp, division, tanh... come from
    `precise`)."""
    for case in map(aot.in_float32, aot.cases_of(MODULES[stem], "sm_90")):
        assert not (report := aot.compile_case(case, "sm_90")).approximate, f"{case.note}: {report}"


@triton.jit
def _quick_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, WHAT: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if WHAT == "exp":
        x = tl.exp(x)
    elif WHAT == "division":
        x = x / n
    elif WHAT == "erf":
        x = tl.math.erf(x)
    elif WHAT == "square root":
        x = tl.sqrt(x)
    elif WHAT == "logarithm":
        x = tl.log(x)
    elif WHAT == "reciprocal root":
        x = tl.rsqrt(x)
    elif WHAT == "sigmoid":
        x = tl.sigmoid(x)
    tl.store(y_ptr + i, x)


@pytest.mark.parametrize("what", ["exp", "division", "erf", "square root", "logarithm", "reciprocal root", "sigmoid"])
def test_what_is_approximate_is_seen(what):
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "fp32"}
    assert aot.compile_for(_quick_kernel, signature, {"BLOCK": 128, "WHAT": what}, "sm_90").approximate
    assert not aot.compile_for(_quick_kernel, signature, {"BLOCK": 128, "WHAT": "nothing"}, "sm_90").approximate


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_product_rounded_to_tf32_is_seen(arch):
    assert aot.compile_for(_dot_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 64}, arch).approximate


@pytest.mark.parametrize("stem", MODULES)
def test_every_kernel_has_a_case(stem):
    module = MODULES[stem]
    covered = {case.kernel.__name__ for arch in aot.ARCHS for case in aot.cases_of(module, arch)}
    assert set(aot.kernels_of(module)) <= covered


def test_spills_and_shared_memory_are_seen():
    """The checks can fail: with 24 registers a thread a row must spill; shared memory over the limit does not fit."""
    starved = aot.compile_for(_sum_kernel, SUM, {"BLOCK": 2048}, "sm_80", num_warps=1, maxnreg=24)
    assert starved.spill_bytes > 0
    assert not starved.fits
    tile = aot.compile_for(_dot_kernel, {"x_ptr": "*bf16", "y_ptr": "*fp32"}, {"BLOCK": 64}, "sm_80")
    assert tile.shared >= 64 * 64 * 2
    assert tile.fits
    assert not dataclasses.replace(tile, shared_limit=tile.shared - 1).fits


@pytest.mark.parametrize("arch", aot.ARCHS)
def test_report(arch):
    plain = aot.compile_for(_sum_kernel, SUM, {"BLOCK": 1024}, arch)
    assert plain.fits
    assert 8 < plain.regs < 128
    assert plain.mma == 0
    if arch != "sm_75":  # a bf16 product takes a minute to compile there, and no kernel of ours launches one
        dot = aot.compile_for(_dot_kernel, {"x_ptr": "*bf16", "y_ptr": "*fp32"}, {"BLOCK": 64}, arch)
        assert dot.mma > 0


def test_arguments_are_checked():
    with pytest.raises(TypeError, match=r"missing \['n'\], unknown \['m'\]"):
        aot.compile_for(_sum_kernel, {"x_ptr": "*bf16", "y_ptr": "*bf16", "m": "i32"}, {"BLOCK": 64}, "sm_80")
    with pytest.raises(ValueError, match="sm_70"):
        aot.compile_for(_sum_kernel, SUM, {"BLOCK": 64}, "sm_70")


def test_kernels_are_found():
    """A module with kernels and without cases is found, and fails; functions that kernels call are no kernels."""
    module = types.ModuleType(__name__)
    module._sum_kernel, module._helper, module._theirs_kernel = _sum_kernel, _dot_kernel, _runtime._probe_kernel
    assert aot.kernels_of(module) == ["_sum_kernel"]
    with pytest.raises(AttributeError, match="AOT_CASES"):
        aot.cases_of(module, "sm_90")


def test_every_launch_says_whether_products_and_sums_fuse():
    """Triton's default changes, and it warns of launches that leave it open."""
    calls = [
        (path.name, {k.arg for k in n.keywords})
        for path in Path(fastft_kernels.__path__[0]).glob("**/*.py")
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)
    ]
    launches = [(name, options) for name, options in calls if "num_warps" in options]
    assert len(launches) >= len(MODULES)
    assert not [name for name, options in launches if "enable_fp_fusion" not in options]
