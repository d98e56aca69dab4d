"""Section `engine`: how the model is streamed."""

from __future__ import annotations

from typing import Literal

from finetune.options import Count, CountOrZero, NonNegative, Positive, Section


class EngineOptions(Section):
    """How the model is streamed. The planner chooses what is None or auto.

    No choice changes results, except `dtype` and the tiles of the loss, which round differently.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: the checkpoint's own."""
    io_backend: Literal["auto", "io_uring", "threads"] = "auto"
    resident_blocks: CountOrZero | None = None
    """Blocks that stay in memory for the whole run."""
    lookahead: CountOrZero | None = None
    """Blocks fetched ahead of the one that computes."""
    activations: Literal["auto", "host", "disk"] = "auto"
    """Where block inputs wait for the backward pass."""
    loss_tile_tokens: Count | None = None
    loss_tile_vocab: Count | None = None
    queue_depth: Count | None = None
    """Disk requests in flight."""
    num_threads: Count | None = None
    """Compute threads; None: PyTorch's choice."""
    simulated_copy_gbps: Positive | None = None
    """Bandwidth of a copy on the simulated device, in units of 10^9 bytes/s; None: unlimited."""
    simulated_delay_ms: NonNegative = 0.0
