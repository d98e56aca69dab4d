"""oneDNN's generated code, bounded: bf16 products on a CPU are compiled for each shape and kept.

By default 1024 primitives are kept, and by PyTorch's binding of oneDNN as many again, each 0.6 to 0.9 MiB: rows of ever new
lengths made a process grow by 30 MiB a step. Compiling one again takes a millisecond, less than most products.
"""

from __future__ import annotations

import os

BYTES_PER_BUFFER = 128 * 1024  # oneDNN takes 256 KiB for a piece of code, at least so much on every version
BYTES_PER_SHAPE = 1 << 20  # resident memory of one kept primitive, measured at most 0.86 MiB
SHAPES_PER_MICRO_BATCH = 16  # products of unlike shapes that a block and the head make of one length, with some room
MAX_SHAPES = 64


def shapes_to_keep(micro_batches: int, experts: bool) -> int:
    """Enough for the micro-batches of a step, which cross a block one after the other; at most `MAX_SHAPES`. experts: whether
    each multiplies as many tokens as have chosen it, so that shapes are many."""
    return MAX_SHAPES if experts else min(MAX_SHAPES, SHAPES_PER_MICRO_BATCH * micro_batches)


def keep_shapes(shapes: int) -> None:
    """From now on at most so many are kept. Has an effect before the process's first such product only."""
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = os.environ["LRU_CACHE_CAPACITY"] = str(shapes)
