"""Which guesses of experts are worth a fetch, by how often such guesses were right.

A router that is asked before its input is there (Hwang et al. 2024, Pre-gated MoE; He et al. 2024, ExpertFlow; Eliseev and
Mazur 2023) names experts in the order of its scores. What is named first is right more often. Every guess is compared with what
is chosen then, fetched or not; so nothing is spent on learning how far the guesses of a block can be trusted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

WASTE = 0.04
"""Of what a visit chooses: so much may be expected to be fetched in vain."""


class ExpertGuesses:
    """Guesses for blocks, by the rank that a router has given an expert."""

    def __init__(self) -> None:
        self._named: dict[int, list[Sequence[int]]] = {}
        self._right: dict[tuple[int, int], int] = {}
        self._made: dict[tuple[int, int], int] = {}
        self.guessed = 0
        """Of all visits: experts that were worth a fetch."""
        self.used = 0
        """Of these, which were chosen."""
        self.chosen = 0
        """Experts that visits have chosen, where few tokens choose few."""

    def begin(self) -> None:
        """A pass begins. What is left of a pass that has failed is forgotten."""
        self._named.clear()

    def add(self, block: int, named: Sequence[Sequence[int]]) -> None:
        """named: per token, the experts that the next visit of the block is thought to choose, the likeliest first."""
        self._named.setdefault(block, []).extend(named)

    def worthwhile(self, block: int) -> list[int]:
        """Experts to fetch for the next visit, the surest first: as many as keep the expected waste within `WASTE`."""
        sure: dict[int, float] = {}
        for experts in self._named.get(block, ()):
            for rank, expert in enumerate(experts):
                sure[expert] = max(sure.get(expert, 0.0), self._share_right(block, rank))
        found, left = [], WASTE * len(sure)
        for expert, share in sorted(sure.items(), key=lambda pair: -pair[1]):
            left -= 1 - share
            if left < 0:
                break
            found.append(expert)
        return found

    def compare(self, block: int, chosen: Collection[int]) -> None:
        """A visit of few tokens has ended, which has chosen these."""
        guessed = self.worthwhile(block)
        self.guessed += len(guessed)
        self.used += sum(expert in chosen for expert in guessed)
        self.chosen += len(chosen)
        for experts in self._named.pop(block, ()):
            for rank, expert in enumerate(experts):
                place = block, rank
                self._made[place] = self._made.get(place, 0) + 1
                self._right[place] = self._right.get(place, 0) + (expert in chosen)

    @property
    def share_right(self) -> float:
        """Of all that routers have named ahead, fetched or not."""
        return sum(self._right.values()) / max(1, sum(self._made.values()))

    @property
    def words(self) -> str:
        """For the user."""
        used, chosen = self.used / max(1, self.guessed), self.used / max(1, self.chosen)
        return (
            f"routers asked a block ahead were right in {self.share_right:.0%}; {self.guessed} experts were expected on that, "
            f"{used:.0%} of them used, {chosen:.0%} of the {self.chosen} chosen"
        )

    def _share_right(self, block: int, rank: int) -> float:
        place = block, rank
        return self._right.get(place, 0) / (self._made.get(place, 0) + 1)
