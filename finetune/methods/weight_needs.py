"""What training the model's own weights asks of memory and disk, from shapes alone; the optimizer that is configured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import chain
from math import prod

from finetune.config import Config
from finetune.memory.needs import Item, Lasts, Needs, Tier
from finetune.methods.selection import interval_of, make_selection
from finetune.offload.sizing.dry_run import VisitSize
from finetune.offload.sizing.needs import EDGES, STEP, TEXTS, VISIT, Streamed, state_needs, update_needs
from finetune.offload.update.kernels import StateFormat
from finetune.offload.update.parts import TrainedParts
from finetune.offload.update.rules import OPTIMIZERS, SUBSPACES
from finetune.offload.update.rules.rule import Rule
from finetune.offload.update.stream import FACTORS, Keeping
from finetune.offload.update.units import UpdateUnit
from finetune.offload.weights.parts import ModelParts
from finetune.planned_run import MeasuredBatch, StoreSize


def make_rule(config: Config, of_blocks: bool = False) -> Rule:
    """The optimizer that the configuration names; of_blocks: what updates blocks, which differs where frugal projects."""
    if of_blocks and config.selection.subspace != "blocks":
        return _make(SUBSPACES[config.selection.subspace], config, interval=interval_of(config))
    return _make(OPTIMIZERS[config.optimizer.name], config)


def _make(kind: type[Rule], config: Config, **given: float) -> Rule:
    """Numbers that are not given are the configuration's, see [Note: a rule's numbers] in
    `finetune.offload.update.rules.rule`."""
    sections = [config.selection, config.training, config.optimizer]
    found = {key: getattr(section, key) for section in sections for key in type(section).model_fields}
    return kind(**{field.name: (found | given)[field.name] for field in fields(kind)})


def streams_experts(config: Config) -> bool:
    """Whether experts are units of their own: not for optimizers that look at whole parameters, which have all experts."""
    rule = make_rule(config, of_blocks=True)
    return rule.passes == 1 and not rule.has_directions


def make_keeping(config: Config) -> Keeping:
    return Keeping(StateFormat(config.optimizer.state), config.optimizer.master == "float32")


COMPUTE_BOUND_TOKENS = 2048
"""A trained weight takes 8 operations a token and moves some 26 bytes a step: with so many tokens a CPU computes longer than
its disk moves."""


def streamed_with_tables(streamed: Streamed, trained: TrainedParts) -> Streamed:
    """Rows of an embedding that are trained go through the slots of the head."""
    sizes = (part.unit.layout.num_bytes for part in trained.table)
    return replace(
        streamed, chunk_bytes=max([streamed.chunk_bytes, *sizes]), chunks=streamed.chunks + len(trained.table)
    )


def trained_weight_needs(
    config: Config, parts: ModelParts, trained: TrainedParts, batch: MeasuredBatch, streamed: Streamed, on_device: bool
) -> Needs:
    """What training the model's own weights adds to what a batch takes.

    streamed: as `streamed_with_tables` has it. Of the working store, what is there already is not counted.
    """
    itemsize, edge_bytes = parts.dtype.itemsize, parts.edge_bytes
    store = store_size(config, trained)
    moments, waiting_bytes = _moments(config, parts, trained, batch)
    waiting = 0
    # Buffers may be as large as what a rule with directions keeps of a whole unit, and the disk has little to do there.
    if not make_rule(config, of_blocks=True).has_directions:
        block_pieces = max(len(unit.pieces) for unit in trained.blocks)
        if on_device:  # see [Note: updates beside an accelerator]: one block's are written while the next one's are read
            waiting = min(2 * block_pieces, store.pieces)
        elif store.trained_share == 1 and batch.rows >= COMPUTE_BOUND_TOKENS:
            waiting = block_pieces
    data = config.output / "store" / "data"
    existing_bytes = data.stat().st_size if data.is_file() else 0
    host_edge_bytes = 2 * edge_bytes  # the image of what is stored, and gradients on their way to it
    # gradients of the rows, and what one micro-batch adds to them; those that wait
    step_bytes = 2 * batch.row_bytes + (0 if on_device else waiting_bytes)
    needs = Needs.of(
        *_visit_items(moments[0], batch.visit),
        *(Item(VISIT, num_bytes, Tier.COMPUTE, Lasts.MOMENT) for num_bytes in moments[1:]),
        Item(STEP, step_bytes, Tier.COMPUTE, Lasts.STEP),
        Item(EDGES, edge_bytes if on_device else host_edge_bytes, Tier.COMPUTE),
        Item("working store", max(0, store.num_bytes - existing_bytes), Tier.DISK),
    )
    needs += state_needs(_largest_piece_bytes(config, trained), store.pieces, waiting)
    if not on_device:
        return needs
    # A unit's gradients, twice where rows are added to them or where they go by the disk, and what the rule makes of them.
    unit_bytes = 2 * itemsize * max(_elements(unit) for unit, _ in _ruled(config, trained)) + _direction_bytes(config, trained)
    largest = max(*streamed.block_bytes, streamed.chunk_bytes, *(size.slot_bytes for size in streamed.experts))
    return needs + update_needs(largest, unit_bytes + host_edge_bytes + batch.row_bytes)


def _visit_items(num_bytes: int, visit: VisitSize) -> tuple[Item, ...]:
    """What a visit takes; less, where what is as long as a text is in a file."""
    if not visit.near_bytes:
        return (Item(VISIT, num_bytes, Tier.COMPUTE, Lasts.MOMENT),)
    near_bytes = num_bytes - visit.peak_bytes + visit.near_bytes
    return (
        Item(VISIT, num_bytes, Tier.COMPUTE, Lasts.MOMENT, without_pool=TEXTS),
        Item(VISIT, near_bytes, Tier.COMPUTE, Lasts.MOMENT, with_pool=TEXTS),
    )


def _ruled(config: Config, trained: TrainedParts) -> Iterator[tuple[UpdateUnit, Rule]]:
    """Units, and what updates them; of the experts of a stack one."""
    of_blocks, of_ends = make_rule(config, of_blocks=True), make_rule(config)
    for unit in chain(trained.blocks, (stack.largest for stack in trained.stacks)):
        yield unit, of_blocks
    for unit in trained.ends:
        yield unit, of_ends


def _largest_piece_bytes(config: Config, trained: TrainedParts) -> int:
    """Of a piece with its state: what a buffer of the optimizer must hold."""
    keeping = make_keeping(config)
    return max(
        keeping.piece_format(unit, index, rule).num_bytes
        for unit, rule in _ruled(config, trained)
        for index in range(FACTORS if rule.has_directions else 0, len(unit.pieces))
    )


def _moments(
    config: Config, parts: ModelParts, trained: TrainedParts, batch: MeasuredBatch
) -> tuple[tuple[int, int, int], int]:
    """What a visit, a loss tile and an update allocate where weights have gradients, and what gradients of a unit wait beside
    them."""
    visit_bytes, loss_bytes, itemsize = batch.visit.peak_bytes, batch.loss_bytes, parts.dtype.itemsize
    lanes, of_lane = batch.shape.micro_batches, batch.visit.waiting_bytes
    visit_bytes += (lanes - 1) * of_lane
    block = max(_elements(unit) for unit in trained.blocks) * itemsize
    largest = max((prod(weight.shape) for layout in parts.layouts for weight in layout.weights.values()), default=0) * itemsize
    if lanes > 1:
        visit_bytes += largest  # of the second micro-batch, before it is added
    chunk = max((_elements(part.unit) for part in trained.head), default=0)
    if chunk:
        # fp32 sums, the product that is added to them, the result; a head of one chunk: .grad and what is added
        loss_bytes += chunk * (4 + 2 * itemsize if len(trained.head) > 1 else 2 * itemsize)
    rows = max((_elements(part.unit) for part in (*trained.head, *trained.table)), default=0) * itemsize
    spills = config.optimizer.clipping == "exact" and config.training.max_grad_norm
    waiting_bytes = block if spills else rows if trained.tied else 0
    update_bytes = max(2 * rows + (block if spills else 0), block) + _direction_bytes(config, trained)
    if trained.stacks:  # of one expert: a gradient, what a lane adds to it, zeros, what is on its way to the disk
        expert = max(_elements(stack.largest) for stack in trained.stacks) * itemsize
        update_bytes = max(update_bytes, lanes * of_lane + 4 * expert)
    return (visit_bytes, loss_bytes, update_bytes), waiting_bytes


def _direction_bytes(config: Config, trained: TrainedParts) -> int:
    """What rules allocate that look at a unit more than once."""
    return max(rule.temporary_bytes(unit) for unit, rule in _ruled(config, trained))


def store_size(config: Config, trained: TrainedParts) -> StoreSize:
    """Upper bounds over all steps: the largest blocks count as the ones that are chosen."""
    keeping, of_ends = make_keeping(config), make_rule(config)
    selection = make_selection(config, len(trained.blocks))

    def size(unit: UpdateUnit, rule: Rule = of_ends) -> tuple[int, int, int, int]:
        """Bytes of weights, masters and state, and the number of pieces."""
        indices = [index for index, piece in enumerate(unit.pieces) if piece.segments]
        if rule.has_directions:
            indices.append(FACTORS)
        formats = [keeping.piece_format(unit, index, rule) for index in indices]
        parts = [(f.master_offset, f.master_bytes, f.state_bytes, 1) for f in formats]
        return tuple(sum(part) for part in zip((0, 0, 0, 0), *parts, strict=True))

    def block_size(index: int) -> tuple[int, int, int, int]:
        rule = make_rule(config, of_blocks=True)
        sizes = [size(trained.blocks[index], rule)]
        for stack in trained.of_block(index):
            sizes.append(tuple(stack.experts * part for part in size(stack.largest, rule)))
        return tuple(sum(part) for part in zip(*sizes, strict=True))

    blocks = [block_size(index) for index in range(len(trained.blocks)) if trained.trains(index)]
    ends = [size(unit) for unit in trained.ends if unit.fqns and selection.ends]
    active = sorted(blocks, key=sum)[-selection.layers :]
    moving = (blocks if selection.sign_scale is not None else active) + ends
    stated = active + ends
    weights, masters, pieces = (sum(unit[part] for unit in moving) for part in (0, 1, 3))
    state = sum(unit[2] for unit in stated)
    total = sum(unit[0] + unit[1] for unit in blocks + ends)
    total += sum(unit[2] for unit in (blocks + ends if selection.keeps_state else stated))
    if not selection.keeps_state:
        total += sum(unit[2] for unit in active)  # of blocks that were just left, until the step is committed
    if config.optimizer.versions == 2:
        total += weights + masters + state
    read = (masters + state) * of_ends.passes
    of_blocks = sorted((_block_elements(trained, index) for index in range(len(trained.blocks))), reverse=True)
    elements = sum(of_blocks[: len(blocks) if selection.sign_scale is not None else len(active)])
    elements += sum(_elements(unit) for unit in trained.ends if selection.ends)
    share = len(active) / max(1, len(blocks))
    end_share = sum(map(sum, ends)) / max(1, sum(map(sum, moving)))
    return StoreSize(total, read, weights + masters + state, pieces, elements, share, end_share)


def _block_elements(trained: TrainedParts, index: int) -> int:
    """Of what is trained in a block, with its experts."""
    stacks = trained.of_block(index)
    return _elements(trained.blocks[index]) + sum(stack.experts * prod(stack.shape) for stack in stacks)


def _elements(unit: UpdateUnit) -> int:
    """Of what is trained in a unit."""
    return sum(prod(unit.layout.views[name].shape) for name in unit.fqns)
