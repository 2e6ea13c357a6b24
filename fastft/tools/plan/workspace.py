"""Bytes that an operator takes while it runs and gives back before it returns: fake tensors show what goes in and comes
out alone."""

from __future__ import annotations

import math

from fastft.compat.torch_private import schema_name


def inside(func, args: tuple, kwargs: dict, for_cuda: bool) -> int:
    """Temporary bytes of one call on the device that is planned for; 0 for operators that are not listed."""
    rule = (_ON_CUDA if for_cuda else _ON_CPU).get(schema_name(func))
    return 0 if rule is None else int(rule(*args, **kwargs))


def _flash_backward(grad_out, query, key, value, *args, **kwargs) -> int:
    """FlashAttention-2's backward: dq accumulates in float32, with one float32 row sum a query; dk and dv are made for
    every query head where several share a key (rows rounded up to 128)."""
    b, h, s, d = query.shape
    rows = b * h * -(-s // 128) * 128
    shared = 0 if key.shape[1] == h else 2 * b * h * key.shape[2] * d * key.element_size()
    return rows * (4 * d + 4) + shared


def _gathered(output, *args, **kwargs) -> int:
    """gloo gathers into a buffer of its own, and copies out of it."""
    return output.nbytes


def _dequantised(A, B, shape, *args, **kwargs) -> int:
    """bitsandbytes multiplies many rows by the whole dequantised matrix."""
    return math.prod(shape) * A.element_size()


_ON_CUDA = {
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
    "bitsandbytes::gemm_4bit": _dequantised,
}
_ON_CPU = {
    "c10d::_allgather_base_": _gathered,
    "bitsandbytes::gemm_4bit": _dequantised,
}
