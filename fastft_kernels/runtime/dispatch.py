"""Which implementation runs, and how it becomes one torch operator.

A kernel file writes its launchers as plain functions and registers each with `op`: under the name `fastft::<name>` the
dispatcher then knows it, with a fake implementation, so that it runs under FakeTensorMode,
`torch.compile(fullgraph=True)` and dispatch modes that count. One operator is one launch (or the torch reference of one
launch): never hide a matrix product or a second launch in one. Operators have no autograd formula: they are called from
`torch.autograd.Function`s only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from fastft_kernels.runtime.compat import apply_directly, dispatch_modes, is_dynamo_compiling, transforms_active
from fastft_kernels.runtime.language import HAS_TRITON, InterpretedFunction, triton

_LIBRARY = torch.library.Library("fastft", "DEF")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = frozenset(KERNEL_DTYPES)
LAUNCHERS: dict[str, Callable] = {}  # an operator's name -> its launcher, for those who ask what it allocates inside
FAKES: dict[str, Callable] = {}  # an operator's name -> its fake implementation
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_BFLOAT16: dict[int | None, bool] = {}  # a CUDA device's index -> what `has_bfloat16` answers
_plans = 0  # how many `planned_for_cuda` are open


@triton.jit
def _probe_kernel():
    pass


# With TRITON_INTERPRET=1 (read by Triton itself, when it is imported) kernels run on CPU tensors.
INTERPRETED = HAS_TRITON and isinstance(_probe_kernel, InterpretedFunction)


def has_bfloat16(device_type: str, index: int | None) -> bool:
    """Do bfloat16 kernels run on this device? Not on an NVIDIA card of a compute capability below 8.0, such as a T4.
    (True to the compiler: the operators in its graph ask again when they run.)"""
    if device_type != "cuda" or torch.version.hip or is_dynamo_compiling():
        return True
    if index not in _BFLOAT16:
        if not torch.cuda.is_available():  # planned for a device that is not here
            return True
        _BFLOAT16[index] = torch.cuda.get_device_capability(index) >= (8, 0)
    return _BFLOAT16[index]


def use_triton(x: torch.Tensor, *dtypes: torch.dtype) -> bool:
    """Does this tensor's operation run a Triton kernel (else the torch reference)? dtypes: of what else the kernel
    reads or writes. float64 always takes the reference, and bfloat16 does where the device has none."""
    if not HAS_TRITON or not (x.is_cuda or x.is_xpu or (INTERPRETED and x.device.type == "cpu")):
        return False
    if x.dtype not in _DTYPES or not _DTYPES.issuperset(dtypes):
        return False
    if x.dtype == torch.bfloat16 or torch.bfloat16 in dtypes:
        return has_bfloat16(x.device.type, x.device.index)
    return True


def runs_triton(x: torch.Tensor) -> bool:
    """Does a kernel that reads and writes no floating-point numbers (8-bit values alone) run on this tensor's
    device?"""
    return HAS_TRITON and (x.is_cuda or x.is_xpu or (INTERPRETED and x.device.type == "cpu"))


def wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The narrowest dtype that holds both floating-point dtypes (torch.promote_types, which is an operator, costs a
    dispatch)."""
    if a == b:
        return a
    return torch.float64 if torch.float64 in (a, b) else torch.float32


def op(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Decorator: register a launcher as the operator `fastft::<schema>` and return the function to call: the operator
    where somebody listens to operators or traces them, else the launcher itself, as the dispatcher costs the host more
    than most launches.

    schema: "name(Tensor x, float eps) -> (Tensor, Tensor)", a tensor first; fake: same arguments, returns empty tensors
    of the right shape, dtype, stride."""
    name = schema.split("(")[0]

    def register(launcher: Callable) -> Callable:
        _LIBRARY.define(schema)
        LAUNCHERS[name], FAKES[name] = launcher, fake
        _LIBRARY.impl(name, launcher, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastft::{name}", fake, lib=_LIBRARY)
        overload = getattr(torch.ops.fastft, name).default

        def call(x: torch.Tensor, *args, **kwargs):
            if is_dynamo_compiling() or dispatch_modes() or type(x) not in _PLAIN:
                return overload(x, *args, **kwargs)
            return launcher(x, *args, **kwargs)

        call.__name__ = call.__qualname__ = name
        return call

    return register


def applied(function: type[torch.autograd.Function], *args):
    """function.apply(*args)"""
    if is_dynamo_compiling() or transforms_active():
        return function.apply(*args)
    return apply_directly(function)(*args)


def quick_apply(function: type[torch.autograd.Function]) -> Callable:
    """function.apply, for callers that know that no torch.func transform is active: two calls instead of two for each
    argument."""
    direct = apply_directly(function)

    def call(*args):
        return function.apply(*args) if is_dynamo_compiling() else direct(*args)

    return call


def on_device(x: torch.Tensor):
    """Context in which a Triton launch goes to the device of x (a kernel launches on the *current* device)."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


@contextlib.contextmanager
def planned_for_cuda() -> Iterator[None]:
    """Inside, CPU tensors stand for tensors of a CUDA device: for fake tensors, whose backward torch cannot run on
    "cuda" without a driver."""
    global _plans
    _plans += 1
    try:
        yield
    finally:
        _plans -= 1


def goes_to_cuda(x: torch.Tensor) -> bool:
    """Is x on a CUDA device, or planned for one?"""
    return x.is_cuda or _plans > 0


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the references compute in: float64 stays (it is the reference), everything else accumulates in
    float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
