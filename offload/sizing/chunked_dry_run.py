"""How much a visit allocates that runs in chunks of a text: the dry run of such a visit, on meta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from finetune.memory.tensor_file import in_file
from finetune.offload.sizing.dry_run import VisitSize, counted_on_meta, first_call, unlike_blocks
from finetune.offload.step.chunked_attention import check_sdpa, refusal
from finetune.offload.step.sequence_chunks import META_CHUNKS, SequenceChunks
from finetune.offload.weights.parts import ModelParts

_FAULTS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a model's code raises that does not go with chunks."""


def measure_chunked_visit(
    parts: ModelParts,
    model: nn.Module,
    inputs: dict[str, Any],
    tokens: int,
    train: bool,
    trained: Sequence[frozenset[str]] | None = None,
) -> VisitSize:
    """As `measure_visit`, of texts that are longer than `tokens`, of which so many compute together. No graph is kept of them.

    Raises UserError for a model whose blocks can't be run in chunks.
    """
    chunks, name = SequenceChunks(tokens), type(parts.model).__name__
    if parts.experts:
        raise refusal(name, "its experts would be fetched again for every chunk")
    check_sdpa(parts.model)
    try:
        with chunks.masks:
            first, args, kwargs = first_call(parts, model, inputs)
        if not chunks.cuts(args, kwargs):
            raise refusal(name, "its blocks are given keys and values, or no hidden states of [rows, tokens, width]")
        names = trained or [frozenset()] * len(parts.blocks)
        found = [
            _run_on_meta(parts, i, args, kwargs, chunks, names[i] if train else None)
            for i in unlike_blocks(parts, first, names)
        ]
    except _FAULTS as error:
        raise refusal(name, f"its code does not run so ({' '.join(str(error).split())[:200]})") from error
    hidden = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    peak_bytes, near_bytes = (max(sizes[i] for sizes in found) for i in (0, 1))
    return VisitSize(peak_bytes, found[0][2], boundary_bytes=hidden.nbytes, near_bytes=near_bytes)


def _run_on_meta(
    parts: ModelParts, index: int, args: tuple, kwargs: dict[str, Any], chunks: SequenceChunks, trained: frozenset[str] | None
) -> tuple[int, int, int]:
    """Bytes that live at once; those of them that cannot lie in a file; operations of a forward of the whole text. trained:
    None: there is no backward pass."""
    block = parts.blocks[index]

    def forward(args: tuple, kwargs: dict[str, Any]) -> Any:
        return block(*args, **kwargs)

    counting = counted_on_meta(parts, index, args, kwargs, trained or frozenset())
    with torch.random.fork_rng(devices=[]), counting as (counter, args, kwargs):
        hidden = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        output = chunks.forward(block, forward, args, kwargs)
        length = hidden.shape[1]
        flops = counter.flops * length // min(length, META_CHUNKS * chunks.tokens)
        if trained is not None:
            hidden.requires_grad_()
            with in_file():
                leaves = tree_leaves(tree_map_only(torch.Tensor, torch.empty_like, output))
            grads = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
            del output, leaves
            chunks.backward(block, forward, (args, kwargs), grads)
    return counter.peak_bytes, counter.near_peak_bytes, flops
