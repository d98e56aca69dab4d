"""fp32 to narrower numbers in Triton kernels. To bf16 by integers: backends and the interpreter cast in their own ways."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROUNDED_TO = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What `rounded` takes."""


@triton.jit
def _nearest_bf16(theta):
    """Ties to even: uint32, whose high half are the bits."""
    bits = theta.to(tl.uint32, bitcast=True)
    nearest = bits + 0x7FFF + ((bits >> 16) & 1)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, nearest).to(tl.uint32)


@triton.jit
def rounded(theta, DTYPE: tl.constexpr):
    """To the nearest value of fp32, bf16 or fp16, ties to even, as fp32."""
    if DTYPE == 1:
        return (_nearest_bf16(theta) & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
    elif DTYPE == 2:
        return theta.to(tl.float16).to(tl.float32)
    else:
        return theta


@triton.jit
def put(to, numbers, mask):
    """Stores fp32 numbers, rounded to the dtype of `to`."""
    if to.dtype.element_ty == tl.bfloat16:
        tl.store(to, (_nearest_bf16(numbers) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask)
    else:
        tl.store(to, numbers.to(to.dtype.element_ty), mask)
