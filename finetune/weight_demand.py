"""What training the model's own weights asks of memory and disk, from shapes alone; the optimizer that is configured."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from finetune.config import Config
from finetune.methods.selection import Selection
from offload.adafactor import TEMPORARY_BYTES
from offload.model_parts import ModelParts
from offload.optimizer_stream import FACTORS, Keeping
from offload.trained_parts import TrainedParts
from offload.update_rules import Rule, StateFormat
from offload.update_units import UpdateUnit


@dataclass(frozen=True, slots=True)
class StoreSize:
    """What training the model's own weights asks of the disk, at most: the working store, and what a step reads (masters and
    state) and writes of it. trained_share: of the blocks, in a step. ends: whether embedding and head are trained."""

    num_bytes: int
    read_bytes: int
    write_bytes: int
    trained_share: float
    ends: bool


def make_rule(config: Config) -> Rule:
    """The optimizer that the configuration names."""
    options, numbers = config.optimizer, config.training
    betas = (numbers.adam_beta1, numbers.adam_beta2)
    return Rule(options.name, betas, numbers.adam_epsilon, numbers.weight_decay, options.momentum)


def make_keeping(config: Config) -> Keeping:
    return Keeping(StateFormat(config.optimizer.state), config.optimizer.master == "float32")


def largest_piece_bytes(config: Config, trained: TrainedParts) -> int:
    """Of a piece with its state: what a buffer of the optimizer must hold."""
    rule, keeping = make_rule(config), make_keeping(config)
    first = FACTORS if rule.name == "adafactor" else 0
    return max(
        keeping.piece_format(unit, index, rule).num_bytes
        for unit in trained.units
        for index in range(first, len(unit.pieces))
    )


def training_temporaries(
    config: Config, parts: ModelParts, trained: TrainedParts, visit_bytes: int, loss_bytes: int, lanes: int
) -> tuple[int, int]:
    """What a visit or a loss tile allocates where weights have gradients, and what gradients of a unit wait beside it."""
    itemsize = parts.dtype.itemsize
    block = max(_elements(unit) for unit in trained.blocks) * itemsize
    largest = max((prod(view.shape) for layout in parts.layouts for view in layout.views.values()), default=0) * itemsize
    if lanes > 1:
        visit_bytes += largest  # of the second micro-batch, before it is added
    chunk = max((_elements(part.unit) for part in trained.head), default=0)
    if chunk:
        # fp32 sums, the product that is added to them, the result; a head of one chunk: .grad and what is added
        loss_bytes += chunk * (4 + 2 * itemsize if len(trained.head) > 1 else 2 * itemsize)
    rows = max((_elements(part.unit) for part in (*trained.head, *trained.table)), default=0) * itemsize
    spills = config.optimizer.clipping == "exact" and config.training.max_grad_norm
    waiting = block if spills else rows if trained.tied else 0
    looks_twice = config.optimizer.name in ("adafactor", "lamb")
    update_bytes = 2 * rows + (block if spills else 0) + (TEMPORARY_BYTES if looks_twice else 0)
    return max(visit_bytes, loss_bytes, update_bytes), waiting


def update_host_bytes(trained: TrainedParts, itemsize: int) -> int:
    """What updates allocate in host memory where compute has its own: a unit's gradients, twice where rows are added to them
    or where they go by the disk, and what the rule makes of them."""
    return 2 * itemsize * max(_elements(unit) for unit in trained.units) + TEMPORARY_BYTES


def store_size(config: Config, trained: TrainedParts) -> StoreSize:
    """Upper bounds over all steps: the largest blocks count as the ones that are chosen."""
    rule, keeping = make_rule(config), make_keeping(config)
    selection = Selection(config, len(trained.blocks))

    def size(unit: UpdateUnit) -> tuple[int, int, int]:
        indices = [index for index, piece in enumerate(unit.pieces) if piece.segments]
        if rule.name == "adafactor":
            indices.append(FACTORS)
        formats = [keeping.piece_format(unit, index, rule) for index in indices]
        parts = ((f.master_offset, f.master_bytes, f.state_bytes) for f in formats)
        return tuple(sum(part) for part in zip(*parts, strict=True))

    blocks = [size(unit) for unit in trained.blocks if unit.fqns]
    ends = [size(u) for u in trained.units[len(trained.blocks) :] if u.fqns and selection.ends]
    active = sorted(blocks, key=sum)[-selection.layers :]
    moving = (blocks if selection.method == "frugal" else active) + ends
    stated = active + ends
    weights, masters = (sum(unit[part] for unit in moving) for part in (0, 1))
    state = sum(unit[2] for unit in stated)
    total = sum(unit[0] + unit[1] for unit in blocks + ends)
    total += sum(unit[2] for unit in (blocks + ends if selection.keeps_state else stated))
    if not selection.keeps_state:
        total += sum(unit[2] for unit in active)  # of blocks that were just left, until the step is committed
    if config.optimizer.versions == 2:
        total += weights + masters + state
    read = (masters + state) * (2 if rule.name == "lamb" else 1)
    return StoreSize(total, read, weights + masters + state, len(active) / max(1, len(blocks)), bool(ends))


def _elements(unit: UpdateUnit) -> int:
    """Of what is trained in a unit."""
    return sum(prod(unit.layout.views[name].shape) for name in unit.fqns)
