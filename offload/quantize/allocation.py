"""Which format each matrix gets, so that what is stored stays within a budget of bits.

[Note: equal loss]
BAQ takes the error of a model for a sum over its matrices, where b bits a weight make it c 2^(-2b) in one with the sensitivity
c. For bits that may be any real numbers, the least error has a closed form: b = 1/2 log2(c / level), with one level for all
matrices, which makes up the budget: all errors are equal, and one more bit would take as much from any of them. Formats have a
few sizes only, and errors that can be measured. The same condition then says: of every matrix those upgrades are taken that
lessen its error by more for each bit than a level, which is the same for all.

So upgrades are taken in the order of what they gain for a bit, while they fit; one that does not fit is left out, with what
would follow it in its matrix. A larger budget never gives a larger error: where it first takes an upgrade that the smaller one
left out, that gains more than the smaller one can still gain with bits too few for it. The error is above the least
possible one by less than the gain of the first upgrade that does not fit.

Source: Zhang et al. 2025 (BAQ: Efficient Bit Allocation Quantization for Large Language Models).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Choice(NamedTuple):
    """A way to store a matrix."""

    bits: int
    """Of all that is stored of it."""
    error: float
    """What that costs, in the measure that is summed over matrices: finite."""


class _Upgrade(NamedTuple):
    """From one choice of a matrix to a larger one."""

    gain: float  # of error, for each bit more
    matrix: int
    below: int  # which choice it goes on from
    above: int
    bits: int  # more


def allocate(choices: Sequence[Sequence[Choice]], budget_bits: float) -> list[int]:
    """Which of its choices each matrix gets: see [Note: equal loss]. Ties go to the matrix that comes first.

    Raises ValueError when the smallest choices do not fit.
    """
    found, upgrades = [], []
    for matrix, options in enumerate(choices):
        corners = _corners(options)
        found.append(corners[0])
        for below, above in zip(corners, corners[1:], strict=False):
            bits = options[above].bits - options[below].bits
            gain = (options[below].error - options[above].error) / bits
            upgrades.append(_Upgrade(gain, matrix, below, above, bits))
    left = budget_bits - least_bits(choices)
    if left < 0:
        raise ValueError(f"{budget_bits} bits for matrices that take {least_bits(choices)}")
    for upgrade in sorted(upgrades, key=lambda upgrade: (-upgrade.gain, upgrade.matrix)):
        if upgrade.bits <= left and found[upgrade.matrix] == upgrade.below:
            found[upgrade.matrix] = upgrade.above
            left -= upgrade.bits
    return found


def least_bits(choices: Sequence[Sequence[Choice]]) -> int:
    """That all matrices take together."""
    return sum(min(option.bits for option in options) for options in choices)


def _corners(options: Sequence[Choice]) -> list[int]:
    """Of the lower convex hull of (bits, error), from the smallest on, while the error falls."""
    found: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: options[index]):
        if found and options[index].error >= options[found[-1]].error:
            continue
        while len(found) > 1 and _slope(options, found[-1], index) <= _slope(options, found[-2], found[-1]):
            found.pop()
        found.append(index)
    return found


def _slope(options: Sequence[Choice], below: int, above: int) -> float:
    """Negative: error for each bit more."""
    return (options[above].error - options[below].error) / (options[above].bits - options[below].bits)
