"""What zeroth-order tuning of a model's own weights asks of memory and disk, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from finetune.methods.zeroth_order_options import ZerothOrderOptions
from memory.needs import Item, Needs, Tier
from offload.perturb.products import factor_bytes, matrices_of
from offload.perturb.replay import BUFFER_BYTES
from offload.perturb.variants import folded_bytes, noise_keys, variant_layout
from offload.sizing.needs import EDGES, VISIT, variant_needs
from offload.weights.parts import ModelParts


@dataclass(frozen=True, slots=True)
class PerturbedSizes:
    """Of a model whose own weights are perturbed, or moved as the steps of a run say."""

    block_bytes: list[int]  # of each block as it is fetched: folded weights may be wider than the model's own
    chunk_bytes: int  # of the largest chunk of the head as it is fetched
    needs: Needs  # beside those of a model whose weights stay


def most_product_groups(options: ZerothOrderOptions, num_steps: int | None) -> int:
    """Groups that products ever meet in a run of so many steps (None: unknown); 0 where weights are perturbed."""
    most = options.product_groups
    return most if num_steps is None else min(most, -(-num_steps // options.group_steps))


def perturbed_sizes(parts: ModelParts, options: ZerothOrderOptions, num_steps: int | None) -> PerturbedSizes:
    """num_steps: of the run; None: unknown, so weights are folded on the way."""
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
        # a weight that is folded in fp32 is converted at each use
        converted = itemsize * max((prod(layout.views[name].shape) for name in matrices), default=0)
        visits.append(sum(visit for _, visit in factors) + converted)
    widens = _folds(options, num_steps) and options.rounding == "exact"
    fetched = [folded_bytes(layout) if widens else layout.num_bytes for layout, _, _ in units]
    # clean values of resident weights in up to twice their size, and every variant; factors that stay
    edge_bytes = parts.edge_bytes * (1 + options.variants) + kept
    needs = Needs.of(
        Item(EDGES, edge_bytes, Tier.COMPUTE),
        Item(VISIT, max(visits) if groups else 0, Tier.COMPUTE),  # where linear layers meet noise in their products
    )
    needs += variant_needs(max(1, *slots[:num_blocks]), max(slots[num_blocks:], default=0))  # a slot there must be
    return PerturbedSizes(fetched[:num_blocks], max(fetched[num_blocks:], default=0), needs)


def fold_needs(parts: ModelParts, options: ZerothOrderOptions, num_steps: int | None) -> Needs:
    """Buffers through which moved weights are written on the way, and what those take of the disk: the old ones stay until the
    new ones are whole."""
    if not _folds(options, num_steps):
        return Needs()
    least = 4 if options.rounding == "exact" else 0  # bytes of a number
    tensors = parts.checkpoint.tensors.values()
    folded = sum(max(entry.num_bytes, least * prod(entry.shape)) for entry in tensors)
    return Needs.of(
        Item("buffers for folding", BUFFER_BYTES, Tier.COMPUTE), Item("folded weights", 2 * folded, Tier.DISK)
    )


def _folds(options: ZerothOrderOptions, num_steps: int | None) -> bool:
    return num_steps is None or num_steps > options.steps_between_folds
