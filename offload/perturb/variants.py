"""Weights under perturbation: while a block is in its slot, it is brought up to date and perturbed into other slots.

The weights on disk, and in the slots they are fetched into, stay clean: every variant of a step is made from the clean copy
by `finetune.offload.noise.noise`, in one pass over memory that also applies the updates that no checkpoint holds yet. (Or, with
noise of low rank, only what is no matrix of a linear layer; see `finetune.offload.perturb.products`.) Nothing is perturbed
and restored in place, so nothing drifts. (MeZO, Malladi et al. 2023, perturbs in place; ZO2, Wang et al. 2025, perturbs
while a block is resident.)

Lanes of one variant are neighbours; the engine calls `enter(variant)` before it runs a lane, and all that the lane's forward
meets (the block, embedding rows, norms outside of blocks, adapters, the head) is then that variant's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from finetune.memory.slots import SlotPool
from finetune.memory.units import PAGE_BYTES, round_up
from finetune.offload.noise import noise
from finetune.offload.perturb.products import (
    NO_FACTORS,
    Factors,
    MatrixNoise,
    PerturbedProduct,
    perturbed_product,
)
from finetune.offload.perturb.scales import element_in
from finetune.offload.sizing.needs import HEAD_VARIANTS, VARIANTS
from finetune.offload.step.weights import Block, HeadChunk, HeadRows, Key
from finetune.offload.weights.binding import Binding
from finetune.offload.weights.embedding import RowsOnDemand
from finetune.offload.weights.formats import stored_name
from finetune.offload.weights.formats.plain import dense_bytes
from finetune.offload.weights.layout import BlockLayout, View, bind_views
from finetune.offload.weights.parameter_map import ParameterMap
from finetune.offload.weights.streamed_parts import Room, StreamedParts

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


class Perturbed(NamedTuple):
    """What is perturbed of a block, or of a chunk of the head, and where. Names are local."""

    matrices: dict[str, int]
    """Weights whose noise is met in products -> key of the noise."""
    tensors: dict[str, int]
    """Stored tensors whose variants are made in slots -> key of the noise."""


def find_perturbed(
    prefix: str, binding: Binding, layout: BlockLayout, keys: Mapping[str, int], in_products: bool
) -> Perturbed:
    """Of what lies in a slot as `layout` says. prefix: fully qualified, of the module. keys: by fully qualified name.
    in_products: whether linear layers meet their noise in their products. The rest (buffers, packed bytes) has no variants."""
    names = (*layout.weights, *layout.views)
    local = {name: keys[fqn] for name in names if (fqn := f"{prefix}.{name}") in keys}
    matrices = {name: local[name] for name in binding.linear_weights if name in local} if in_products else {}
    return Perturbed(matrices, {name: local[name] for name in layout.views if name in local and name not in matrices})


def variant_layout(
    layout: BlockLayout, dtypes: Mapping[str, torch.dtype], names: Collection[str]
) -> BlockLayout:
    """Where the tensors of `layout` with these names lie once perturbed: in the dtypes that compute (scales: as stored), each
    at a cache line."""
    views, end = {}, 0
    for name, view in layout.views.items():
        if name not in names:
            continue
        views[name] = View(end, dtypes.get(name, view.dtype), view.shape)
        end += round_up(views[name].num_bytes, CACHE_LINE_BYTES)
    return BlockLayout(round_up(end), (), views)


def folded_bytes(layout: BlockLayout, dtype: torch.dtype | None) -> int:
    """What a block of this layout takes at most in its slot once what was moved is elsewhere on disk. dtype: in which all of it
    is then; None: as it is."""
    views = {(view.slot_offset, view.shape): view for view in layout.views.values()}.values()
    wide = (max(view.num_bytes, 0 if dtype is None else dense_bytes(view.shape, dtype)) for view in views)
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
        self.least: float | None = None  # what groups make smaller is raised to it

    def write(
        self,
        key: int,
        source: torch.Tensor,
        targets: Mapping[int, torch.Tensor],
        stored_dtype: torch.dtype,
        elements: int | Sequence[tuple[int, int]] = 0,
    ) -> None:
        """Makes variants of `source`, brought up to date: variant index -> where to. elements: as `noise.move` takes them."""
        parameter = noise.Parameter(key, columns_of(source), stored_dtype, self.least)
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


class Resident(NamedTuple):
    """A small tensor that has variants."""

    key: int  # of its noise
    clean: torch.Tensor  # on the CPU
    dtype: torch.dtype  # of a variant
    install: Callable[[torch.Tensor], None]  # gives the model a variant
    stored_dtype: torch.dtype  # what rounding rounds to


class Residents:
    """Small tensors that stay in memory: clean values, and the step's variants of them, made once and kept for the step.

    Clean values are on the CPU, where variants are made; these are then on `device`, where the model is.
    """

    def __init__(self, perturbation: Perturbation, device: torch.device) -> None:
        self._perturbation = perturbation
        self._device = device
        self._tensors: list[Resident] = []
        self._made: dict[int, list[torch.Tensor]] = {}

    def add(self, resident: Resident) -> None:
        self._tensors.append(resident)

    def clear(self) -> None:
        self._tensors.clear()
        self._made.clear()

    def begin(self) -> None:
        self._made.clear()

    def enter(self, variant: int) -> None:
        if variant not in self._made:
            together = self._perturbation.made_together(variant, 2)
            made: dict[int, list[torch.Tensor]] = {other: [] for other in together}
            for one in self._tensors:
                targets = {other: torch.empty(one.clean.shape, dtype=one.dtype) for other in together}
                self._perturbation.write(one.key, one.clean, targets, one.stored_dtype)
                for other, target in targets.items():
                    made[other].append(target.to(self._device))
            self._made |= made
        for one, value in zip(self._tensors, self._made[variant], strict=True):
            one.install(value)

    def fold(self) -> None:
        """The pending updates become part of the clean values, which are fp32."""
        for one in self._tensors:
            parameter = noise.Parameter(one.key, columns_of(one.clean), one.stored_dtype)
            noise.move(self._perturbation.noise, parameter, one.clean, self._perturbation.pending, [noise.Target(one.clean)])
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


@dataclass(frozen=True, slots=True)
class _Part:
    """What variants of a block, or of a chunk of the head, take. Tables are by local name."""

    slots: _Slots  # where variants are made
    clean: BlockLayout  # of what they are made of
    layout: BlockLayout  # of a variant in its slot: what has noise of its own there; the rest is that of the clean slot
    keys: Mapping[str, int]  # of the tensors in `layout`
    stored: Mapping[str, torch.dtype]  # what rounding rounds to
    first_row: int  # where its weights begin in those of which it holds only some rows
    first_elements: Mapping[str, int]  # where the tensors in `layout` begin in those of which they are a part
    products: Mapping[str, PerturbedProduct]  # forwards of linear layers that meet their noise in the product
    matrices: Mapping[str, MatrixNoise]  # and that noise


@dataclass(slots=True)
class _ProductRows(HeadRows):
    """Rows of the head that meet their noise in their product."""

    factors: Factors  # of the noise

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return perturbed_product(hidden, self.weight, self.factors, self.bias)


class StreamedVariants:
    """Variants of what is streamed, made while it is in its slot, and bound in its place."""

    def __init__(
        self,
        room: Room,
        streamed: StreamedParts,
        perturbation: Perturbation,
        keys: Mapping[str, int],
        product_groups: int,
    ) -> None:
        """product_groups: how many pending groups linear layers can meet, and their noise, in their products, in which case
        slots need no room for their weights; 0: weights are perturbed."""
        self._streamed = streamed
        self._perturbation = perturbation
        self._device = room.device.torch_device
        self._dtype = room.parts.dtype
        self._sources = room.parts.sources
        self._keys = keys
        self._product_groups = product_groups
        parts, plan = room.parts, room.plan
        slots = _Slots(plan.slots[VARIANTS].carve_from(room.computing), perturbation)
        self._parts: dict[Key, _Part] = {}
        for index, (prefix, binding) in enumerate(zip(parts.prefixes, parts.bindings, strict=True)):
            (part,) = self._make_parts(prefix, binding, parts.layouts[index : index + 1], (0,), slots)
            self._parts[Block(index)] = part
        if (head := parts.head) is not None:
            slots = _Slots(plan.slots[HEAD_VARIANTS].carve_from(room.computing), perturbation)
            chunks = self._make_parts(head.name, head.binding, head.layouts, head.starts, slots)
            self._parts |= {HeadChunk(index): part for index, part in enumerate(chunks)}
        self._key: Key | None = None  # of what is held
        self._part: _Part | None = None  # of the same
        self._clean: dict[str, torch.Tensor] = {}
        self._head_weight: torch.Tensor | None = None  # of the chunk that is held, in the dtype that computes

    def hold(self, key: Key, clean: dict[str, torch.Tensor]) -> None:
        """`key` is in its slot: `clean` are its tensors until `let_go`."""
        self._key, self._part, self._clean = key, self._parts[key], clean
        self._part.slots.forget()

    def enter(self, variant: int) -> None:
        """Binds what is held, if anything is, as `variant` has it."""
        key, part = self._key, self._part
        if part is None:
            return
        views = self._clean | part.slots.views(variant, part.layout, self._write)
        for name, matrix in part.matrices.items():
            part.products[name].factors = self._perturbation.factors(matrix, variant)
        if self._streamed.is_bound(key):
            self._streamed.bind(key, views)
            return
        if self._head_weight is None or any(name.startswith("weight") for name in part.keys):
            self._head_weight = part.clean.decode(views, "weight", self._dtype)
        bias = part.clean.decode(views, "bias", self._dtype) if "bias" in part.clean.weights else None
        rows = part.first_row, self._head_weight, bias
        self._streamed.head_rows = (
            _ProductRows(*rows, part.products["weight"].factors) if part.products else HeadRows(*rows)
        )

    def let_go(self) -> None:
        for name, matrix in self._part.matrices.items():
            self._part.products[name].factors = NO_FACTORS
            matrix.forget()
        self._key = self._part = self._head_weight = None

    def _make_parts(
        self, prefix: str, binding: Binding, layouts: Sequence[BlockLayout], first_rows: Sequence[int], slots: _Slots
    ) -> list[_Part]:
        """Of what is bound by one `binding`: a block, or all chunks of the head. prefix: the module's fqn."""
        stored = {name: view.dtype for name, view in layouts[0].views.items()}
        perturbed = find_perturbed(prefix, binding, layouts[0], self._keys, bool(self._product_groups))
        products = {name: PerturbedProduct(binding.linear_weights[name]) for name in perturbed.matrices}
        found = []
        for layout, first_row in zip(layouts, first_rows, strict=True):
            matrices = {
                name: MatrixNoise(
                    self._perturbation.noise, key, layout.weights[name].shape, binding.dtypes[name], self._device,
                    self._product_groups, first_row,
                )
                for name, key in perturbed.matrices.items()
            }  # fmt: skip
            of_variant = variant_layout(layout, binding.dtypes, perturbed.tensors)
            starts = self._first_elements(prefix, layout, first_row, perturbed.tensors)
            found.append(_Part(slots, layout, of_variant, perturbed.tensors, stored, first_row, starts, products, matrices))
        binding.multiply_by(products)
        return found

    def _write(self, targets: dict[int, dict[str, torch.Tensor]]) -> None:
        """Fills variant -> name -> tensor from the clean tensors."""
        part = self._part
        for name, key in part.keys.items():
            source = self._clean[name]
            of_variants = {variant: tensors[name] for variant, tensors in targets.items()}
            self._perturbation.write(key, source, of_variants, part.stored[name], part.first_elements[name])

    def _first_elements(
        self, prefix: str, layout: BlockLayout, first_row: int, names: Collection[str]
    ) -> dict[str, int]:
        """Of these stored tensors of a part: which element of the whole tensor is their first one."""
        found = {}
        for name, weight in layout.weights.items():
            for field, tensor in weight.tensors.items():
                if (view := stored_name(name, field)) in names:
                    whole = self._sources[f"{prefix}.{name}"].tensors[field]
                    found[view] = element_in(tensor, whole) if field else first_row * prod(tensor.shape[1:])
        return found
