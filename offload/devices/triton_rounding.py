"""fp32 to narrower numbers in Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(theta, DTYPE: tl.constexpr):
    """To the nearest value of fp32, bf16 or fp16, ties to even, as fp32. bf16 by integers: backends cast in their own ways."""
    if DTYPE == 1:
        bits = theta.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        nearest = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, nearest)
        return nearest.to(tl.uint32).to(tl.float32, bitcast=True)
    elif DTYPE == 2:
        return theta.to(tl.float16).to(tl.float32)
    else:
        return theta
