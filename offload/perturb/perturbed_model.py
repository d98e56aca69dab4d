"""A streamed model whose weights are perturbed and moved by a journal: what zeroth-order tuning runs on.

[Note: where moved weights live]
The original checkpoint is never written. What the journal's steps add is applied while blocks are fetched; so that this
does not grow with the number of steps, whole groups are folded from time to time into a checkpoint of their own, in fp32
(a directory of safetensors files like the original, written as a stream and renamed into place when durable). The journal
stays complete, so losing such a directory loses nothing. Folded or pending, the sums are the same: see [Note: groups] in
`offload.perturb.journal`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memory.plan import Plan
from offload.devices import Device
from offload.files.checkpoint import Checkpoint, read_checkpoint
from offload.noise.noise import Noise, parameter_key
from offload.perturb.replay import Changes, moved_sources, replay
from offload.perturb.variants import (
    Perturbation,
    PerturbedBlocks,
    PerturbedChunks,
    PerturbedRows,
    Residents,
    Variant,
    noise_keys,
)
from offload.sizing.needs import HEAD_VARIANTS, VARIANTS
from offload.step.engine import Weights
from offload.step.head import HeadChunk
from offload.streamed_model import BlockWeights, Chunks, StreamedModel
from offload.weights.formats.plain import TORCH_DTYPES
from offload.weights.parts import EdgeTensor, ModelParts


class _ResidentVariants(BlockWeights):
    """Blocks as they are; only resident tensors (adapters) have variants."""

    def __init__(self, parts: ModelParts, tier: Any, residents: Residents) -> None:
        super().__init__(parts, tier)
        self._residents = residents

    def begin(self, order: Sequence[int]) -> None:
        self._residents.begin()
        super().begin(order)

    def enter(self, variant: int) -> None:
        self._residents.enter(variant)


class _ResidentChunks(Chunks):
    """The head as it is; an adapter of it has variants."""

    def __init__(self, parts: ModelParts, tier: Any, residents: Residents) -> None:
        super().__init__(parts.head, tier, parts.dtype)
        self._residents = residents

    def enter(self, variant: int) -> HeadChunk:
        self._residents.enter(variant)
        return super().enter(variant)


class PerturbedModel(StreamedModel):
    """noise: what perturbs. adapters: fqn -> parameter, when only these are perturbed; None: all parameters of the model.
    product_groups: as in `PerturbedBlocks`.

    `perturbation.pending` is what the weights lack; the caller keeps it up to date.
    """

    def __init__(
        self,
        parts: ModelParts,
        plan: Plan,
        device: Device,
        scratch: Path,
        *,
        noise: Noise,
        adapters: Mapping[str, nn.Parameter] | None = None,
        product_groups: int = 0,
        **options: Any,
    ) -> None:
        self.perturbation = Perturbation(noise)
        self.original = parts.checkpoint
        self._original_sources = parts.sources
        self.keys = {} if adapters is not None else noise_keys(parts.sources, parts.parameters)
        self._residents = Residents(self.perturbation, device.torch_device)
        self._rows: list[PerturbedRows] = []
        self._adapters = adapters
        self._product_groups = product_groups
        self.take_adapters()
        super().__init__(parts, plan, device, scratch, **options)

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Tensor of the checkpoint -> the dtype that the user's own checkpoint has for it."""
        return {name: TORCH_DTYPES[entry.dtype] for name, entry in self.original.tensors.items()}

    @contextmanager
    def under(self, variants: Sequence[Variant]) -> Iterator[None]:
        """`forward`, `last_logits` and the head can be asked for these versions of the weights inside; variant i is i."""
        self.perturbation.variants = variants
        try:
            yield
        finally:
            self.perturbation.variants = (Variant(),)

    def losses(
        self, inputs: Sequence[dict[str, Any]], labels: Sequence[torch.Tensor], variants: Sequence[Variant]
    ) -> torch.Tensor:
        """The step's loss under every variant of the weights, fp32 [variants]; each block is fetched once.

        inputs, labels and the loss as in `train_step`, without gradients.
        """
        with self.under(variants):
            return self.step_losses(inputs, labels, len(variants)).losses

    def take_adapters(self) -> None:
        """The adapters' values are now what is perturbed and moved."""
        if self._adapters is None:
            return
        self._residents.clear()
        for name, parameter in self._adapters.items():
            self._residents.add(
                parameter_key(name), parameter.detach().float().cpu(), parameter.dtype,
                lambda value, parameter=parameter: setattr(parameter, "data", value), torch.float32,
            )  # fmt: skip

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
        changes = Changes(
            self.parts.sources, self.keys, self.perturbation.noise, self.perturbation.pending, self.stored_dtypes,
            None if rounds else torch.float32,
        )  # fmt: skip
        replay(self.parts.checkpoint, changes, directory, steps=steps, io_backend=self.io.backend, progress=progress)
        self.move_to(read_checkpoint(directory))

    def move_to(self, checkpoint: Checkpoint) -> None:
        """Streams from `checkpoint`, a fold of the original, from now on; nothing is pending then."""
        parts = self.parts.on(checkpoint, moved_sources(self._original_sources, self.original, checkpoint))
        self.tier.give_up()
        self.tier.move_to(parts.layouts)
        self._weights.move_to(parts)
        if parts.head is not None:
            self.head_tier.give_up()
            self.head_tier.move_to(parts.head.layouts)
            self._head_chunks.move_to(parts.head)
        for embedding, (_, _, source) in zip(self.embeddings, parts.embeddings, strict=True):
            embedding.move_to(source)
        self.parts = parts
        self._residents.clear()
        self._load_edges(parts.edges)
        self.perturbation.pending = ()

    def _prepare(self, inputs: Sequence[dict[str, Any]]) -> None:
        for rows in self._rows:
            rows.begin()
        super()._prepare(inputs)

    def _make_weights(self, plan: Plan) -> Weights:
        if self._adapters is not None:
            return _ResidentVariants(self.parts, self.tier, self._residents)
        for embedding, (name, _, source) in zip(self.embeddings, self.parts.embeddings, strict=True):
            weight = f"{name}.weight"
            self._rows.append(
                PerturbedRows(embedding, self.keys[weight], self.parts.dtype, source.dtype, self.perturbation)
            )
        pool = plan.slots[VARIANTS].carve_from(self._computing_slab)
        return PerturbedBlocks(
            self.parts, self.tier, pool, self.perturbation, self.keys, self._residents, self._rows,
            self.device.torch_device, self._product_groups,
        )  # fmt: skip

    def _make_chunks(self, plan: Plan) -> Any:
        if self._adapters is not None:
            return _ResidentChunks(self.parts, self.head_tier, self._residents)
        pool = plan.slots[HEAD_VARIANTS].carve_from(self._computing_slab)
        self._head_chunks = PerturbedChunks(
            self.parts.head, self.head_tier, pool, self.perturbation, self.keys, self.device.torch_device,
            self._product_groups,
        )  # fmt: skip
        return self._head_chunks

    def _take_edge(self, edge: EdgeTensor, tensor: torch.Tensor) -> None:
        super()._take_edge(edge, tensor)
        if edge.name in self.keys:
            stored = self._original_sources[edge.name].dtype
            self._residents.add(self.keys[edge.name], tensor, edge.dtype, edge.install, stored)
