"""Updates of streamed weights in place: a unit's gradients meet its state, piece by piece, as the stream brings it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from finetune.offload.update import kernels
from finetune.offload.update.kernels import Sums
from finetune.offload.update.matrices import scaled
from finetune.offload.update.rules.rule import Direction, FirstPass, Rule
from finetune.offload.update.stream import FACTORS, Request, StatePiece, StateStream
from finetune.offload.update.units import Segment, UpdateUnit


@dataclass(frozen=True, slots=True)
class _Given:
    """What the update of a unit has for all of its pieces."""

    gradients: Mapping[str, torch.Tensor]
    """Local name -> contiguous gradient, fp32 or bf16."""
    directions: Mapping[str, Direction]
    """Local name -> what its elements move along instead, of a rule that has directions."""
    ratios: FirstPass | None
    """What each parameter's learning rate is multiplied by, of a rule with two passes."""
    learning_rate: float  # of the step
    grad_scale: float
    """What gradients are multiplied by."""
    seed: int
    """Of stochastic rounding."""

    def along(self, segment: Segment) -> torch.Tensor:
        """What a segment's elements move along; longer, where it is a gradient."""
        if self.directions:
            return self.directions[segment.name].of(segment.first_element, segment.count)
        return self.gradients[segment.name].view(-1)[segment.first_element :]

    def ratio(self, segment: Segment) -> float:
        return 1.0 if self.ratios is None else self.ratios[segment.name]


class Optimizer:
    """Updates units with the state that `stream` brings. seed: of stochastic rounding and projections. Not thread-safe."""

    def __init__(self, stream: StateStream, *, seed: int, threads: int) -> None:
        self._stream = stream
        self._keeping = stream.keeping
        self._seed = seed
        self._threads = threads

    def update(
        self, request: Request, image: torch.Tensor, gradients: Mapping[str, torch.Tensor],
        learning_rate: float, grad_scale: float, step: int,
    ) -> Sums:  # fmt: skip
        """Updates the trained parameters of a unit in place, in its image (uint8), and starts to write their new version.

        gradients: local name -> contiguous gradient, fp32 or bf16. step: of the run, from 1; it seeds stochastic rounding.
        """
        indices = [index for index in request.piece_indices() if _segments(request, index, gradients)]
        if not indices:
            return Sums(0.0, 0.0)
        directions: Mapping[str, Direction] = {}
        ratios: FirstPass | None = None
        if request.rule.has_directions:
            directions = self._observe(request, gradients, grad_scale)
        if request.rule.passes == 2:
            ratios = self._look(request, indices, image, gradients, grad_scale)
        given = _Given(gradients, directions, ratios, learning_rate * request.scale, grad_scale, self._seed + step)
        total = Sums(0.0, 0.0)
        for index in indices:
            piece = self._take(request, index, image)
            total = _add(total, self._update_piece(request, piece, image, given))
            self._stream.fetch_ahead()
        return total

    def _observe(
        self, request: Request, gradients: Mapping[str, torch.Tensor], grad_scale: float
    ) -> Mapping[str, Direction]:
        """Takes the gradients into the unit's factors, and starts to write these."""
        piece = self._stream.take(request, FACTORS)
        gradients = {name: grad for name, grad in gradients.items() if name in request.trained}
        factors = piece.all_state.view(torch.float32)
        directions = request.rule.directions(request.unit, factors, gradients, grad_scale, self._seed)
        self._stream.write(piece, piece.updates + 1)
        self._stream.fetch_ahead()
        return directions

    def _look(
        self, request: Request, indices: Sequence[int], image: torch.Tensor, gradients: Mapping[str, torch.Tensor],
        grad_scale: float,
    ) -> FirstPass:  # fmt: skip
        """Shows the rule all parameters in these pieces; nothing is changed."""
        ratios = request.rule.first_pass()
        dtype = torch.float32 if self._keeping.state.name == "float32" else torch.bfloat16
        for index in indices:
            piece = self._take(request, index, image)
            state = {name: array.view(dtype) for name, array in piece.arrays().items()}
            for segment in _segments(request, index, gradients):
                units, weights, remainder = piece.units_of(segment), _weights(image, segment), None
                if piece.format.whole_masters and weights.itemsize == 2:
                    weights = piece.masters(torch.float32)[units]
                elif piece.format.master_bytes and weights.itemsize == 2:
                    remainder = piece.masters(torch.int16)[units]
                gradient = gradients[segment.name].view(-1)[segment.first_element :][: segment.count]
                ratios.add(
                    segment.name, request.rule_of(segment.name), kernels.masters(weights, remainder),
                    scaled(gradient, grad_scale), {name: array[units].float() for name, array in state.items()},
                    request.next_update(piece),
                )  # fmt: skip
            self._stream.put_back(piece)
            self._stream.fetch_ahead()
        return ratios

    def _take(self, request: Request, index: int, image: torch.Tensor) -> StatePiece:
        """The piece with its state. Masters that were never written are made of the weights in `image`."""
        piece = self._stream.take(request, index)
        if piece.format.whole_masters and not piece.has_masters:
            for segment in piece.place.segments:
                piece.masters(torch.float32)[piece.units_of(segment)].copy_(_weights(image, segment))
        return piece

    def _update_piece(self, request: Request, piece: StatePiece, image: torch.Tensor, given: _Given) -> Sums:
        """Updates what is trained of a piece, and starts to write it."""
        found = _segments(request, piece.index, given.gradients)
        # With 8 bit a block of state on the border of two of these is rounded in each.
        together: dict[tuple[Rule, float], list[kernels.Segment]] = defaultdict(list)
        rounded: list[tuple[torch.Tensor, torch.Tensor]] = []
        for segment in found:
            weights, copy = _weights(image, segment), piece.lease.address + segment.offset - piece.place.start
            if piece.format.whole_masters and weights.itemsize == 2:
                whole = piece.masters(torch.float32)[piece.units_of(segment)]
                rounded.append((weights, whole))
                weights, copy = whole, 0
            along = given.along(segment)
            together[request.rule_of(segment.name), given.ratio(segment)].append(
                kernels.Segment(
                    piece.units_of(segment).start, segment.count, weights, weights.dtype, along, along.dtype, copy=copy,
                    element=_first_element(request.unit, segment.name) + segment.first_element,
                )
            )  # fmt: skip
        number = request.next_update(piece)
        sums = [self._run(rule, ratio, part, piece, number, given) for (rule, ratio), part in together.items()]
        for weights, whole in rounded:
            weights.copy_(whole)
        place = piece.place
        if place.others or rounded or len(found) < len(place.segments):
            # Else only gaps between weights are not what is in the slot.
            piece.buffer[: place.num_bytes].copy_(image[place.start : place.start + place.num_bytes])
        self._stream.write(piece, number)
        return reduce(_add, sums, Sums(0.0, 0.0))

    def _run(
        self, rule: Rule, ratio: float, segments: Sequence[kernels.Segment], piece: StatePiece, number: int, given: _Given
    ) -> Sums:
        """number: of the update, from 1."""
        step = kernels.Step(
            number,
            given.learning_rate * ratio,
            gradient_scale=1.0 if given.directions else given.grad_scale,
            rounding="nearest" if self._keeping.masters else "stochastic",
            seed=given.seed,
        )
        remainders = piece.format.master_bytes and not piece.format.whole_masters
        state = kernels.PieceState(
            piece.place.units, piece.arrays(), self._keeping.state, piece.masters(torch.int16) if remainders else 0
        )
        return kernels.update(rule, step, segments, state, kernels.Code(self._threads))


def _add(one: Sums, other: Sums) -> Sums:
    return Sums(one.change_sq + other.change_sq, one.weight_sq + other.weight_sq)


def _segments(request: Request, index: int, gradients: Mapping[str, torch.Tensor]) -> list[Segment]:
    """Of a piece, what is updated."""
    segments = request.unit.pieces[index].segments
    return [segment for segment in segments if segment.name in request.trained and segment.name in gradients]


def _weights(image: torch.Tensor, segment: Segment) -> torch.Tensor:
    return image[segment.offset : segment.end].view(segment.view.dtype)


def _first_element(unit: UpdateUnit, name: str) -> int:
    """Where a parameter's elements begin in the sequence of random bits: far from those of others."""
    digest = hashlib.blake2b(unit.fqns[name].encode(), digest_size=3).digest()
    return (int.from_bytes(digest, "little") << 40) + unit.first_element
