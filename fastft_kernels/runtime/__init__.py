"""How kernels are launched.

dispatch      which launcher runs a call: Triton on the device, its interpreter, or the reference in PyTorch
rows          launches over rows of any width: tiles, programs and the reduction of per-row results
language      Triton's module, or a stand-in where Triton is not installed
precise       float32 functions (exp, log, division, square root) without Triton's approximations
compat        what is used of torch's private interface
higher_order  second derivatives: a backward pass that is differentiable through a formula in PyTorch
aot           compilation ahead of time, without a GPU: registers, spills, shared memory
"""
