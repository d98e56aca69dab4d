"""What zeroth-order tuning of a model's own weights asks of memory and disk, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from finetune.memory.needs import Item, Needs, Tier
from finetune.memory.units import PAGE_BYTES, round_up
from finetune.methods.zeroth_order_options import ZerothOrderOptions
from finetune.offload.perturb.products import factor_bytes
from finetune.offload.perturb.replay import BUFFER_BYTES
from finetune.offload.perturb.scales import scale_keys, scale_tensors
from finetune.offload.perturb.variants import find_perturbed, folded_bytes, noise_keys, variant_layout
from finetune.offload.sizing.needs import EDGES, VISIT, expert_sizes, variant_needs
from finetune.offload.weights.formats.plain import dense_bytes
from finetune.offload.weights.parts import ModelParts


@dataclass(frozen=True, slots=True)
class PerturbedSizes:
    """Of a model whose own weights are perturbed, or moved as the steps of a run say."""

    block_bytes: list[int]  # of each block as it is fetched: folded weights may be wider than the model's own
    chunk_bytes: int  # of the largest chunk of the head as it is fetched
    expert_bytes: list[int]  # of matrices of experts as they are fetched by themselves, in the order of their sizes
    needs: Needs  # beside those of a model whose weights stay


FACTORS = "sums of the factors of updates"
FEWER_FACTORS = "raise zo.fold_steps, lower zo.rank or train fewer steps: nothing can be folded into packed weights"


def is_packed(parts: ModelParts) -> bool:
    """Whether some of the model's weights are stored in a way that takes no update up."""
    return any(not parts.sources[name].can_be_updated for name in parts.parameters)


def steps_between_folds(parts: ModelParts, options: ZerothOrderOptions) -> int | None:
    """After so many steps what is pending is folded into weights on disk; None: never, for packed ones take nothing up."""
    return None if options.perturb == "products" and is_packed(parts) else options.steps_between_folds


def most_product_groups(parts: ModelParts, options: ZerothOrderOptions, num_steps: int | None) -> int:
    """Groups that products ever meet in a run of so many steps (None: unknown); 0 where weights are perturbed."""
    most = options.product_groups
    if num_steps is None or not most:
        return most
    groups = max(1, -(-num_steps // options.group_steps))
    return groups if steps_between_folds(parts, options) is None else min(most, groups)


def perturbed_sizes(parts: ModelParts, options: ZerothOrderOptions, num_steps: int | None) -> PerturbedSizes:
    """num_steps: of the run; None: unknown, so weights are folded on the way where they can be."""
    head, itemsize = parts.head, parts.dtype.itemsize
    units = list(zip(parts.layouts, parts.bindings, parts.prefixes, strict=True))
    num_blocks = len(units)
    if head is not None:
        units += [(layout, head.binding, head.name) for layout in head.layouts]
    groups = most_product_groups(parts, options, num_steps)
    scales = options.parameters == "scales"
    keys = scale_keys(parts) if scales else noise_keys(parts.sources, parts.parameters)
    slots, kept, visits = [], 0, []
    for layout, binding, prefix in units:
        perturbed = find_perturbed(prefix, binding, layout, keys, bool(groups))
        slots.append(variant_layout(layout, binding.dtypes, perturbed.tensors).num_bytes)
        matrices = [layout.weights[name] for name in perturbed.matrices]
        factors = [factor_bytes(weight.shape, options.noise_rank, groups, itemsize) for weight in matrices]
        kept += sum(kept for kept, _ in factors)
        # A weight that is folded in fp32 is converted at each use; what decoding a packed one takes is in the dry run.
        plain = (prod(weight.shape) for weight in matrices if weight.can_be_updated)
        visits.append(sum(visit for _, visit in factors) + itemsize * max(plain, default=0))
    fetched = [layout.num_bytes for layout, _, _ in units]
    sizes = expert_sizes(parts.experts)
    experts = [[prod(parts.experts[number].stack.weight.shape[1:]) for number in size.stacks] for size in sizes]
    of_experts = [0 for _ in experts]
    if _folds(parts, options, num_steps) and options.rounding == "exact":
        fetched = [folded_bytes(layout, None if scales else torch.float32) for layout, _, _ in units]
        of_experts = [round_up(4 * max(elements)) + PAGE_BYTES for elements in experts]
    # clean values of resident weights in up to twice their size, and every variant
    edge_bytes = 0 if scales else parts.edge_bytes * (1 + options.variants)
    remedy = FEWER_FACTORS if steps_between_folds(parts, options) is None else ""
    needs = Needs.of(
        Item(EDGES, edge_bytes, Tier.COMPUTE),
        Item(FACTORS, kept, Tier.COMPUTE, remedy=remedy),
        Item(VISIT, max(visits) if groups else 0, Tier.COMPUTE),  # where linear layers meet noise in their products
    )
    largest = max((dense_bytes(one.stack.weight.shape[1:], one.stack.dtype) for one in parts.experts), default=0)
    needs += variant_needs(max(1, *slots[:num_blocks]), max(slots[num_blocks:], default=0), largest)  # a slot there must be
    return PerturbedSizes(fetched[:num_blocks], max(fetched[num_blocks:], default=0), of_experts, needs)


def fold_needs(parts: ModelParts, options: ZerothOrderOptions, num_steps: int | None) -> Needs:
    """Buffers through which moved weights are written on the way, and what those take of the disk: the old ones stay until the
    new ones are whole."""
    if not _folds(parts, options, num_steps):
        return Needs()
    least = 4 if options.rounding == "exact" else 0  # bytes of a number
    tensors = parts.checkpoint.tensors.values()
    folded = sum(max(entry.num_bytes, least * prod(entry.shape)) for entry in tensors)
    if options.parameters == "scales":
        folded = sum(tensor.num_bytes for tensor in scale_tensors(parts).values())
    return Needs.of(
        Item("buffers for folding", BUFFER_BYTES, Tier.COMPUTE), Item("folded weights", 2 * folded, Tier.DISK)
    )


def _folds(parts: ModelParts, options: ZerothOrderOptions, num_steps: int | None) -> bool:
    between = steps_between_folds(parts, options)
    return between is not None and (num_steps is None or num_steps > between)
