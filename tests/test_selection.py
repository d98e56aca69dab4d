"""Which blocks a step trains."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from finetune import Config
from finetune.memory.errors import UserError
from finetune.methods.selection import Selection, make_selection

BLOCKS = 7


def selection(method: str, resident: frozenset[int] = frozenset(), seed: int = 1, **options: Any) -> Selection:
    return make_selection(Config(model="m", method=method, seed=seed, selection=options), BLOCKS, resident)


def test_full_trains_all():
    assert selection("full").blocks(3) == list(range(BLOCKS))


@pytest.mark.parametrize("method", ["lisa", "badam", "frugal"])
def test_blocks_are_a_function_of_seed_and_interval(method):
    first, second = selection(method, interval=5, layers=2), selection(method, interval=5, layers=2)
    rounds = [first.blocks(step) for step in range(0, 200, 5)]
    assert all(second.blocks(step) == rounds[step // 5] for step in reversed(range(200)))
    assert [selection(method, interval=5, layers=2, seed=2).blocks(step) for step in range(0, 200, 5)] != rounds


def test_lisa_chooses_every_block_equally_often_without_repeating_one():
    lisa = selection("lisa", interval=1, layers=3)
    counts: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    for step in range(7000):
        blocks = lisa.blocks(step)
        assert len(set(blocks)) == 3 and blocks == sorted(blocks)
        counts.update(blocks)
        pairs.update((a, b) for a in blocks for b in blocks if a < b)
    assert all(abs(count - 3000) < 200 for count in counts.values()) and len(counts) == BLOCKS  # 5 standard deviations
    assert all(abs(count - 1000) < 150 for count in pairs.values()) and len(pairs) == 21
    assert [lisa.importance(block) for block in range(BLOCKS)] == pytest.approx([1.0] * BLOCKS)


@pytest.mark.parametrize("preference", [2.0, 50.0])
def test_resident_blocks_may_be_preferred_with_the_expectation_kept(preference):
    """Chance times importance is what every block has among equals; no block is chosen twice in a draw."""
    lisa = selection("lisa", frozenset({1, 4}), interval=1, layers=3, prefer_resident=preference)
    counts: Counter[int] = Counter()
    steps = 7000
    for step in range(steps):
        blocks = lisa.blocks(step)
        assert len(set(blocks)) == 3
        counts.update(blocks)
    for block in range(BLOCKS):
        assert counts[block] / steps * lisa.importance(block) == pytest.approx(3 / BLOCKS, rel=0.15)
    assert counts[1] / counts[0] == pytest.approx(2.0 if preference == 2.0 else 5.0, rel=0.1)  # at most always: 1 of 1/5


def test_badam_goes_through_all_blocks_in_every_round():
    orders = {
        "ascending": [[0, 1, 2], [3, 4, 5], [6]] * 2,
        "descending": [[4, 5, 6], [1, 2, 3], [0]] * 2,
        "alternating": [[0, 1, 2], [3, 4, 5], [6], [4, 5, 6], [1, 2, 3], [0]],
    }
    for order, expected in orders.items():
        badam = selection("badam", interval=4, layers=3, order=order)
        assert [badam.blocks(step) for step in range(0, 24, 4)] == expected
    badam = selection("badam", interval=2, layers=1)
    rounds = [[badam.blocks(2 * (round_ * BLOCKS + turn))[0] for turn in range(BLOCKS)] for round_ in range(6)]
    assert all(sorted(blocks) == list(range(BLOCKS)) for blocks in rounds)
    assert len({tuple(blocks) for blocks in rounds}) > 3


def test_slimfit_trains_what_changed_most_and_remembers_it():
    slimfit = selection("slimfit", layers=2)
    seen: set[int] = set()
    for step in range(4):  # all blocks once, before any is judged
        blocks = slimfit.blocks(step)
        seen |= set(blocks)
        slimfit.observe({block: (float(block + 1) ** 2, 4.0) for block in blocks})
    assert seen == set(range(BLOCKS))
    assert slimfit.blocks(9) == [5, 6]
    slimfit.observe({6: (0.01, 4.0)})
    assert slimfit.blocks(10) == [4, 5]
    other = selection("slimfit", layers=2)
    other.restore(slimfit.notes())
    assert other.blocks(10) == [4, 5]


def test_what_the_papers_leave_frozen():
    assert [selection(m).ends for m in ("full", "lisa", "badam", "slimfit", "frugal")] == [True, True, False, True, True]
    assert selection("badam", ends=True).ends and not selection("lisa", ends=False).ends
    assert [selection(m).keeps_state for m in ("full", "lisa", "badam", "slimfit", "frugal")] == [
        True, False, False, True, False,
    ]  # fmt: skip
    assert selection("badam", keep_state=True).keeps_state


def test_more_layers_than_there_are():
    with pytest.raises(UserError, match="selection.layers: expected at most 7"):
        selection("lisa", layers=8)
