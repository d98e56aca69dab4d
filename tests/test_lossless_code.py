"""The lossless code: its words, its format, and what damaged or hostile bytes can do."""

from __future__ import annotations

import ctypes
import heapq
import mmap
import random

import pytest
import torch
from coded_numbers import Coded, bits, draw
from extents import equal_bits

from finetune.offload.weights.formats.lossless_code import CHUNK, MAX_BITS, code_lengths, decode, is_complete

pytestmark = pytest.mark.every(3)

KINDS = ["weights", "any bits", "one value", "zeros", "two exponents", "steep", "special"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 63, 2047, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_come_back_bit_for_bit(kind, count, threads):
    numbers, before = draw(kind, count), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        coded = Coded(numbers)
        assert equal_bits(coded.decode(), numbers)
        wide = coded.decode(dtype=torch.float32).view(torch.int32)
        assert wide.equal(numbers.view(torch.int16).to(torch.int32) << 16)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_every_bfloat16_comes_back(order):
    numbers = bits(torch.arange(-(1 << 15), 1 << 15))
    if order == "shuffled":
        numbers = numbers[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(1))]
    assert equal_bits(Coded(numbers, 2048).decode(), numbers)


def test_any_run_of_numbers_is_decoded_alone():
    numbers, chunk = draw("weights", 5 * 256 + 3), 256
    coded = Coded(numbers, chunk)
    draws = random.Random(3)
    for _ in range(300):
        start = draws.randrange(numbers.numel())
        stop = draws.randint(start + 1, numbers.numel())
        for dtype in (torch.bfloat16, torch.float32):
            assert equal_bits(coded.decode(start, stop, dtype), numbers[start:stop].to(dtype))


def test_weights_take_two_thirds_and_noise_takes_no_more_than_it_did():
    count = 16 * CHUNK
    assert Coded(draw("weights", count)).packed.numel() < 0.665 * 2 * count
    assert Coded(draw("any bits", count)).packed.numel() == 2 * count + 16 * 4


def huffman_bits(counts: list[int]) -> int:
    """Of a text in which symbols occur so often, by Huffman's own algorithm."""
    heap, total = [count for count in counts if count], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def test_words_are_as_short_as_huffmans():
    draws = random.Random(5)
    for _ in range(50):
        counts = [draws.randint(0, 50) for _ in range(40)]
        lengths = code_lengths(counts)
        assert is_complete(lengths)
        assert sum(c * length for c, length in zip(counts, lengths, strict=True)) == huffman_bits(counts)


def test_words_are_no_longer_than_the_limit_and_the_best_of_those():
    fibonacci = [1, 1]
    while len(fibonacci) < 8:
        fibonacci.append(sum(fibonacci[-2:]))
    lengths = code_lengths(fibonacci, 4)
    best = min(
        sum(c * length for c, length in zip(fibonacci, sorted(choice, reverse=True), strict=True))
        for choice in choices(8, 4)
    )
    assert max(lengths) == 4 and sum(c * length for c, length in zip(fibonacci, lengths, strict=True)) == best
    assert max(code_lengths([round(1.7**i) for i in range(60)] + [0] * 196)) == MAX_BITS


def choices(symbols: int, most: int, least: int = 1, left: float = 1.0) -> list[list[int]]:
    """Every way to give lengths, ascending, to so many symbols that sum 2^-length = 1."""
    if symbols == 0:
        return [[]] if left == 0 else []
    found = []
    for length in range(least, most + 1):
        if 2.0**-length <= left:
            found += [[length, *rest] for rest in choices(symbols - 1, most, length, left - 2.0**-length)]
    return found


# The format, by a decoder that knows csrc/lossless.h's description and nothing of its code.


def mix(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def checksum(seed: int, data: bytes) -> int:
    padded = data + bytes(64 - len(data) % 64)
    words = torch.frombuffer(bytearray(padded), dtype=torch.int32).view(-1, 16).tolist()
    found = mix(seed ^ len(data))
    for column in zip(*words, strict=True):
        total = totals = 0
        for word in column:
            total = (total + word) & 0xFFFFFFFF
            totals = (totals + total) & 0xFFFFFFFF
        found = mix(found ^ (totals << 32 | total))
    return found & 0xFFFFFFFF


def sealed(lengths: bytes, index: int, chunk: bytes) -> bytes:
    """The chunk with the checksum that fits it."""
    seed = mix(checksum(1, lengths) + index)
    return checksum(seed, chunk[4:]).to_bytes(4, "little") + chunk[4:]


def words_of(lengths: bytes) -> dict[str, int]:
    words, word = {}, 0
    for length in range(1, max(lengths) + 1):
        word <<= 1
        for symbol in range(256):
            if lengths[symbol] == length:
                words[f"{word:0{length}b}"] = symbol
                word += 1
    return words


def decoded_slowly(lengths: bytes, chunk: bytes, count: int) -> list[int]:
    if len(chunk) == 4 + 2 * count:
        return [int.from_bytes(chunk[4 + 2 * i : 6 + 2 * i], "little") for i in range(count)]
    words, exponents, at = words_of(lengths), [], 12
    share = -(-count // 4)
    for stream in range(4):
        size = int.from_bytes(chunk[4 + 2 * stream : 6 + 2 * stream], "little")
        text, begun = "".join(f"{byte:08b}"[::-1] for byte in chunk[at : at + size]), 0
        for _ in range(max(0, min(count, (stream + 1) * share) - stream * share)):
            end = begun + 1
            while text[begun:end] not in words:
                end += 1
            exponents.append(words[text[begun:end]])
            begun = end
        at += size
    return [(rest & 0x80) << 8 | exponent << 7 | rest & 0x7F for exponent, rest in zip(exponents, chunk[at:], strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_format_is_what_its_description_says(kind):
    numbers = draw(kind, 3 * 128 + 5)
    coded = Coded(numbers, 128)
    found, data, lengths = [], bytes(coded.packed.numpy()), bytes(coded.code.numpy())
    for i, size in enumerate(coded.sizes):
        chunk = data[int(coded.offsets[i]) :][:size]
        assert sealed(lengths, i, chunk) == chunk
        found += decoded_slowly(lengths, chunk, min(128, 389 - 128 * i))
    assert found == [value & 0xFFFF for value in numbers.view(torch.int16).tolist()]


# Hostile bytes.


class Guarded:
    """Memory that ends where the process may not touch what follows: a step beyond it kills the test."""

    def __init__(self, num_bytes: int) -> None:
        pages = -(-max(num_bytes, 1) // mmap.PAGESIZE)
        self._map = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        self._array = (ctypes.c_uint8 * ((pages + 1) * mmap.PAGESIZE)).from_buffer(self._map)
        end = ctypes.addressof(self._array) + pages * mmap.PAGESIZE
        assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
        begin = pages * mmap.PAGESIZE - num_bytes
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8, count=pages * mmap.PAGESIZE)[begin:]


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    memory = Guarded(tensor.nbytes)
    memory.tensor.copy_(tensor.view(torch.uint8))
    found = memory.tensor.view(tensor.dtype)
    found.memory = memory
    return found


@pytest.mark.parametrize("kind", ["weights", "steep", "any bits", "zeros"])
def test_no_bytes_make_it_touch_what_is_not_its_own(kind):
    """The checksum is made to fit, as an attacker would."""
    chunk = 256
    numbers = draw(kind, chunk + 40)
    coded, draws = Coded(numbers, chunk), random.Random(11)
    lengths, original = bytes(coded.code.numpy()), bytes(coded.packed.numpy())
    packed, offsets, target = guarded(coded.packed), guarded(coded.offsets), guarded(numbers)
    refused = 0
    for _ in range(400):
        data = bytearray(original)
        for _ in range(draws.choice([1, 1, 2, 8, 64])):
            place = draws.choice([draws.randrange(len(data)), 4 + draws.randrange(8), coded.sizes[0] + 4 + draws.randrange(8)])
            data[min(place, len(data) - 1)] = draws.choice([0, 255, draws.randrange(256)])
        first, second = bytes(data[: coded.sizes[0]]), bytes(data[coded.sizes[0] :])
        data = sealed(lengths, 0, first) + sealed(lengths, 1, second)
        packed.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        try:
            stored = {"code": coded.code, "offsets": offsets, "packed": packed}
            decode(stored, chunk, numbers.numel(), 0, numbers.numel(), target)
        except ValueError:
            refused += 1
    assert refused > 50 or kind == "any bits"


def test_no_offsets_make_it_touch_what_is_not_its_own():
    chunk = 256
    numbers = draw("weights", 3 * chunk)
    coded, draws = Coded(numbers, chunk), random.Random(13)
    packed, offsets, target = guarded(coded.packed), guarded(coded.offsets), guarded(numbers)
    values = [0, 1, -1, 3, 5, 2**63 - 1, -(2**63), coded.packed.numel(), coded.packed.numel() + 1]
    for _ in range(300):
        changed = coded.offsets.clone()
        changed[draws.randrange(4)] = draws.choice([*values, draws.randrange(coded.packed.numel())])
        offsets.copy_(changed)
        stored = {"code": coded.code, "offsets": offsets, "packed": packed}
        if changed.equal(coded.offsets):
            continue
        with pytest.raises(ValueError, match="offsets do not fit|size that it cannot have|checksum does not fit"):
            decode(stored, chunk, numbers.numel(), 0, numbers.numel(), target)


def test_lengths_that_are_no_code_are_refused():
    numbers = draw("weights", 100)
    coded = Coded(numbers)
    symbol = int(coded.code.nonzero()[0])
    for length in (0, int(coded.code[symbol]) + 1, MAX_BITS + 1, 255):
        changed = coded.code.clone()
        changed[symbol] = length
        stored = {"code": changed, "offsets": coded.offsets, "packed": coded.packed}
        with pytest.raises(ValueError, match="complete code"):
            decode(stored, CHUNK, 100, 0, 100, torch.empty(100, dtype=torch.bfloat16))


def test_changed_bytes_are_noticed_wherever_they_are():
    coded, draws = Coded(draw("weights", 3000), 1024), random.Random(17)
    for place in range(0, coded.packed.numel(), 7):
        coded.packed[place] ^= 1 << draws.randrange(8)
        with pytest.raises(ValueError, match="checksum"):
            coded.decode()
