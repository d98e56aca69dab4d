"""What zeroth-order tuning of a model's own weights asks of memory and disk, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from finetune.methods.zeroth_order_options import ZerothOrderOptions
from offload.perturb.products import factor_bytes, matrices_of
from offload.perturb.replay import BUFFER_BYTES
from offload.perturb.variants import folded_bytes, noise_keys, variant_layout
from offload.weights.formats.plain import strips
from offload.weights.parts import ModelParts


@dataclass(frozen=True, slots=True)
class PerturbationDemand:
    """variant, head_variant: slots in which weights of a block, and of a chunk of the head, are perturbed. block, head_chunk:
    what those take as they are fetched. edges: resident weights with their variants, and factors that stay. visit: what linear
    layers allocate where they meet noise in their products. folding: buffers through which weights are written. folded: what
    a fold takes of the disk."""

    variant_bytes: int
    head_variant_bytes: int
    block_bytes: list[int]
    head_chunk_bytes: int
    edge_bytes: int
    visit_bytes: int
    folding_bytes: int
    folded_bytes: int


def most_product_groups(options: ZerothOrderOptions, num_steps: int | None) -> int:
    """Groups that products ever meet in a run of so many steps (None: unknown); 0 where weights are perturbed."""
    most = options.product_groups
    return most if num_steps is None else min(most, -(-num_steps // options.group_steps))


def _strip_elements(rows: int, columns: int) -> int:
    """Of the largest strip in which a weight is converted."""
    return columns * max(strip.stop - strip.start for strip in strips(rows))


def perturbation_demand(parts: ModelParts, options: ZerothOrderOptions, num_steps: int | None) -> PerturbationDemand:
    head, itemsize = parts.head, parts.dtype.itemsize
    units = list(zip(parts.layouts, parts.bindings, parts.prefixes, strict=True))
    num_blocks = len(units)
    if head is not None:
        units += [(layout, head.binding, head.name) for layout in head.layouts]
    groups = most_product_groups(options, num_steps)
    keys = noise_keys(parts.sources, parts.parameters)
    slots, kept, visits = [], 0, []
    for layout, binding, prefix in units:
        local = {name: keys.get(f"{prefix}.{name}") for name in layout.views}
        matrices = matrices_of(binding, local) if groups else []
        slots.append(variant_layout(layout, binding.dtypes, matrices).num_bytes)
        factors = [factor_bytes(layout.views[name].shape, options.noise_rank, groups, itemsize) for name in matrices]
        kept += sum(kept for kept, _ in factors)
        # a strip of a weight that is folded in fp32 is converted at each use
        strip = itemsize * max((_strip_elements(*layout.views[name].shape) for name in matrices), default=0)
        visits.append(sum(visit for _, visit in factors) + strip)
    folds = num_steps is None or num_steps > options.steps_between_folds
    widens = folds and options.rounding == "exact"
    fetched = [folded_bytes(layout) if widens else layout.num_bytes for layout, _, _ in units]
    return PerturbationDemand(
        variant_bytes=max(1, *slots[:num_blocks]),  # a slot there must be
        head_variant_bytes=max(slots[num_blocks:], default=0),
        block_bytes=fetched[:num_blocks],
        head_chunk_bytes=max(fetched[num_blocks:], default=0),
        # clean values in up to twice their size, and every variant
        edge_bytes=parts.edge_bytes * (2 + options.variants) + kept,
        visit_bytes=max(visits) if groups else 0,
        folding_bytes=BUFFER_BYTES if folds else 0,
        folded_bytes=sum(
            max(entry.num_bytes, 4 * prod(entry.shape) if widens else 0) for entry in parts.checkpoint.tensors.values()
        )
        if folds
        else 0,
    )
