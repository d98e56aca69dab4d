"""What weights policies stand on: the room that a model is opened in, tiers of what is streamed, and modules it is bound to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.memory.expert_guesses import ExpertGuesses
from finetune.memory.plan import Plan, Slots
from finetune.memory.slots import Slab
from finetune.offload.devices import Device
from finetune.offload.residency.expert_tiers import HostExperts
from finetune.offload.residency.io import IOEngine
from finetune.offload.residency.tiers import DeviceTier, HostTier, PassingTier, Tier
from finetune.offload.sizing.needs import DECODED, DEVICE_BLOCKS, DEVICE_HEAD, HOST_BLOCKS, HOST_HEAD
from finetune.offload.step.weights import Block, HeadRows, Key
from finetune.offload.weights.binding import Binding
from finetune.offload.weights.embedding import RowsOnDemand
from finetune.offload.weights.formats import PlainTensor, Stored
from finetune.offload.weights.parts import EdgeTensor, ModelParts
from finetune.offload.weights.streamed_experts import StreamedExperts


@dataclass(frozen=True, slots=True)
class Room:
    """What a model's weights are opened in. Whoever opens something here has it closed by one of the two stacks."""

    parts: ModelParts  # of the model
    model: nn.Module  # what is called; adapters may wrap that of `parts`
    plan: Plan  # how many slots there are
    device: Device  # where blocks compute
    io: IOEngine  # reads and writes files
    host: Slab  # the host tier, which the device copies from
    computing: Slab  # the tier that compute reads; the same one where it reads host memory
    scratch: Path  # a directory for what lives as long as the model is open
    embeddings: Sequence[RowsOnDemand]  # in the order of `parts.embeddings`
    closing: ExitStack  # closed with the model
    after_io: ExitStack  # closed once no I/O is under way
    guesses: ExpertGuesses = field(default_factory=ExpertGuesses)  # of experts, where these are streamed


class StreamedParts:
    """Blocks and chunks of the head in their tiers, and the modules that they are bound to."""

    def __init__(
        self, room: Room, blocks: Sequence[Any], chunks: Sequence[Any], make_tier: Callable[..., HostTier] = HostTier,
        make_experts: Callable[..., HostExperts] = HostExperts,
    ) -> None:  # fmt: skip
        """blocks, chunks: their layouts, or what `make_tier` takes in place of them. There may be more chunks than the head
        has: these only share its slots. make_experts: the tier of experts in host memory."""
        self._parts = room.parts
        self.blocks = _open_tier(room, (HOST_BLOCKS, DEVICE_BLOCKS), blocks, make_tier)
        self.head = _open_head(room, chunks, make_tier) if chunks else None
        self._rooms = open_rooms(room)
        self.experts: StreamedExperts | None = None
        if room.parts.experts:
            self.experts = StreamedExperts(room, self.blocks, make_experts)
            room.closing.callback(self.experts.close)
        self.num_chunks = 0 if room.parts.head is None else len(room.parts.head.layouts)
        self.head_rows: HeadRows | None = None
        """Of the chunk of the head that is bound."""

    @property
    def stall_seconds(self) -> float:
        tiers = [self.blocks] + [self.head] * (self.head is not None)
        tiers += [] if self.experts is None else self.experts.tiers
        of_hosts = sum(tier.host_stall_seconds for tier in tiers if isinstance(tier, DeviceTier))
        return sum(tier.stall_seconds for tier in tiers) + of_hosts

    def begin(self, order: Sequence[int]) -> None:
        """The visits of blocks to come."""
        self.blocks.begin(order)
        if self.experts is not None:
            self.experts.begin(order)

    def tier(self, key: Key) -> Tier:
        return self.blocks if type(key) is Block else self.head

    def acquire(self, key: Key) -> dict[str, torch.Tensor]:
        """The stored tensors, by local name, valid until `release`."""
        tier = self.tier(key)
        tier.acquire(key.index)
        if self.experts is not None and type(key) is Block:
            self.experts.visit(key.index)
        return tier.views(key.index)

    def bind(self, key: Key, views: dict[str, torch.Tensor], trained: frozenset[str] = frozenset()) -> None:
        """trained: as in `Binding.bind`. One chunk of several is not bound to the head's module, only decoded."""
        binding, head = self._binding(key), self._parts.head
        if binding is not None:
            binding.bind(views, trained, self._rooms if type(key) is Block else ())
        if type(key) is Block:
            return
        if binding is not None:
            self.head_rows = HeadRows(0, head.module.weight, head.module.bias)
        else:
            layout, dtype = head.layouts[key.index], self._parts.dtype
            bias = layout.decode(views, "bias", dtype) if "bias" in layout.weights else None
            self.head_rows = HeadRows(head.starts[key.index], layout.decode(views, "weight", dtype), bias)

    def gradients(self, key: Key) -> dict[str, torch.Tensor]:
        """What compute has left at the modules that `key` is bound to, by local name."""
        binding = self._binding(key)
        return {} if binding is None else binding.gradients()

    def unbind(self, key: Key) -> None:
        binding = self._binding(key)
        if binding is not None:
            binding.unbind()
        if type(key) is not Block:
            self.head_rows = None

    def drop_gradients(self) -> None:
        """What backward has left for those of experts is not wanted."""
        for matrices in self._parts.experts:
            matrices.waiting.clear()

    def release(self, key: Key) -> None:
        self.tier(key).release(key.index)

    def begin_head(self) -> None:
        """Its chunks are wanted soon, each once."""
        if self.num_chunks:
            self.head.begin(range(self.num_chunks))

    def move_to(self, parts: ModelParts) -> None:
        """From now on slots are filled as `parts` says; the modules stay."""
        self.blocks.give_up()
        self.blocks.move_to(parts.layouts)
        if parts.head is not None:
            self.head.give_up()
            self.head.move_to(parts.head.layouts)
        if self.experts is not None:
            self.experts.move()

    def is_bound(self, key: Key) -> bool:
        """Whether modules compute with it: one chunk of the head among several is given to the tiled loss alone."""
        return type(key) is Block or self.num_chunks == 1

    def _binding(self, key: Key) -> Binding | None:
        """None: of a chunk of several."""
        if type(key) is Block:
            return self._parts.bindings[key.index]
        return self._parts.head.binding if self.num_chunks == 1 else None


def read_edges(io: IOEngine, edges: Sequence[EdgeTensor]) -> Iterator[tuple[EdgeTensor, Stored]]:
    """Every edge with what is stored of it."""
    files: dict[Path, int] = {}
    for edge in edges:
        yield edge, edge.source.load(partial(read_tensor, io, files))
    for file in files.values():
        io.close_file(file)


def read_tensor(io: IOEngine, files: dict[Path, int], stored: PlainTensor) -> torch.Tensor:
    """files: those that are open."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    reads = []
    for extent in stored.extents:
        if extent.path not in files:
            files[extent.path] = io.open(extent.path)
        reads.append((files[extent.path], extent.file_offset, extent.num_bytes, tensor.data_ptr() + extent.target_offset))
    if reads:
        io.wait(io.submit_reads(reads))
    return tensor


def open_rooms(room: Room) -> list[torch.Tensor | None]:
    """Where weights of a block may stay decoded, as `Binding.bind` takes it: None where the plan has no room."""
    pools = (slots for name, slots in room.plan.slots.items() if name.startswith(DECODED))
    return [slots.carve_from(room.computing).lease().buffer if slots.count else None for slots in pools]


def _open_head(room: Room, chunks: Sequence[Any], make_tier: Callable[..., HostTier]) -> Tier:
    slots = room.plan.slots[HOST_HEAD]
    if slots.count:
        return _open_tier(room, (HOST_HEAD, DEVICE_HEAD), chunks, make_tier)
    tier = PassingTier(chunks, room.io, slots.slot_bytes)
    room.closing.callback(tier.close)
    return tier


def _open_tier(
    room: Room, pools: tuple[str, str], layouts: Sequence[Any], make_tier: Callable[..., HostTier]
) -> Tier:
    """The nearest tier, the host's or a device's above it. pools: the names that the plan has for them."""
    slots = room.plan.slots[pools[0]]
    host = make_tier(layouts, room.io, slots.carve_from(room.host), _resident(slots, len(layouts)), slots.lookahead)
    tier: Tier = host
    if not room.device.shares_host_memory:
        slots = room.plan.slots[pools[1]]
        tier = DeviceTier(host, room.device, slots.carve_from(room.computing), _resident(slots, len(layouts)), slots.lookahead)
    room.closing.callback(tier.close)
    return tier


def _resident(slots: Slots, count: int) -> frozenset[int]:
    """Of blocks the plan says which ones stay; chunks of the head do where there is a slot for each of so many."""
    if slots.pool.most_kept:
        return slots.resident
    return frozenset(range(count)) if slots.count == count else frozenset()
