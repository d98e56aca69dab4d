"""Weights that are perturbed, and moved by a journal: what zeroth-order tuning runs on.

[Note: where moved weights live]
The original checkpoint is never written. What the journal's steps add is applied while blocks are fetched; so that this
does not grow with the number of steps, whole groups are folded from time to time into a checkpoint of their own, in fp32
(a directory of safetensors files like the original, written as a stream and renamed into place when durable). The journal
stays complete, so losing such a directory loses nothing. Folded or pending, the sums are the same: see [Note: groups] in
`finetune.offload.perturb.journal`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from finetune.offload.files.checkpoint import Checkpoint, read_checkpoint
from finetune.offload.noise.noise import Noise, parameter_key
from finetune.offload.perturb.expert_variants import ExpertVariants
from finetune.offload.perturb.replay import Changes, moved_sources, replay
from finetune.offload.perturb.scales import LEAST_SCALE, scale_keys, scale_tensors
from finetune.offload.perturb.variants import (
    Perturbation,
    PerturbedRows,
    Resident,
    Residents,
    StreamedVariants,
    Variant,
    noise_keys,
)
from finetune.offload.sizing.needs import EXPERT_VARIANTS
from finetune.offload.step.weights import HeadRows, Key
from finetune.offload.weights.formats.plain import TORCH_DTYPES
from finetune.offload.weights.streamed_parts import Room, StreamedParts, read_edges


class PerturbedWeights:
    """A policy of `finetune.offload.step.weights`. `perturbation.pending` is what the weights lack; the caller keeps it up to
    date."""

    def __init__(
        self,
        room: Room,
        noise: Noise,
        adapters: Mapping[str, nn.Parameter] | None = None,
        product_groups: int = 0,
        scales: bool = False,
    ) -> None:
        """noise: what perturbs. adapters: fqn -> parameter, when only these are perturbed; None: all parameters of the model.
        product_groups: as in `StreamedVariants`. scales: whether only the scales of packed weights are perturbed."""
        self.perturbation = Perturbation(noise)
        self._room = room
        self._parts = self._original = room.parts
        self._adapters = adapters
        self._residents = Residents(self.perturbation, room.device.torch_device)
        self._scales = scales
        self._keys = {} if adapters is not None else noise_keys(room.parts.sources, room.parts.parameters)
        if scales:
            self._keys, self.perturbation.least = scale_keys(room.parts), LEAST_SCALE
        head = room.parts.head
        self._streamed = StreamedParts(room, room.parts.layouts, () if head is None else head.layouts)
        self._variants: StreamedVariants | None = None
        self._of_experts: ExpertVariants | None = None
        self._rows: list[PerturbedRows] = []
        self._variant: int | None = None
        """That was entered last, and still is what everything meets."""
        if adapters is None:
            self._variants = StreamedVariants(room, self._streamed, self.perturbation, self._keys, product_groups)
            if room.parts.experts:
                pool = room.plan.slots[EXPERT_VARIANTS].carve_from(room.computing)
                self._of_experts = ExpertVariants(room.parts.experts, self.perturbation, self._keys, pool)
                room.closing.callback(self._of_experts.close)
            for embedding, (name, _, source) in zip(room.embeddings, room.parts.embeddings, strict=True):
                if (key := self._keys.get(f"{name}.weight")) is not None:
                    self._rows.append(PerturbedRows(embedding, key, room.parts.dtype, source.dtype, self.perturbation))
        self.take_adapters()
        self._load_edges()

    @property
    def stall_seconds(self) -> float:
        return self._streamed.stall_seconds

    @property
    def head_rows(self) -> HeadRows:
        return self._streamed.head_rows

    def begin_pass(self) -> None:
        for rows in self._rows:
            rows.begin()
        self._streamed.begin_head()

    def begin(self, order: Sequence[int]) -> None:
        self._residents.begin()
        self._variant = None
        self._streamed.begin(order)

    def enter(self, variant: int) -> None:
        if variant == self._variant:
            return
        self._variant = variant
        self._residents.enter(variant)
        for rows in self._rows:
            rows.enter(variant)
        if self._of_experts is not None:
            self._of_experts.variant = variant
        if self._variants is not None:
            self._variants.enter(variant)

    def acquire(self, key: Key) -> None:
        clean = self._streamed.acquire(key)
        if self._variants is None:
            self._streamed.bind(key, clean)
        else:
            self._variants.hold(key, clean)
            self._variant = None  # nothing is bound until one is entered

    def release(self, key: Key) -> None:
        self._streamed.unbind(key)
        if self._variants is not None:
            self._variants.let_go()
        self._streamed.release(key)

    def trains(self, key: Key) -> bool:
        return False

    @contextmanager
    def under(self, variants: Sequence[Variant]) -> Iterator[None]:
        """The model can be asked for these variants of the weights inside; variant i is i."""
        self.perturbation.variants = variants
        try:
            yield
        finally:
            self.perturbation.variants = (Variant(),)

    def take_adapters(self) -> None:
        """The adapters' values are now what is perturbed and moved."""
        if self._adapters is None:
            return
        self._residents.clear()
        for name, parameter in self._adapters.items():
            clean = parameter.detach().float().cpu()
            install = partial(setattr, parameter, "data")
            self._residents.add(Resident(parameter_key(name), clean, parameter.dtype, install, torch.float32))

    def fold_adapters(self) -> None:
        """Pending updates become part of the adapters' values."""
        self._residents.fold()
        self.perturbation.pending = ()

    def settle_adapters(self) -> None:
        """Leaves the model with the adapters as they are after all updates."""
        self._residents.begin()
        self._residents.enter(0)

    def fold(
        self, directory: Path, steps: str, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Writes the weights with all pending updates to `directory` and goes on from there; nothing is pending then.

        steps: the digest of all steps that the weights then hold. See [Note: where moved weights live].
        """
        rounds = any(group.rounding != "exact" for group in self.perturbation.pending)
        stored = {name: TORCH_DTYPES[entry.dtype] for name, entry in self._original.checkpoint.tensors.items()}
        dtype = None if rounds else torch.float32
        sources = scale_tensors(self._parts) if self._scales else self._parts.sources
        changes = Changes(
            sources, self._keys, self.perturbation.noise, self.perturbation.pending, stored, dtype, self.perturbation.least
        )
        checkpoint = changes.changed(self._parts.checkpoint) if self._scales else self._parts.checkpoint
        replay(checkpoint, changes, directory, steps=steps, io_backend=self._room.io.backend, progress=progress)
        self.move_to(read_checkpoint(directory))

    def move_to(self, checkpoint: Checkpoint) -> None:
        """Streams from `checkpoint`, a fold of the original, from now on; nothing is pending then."""
        original = self._original
        parts = original.on(checkpoint, moved_sources(original.sources, original.checkpoint, checkpoint))
        self._streamed.move_to(parts)
        for embedding, (_, _, source) in zip(self._room.embeddings, parts.embeddings, strict=True):
            embedding.move_to(source)
        self._parts = parts
        self._residents.clear()
        self._load_edges()
        self.perturbation.pending = ()

    def _load_edges(self) -> None:
        for edge, stored in read_edges(self._room.io, self._parts.edges):
            edge.install(edge.source.decode(stored, edge.dtype).to(self._room.device.torch_device))
            if edge.name in self._keys:
                rounded_to = self._original.sources[edge.name].dtype
                self._residents.add(Resident(self._keys[edge.name], stored, edge.dtype, edge.install, rounded_to))
