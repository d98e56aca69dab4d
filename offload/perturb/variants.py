"""Weights under perturbation: while a block is in its slot, it is brought up to date and perturbed into other slots.

The weights on disk, and in the slots they are fetched into, stay clean: every variant of a step is made from the clean copy
by `offload.noise.noise`, in one pass over memory that also applies the updates that no checkpoint holds yet. (Or, with noise
of low rank, only what is no matrix of a linear layer; see `offload.perturb.products`.) Nothing is perturbed
and restored in place, so nothing drifts. (MeZO, Malladi et al. 2023, perturbs in place; ZO2, Wang et al. 2025, perturbs
while a block is resident.)

Lanes of one variant are neighbours; the engine calls `enter(variant)` before it runs a lane, and all that the lane's forward
meets (the block, embedding rows, norms outside of blocks, adapters, the head) is then that variant's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from memory.slots import SlotPool
from memory.units import PAGE_BYTES, round_up
from offload.noise import noise
from offload.perturb.products import (
    NO_FACTORS,
    Factors,
    MatrixNoise,
    PerturbedProduct,
    matrices_of,
    perturbed_product,
)
from offload.residency.tiers import Tier
from offload.step.head import HeadChunk
from offload.weights.binding import Binding
from offload.weights.embedding import RowsOnDemand
from offload.weights.formats.plain import dense_bytes
from offload.weights.layout import BlockLayout, View, bind_views
from offload.weights.parameter_map import ParameterMap
from offload.weights.parts import HeadPart, ModelParts

CACHE_LINE_BYTES = 64


class Variant(NamedTuple):
    """The weights plus coefficient * z(seed); a coefficient of 0 is the weights themselves.

    shared_seed: of the columns, where noise is of low rank.
    """

    seed: int = 0
    coefficient: float = 0.0
    shared_seed: int = 0


def noise_keys(sources: ParameterMap, parameters: frozenset[str]) -> dict[str, int]:
    """Fqn -> key of the parameter's noise. Tied parameters have one key, that of their home."""
    return {name: noise.parameter_key(sources.tied.get(name, name)) for name in parameters if name in sources}


def variant_layout(
    layout: BlockLayout, dtypes: Mapping[str, torch.dtype], without: Collection[str] = ()
) -> BlockLayout:
    """Where the tensors of `layout`, but for those `without`, lie once perturbed: in the dtypes that compute, each at a cache
    line."""
    views, end = {}, 0
    for name, view in layout.views.items():
        if name in without:
            continue
        views[name] = View(end, dtypes[name], view.shape)
        end += round_up(views[name].num_bytes, CACHE_LINE_BYTES)
    return BlockLayout(round_up(end), (), views)


def folded_bytes(layout: BlockLayout) -> int:
    """What a block of this layout takes at most in its slot once it is in fp32 on disk."""
    views = {(view.slot_offset, view.shape): view for view in layout.views.values()}.values()
    wide = (max(view.num_bytes, dense_bytes(view.shape, torch.float32)) for view in views)
    return sum(map(round_up, wide)) + len(views) * PAGE_BYTES


def columns_of(tensor: torch.Tensor) -> int:
    """The `columns` of `noise.Parameter` for a whole one, or for some of its rows."""
    return tensor.shape[-1] if tensor.dim() > 1 else 0


class Perturbation:
    """The step's variants and the updates that no checkpoint holds yet: shared by all parts of the model."""

    def __init__(self, kind: noise.Noise) -> None:
        self.noise = kind
        self.variants: Sequence[Variant] = (Variant(),)
        self.pending: tuple[noise.Group, ...] = ()

    def write(
        self,
        key: int,
        source: torch.Tensor,
        targets: Mapping[int, torch.Tensor],
        stored_dtype: torch.dtype,
        elements: int | Sequence[tuple[int, int]] = 0,
    ) -> None:
        """Makes variants of `source`, brought up to date: variant index -> where to. elements: as `noise.move` takes them."""
        parameter = noise.Parameter(key, columns_of(source), stored_dtype)
        found = [noise.Target(target, *self.variants[variant]) for variant, target in targets.items()]
        noise.move(self.noise, parameter, source, self.pending, found, elements)

    def factors(self, matrix: MatrixNoise, variant: int) -> Factors:
        """What `variant` makes of a matrix whose noise is met in products."""
        return matrix.factors(self.pending, *self.variants[variant])

    def made_together(self, variant: int, most: int) -> list[int]:
        """`variant` and those after it that share its noise: made in one pass, at most `most`."""
        seed = self.variants[variant].seed
        together = [variant]
        for other in range(variant + 1, min(len(self.variants), variant + most)):
            if self.variants[other].seed != seed:
                break
            together.append(other)
        return together


class _Slots:
    """Slots of one pool that hold variants of whatever is in its clean slot."""

    def __init__(self, pool: SlotPool, perturbation: Perturbation) -> None:
        self._buffers = [pool.lease().buffer for _ in range(pool.count)]
        self._perturbation = perturbation
        self._made: list[int] = []

    def forget(self) -> None:
        """The clean slot holds something else now."""
        self._made = []

    def views(
        self, variant: int, layout: BlockLayout, write: Callable[[dict[int, dict[str, torch.Tensor]]], None]
    ) -> dict[str, torch.Tensor]:
        """The tensors of `variant`. `write` fills those that are not there: variant -> name -> tensor."""
        if variant not in self._made:
            self._made = self._perturbation.made_together(variant, len(self._buffers))
            write(
                {
                    other: bind_views(buffer, layout)
                    for other, buffer in zip(self._made, self._buffers[: len(self._made)], strict=True)
                }
            )
        return bind_views(self._buffers[self._made.index(variant)], layout)


class Residents:
    """Small tensors that stay in memory: clean values, and the step's variants of them, made once and kept for the step.

    Clean values are on the CPU, where variants are made; these are then on `device`, where the model is.
    """

    def __init__(self, perturbation: Perturbation, device: torch.device) -> None:
        self._perturbation = perturbation
        self._device = device
        self._tensors: list[tuple[int, torch.Tensor, torch.dtype, Callable[[torch.Tensor], None], torch.dtype]] = []
        self._made: dict[int, list[torch.Tensor]] = {}

    def add(
        self,
        key: int,
        clean: torch.Tensor,
        dtype: torch.dtype,
        install: Callable[[torch.Tensor], None],
        stored_dtype: torch.dtype,
    ) -> None:
        """install: gives the model a variant, of `dtype`. stored_dtype: what rounding rounds to."""
        self._tensors.append((key, clean, dtype, install, stored_dtype))

    def clear(self) -> None:
        self._tensors.clear()
        self._made.clear()

    def begin(self) -> None:
        self._made.clear()

    def enter(self, variant: int) -> None:
        if variant not in self._made:
            together = self._perturbation.made_together(variant, 2)
            made: dict[int, list[torch.Tensor]] = {other: [] for other in together}
            for key, clean, dtype, _, stored_dtype in self._tensors:
                targets = {other: torch.empty(clean.shape, dtype=dtype) for other in together}
                self._perturbation.write(key, clean, targets, stored_dtype)
                for other, target in targets.items():
                    made[other].append(target.to(self._device))
            self._made |= made
        for (_, _, _, install, _), value in zip(self._tensors, self._made[variant], strict=True):
            install(value)

    def fold(self) -> None:
        """The pending updates become part of the clean values, which are fp32."""
        for key, clean, _, _, stored_dtype in self._tensors:
            parameter = noise.Parameter(key, columns_of(clean), stored_dtype)
            noise.move(self._perturbation.noise, parameter, clean, self._perturbation.pending, [noise.Target(clean)])
        self._made.clear()


class PerturbedRows:
    """Embedding rows on demand under perturbation: the noise of a row is had without that of the rows before it."""

    def __init__(
        self,
        embedding: RowsOnDemand,
        key: int,
        dtype: torch.dtype,
        stored_dtype: torch.dtype,
        perturbation: Perturbation,
    ) -> None:
        self._embedding = embedding
        self._key = key
        self._dtype = dtype
        self._stored_dtype = stored_dtype
        self._perturbation = perturbation
        self._made: dict[int, torch.Tensor] = {}
        self._variant: int | None = None
        embedding.after_read = self._after_read

    def begin(self) -> None:
        """A pass begins: no lane has entered a variant yet. Before its rows are read."""
        self._made.clear()
        self._variant = None

    def enter(self, variant: int) -> None:
        self._variant = variant
        rows = self._embedding.rows
        if variant not in self._made:
            width = rows[0].numel() if rows.numel() else 0
            together = self._perturbation.made_together(variant, 2)
            targets = {other: torch.empty(rows.shape, dtype=self._dtype) for other in together}
            segments = [(row * width, width) for row in self._embedding.ids.tolist()]
            self._perturbation.write(self._key, rows, targets, self._stored_dtype, segments)
            self._made |= {other: target.to(self._embedding.device) for other, target in targets.items()}
        self._embedding.table = self._made[variant]

    def _after_read(self) -> None:
        """A lane asked for rows that were not in memory."""
        self._made.clear()
        if self._variant is not None:
            self.enter(self._variant)


class PerturbedBlocks:
    """The engine's weights (see `offload.step.engine.Weights`) for steps of several variants of all parameters.

    pool: one or two slots for variants of a block; with two, a pair is made in one pass. product_groups: how many pending
    groups linear layers can meet, and their noise, in their products, in which case slots need no room for their weights; 0:
    weights are perturbed.
    """

    def __init__(
        self,
        parts: ModelParts,
        tier: Tier,
        pool: SlotPool,
        perturbation: Perturbation,
        keys: Mapping[str, int],
        residents: Residents,
        rows: Sequence[PerturbedRows],
        device: torch.device,
        product_groups: int,
    ) -> None:
        self._tier = tier
        self._perturbation = perturbation
        self._slots = _Slots(pool, perturbation)
        self._bindings = parts.bindings
        self._stored = [{name: view.dtype for name, view in layout.views.items()} for layout in parts.layouts]
        self._keys = [
            {name: keys.get(f"{prefix}.{name}") for name in layout.views}
            for prefix, layout in zip(parts.prefixes, parts.layouts, strict=True)
        ]
        self._residents = residents
        self._rows = rows
        self._products: list[dict[str, PerturbedProduct]] = [{} for _ in parts.blocks]
        self._matrices: list[dict[str, MatrixNoise]] = [{} for _ in parts.blocks]
        for index, (layout, binding) in enumerate(zip(parts.layouts, parts.bindings, strict=True)):
            for name in matrices_of(binding, self._keys[index]) if product_groups else ():
                self._products[index][name] = PerturbedProduct(binding.linear_weights[name])
                self._matrices[index][name] = MatrixNoise(
                    perturbation.noise, self._keys[index][name], layout.views[name].shape, binding.dtypes[name], device,
                    product_groups,
                )  # fmt: skip
            binding.multiply_by(self._products[index])
        self._index: int | None = None
        self._variant: int | None = None
        self.move_to(parts)

    def move_to(self, parts: ModelParts) -> None:
        """From now on slots are filled as `parts` says; what is perturbed stays the same."""
        self._variant_layouts = [
            variant_layout(layout, binding.dtypes, without)
            for layout, binding, without in zip(parts.layouts, parts.bindings, self._matrices, strict=True)
        ]

    def begin(self, order: Sequence[int]) -> None:
        self._residents.begin()
        self._variant = None
        self._tier.begin(order)

    def acquire(self, index: int) -> None:
        self._tier.acquire(index)
        self._clean = self._tier.views(index)
        self._index, self._variant = index, None
        self._slots.forget()

    def enter(self, variant: int) -> None:
        if variant == self._variant:
            return
        self._variant = variant
        self._residents.enter(variant)
        for rows in self._rows:
            rows.enter(variant)
        if self._index is not None:
            views = self._slots.views(variant, self._variant_layouts[self._index], self._write)
            for name, matrix in self._matrices[self._index].items():
                views[name] = self._clean[name]
                self._products[self._index][name].factors = self._perturbation.factors(matrix, variant)
            self._bindings[self._index].bind(views)

    def release(self, index: int) -> None:
        self._bindings[index].unbind()
        for name, matrix in self._matrices[index].items():
            self._products[index][name].factors = NO_FACTORS
            matrix.forget()
        self._index = None
        self._tier.release(index)

    def _write(self, targets: dict[int, dict[str, torch.Tensor]]) -> None:
        index = self._index
        clean = {name: tensor for name, tensor in self._clean.items() if name not in self._matrices[index]}
        write_variants(self._perturbation, self._keys[index], clean, targets, self._stored[index])


@dataclass(slots=True)
class PerturbedChunk(HeadChunk):
    """A chunk that meets its noise in its product. weight: as stored."""

    factors: Factors

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return perturbed_product(hidden, self.weight, self.factors, self.bias)


class PerturbedChunks:
    """The tiled head's view of its tier (see `offload.step.head.TiledHead`) for steps of several variants; arguments as
    those of `PerturbedBlocks`."""

    trained = False

    def __init__(
        self,
        head: HeadPart,
        tier: Tier,
        pool: SlotPool,
        perturbation: Perturbation,
        keys: Mapping[str, int],
        device: torch.device,
        product_groups: int,
    ) -> None:
        self._tier = tier
        self._perturbation = perturbation
        self._slots = _Slots(pool, perturbation)
        self._binding: Binding = head.binding
        self._keys = {name: keys.get(f"{head.name}.{name}") for name in head.layouts[0].views}
        self._stored = {name: view.dtype for name, view in head.layouts[0].views.items()}
        self._starts = head.starts
        self._product = PerturbedProduct(head.module)
        self._matrices: list[MatrixNoise] = []
        if product_groups and matrices_of(head.binding, self._keys):
            self._matrices = [
                MatrixNoise(
                    perturbation.noise, self._keys["weight"], layout.views["weight"].shape, head.binding.dtypes["weight"],
                    device, product_groups, first_row,
                )
                for layout, first_row in zip(head.layouts, head.starts, strict=True)
            ]  # fmt: skip
            head.binding.multiply_by({"weight": self._product})
        self._index = 0
        self.move_to(head)

    def move_to(self, head: HeadPart) -> None:
        self._head = head
        without = ("weight",) if self._matrices else ()
        self._variant_layouts = [variant_layout(layout, head.binding.dtypes, without) for layout in head.layouts]

    def acquire(self, index: int) -> None:
        self._tier.acquire(index)
        self._clean = self._tier.views(index)
        self._index = index
        self._slots.forget()

    def enter(self, variant: int) -> HeadChunk:
        views = self._slots.views(variant, self._variant_layouts[self._index], self._write)
        start = self._starts[self._index]
        if not self._matrices:
            chunk = HeadChunk(start, views["weight"], views.get("bias"))
        else:
            views["weight"] = self._clean["weight"]
            factors = self._product.factors = self._perturbation.factors(self._matrices[self._index], variant)
            chunk = PerturbedChunk(start, views["weight"], views.get("bias"), factors)
        if len(self._starts) == 1:
            self._binding.bind(views)
        return chunk

    def release(self, index: int) -> None:
        self._product.factors = NO_FACTORS
        if self._matrices:
            self._matrices[index].forget()
        if len(self._starts) == 1:
            self._binding.unbind()
        self._tier.release(index)

    def _write(self, targets: dict[int, dict[str, torch.Tensor]]) -> None:
        clean = {name: tensor for name, tensor in self._clean.items() if name != "weight" or not self._matrices}
        write_variants(self._perturbation, self._keys, clean, targets, self._stored, self._starts[self._index])


def write_variants(
    perturbation: Perturbation,
    keys: Mapping[str, int | None],
    clean: Mapping[str, torch.Tensor],
    targets: Mapping[int, Mapping[str, torch.Tensor]],
    stored: Mapping[str, torch.dtype],
    first_row: int = 0,
) -> None:
    """Fills variant -> name -> tensor from the clean tensors. What has no key (a buffer) is copied as it is.

    first_row: where `clean` begins in parameters of which it holds only some rows.
    """
    for name, source in clean.items():
        if keys[name] is None:
            for tensors in targets.values():
                tensors[name].copy_(source)
            continue
        first_element = first_row * (source.numel() // source.shape[0]) if source.dim() else 0
        of_variants = {variant: tensors[name] for variant, tensors in targets.items()}
        perturbation.write(keys[name], source, of_variants, stored[name], first_element)
