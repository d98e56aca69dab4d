"""Rates and visits of a machine that is not here, from its profile: what `calibration` and `timing` measure on this one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from finetune.memory.machine import ComputeRates
from finetune.offload.devices import DescribedDevice
from finetune.offload.sizing.calibration import Rates, write_rate_of
from finetune.offload.sizing.counting import BlockWork, Work, count_block, decode_seconds
from finetune.offload.sizing.dry_run import first_call
from finetune.offload.sizing.needs import DECODED
from finetune.offload.sizing.timing import BlockSeconds, PassSeconds, Timing, Workload, block_kind
from finetune.offload.step.mask_rows import MaskRows, MasksInParts
from finetune.offload.weights.parts import HeadPart, ModelParts


def profile_rates(parts: ModelParts, device: DescribedDevice, rows: int) -> Rates:
    """Of products with so many rows and weights of the model's width. Raises UserError where the profile has none in the dtype
    that computes."""
    machine = device.machine
    width = max(p.shape[-1] for p in parts.blocks[0].parameters())
    seconds = device.rates.product_seconds("forward", _name(parts.dtype), rows, width, width)
    link = back = None
    if not device.shares_host_memory:
        link = machine.accelerator.host_to_device_bytes_per_second
        back = machine.accelerator.device_to_host_bytes_per_second
    return Rates(
        machine.drives[0].read_bytes_per_second,
        2 * rows * width * width / seconds,
        link or float("inf"),
        write_rate_of(machine.drives[-1]),
        device.rates.elementwise_bytes_per_second,
        machine.name,
        back or float("inf"),
    )


def count_visits(work: Workload, device: DescribedDevice) -> Timing:
    """As `time_visits`, but nothing is read or computed.

    Raises UserError where the profile lacks a dtype, and what the model's code raises where it cannot run on meta.
    """
    parts, train = work.parts, work.train
    with nullcontext() if work.chunk is None else MasksInParts(work.chunk):
        index, args, kwargs = first_call(parts, work.model, work.inputs)
    args, kwargs = tree_map_only(MaskRows, lambda mask: None, (args, kwargs))  # attention is counted as causal
    keys = [block_kind(block, layout) for block, layout in zip(parts.blocks, parts.layouts, strict=True)]
    rooms = sum(1 for name, slots in work.plan.slots.items() if name.startswith(DECODED) and slots.count)
    hidden = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    chunks = 1 if work.chunk is None else -(-hidden.shape[1] // work.chunk)
    kinds: dict[Any, BlockSeconds] = {}
    for block in (index, *range(len(keys))):
        if keys[block] not in kinds:
            counted = count_block(parts, block, args, kwargs, train, work.names(block), work.chunk is not None)
            kinds[keys[block]] = _block_seconds(counted, parts.dtype, device, rooms, chunks)
    rows = hidden.numel() // hidden.shape[-1]
    head = 0.0 if parts.head is None else _head_row(parts.head, parts.dtype, device.rates, rows, train)
    return Timing(tuple(kinds[key] for key in keys), head, counted=True)


def _block_seconds(
    work: BlockWork, dtype: torch.dtype, device: DescribedDevice, rooms: int, chunks: int
) -> BlockSeconds:
    """rooms: how many of the weights that are decoded stay so for a visit. chunks: of a text, for each of which the others are
    decoded again, and operations called."""

    def decoding(weights) -> float:
        return sum(decode_seconds(weight, dtype, device.rates) for weight in weights)

    def seconds(of: Work) -> float:
        called = replace(of, operations=of.operations * chunks)
        return called.seconds(device.rates, queued=not device.traits.computes_on_host)

    once = decoding(work.bound) + decoding(work.decoded[:rooms])
    again = chunks * decoding(work.decoded[rooms:])
    forward = again + seconds(work.forward)
    if not work.backward.operations:
        return BlockSeconds(PassSeconds(once + forward, forward), PassSeconds(0.0, 0.0), PassSeconds(0.0, 0.0))
    recomputed = again + seconds(work.keys) + seconds(work.recomputed)
    backward = again + seconds(work.backward)
    return BlockSeconds(
        PassSeconds(once + forward, forward),
        PassSeconds(once + recomputed, recomputed),
        PassSeconds(backward, backward),
    )


def _head_row(head: HeadPart, dtype: torch.dtype, rates: ComputeRates, rows: int, train: bool) -> float:
    """Seconds of one row of hidden states: logits in tiles, their softmax in fp32, and the gradient of the row."""
    tile, seconds = min(rows, head.tile_tokens), 0.0
    for layout in head.layouts:
        vocabulary, width = layout.weights["weight"].shape
        for kind in ("forward", "input_gradient") if train else ("forward",):
            seconds += rates.product_seconds(kind, _name(dtype), tile, vocabulary, width)
        # Each logit is converted to fp32 and read for the sum; with gradients the softmax is made of it, changed and converted.
        moved = tile * vocabulary * (dtype.itemsize + 8 + (16 + dtype.itemsize if train else 0))
        seconds += moved / rates.elementwise_bytes_per_second
    return seconds / tile


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
