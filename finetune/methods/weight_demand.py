"""What training the model's own weights asks of memory and disk, from shapes alone; the optimizer that is configured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import prod

import torch

from finetune.config import Config
from finetune.methods.selection import interval_of, make_selection
from memory.errors import UserError
from offload.update.kernels import StateFormat
from offload.update.parts import TrainedParts
from offload.update.rules import OPTIMIZERS, SUBSPACES
from offload.update.rules.rule import Rule
from offload.update.stream import FACTORS, Keeping
from offload.update.units import UpdateUnit
from offload.weights.parts import ModelParts


@dataclass(frozen=True, slots=True)
class StoreSize:
    """What training the model's own weights asks of the disk, at most: the working store, and what a step reads (masters and
    state) and writes of it, of so many pieces. trained_share: of the blocks, in a step. ends: whether embedding and head are
    trained."""

    num_bytes: int
    read_bytes: int
    write_bytes: int
    pieces: int
    trained_share: float
    ends: bool


def make_rule(config: Config, of_blocks: bool = False) -> Rule:
    """The optimizer that the configuration names; of_blocks: what updates blocks, which differs where frugal projects."""
    if of_blocks and config.selection.subspace != "blocks":
        return _make(SUBSPACES[config.selection.subspace], config, refresh_steps=interval_of(config))
    return _make(OPTIMIZERS[config.optimizer.name], config)


def _make(kind: type[Rule], config: Config, **given: float) -> Rule:
    """Numbers that are not given are the configuration's, see [Note: a rule's numbers] in `offload.update.rules.rule`."""
    sections = [config.selection, config.training, config.optimizer]
    found = {key: getattr(section, key) for section in sections for key in type(section).model_fields}
    return kind(**{field.name: (found | given)[field.name] for field in fields(kind)})


def check_rounding(config: Config, parts: ModelParts, names: Iterable[str]) -> None:
    """Raises UserError where these parameters, as they are stored, can't be rounded as configured."""
    key, remedy = ("zo.rounding stochastic", "nearest") if config.method == "zo" else ("optimizer.master none", "float32")
    at_random = config.zo.rounding == "stochastic" if config.method == "zo" else config.optimizer.master == "none"
    fp16 = next((name for name in sorted(names) if parts.sources[name].dtype == torch.float16), None)
    if at_random and fp16 is not None:
        raise UserError(
            f"{fp16} is stored as float16, which {key} cannot round stochastically: set it to {remedy}, or save the model in "
            "bfloat16"
        )


def make_keeping(config: Config) -> Keeping:
    return Keeping(StateFormat(config.optimizer.state), config.optimizer.master == "float32")


def largest_piece_bytes(config: Config, trained: TrainedParts) -> int:
    """Of a piece with its state: what a buffer of the optimizer must hold."""
    keeping = make_keeping(config)
    return max(
        keeping.piece_format(unit, index, rule).num_bytes
        for number, unit in enumerate(trained.units)
        for rule in [make_rule(config, of_blocks=number < len(trained.blocks))]
        for index in range(FACTORS if rule.has_directions else 0, len(unit.pieces))
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
    update_bytes = max(2 * rows + (block if spills else 0), block) + _direction_bytes(config, trained)
    return max(visit_bytes, loss_bytes, update_bytes), waiting


def update_host_bytes(config: Config, trained: TrainedParts, itemsize: int) -> int:
    """What updates allocate in host memory where compute has its own: a unit's gradients, twice where rows are added to them
    or where they go by the disk, and what the rule makes of them."""
    return 2 * itemsize * max(_elements(unit) for unit in trained.units) + _direction_bytes(config, trained)


def _direction_bytes(config: Config, trained: TrainedParts) -> int:
    """What rules allocate that look at a unit more than once."""
    return max(
        make_rule(config, of_blocks=number < len(trained.blocks)).temporary_bytes(unit)
        for number, unit in enumerate(trained.units)
    )


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
        parts = ((f.master_offset, f.master_bytes, f.state_bytes, 1) for f in formats)
        return tuple(sum(part) for part in zip(*parts, strict=True))

    blocks = [size(unit, make_rule(config, of_blocks=True)) for unit in trained.blocks if unit.fqns]
    ends = [size(u) for u in trained.units[len(trained.blocks) :] if u.fqns and selection.ends]
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
    return StoreSize(total, read, weights + masters + state, pieces, len(active) / max(1, len(blocks)), bool(ends))


def _elements(unit: UpdateUnit) -> int:
    """Of what is trained in a unit."""
    return sum(prod(unit.layout.views[name].shape) for name in unit.fqns)
