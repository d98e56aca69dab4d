"""Section `engine`: how the model is streamed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from finetune.offload.residency.io import BACKENDS
from finetune.options import Count, CountOrZero, NonNegative, Positive, Section, show


def _check_sequence_chunk(value: Any) -> Any:
    if isinstance(value, str) and value.isdecimal():  # from a command line
        value = int(value)
    if value not in (None, "auto") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"expected a number of tokens, 1 or more, or auto, found {show(value)}")
    return value


class EngineOptions(Section):
    """How the model is streamed. The planner chooses what is None or auto.

    No choice changes results, except `dtype`, `sequence_chunk` and the tiles of the loss, which round differently.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """In which the model computes. auto: the checkpoint's own, or fp32 on a CPU that has no hardware for it."""
    io_backend: Literal[*BACKENDS] = "auto"
    """What reads the disk. auto: io_uring if the kernel allows it, else threads."""
    resident_blocks: CountOrZero | None = None
    """Blocks that stay in memory for the whole run."""
    lookahead: CountOrZero | None = None
    """Blocks that are read ahead of the one that computes."""
    expert_slots: Count | None = None
    """Matrices of experts that are in memory together, where they are fetched one by one."""
    activations: Literal["auto", "host", "disk"] = "auto"
    """Where block inputs wait for the backward pass."""
    hidden_states: Literal["auto", "host", "disk"] = "auto"
    """Where micro-batches of a step wait between two visits of a block. disk: their block inputs and gradients, too. auto: in
    memory wherever that fits."""
    kept_graphs: CountOrZero | None = None
    """Blocks, the last ones, that the backward pass does not recompute: what they computed stays in memory. 0: none."""
    sequence_chunk: Annotated[int | Literal["auto"] | None, BeforeValidator(_check_sequence_chunk)] = None
    """Tokens of a text that a block computes together, where a text is longer: what a visit computes is in memory for so many.
    None: all. auto: all where that fits, else the most that do."""
    loss_tile_tokens: Count | None = None
    """Rows of logits that are computed together. None: by the model's size."""
    loss_tile_vocab: Count | None = None
    """Rows of the head that are in memory together. None: by the model's size."""
    queue_depth: Count | None = None
    """Disk requests in flight."""
    num_threads: Count | None = None
    """Compute threads. None: PyTorch's choice."""
    simulated_copy_gbps: Positive | None = None
    """Bandwidth of a copy on the simulated device, in 10^9 bytes/s. None: unlimited."""
    simulated_delay_ms: NonNegative = 0.0
    """What each copy on the simulated device waits first."""
