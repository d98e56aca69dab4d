"""What a streamed model needs, for the planner: its slots, and in which order more of them are worth their memory.

The names of pools are those by which the engine carves them out of the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest

from finetune.memory.needs import Item, Lasts, Needs, Pool, Step, Tier, Worth, ascent
from finetune.memory.units import MIB, PAGE_BYTES, round_up
from finetune.offload.devices import Device
from finetune.offload.weights.experts import StackedMatrices
from finetune.offload.weights.layout import aligned_bytes
from finetune.offload.weights.parts import ModelParts

HOST_BLOCKS = "host blocks"
DEVICE_BLOCKS = "device blocks"
HOST_HEAD = "host head"
DEVICE_HEAD = "device head"
ACTIVATIONS = "activations"
HIDDEN_STATES = "hidden states"
LANES_NEAR = "more micro-batches at the head"
TEXTS = "hidden states of texts"
STATE = "optimizer state"
UPDATE = "update"
VARIANTS = "variants of blocks"
HEAD_VARIANTS = "variants of the head"
EXPERT_VARIANTS = "variants of experts"
GRAPHS = "graphs of blocks"
DECODED = "decoded weights"  # begins the names of such pools

PROCESS = "process (interpreter, libraries, model skeleton)"
EDGES = "embeddings, norms, other resident weights"
VISIT = "one block visit and the loss"
STEP = "inputs and hidden states of a step"
RUNNING = "hidden states of the micro-batch that runs"
BLOCK_INPUTS = "block inputs kept for backward"
TEXTS_ON_DISK = "block inputs and hidden states of texts"  # of which a visit computes a chunk at a time

STAGING_BYTES = 8 * MIB
ACTIVATION_SLOTS = 4
MIN_STATE_SLOTS = 3  # of an optimizer on disk: one is read, one is updated, one is written
DECODED_WEIGHTS = 16  # of a block, at most: experts of many modules are not worth a pool each
STATE_SLOTS = 12  # keep a disk busy in both directions
WAITING_STEPS = 64  # in which more of them are offered: each is a plan
ALLOCATOR_FACTOR = 1.1  # of a device: what PyTorch's allocator loses there between tensors that stay for long
MARGIN_BYTES = 16 * MIB  # Python objects, small tensors, library buffers that grow during the first steps


@dataclass(frozen=True, slots=True)
class ExpertSize:
    """Matrices of experts that share slots."""

    slot_bytes: int  # of one, wherever in its pages and on which device it lies
    count: int  # in the model
    block_count: int  # in one block, at most
    per_token: float  # of a stack that a token is multiplied by, as a share of it
    stacks: tuple[int, ...]  # numbers of the stacks that they are in

    @property
    def pools(self) -> tuple[str, str]:
        """Of their slots, in host memory and on the device."""
        return f"host experts like those of stack {self.stacks[0]}", f"device experts like those of stack {self.stacks[0]}"

    def read_bytes(self, slots: int, tokens: int, lanes: int, train: bool) -> int:
        """That a step fetches about, where tokens choose evenly. slots: of them that keep what they hold. tokens: of a lane."""

        def chosen(tokens: int) -> float:
            return self.count * (1 - (1 - self.per_token) ** tokens)

        passes = 2 if train else 1
        if slots >= self.block_count:  # what one lane has fetched is there for the others, and for gradients
            reads = passes * max(0.0, chosen(lanes * tokens) - slots)
        else:
            reads = lanes * (passes + train) * chosen(tokens)
        return int(reads * self.slot_bytes)


def expert_sizes(experts: Sequence[StackedMatrices]) -> tuple[ExpertSize, ...]:
    """The largest first."""
    by_size: dict[int, list[StackedMatrices]] = {}
    for matrices in experts:
        tensors = matrices.stack.matrix(0).tensors.values()
        by_size.setdefault(sum(round_up(tensor.num_bytes) + PAGE_BYTES for tensor in tensors), []).append(matrices)
    return tuple(_expert_size(slot_bytes, by_size[slot_bytes]) for slot_bytes in sorted(by_size, reverse=True))


def _expert_size(slot_bytes: int, experts: Sequence[StackedMatrices]) -> ExpertSize:
    counts: dict[int, int] = {}
    for matrices in experts:
        stack = matrices.stack
        counts[stack.block] = counts.get(stack.block, 0) + stack.weight.shape[0]
    per_token = min(1.0, max(one.stack.experts_per_token / one.stack.weight.shape[0] for one in experts))
    numbers = tuple(one.number for one in experts)
    return ExpertSize(slot_bytes, sum(counts.values()), max(counts.values()), per_token, numbers)


@dataclass(frozen=True, slots=True)
class Streamed:
    """What goes through slots in every pass over the weights."""

    block_bytes: tuple[int, ...]  # of each block
    chunk_bytes: int  # of the largest chunk of the head, or of a table that is trained
    chunks: int  # 0: the model has no head that is streamed
    experts: tuple[ExpertSize, ...] = ()  # of matrices of experts that are fetched by themselves

    @classmethod
    def of(cls, parts: ModelParts, on_device: bool) -> Streamed:
        """on_device: with room for what an accelerator wants aligned."""

        def size(layout) -> int:
            return max(layout.num_bytes, aligned_bytes(layout)) if on_device else layout.num_bytes

        chunks = () if parts.head is None else parts.head.layouts
        return cls(
            tuple(map(size, parts.layouts)), max(map(size, chunks), default=0), len(chunks), expert_sizes(parts.experts)
        )

    @property
    def visit_bytes(self) -> int:
        """That a visit of a block fetches at most, with all of its experts."""
        return max(self.block_bytes) + sum(size.block_count * size.slot_bytes for size in self.experts)

    def holding(self, block_bytes: list[int], chunk_bytes: int, expert_bytes: Sequence[int]) -> Streamed:
        """With slots that hold these too. expert_bytes: of matrices, in the order of `experts`."""
        largest = (max(pair) for pair in zip(self.block_bytes, block_bytes, strict=True))
        experts = (
            replace(size, slot_bytes=max(size.slot_bytes, num_bytes))
            for size, num_bytes in zip(self.experts, expert_bytes, strict=True)
        )
        return replace(
            self, block_bytes=tuple(largest), chunk_bytes=max(self.chunk_bytes, chunk_bytes), experts=tuple(experts)
        )


def process_needs(device: Device, baseline_bytes: int, code_bytes: int) -> Needs:
    """baseline_bytes: the process before anything is opened. code_bytes: what matrix products compile for themselves."""
    return Needs.of(
        Item(PROCESS, baseline_bytes, Tier.HOST),
        Item("disk staging", STAGING_BYTES, Tier.HOST),
        Item("generated code of matrix products", code_bytes, Tier.HOST, Lasts.STEP),
        Item("libraries and context of the accelerator, assumed", device.assumed_host_bytes, Tier.HOST),
        Item("kernels of the accelerator", device.traits.host_libraries_bytes, Tier.HOST),
        Item("margin", MARGIN_BYTES, Tier.HOST),
        Item("workspaces of kernels", device.traits.libraries_bytes, Tier.DEVICE),
    )


def stream_needs(
    streamed: Streamed,
    on_device: bool,
    resident_blocks: int | None = None,
    lookahead: int | None = None,
    expert_slots: int | None = None,
    head_passes: bool = False,
) -> Needs:
    """Slots for blocks and for chunks of the head. A host slot is held until its copy to a device is done: one more keeps the
    disk busy meanwhile.

    resident_blocks: None: as many as there is room for. lookahead: blocks read ahead; None: up to two.
    expert_slots: for matrices of experts; None: as many as there is room for.
    head_passes: whether chunks of the head do without a slot where there is no room for one: see `passing_head`.
    """
    blocks, chunks = len(streamed.block_bytes), streamed.chunks

    def rings(ahead: int) -> dict[str, int]:
        return {HOST_BLOCKS: ahead + 1 + on_device, DEVICE_BLOCKS: ahead + 1}

    pools = [
        Pool(
            name, "block slots ({slots} x {size})", tier, max(streamed.block_bytes), rings(lookahead or 0)[name],
            kept=min(resident_blocks or 0, blocks), most_kept=blocks, most=blocks,
            busy=1 + (on_device and tier is Tier.HOST),
        )
        for name, tier in ((HOST_BLOCKS, Tier.HOST), (DEVICE_BLOCKS, Tier.DEVICE))
    ]  # fmt: skip
    steps = []
    if lookahead is None:
        steps.append(Step(Worth.NEXT_BLOCK, rings(min(1, blocks - 1))))
        steps.append(Step(Worth.LATER_BLOCKS, rings(min(2, blocks - 1))))
    if resident_blocks is None:
        steps += ascent(Worth.RESIDENT_BLOCKS, HOST_BLOCKS, blocks) + ascent(
            Worth.RESIDENT_BLOCKS, DEVICE_BLOCKS, blocks
        )
    if chunks:
        pools += [
            Pool(name, "head slots ({slots} x {size})", tier, streamed.chunk_bytes, 1 - head_passes, most=chunks)
            for name, tier in ((HOST_HEAD, Tier.HOST), (DEVICE_HEAD, Tier.DEVICE))
        ]
    if head_passes:
        steps.append(Step(Worth.NEXT_CHUNK, {HOST_HEAD: 1}))
    experts = _expert_needs(streamed.experts, on_device, expert_slots) if streamed.experts else Needs()
    if chunks > 1:
        steps.append(Step(Worth.NEXT_CHUNK, {HOST_HEAD: 2, DEVICE_HEAD: 2}))
        steps += [Step(Worth.WHOLE_HEAD, {name: chunks}) for name in (HOST_HEAD, DEVICE_HEAD)]
    return Needs.of(*pools, *steps) + experts


def passing_head(loss_bytes: int, streamed: Streamed) -> Needs:
    """Of the loss, where chunks of the head pass through the memory that visits of blocks leave to it."""
    return Needs.of(Item(VISIT, loss_bytes + streamed.chunk_bytes + PAGE_BYTES, Tier.COMPUTE, Lasts.MOMENT))


def _expert_needs(sizes: Sequence[ExpertSize], on_device: bool, slots: int | None) -> Needs:
    """slots: for each size; None: as many as there is room for."""
    pools, kept, rings = [], {}, {}
    for size in sizes:
        for name, tier in zip(size.pools, (Tier.HOST, Tier.DEVICE), strict=True):
            held = int(on_device and tier is Tier.HOST)  # by a copy
            label = "slots for matrices of experts ({slots} x {size})"
            ring = min((slots or 1) + held, size.count)
            pools.append(
                Pool(name, label, tier, size.slot_bytes, ring, most_kept=size.count, most=size.count, busy=1 + held)
            )
            kept[name] = size.count
            rings[name] = max(_EXPERTS_AHEAD[-1], size.block_count)
    if slots is not None:
        return Needs.of(*pools)
    steps = [Step(Worth.NEXT_EXPERTS, dict.fromkeys(kept, ring)) for ring in _EXPERTS_AHEAD]
    steps.append(Step(Worth.BLOCKS_EXPERTS, rings))
    for i in reversed(range(max(kept.values()).bit_length())):
        steps.append(Step(Worth.RESIDENT_EXPERTS, kept=dict.fromkeys(kept, 1 << i)))
    return Needs.of(*pools, *steps)


_EXPERTS_AHEAD = (2, 4, 8, 16)


def decoded_needs(weight_bytes: Iterable[Collection[int]]) -> Needs:
    """Rooms in which weights of a block stay decoded while it is visited: one for the largest of any block, one for the second
    largest of any, and so on.

    weight_bytes: of each block, those of its weights that are decoded when they are multiplied by, decoded, the largest first.
    """
    by_rank = islice(zip_longest(*weight_bytes, fillvalue=0), DECODED_WEIGHTS)
    pools = [
        Pool(f"{DECODED} {rank}", "weights that stay decoded for a visit", Tier.COMPUTE, max(sizes), ring=0)
        for rank, sizes in enumerate(by_rank)
    ]
    return Needs.of(*pools, *(Step(Worth.DECODED_WEIGHTS, {pool.name: 1}) for pool in pools))


def block_input_needs(boundary_bytes: int, total_bytes: int, place: str) -> Needs:
    """boundary_bytes: one micro-batch's input of a block. total_bytes: all of a step's. place: "auto", "host" or "disk"."""
    kept = Item(BLOCK_INPUTS, total_bytes, Tier.COMPUTE, Lasts.FALLING, without_pool=ACTIVATIONS)
    if place == "host":
        return Needs.of(kept)
    label = "slots for block inputs on their way to disk ({slots})"
    spilled = Needs.of(
        kept,
        Pool(ACTIVATIONS, label, Tier.HOST, boundary_bytes, ACTIVATION_SLOTS, optional=place == "auto"),
        Item("block inputs", total_bytes, Tier.DISK, Lasts.STEP, with_pool=ACTIVATIONS),
    )
    if place == "disk":
        return spilled
    return spilled + Needs.of(Step(Worth.BLOCK_INPUTS, {ACTIVATIONS: 0}, without_pool=HIDDEN_STATES))


@dataclass(frozen=True, slots=True)
class LaneSize:
    """Bytes of one micro-batch on its way through the model."""

    boundary_bytes: int  # of a block's input
    waiting_bytes: int  # that it holds where all wait in memory
    running_bytes: int  # that it holds during a visit where all others are on disk
    end_bytes: int  # that it takes between the last block and its gradient there, where all others are on disk
    near_bytes: int  # that it takes at the head, where several of them share a pass over it

    def disk_bytes(self, lanes: int) -> int:
        """Of hidden states and gradients, beside block inputs."""
        return lanes * (2 * self.boundary_bytes + self.end_bytes)


def waiting_needs(size: LaneSize, lanes: int, loss_bytes: int, place: str, shares_head: bool) -> Needs:
    """What micro-batches hold between visits.

    loss_bytes: of a tile of the loss. place: where they wait, "auto", "host" or "disk". shares_head: whether the head is read
    again for every so many micro-batches of which gradients are computed at a time.
    """
    whole = Item(STEP, lanes * size.waiting_bytes, Tier.COMPUTE, Lasts.STEP, without_pool=HIDDEN_STATES)
    if place == "host":  # beside a step that does otherwise, a pass of evaluation takes as much as alone
        return Needs.of(whole, replace(whole, name=RUNNING, without_pool="", with_pool=HIDDEN_STATES))
    label = "slots for hidden states on their way to disk ({slots})"
    needs = Needs.of(
        whole,
        Item(RUNNING, size.running_bytes, Tier.COMPUTE, Lasts.STEP, with_pool=HIDDEN_STATES),
        Item(VISIT, loss_bytes + size.end_bytes, Tier.COMPUTE, Lasts.MOMENT, with_pool=HIDDEN_STATES),
        Pool(HIDDEN_STATES, label, Tier.HOST, size.boundary_bytes, ACTIVATION_SLOTS, optional=place == "auto"),
        Item("hidden states", size.disk_bytes(lanes), Tier.DISK, Lasts.STEP, with_pool=HIDDEN_STATES),
    )
    if place == "auto":
        needs += Needs.of(Step(Worth.HIDDEN_STATES, {HIDDEN_STATES: 0}))
    if not shares_head:
        return needs
    counts = [(1 << i) - 1 for i in range(1, lanes.bit_length())]
    label = "more micro-batches that are at the head together ({slots} x {size})"
    return needs + Needs.of(
        Pool(LANES_NEAR, label, Tier.COMPUTE, size.near_bytes, ring=0, carved=False),
        *(Step(Worth.LANES_NEAR, {LANES_NEAR: count}, with_pool=HIDDEN_STATES) for count in counts),
    )


def text_needs(piece_bytes: int, file_bytes: int, place: str) -> Needs:
    """Where visits compute chunks of a text: what is as long as a text, in memory or in a file.

    piece_bytes: of a chunk's hidden states. file_bytes: of all that lies in the file at once. place: "auto", "host" or "disk".
    """
    if place == "host":
        return Needs()
    label = "chunks of texts on their way to disk ({slots} x {size})"
    needs = Needs.of(
        Pool(TEXTS, label, Tier.HOST, piece_bytes, ACTIVATION_SLOTS, optional=place == "auto", carved=False),
        Item(TEXTS_ON_DISK, file_bytes, Tier.DISK, Lasts.STEP, with_pool=TEXTS),
    )
    return needs + Needs.of(Step(Worth.HIDDEN_STATES, {TEXTS: 0})) if place == "auto" else needs


def graph_needs(
    lane_bytes: int, lanes: int, blocks: int, comes_first: bool, boundary_bytes: int, on_device: bool, kept: int | None = None
) -> Needs:
    """Graphs of the last blocks, which are held for the shortest time, between forward and backward.

    lane_bytes: of a block's graph and one micro-batch, beside the block's input of `boundary_bytes`. comes_first: whether they
    are worth more than blocks that stay. kept: of so many blocks; None: of as many as there is room for, if block inputs stay
    in memory.
    """
    # Where block inputs go to disk, a kept graph has its own in memory yet.
    slot_bytes = lanes * (lane_bytes if kept is None else lane_bytes + boundary_bytes)
    slot_bytes = int(slot_bytes * (ALLOCATOR_FACTOR if on_device else 1))
    label = "graphs that backward needs not recompute ({slots} x {size})"
    pool = Pool(
        GRAPHS, label, Tier.COMPUTE, slot_bytes, ring=0, kept=min(kept or 0, blocks), most_kept=blocks, carved=False,
        falling=True,
    )  # fmt: skip
    if kept is not None:
        return Needs.of(pool)
    worth = Worth.GRAPHS_OF_COMPUTE if comes_first else Worth.OTHER_GRAPHS
    return Needs.of(pool, *ascent(worth, GRAPHS, blocks, without_pool=ACTIVATIONS))


def state_needs(slot_bytes: int, pieces: int, waiting: int) -> Needs:
    """Buffers through which the state of an optimizer moves.

    slot_bytes: of a piece with its state. pieces: that a step updates. waiting: buffers more than the usual ones that are of
    use where compute takes longer than the disk: what waits in them is not waited for.
    """
    counts = [(Worth.STATE_BUFFERS, count) for count in (MIN_STATE_SLOTS * 2, STATE_SLOTS)]
    apart = max(1, waiting // WAITING_STEPS)
    counts += [(Worth.WAITING_STATE, STATE_SLOTS + more) for more in range(apart, waiting + 1, apart)]
    label = "buffers for optimizer state ({slots} x {size})"
    return Needs.of(
        Pool(STATE, label, Tier.HOST, slot_bytes, MIN_STATE_SLOTS, most_kept=pieces, pinned=False),
        *(Step(worth, {STATE: count}) for worth, count in counts),
        *ascent(Worth.KEPT_STATE, STATE, pieces),
    )


def update_needs(image_bytes: int, gradient_bytes: int) -> Needs:
    """Of the largest unit that is updated, where compute is not in host memory."""
    label = "weights and gradients of what is updated"
    return Needs.of(Pool(UPDATE, label, Tier.HOST, image_bytes), Item(label, gradient_bytes, Tier.HOST))


def variant_needs(block_bytes: int, chunk_bytes: int, expert_bytes: int = 0) -> Needs:
    """Slots in which perturbed weights of a block, of a chunk of the head, and of a matrix of an expert (0: there are none that
    are fetched by themselves) are made, in the dtypes that compute."""
    label = "slots for perturbed weights ({slots})"
    of_experts = [Pool(EXPERT_VARIANTS, label, Tier.COMPUTE, expert_bytes)] if expert_bytes else []
    return Needs.of(
        *of_experts,
        Pool(VARIANTS, label, Tier.COMPUTE, block_bytes),
        Pool(HEAD_VARIANTS, label, Tier.COMPUTE, chunk_bytes),
        Step(Worth.SECOND_VARIANT, {VARIANTS: 2, HEAD_VARIANTS: 2}),
    )
