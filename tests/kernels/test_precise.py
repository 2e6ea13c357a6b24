"""The elementary functions of the kernels against float64, over float32 numbers spread by their bits: the largest
error, in units of the last place, is the one that `precise` documents."""

import pytest
import torch

from fastft_kernels.runtime import precise
from fastft_kernels.runtime.dispatch import INTERPRETED
from fastft_kernels.runtime.language import HAS_TRITON, tl, triton

pytestmark = pytest.mark.skipif(
    not (HAS_TRITON and (INTERPRETED or torch.cuda.is_available())), reason="runs on a GPU or in Triton's interpreter"
)
BLOCK = 8192
STEP = 40_009 if INTERPRETED else 4_001  # every STEPth float32


@triton.jit
def _apply_kernel(x_ptr, y_ptr, d, BLOCK: tl.constexpr, WHAT: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if WHAT == "exp":
        y = precise.exp(x)
    elif WHAT == "exp_normal":
        y = precise.exp_normal(x)
    elif WHAT == "unit_reciprocal":
        y = precise.unit_reciprocal(x)
    elif WHAT == "sigmoid":
        y = precise.sigmoid(x)
    elif WHAT == "sigmoid_grad":
        y = precise.sigmoid_grad(x)
    elif WHAT == "erf":
        y = precise.erf(x)
    elif WHAT == "quotient":
        y = precise.quotient(x, d, tl.div_rn(1.0, d))
    else:
        t, slope = precise.tanh_and_slope(x)
        y = t if WHAT == "tanh" else slope
    tl.store(y_ptr + i, y)


def applied(what: str, x: torch.Tensor, d: float = 3.0) -> torch.Tensor:
    padded = torch.ones(-(-len(x) // BLOCK) * BLOCK, device=x.device)
    padded[: len(x)] = x
    y = torch.empty_like(padded)
    _apply_kernel[(len(padded) // BLOCK,)](padded, y, d, BLOCK=BLOCK, WHAT=what, num_warps=4, enable_fp_fusion=True)
    return y[: len(x)]


def _slope(x):
    q = torch.exp(-2 * x.abs())
    return 4 * q / (1 + q) ** 2


def _sigmoid_grad(x):
    e = torch.exp(-x.abs())
    return e / (1 + e) ** 2


REFERENCES = {  # what -> (float64 function, lowest and highest x, bound when fused, bound as the interpreter computes)
    "exp": (torch.exp, -110.0, 89.0, 1.0, 1.0),
    "exp_normal": (torch.exp, -87.3, 0.0, 1.0, 1.0),
    "unit_reciprocal": (torch.reciprocal, 1.0, 2.0, 0.51, 1.4),
    "sigmoid": (torch.sigmoid, -110.0, 110.0, 2.4, 2.4),
    "sigmoid_grad": (_sigmoid_grad, -110.0, 110.0, 4.0, 4.0),
    "erf": (torch.erf, -10.0, 10.0, 1.0, 1.2),
    "tanh": (torch.tanh, -40.0, 40.0, 1.6, 2.4),
    "slope": (_slope, -40.0, 40.0, 4.0, 4.0),
    "quotient": (lambda x: x / 3.0, -1e30, 1e30, 0.51, 1.5),
}


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("what", REFERENCES)
def test_error(what, device):
    function, low, high, fused, plain = REFERENCES[what]
    if what == "unit_reciprocal":
        x = torch.linspace(low, high, 2**18)
    else:
        bits = torch.arange(1, 0x7F80_0000, STEP, dtype=torch.int32).view(torch.float32)
        x = torch.cat([-bits, bits])
    x = x[(x >= low) & (x <= high)].to(device)
    y, reference = applied(what, x).double(), function(x.double())
    finite = reference.abs() < 2.0**127
    ulp = torch.exp2(torch.floor(torch.log2(reference.abs().clamp(min=2.0**-126))) - 23)
    if what == "quotient":
        finite &= reference.abs() > 2.0**-100  # where a remainder is subnormal it is not exact
    error = ((y - reference).abs() / ulp)[finite]
    worst = float(error.max())
    assert worst <= (plain if INTERPRETED else fused), (
        f"{what}: {worst:.3f} units at {float(x[finite][error.argmax()])!r}"
    )
    assert worst > 0.2  # and what was measured is not nothing


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_not_finite_and_what_must_be_exact(device):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -inf, inf, nan, 1000.0, -1000.0], device=device)
    for what, want in {
        "exp": [1.0, 0.0, inf, nan, inf, 0.0],
        "exp_normal": [1.0, 0.0, None, nan, None, 0.0],
        "sigmoid": [0.5, 0.0, 1.0, nan, 1.0, 0.0],
        "sigmoid_grad": [0.25, 0.0, 0.0, nan, 0.0, 0.0],
        "erf": [0.0, -1.0, 1.0, nan, 1.0, -1.0],
        "tanh": [0.0, -1.0, 1.0, nan, 1.0, -1.0],
        "slope": [1.0, 0.0, 0.0, nan, 0.0, 0.0],
        "quotient": [0.0, -inf, inf, nan, 1000.0 / 3, -1000.0 / 3],
    }.items():
        asked = [i for i, y in enumerate(want) if y is not None]
        expected = torch.tensor([want[i] for i in asked], device=device)
        assert torch.equal(applied(what, x[asked]).nan_to_num(7.0), expected.nan_to_num(7.0)), what
    whole = torch.arange(-50.0, 50.0, device=device)
    assert torch.equal(applied("quotient", whole * 8, 8.0), whole)
    assert torch.equal(applied("quotient", whole, 1.0), whole)
