"""What a model asks of memory and disk for one batch, and what adapters add, from shapes alone. Methods add the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from typing import TYPE_CHECKING

import torch
from torch import nn

from finetune.adapters import peft_files
from finetune.adapters.base import adapter_of
from finetune.memory.arena import trim_malloc
from finetune.memory.errors import UserError
from finetune.memory.meter import host_bytes
from finetune.memory.needs import Item, Lasts, Needs, Tier
from finetune.memory.onednn_cache import BYTES_PER_SHAPE, shapes_to_keep
from finetune.memory.units import MIB, round_up
from finetune.offload.devices import Device
from finetune.offload.sizing.chunked_dry_run import measure_chunked_visit
from finetune.offload.sizing.dry_run import MaskSize, VisitSize, measure_masks, measure_visit, walk
from finetune.offload.sizing.needs import (
    BLOCK_INPUTS,
    EDGES,
    GRAPHS,
    HIDDEN_STATES,
    RUNNING,
    STEP,
    TEXTS,
    VISIT,
    LaneSize,
    block_input_needs,
    process_needs,
    text_needs,
    waiting_needs,
)
from finetune.offload.step.shared_gradients import shared_parameters
from finetune.offload.weights.formats.plain import dense_bytes
from finetune.offload.weights.parts import ModelParts
from finetune.planned_run import BatchShape, MeasuredBatch

if TYPE_CHECKING:
    from finetune.session import Session

ADAMW_BYTES_PER_PARAMETER = 8  # of adapters: exp_avg and exp_avg_sq in fp32
CACHES = "keys and values of texts"
CACHE_WINDOW_BYTES = 4 * MIB  # that pass through memory of a cache that is on disk
LABEL_BYTES = 64  # of a token: its id, its label, where it is among the labelled ones, and sums of the loss
END_TENSORS = 16  # as large as hidden states, that a loss in chunks, with sums in fp32, and what comes before it hold at most
ADAPTERS = "adapters, optimizer"
GRADIENTS = "gradients of adapters, beyond the room that block inputs leave"
FEWER_ADAPTERS = "lower lora.r or name fewer lora.target_modules"


def measure_batch(
    parts: ModelParts, model: nn.Module, shape: BatchShape, trained: Sequence[frozenset[str]] | None = None,
    visit: VisitSize | None = None, chunk: int | None = None,
) -> MeasuredBatch:  # fmt: skip
    """trained: per block, local names of its own weights that get gradients. visit: where it is known. chunk: see
    `chunk_of`.

    Raises UserError for rows of tensors that the model can't take, and for a model that can't be run in chunks of a text.
    """
    if visit is None:
        measured = (parts, model, shape.inputs, shape.train, trained)
        if chunk is not None:
            visit = _chunked_visit(parts, model, shape, chunk, trained)
        else:
            visit = measure_visit(*measured) if shape.samples is None else walk(*measured).size
    row_bytes = _dense_rows(parts, shape.micro_batches * shape.rows)  # what only goes forward reads the same
    return MeasuredBatch(shape, visit, _loss_bytes(parts, model, shape), row_bytes, chunk)


def chunk_of(shape: BatchShape, sequence_chunk: int | str | None) -> int | None:
    """Tokens of a text that compute together; None: all, because they are no more. Raises UserError for rows of tensors."""
    if not isinstance(sequence_chunk, int) or shape.fills_caches:  # auto, where nothing is settled yet: whole texts
        return None
    if shape.samples is not None:
        raise UserError("engine.sequence_chunk: only rows of text are run in chunks, found rows of tensors: leave it out")
    return sequence_chunk if sequence_chunk < shape.inputs["input_ids"].shape[1] else None


def check_device_cuts(device: Device) -> None:
    """Raises UserError where texts can't be run in chunks."""
    if not device.traits.computes_on_host:
        raise UserError(f"engine.sequence_chunk: only a CPU runs chunks of a text yet, found {device.kind}: leave it out")


def _chunked_visit(
    parts: ModelParts, model: nn.Module, shape: BatchShape, chunk: int, trained: Sequence[frozenset[str]] | None
) -> VisitSize:
    """Shorter rows of the same run compute whole."""
    visit = measure_chunked_visit(parts, model, shape.inputs, chunk, shape.train, trained)
    whole = measure_visit(parts, model, shape.of_length(chunk).inputs, shape.train, trained)
    most = {name: max(getattr(visit, name), whole.peak_bytes) for name in ("peak_bytes", "near_bytes")}
    return replace(visit, **most)


def batch_needs(
    parts: ModelParts, model: nn.Module, batch: MeasuredBatch, block_inputs: str, hidden_states: str, frozen: bool,
    caches_place: str = "host",
) -> Needs:  # fmt: skip
    """What a batch takes where compute happens.

    block_inputs, hidden_states: where they wait, see `block_input_needs` and `waiting_needs`. caches_place: where keys and
    values of long texts are, see `text_needs`. frozen: whether no row of an
    embedding is trained.
    """
    shape, visit, lanes = batch.shape, batch.visit, batch.shape.lanes
    masks, lane_bytes = MaskSize(0, 0), 0
    if "input_ids" in shape.inputs:
        masks, lane_bytes = _masks(parts, model, shape, batch.chunk), adapter_of(model).lane_bytes(parts.dtype.itemsize)
    lane_bytes += masks.kept_bytes
    all_rows, lane_rows = batch.row_bytes + _stored_rows(parts, lanes * shape.rows), _dense_rows(parts, shape.rows)
    lane_rows += _stored_rows(parts, shape.rows)
    rows_by_lane = hidden_states != "host" and (frozen or not shape.train)
    size = _lane_size(parts, model, batch, lane_bytes)
    boundaries = shape.micro_batches * (len(parts.blocks) if shape.train else 1) + shape.forward_lanes
    shares_head = shape.train and parts.head is not None and len(parts.head.layouts) > 1
    waiting = waiting_needs(size, lanes, batch.loss_bytes, hidden_states, shares_head)
    inputs = block_input_needs(visit.boundary_bytes, visit.boundary_bytes * boundaries, block_inputs)
    if not shape.train:  # they are what waits between visits
        inputs = replace(inputs, items=tuple(replace(x, without_pool=x.without_pool or HIDDEN_STATES) for x in inputs.items))
    caches = Needs()
    if shape.cache_bytes:
        caches = Needs.of(Item(CACHES, shape.cache_bytes, Tier.COMPUTE, Lasts.STEP, without_pool=TEXTS))
        caches += text_needs(CACHE_WINDOW_BYTES, round_up(shape.cache_bytes + MIB, MIB), caches_place)
    return caches + Needs.of(
        *(Item(VISIT, num_bytes, Tier.COMPUTE, Lasts.MOMENT) for num_bytes in (batch.loss_bytes, masks.made_bytes)),
        # One recomputed graph at a time is a part of the visit. Kept ones are all gone when the first one is recomputed.
        Item(VISIT, visit.peak_bytes, Tier.COMPUTE, Lasts.MOMENT, without_pool=GRAPHS),
        Item(VISIT, visit.peak_bytes - visit.graph_bytes, Tier.COMPUTE, Lasts.MOMENT, with_pool=GRAPHS),
        # Of a text that is cut, what comes before the head and its gradient: no part of it is in fp32.
        Item(VISIT, 0 if batch.chunk is None else batch.loss_bytes + 3 * visit.boundary_bytes, Tier.COMPUTE, Lasts.MOMENT),
        Item(STEP, shape.kept_bytes, Tier.COMPUTE, Lasts.STEP),
        Item(STEP, all_rows, Tier.COMPUTE, Lasts.STEP, without_pool=HIDDEN_STATES),
        Item(RUNNING, lane_rows if rows_by_lane else all_rows, Tier.COMPUTE, Lasts.STEP, with_pool=HIDDEN_STATES),
        Item(EDGES, parts.edge_bytes, Tier.COMPUTE),
    ) + waiting + inputs


def text_batch_needs(parts: ModelParts, model: nn.Module, batch: MeasuredBatch, place: str, frozen: bool) -> Needs:
    """As `batch_needs`, where what is as long as a text can lie in a file: see `finetune.memory.tensor_file`. place: as in
    `text_needs`.
    """
    shape, visit, lanes = batch.shape, batch.visit, batch.shape.lanes
    row_bytes = visit.boundary_bytes // shape.rows  # of a token's hidden states
    tokens = shape.rows if batch.chunk is None else batch.chunk * shape.inputs["input_ids"].shape[0]
    all_rows = batch.row_bytes + _stored_rows(parts, lanes * shape.rows)
    boundaries = shape.micro_batches * (len(parts.blocks) if shape.train else 1) + shape.forward_lanes
    # A norm outside of blocks, in fp32, forward and backward.
    norm_bytes = 6 * tokens * row_bytes * 4 // parts.dtype.itemsize
    size = _lane_size(parts, model, batch, _masks(parts, model, shape, batch.chunk).kept_bytes)
    ends_bytes = lanes * (size.waiting_bytes + END_TENSORS * visit.boundary_bytes)
    file_bytes = boundaries * visit.boundary_bytes + ends_bytes + all_rows
    return Needs.of(
        Item(VISIT, visit.peak_bytes, Tier.COMPUTE, Lasts.MOMENT, without_pool=TEXTS),
        Item(VISIT, visit.near_bytes or visit.peak_bytes, Tier.COMPUTE, Lasts.MOMENT, with_pool=TEXTS),
        Item(VISIT, batch.loss_bytes + 3 * visit.boundary_bytes, Tier.COMPUTE, Lasts.MOMENT, without_pool=TEXTS),
        Item(VISIT, batch.loss_bytes + norm_bytes, Tier.COMPUTE, Lasts.MOMENT, with_pool=TEXTS),
        Item(STEP, shape.kept_bytes + lanes * shape.rows * LABEL_BYTES, Tier.COMPUTE, Lasts.STEP),
        Item(STEP, lanes * size.waiting_bytes + all_rows, Tier.COMPUTE, Lasts.STEP, without_pool=TEXTS),
        Item(STEP, 0 if frozen or not shape.train else all_rows, Tier.COMPUTE, Lasts.STEP, with_pool=TEXTS),
        Item(BLOCK_INPUTS, visit.boundary_bytes * boundaries, Tier.COMPUTE, Lasts.FALLING, without_pool=TEXTS),
        Item(EDGES, parts.edge_bytes, Tier.COMPUTE),
    ) + text_needs(tokens * row_bytes, round_up(file_bytes), place)


def process_as_it_is(adapter_bytes: int) -> int:
    """Bytes of the process now, less its adapters, which move into the arena."""
    trim_malloc()
    return max(0, host_bytes() - adapter_bytes)


def process_of_run(device: Device, parts: ModelParts, process_bytes: int, micro_batches: int) -> Needs:
    """The process, and what it comes to hold that no batch is asked for."""
    # fp32 products go through MKL, which compiles nothing.
    compiles = device.traits.computes_on_host and parts.dtype != torch.float32
    code_bytes = shapes_to_keep(micro_batches, bool(parts.experts)) * BYTES_PER_SHAPE if compiles else 0
    return process_needs(device, process_bytes, code_bytes)


def adapter_needs(session: Session) -> Needs:
    """Of adapters that are used as they are. Their buffers are the process's own where there is no device."""
    num_bytes = _num_bytes(session.adapter_parameters)
    num_bytes += sum(buffer.nbytes for buffer in session.adapter_buffers) if session.on_device else 0
    return Needs.of(Item(ADAPTERS, num_bytes, Tier.COMPUTE, remedy=FEWER_ADAPTERS))


def trained_adapter_needs(session: Session, micro_batches: int) -> Needs:
    """Of adapters that AdamW trains. On a device they are saved by way of host memory, with their moments. What blocks share
    has sums of every micro-batch, see `finetune.offload.step.shared_gradients`."""
    parameters, blocks, adapter = session.trainable, session.parts.blocks, session.adapter
    num_bytes = _num_bytes(parameters)
    moment_bytes = ADAMW_BYTES_PER_PARAMETER * sum(p.numel() for p in parameters)
    shared = shared_parameters(blocks)
    apart = {id(parameter) for parameter in shared}
    of_blocks = [_num_bytes([p for p in block.parameters() if p.requires_grad and id(p) not in apart]) for block in blocks]
    rising_bytes = sum(of_blocks) if len(set(of_blocks)) == 1 and adapter.gradients_rise else 0
    return adapter_needs(session) + Needs.of(
        Item(ADAPTERS, moment_bytes + adapter.state_bytes, Tier.COMPUTE, remedy=FEWER_ADAPTERS),
        Item(ADAPTERS, num_bytes - rising_bytes, Tier.COMPUTE, remedy=FEWER_ADAPTERS),
        Item(ADAPTERS, micro_batches * _num_bytes(shared), Tier.COMPUTE, Lasts.STEP, remedy=FEWER_ADAPTERS),
        Item(GRADIENTS, rising_bytes, Tier.COMPUTE, Lasts.RISING, len(blocks), remedy=FEWER_ADAPTERS),
        _saving(num_bytes + moment_bytes if session.on_device else 0),
        # Those that are kept and one being written, each with two moments.
        Item("resumable states", 3 * (session.config.training.kept_states + 1) * num_bytes, Tier.DISK),
        Item("adapter", num_bytes, Tier.DISK),
        _best(session, num_bytes),
    )


def perturbed_adapter_needs(session: Session, variants: int, first_kept: bool) -> Needs:
    """Of adapters that are perturbed: clean values in fp32, beside a device in host memory too, and every variant.

    first_kept: whether those that the run begins with are kept on disk.
    """
    parameters = session.trainable
    num_bytes, clean_bytes = _num_bytes(parameters), 4 * sum(p.numel() for p in parameters)
    return adapter_needs(session) + Needs.of(
        Item(ADAPTERS, clean_bytes + variants * num_bytes, Tier.COMPUTE, remedy=FEWER_ADAPTERS),
        _saving(num_bytes + clean_bytes if session.on_device else 0),
        Item("adapter", num_bytes, Tier.DISK),
        Item("the prefix that it begins as", num_bytes if first_kept else 0, Tier.DISK),
        _best(session, num_bytes),
    )


def _best(session: Session, num_bytes: int) -> Item:
    """The best adapter so far, and a better one until the state that goes with it is durable."""
    return Item("best adapters", 2 * num_bytes if session.config.training.load_best_model_at_end else 0, Tier.DISK)


def _saving(num_bytes: int) -> Item:
    return Item("adapters and their state while they are saved", num_bytes, Tier.HOST)


def _num_bytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.nbytes for p in parameters)


def _loss_bytes(parts: ModelParts, model: nn.Module, shape: BatchShape) -> int:
    """What one tile of the loss allocates; without tiles, the loss of a micro-batch."""
    itemsize, head = parts.dtype.itemsize, parts.head
    table_bytes = peft_files.table_bytes(model, parts)
    if head is None:
        output = model.get_output_embeddings()
        return table_bytes + (0 if output is None else 3 * shape.rows * output.weight.shape[0] * itemsize)
    tile = min(head.tile_tokens, shape.rows) * head.tile_vocab
    # logits in the model's dtype, in fp32, their softmax and its gradient; a converted weight where dtypes differ
    num_bytes = tile * (3 * 4 + (itemsize if itemsize < 4 else 0))
    if model.get_output_embeddings() is not head.module:
        num_bytes += 3 * tile * itemsize  # an adapter's product, scaled, and the sum
    if not head.layouts[0].weights["weight"].is_stored_as(parts.dtype):
        num_bytes += head.tile_vocab * head.module.weight.shape[1] * itemsize
    return table_bytes + num_bytes


def _dense_rows(parts: ModelParts, rows: int) -> int:
    """Of so many rows of each embedding, in the dtype that computes."""
    return sum(min(rows, source.shape[0]) * dense_bytes(source.shape[1:], parts.dtype) for _, _, source in parts.embeddings)


def _stored_rows(parts: ModelParts, rows: int) -> int:
    """The same, as they are stored."""
    return sum(source.row_bytes(min(rows, source.shape[0])) for _, _, source in parts.embeddings)


def _lane_size(parts: ModelParts, model: nn.Module, batch: MeasuredBatch, more_bytes: int) -> LaneSize:
    """more_bytes: that a lane holds beside its hidden states."""
    logits_bytes, boundary = _logits_bytes(parts, model, batch.shape), batch.visit.boundary_bytes
    # The norm before the head in fp32, forward and backward; what a tile's rows are chosen into; sums of a head in chunks.
    end_bytes = logits_bytes + more_bytes + 6 * boundary
    if batch.chunk is None:
        end_bytes += 6 * boundary * 4 // parts.dtype.itemsize
    return LaneSize(
        boundary, logits_bytes + more_bytes, 3 * boundary + more_bytes, end_bytes, logits_bytes + 4 * boundary
    )


def _logits_bytes(parts: ModelParts, model: nn.Module, shape: BatchShape) -> int:
    """What a lane holds between the last block and the loss."""
    itemsize, head, rows = parts.dtype.itemsize, parts.head, shape.rows
    if head is not None:  # hidden states before the head and their gradients; a head in chunks keeps sums in fp32
        return rows * (head.module.weight.shape[1] * (3 * itemsize + (4 if len(head.layouts) > 1 else 0)) + 64)
    output = model.get_output_embeddings()
    return 0 if output is None else rows * output.weight.shape[0] * itemsize  # whole logits


def _masks(parts: ModelParts, model: nn.Module, shape: BatchShape, chunk: int | None) -> MaskSize:
    """Of texts that are run in chunks, masks are part of the visit."""
    count, length = shape.inputs["input_ids"].shape
    length = length if chunk is None else chunk
    if shape.samples is not None:  # short texts would not do without the rows' other tensors: one of numbers is assumed
        return MaskSize(count * length**2 * parts.dtype.itemsize, 0)
    masks = measure_masks(parts, model, count, length, shape.packed)
    if count > 1:
        return masks
    short = measure_masks(parts, model, 2, min(length, isqrt(shape.mask_pairs // 2)), False)
    return max(masks, short)
