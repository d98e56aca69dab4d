"""Room in a file: never given twice, joined when freed."""

from __future__ import annotations

import random

import pytest

from finetune.offload.update.extent_allocator import ExtentAllocator


def test_no_byte_is_given_twice_and_what_is_freed_is_used_again():
    chance = random.Random(1)
    allocator = ExtentAllocator()
    held: dict[int, int] = {}
    owner: dict[int, int] = {}
    largest = 0
    for _ in range(3000):
        if held and (len(held) > 30 or chance.random() < 0.45):
            offset = chance.choice(list(held))
            size = held.pop(offset)
            for at in range(offset, offset + size):
                del owner[at]
            allocator.free(offset, size)
        else:
            size = chance.randint(1, 9)
            offset = allocator.allocate(size)
            for at in range(offset, offset + size):
                assert at not in owner
                owner[at] = offset
            held[offset] = size
        largest = max(largest, sum(held.values()))
    assert allocator.end < 3 * largest
    for offset, size in held.items():
        allocator.free(offset, size)
    assert allocator.allocate(allocator.end) == 0  # all free ranges were joined


def test_what_is_in_use_at_the_start_stays():
    allocator = ExtentAllocator([(30, 10), (10, 10)])
    assert [allocator.allocate(10), allocator.allocate(11), allocator.allocate(10)] == [0, 40, 20]
    assert allocator.end == 51


@pytest.mark.parametrize(("offset", "size"), [(10, 5), (8, 4), (12, 20), (0, 40)])
def test_freeing_twice_is_an_error(offset, size):
    allocator = ExtentAllocator([(0, 40)])
    allocator.free(10, 10)
    with pytest.raises(ValueError, match="free already"):
        allocator.free(offset, size)
