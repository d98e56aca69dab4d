"""Weights that are compressed without loss: the code, its format, and what a damaged or hostile file can do."""

from __future__ import annotations

import ctypes
import heapq
import json
import mmap
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from extents import equal_bits, read_source
from safetensors.torch import load_file, save_file
from text_models import make_config, write_model, write_rows
from typer.testing import CliRunner

import offload.weights.compress as compress_module
from finetune import Trainer
from finetune.cli import app
from finetune.compress import compress
from finetune.session import Session
from memory.device_kinds import DEVICE_KINDS
from memory.errors import UserError
from offload.files.checkpoint import CheckpointError, read_checkpoint, read_header
from offload.weights.compress import compress_checkpoint
from offload.weights.formats import PlainTensor
from offload.weights.formats.lossless import CODE, CODE_BYTES, METHOD, OFFSETS, VERSION, LosslessWeight
from offload.weights.formats.lossless_code import (
    CHUNK,
    MAX_BITS,
    code_lengths,
    count_exponents,
    decode,
    encode,
    is_complete,
    room_bytes,
)
from offload.weights.parts import cut, stored_dtype

pytestmark = pytest.mark.every(3)

SECTION = {"quant_method": METHOD, "version": VERSION, "dtype": "BF16"}


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.int16).view(torch.bfloat16)


def draw(kind: str, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(count, generator=generator)
    values = {
        "weights": lambda: (normal * 0.02).bfloat16(),
        "any bits": lambda: bits(torch.randint(-(1 << 15), 1 << 15, (count,), generator=generator)),
        "one value": lambda: torch.full((count,), -1.5).bfloat16(),
        "zeros": lambda: torch.zeros(count).bfloat16(),
        "two exponents": lambda: torch.where(normal > 0, 1.0, 2.0).bfloat16(),
        "steep": lambda: (normal.double().exp() ** 9).bfloat16(),  # words as long as there can be, and longer without a limit
        "special": lambda: torch.where(normal > 1, torch.inf, torch.where(normal < -1, torch.nan, normal * 1e-39)).bfloat16(),
    }
    return values[kind]()


class Coded:
    """Numbers in the code, as a weight keeps them."""

    def __init__(self, numbers: torch.Tensor, chunk: int = CHUNK, lengths: list[int] | None = None) -> None:
        self.chunk, self.numbers = chunk, numbers.numel()
        lengths = lengths or code_lengths(count_exponents(numbers).tolist())
        self.code = torch.tensor(lengths, dtype=torch.uint8)
        room = torch.full((room_bytes(self.numbers, chunk),), 0xAA, dtype=torch.uint8)
        self.sizes = encode(numbers, self.code, chunk, 0, room)
        self.packed = room[: sum(self.sizes)]
        self.offsets = torch.tensor([0, *self.sizes]).cumsum(0)

    def decode(self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        stop = self.numbers if stop is None else stop
        first, last = start // self.chunk, -(-stop // self.chunk)
        low, high = int(self.offsets[first]), int(self.offsets[last])
        stored = {"code": self.code, "offsets": self.offsets[first : last + 1], "packed": self.packed[low:high]}
        target = torch.empty(stop - start, dtype=dtype)
        decode(stored, self.chunk, self.numbers, start, stop, target)
        return target


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


# Checkpoints.


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_model(kind, tmp_path_factory.mktemp(kind) / "model", dtype=torch.bfloat16)
        return made[kind]

    return get


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch) -> None:
    monkeypatch.setattr(compress_module, "MIN_BYTES", 0)
    monkeypatch.setattr(compress_module, "SHARE", 2)
    monkeypatch.setattr(compress_module, "LAYER_CHUNK", 512)
    monkeypatch.setattr(compress_module, "TABLE_CHUNK", 64)


def side_files(model: Path) -> dict[Path, Path]:
    return {path.relative_to(model): path for path in model.glob("*") if ".safetensors" not in path.name}


def compressed(model: Path, directory: Path, budget_bytes: int = 1 << 20) -> Path:
    compress_checkpoint(cut(model), directory, budget_bytes, side_files(model))
    return directory


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_compressed_checkpoint_has_the_same_numbers(kind, plain, tmp_path):
    before, after = cut(plain(kind)), cut(compressed(plain(kind), tmp_path / "out"))
    assert before.sources.keys() == after.sources.keys() and before.sources.tied == after.sources.tied
    assert after.dtype == before.dtype == torch.bfloat16 and not after.sources.unused
    packed = {name: weight for name, weight in after.sources.items() if isinstance(weight, LosslessWeight)}
    assert packed.keys() == {name for name, weight in before.sources.items() if len(weight.shape) == 2}
    for name, weight in after.sources.items():
        expected = read_source(before.sources[name])
        assert equal_bits(weight.decode(weight.load(read_source), torch.bfloat16), expected)
        if name not in packed:
            continue
        assert weight.decode(weight.load(read_source), torch.float16).equal(expected.half())
        meta = {part: torch.empty(t.shape, dtype=t.dtype, device="meta") for part, t in weight.tensors.items()}
        assert weight.decode(meta, torch.float32).shape == expected.shape
        count = len(expected)
        for ranges in ([(0, 1)], [(0, 2), (3, 4), (5, 9), (count - 1, count)], [(0, count)], [(2, 2)], [(4, 7), (7, 8)]):
            some = weight.rows(ranges)
            numbers = torch.cat([expected[a:b] for a, b in ranges])
            assert equal_bits(some.decode(some.load(read_source), torch.bfloat16), numbers)
            assert some.num_bytes <= weight.row_bytes(len(numbers)) or not len(numbers)


@pytest.mark.parametrize("budget_bytes", [compress_module.LEAST_BUDGET_BYTES, 1 << 24])
def test_the_budget_changes_no_byte(budget_bytes, plain, tmp_path):
    runs = [compressed(plain("llama"), tmp_path / str(size), size) for size in (budget_bytes, 1 << 20)]
    shards = sorted(path.name for path in runs[0].glob("*.safetensors"))
    assert shards and all((runs[0] / name).read_bytes() == (runs[1] / name).read_bytes() for name in shards)


def test_numbers_of_a_weight_larger_than_the_buffers(tmp_path):
    """Of several pieces, the last of which is no whole chunk."""
    numbers = draw("weights", 3 * CHUNK + 77)
    path = tmp_path / "big.safetensors"
    save_file({"a": numbers}, path)
    entry = read_header(path)[0]
    writer = compress_module._Writer(CHUNK, {"a": 512}, lambda *_: None, entry.num_bytes)
    assert writer.write(tmp_path / "out.safetensors", [entry]) == ["a", "a" + OFFSETS, "a" + CODE]
    parts = {entry.name: entry for entry in read_header(tmp_path / "out.safetensors")}
    found = LosslessWeight.find(parts, SECTION)["a"]
    weight = LosslessWeight.make(tuple(numbers.shape), found, SECTION)
    assert equal_bits(weight.decode(weight.load(read_source), torch.bfloat16), numbers)


def test_what_is_not_compressed_is_copied(plain, tmp_path):
    model = shutil.copytree(plain("llama"), tmp_path / "model")
    shard = sorted(model.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(key for key, value in tensors.items() if value.dim() == 2)
    tensors |= {name: tensors[name].float(), "extra": torch.arange(5)}
    save_file(tensors, shard)
    index = next(model.glob("*.index.json"))
    values = json.loads(index.read_text())
    values["weight_map"]["extra"] = shard.name
    index.write_text(json.dumps(values))
    found = compressed(model, tmp_path / "out")
    after = load_file(found / shard.name)
    assert equal_bits(after[name], tensors[name]) and after["extra"].equal(tensors["extra"])
    assert json.loads((found / "config.json").read_text())["quantization_config"] == SECTION
    homes = json.loads((found / index.name).read_text())["weight_map"]
    assert {key: (found / home).name for key, home in homes.items()} == {
        key: entry.path.name for key, entry in read_checkpoint(found).tensors.items()
    }


def test_a_copy_of_a_tied_weight_is_not_kept(plain, tmp_path):
    model = shutil.copytree(plain("llama"), tmp_path / "model")
    tensors = {key: value for path in model.glob("*.safetensors") for key, value in load_file(path).items()}
    for path in [*model.glob("*.safetensors"), *model.glob("*.index.json")]:
        path.unlink()
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    before, after = cut(model), cut(compressed(model, tmp_path / "out"))
    assert before.sources.tied == after.sources.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert before.sources.copies and not after.sources.copies and not after.sources.apart


def test_a_model_without_bf16_is_refused(tmp_path):
    model = write_model("llama", tmp_path / "model", dtype=torch.float32)
    with pytest.raises(UserError, match="expected matrices in bf16 to compress, found none"):
        compressed(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_ends_early_leaves_nothing(plain, tmp_path):
    model = shutil.copytree(plain("llama"), tmp_path / "model")
    parts = cut(model)
    shard = parts.checkpoint.files[-1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="ends early: download the model again"):
        compress_checkpoint(parts, tmp_path / "out", 1 << 20, {})
    assert not list(tmp_path.glob("*out*"))


def test_the_command(plain, tmp_path):
    command = CliRunner()
    target = tmp_path / "out"
    arguments = ["compress", "--model", str(plain("llama")), "--to", str(target)]
    result = command.invoke(app, arguments)
    assert result.exit_code == 0 and " weights compressed, " in result.stdout, result.output
    assert cut(target).sources.keys() == cut(plain("llama")).sources.keys()
    assert {path.name for path in target.iterdir()} >= {path.name for path in plain("llama").iterdir()}
    again = command.invoke(app, arguments)
    assert again.exit_code == 1 and "exists: name a directory that does not" in again.output
    packed = command.invoke(app, ["compress", "--model", str(target), "--to", str(tmp_path / "twice")])
    assert packed.exit_code == 1 and "the weights are packed" in packed.output
    assert command.invoke(app, arguments[:-2]).exit_code == 1


def test_the_command_asks_for_room(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="are to be written, 1000 bytes are free|are free: make room"):
        compress(make_config(plain("llama"), tmp_path / "run"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_compute_dtype_is_that_of_the_plain_model(plain, tmp_path):
    """Whatever most of the plain weights beside compressed ones have."""
    found = compressed(plain("llama"), tmp_path / "out")
    checkpoint = read_checkpoint(found)
    for word, dtype in (("BF16", torch.bfloat16), ("F32", torch.float32)):
        assert stored_dtype(checkpoint, SECTION | {"dtype": word}) == dtype
    with pytest.raises(UserError, match="expected weights in BF16, F16 or F32, found I8"):
        stored_dtype(checkpoint, SECTION | {"dtype": "I8"})


def test_an_accelerator_is_refused(plain, tmp_path):
    parts = cut(compressed(plain("llama"), tmp_path / "out"))
    for kind in DEVICE_KINDS:
        session = SimpleNamespace(device=SimpleNamespace(kind=kind, traits=DEVICE_KINDS[kind]))
        if DEVICE_KINDS[kind].computes_on_host:
            Session._check_decodes(session, parts)
            continue
        with pytest.raises(UserError, match=f"lossless bf16, which only a CPU decodes yet, and this run computes on {kind}"):
            Session._check_decodes(session, parts)


# What does not fit.

ROWS, COLUMNS = 40, 50


def write_weight(path: Path, **changes: torch.Tensor | None) -> LosslessWeight:
    """One weight in chunks of 512, changed; as it is read."""
    coded = Coded(draw("weights", ROWS * COLUMNS), 512)
    code = torch.tensor([*coded.code.tolist(), 9, *[0] * (CODE_BYTES - 257)], dtype=torch.uint8)
    packed = torch.cat([coded.packed, torch.zeros(-coded.packed.numel() % 8, dtype=torch.uint8)])
    stored = {"a": packed, "a" + OFFSETS: coded.offsets, "a" + CODE: code}
    names = {"packed": "a", "offsets": "a" + OFFSETS, "code": "a" + CODE}
    stored |= {names[part]: value for part, value in changes.items()}
    save_file({name: value for name, value in stored.items() if value is not None}, path)
    found = LosslessWeight.find({entry.name: entry for entry in read_header(path)}, SECTION)["a"]
    return LosslessWeight.make((ROWS, COLUMNS), found, SECTION)


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    def make(path: Path) -> object:
        write_weight(path)
        value = load_file(path)["a" + {"packed": "", "offsets": OFFSETS, "code": CODE}[part]]
        return write_weight(path, **{part: change(value)})

    return make


def put(place: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([place % len(tensor)]), value)


WRONG = {
    "packed of another dtype": (changed("packed", lambda t: t.view(torch.int8)), r"'a': expected U8 \[bytes\], found I8"),
    "packed in rows": (changed("packed", lambda t: t.view(-1, 8)), r"expected U8 \[bytes\], found U8 \[\d+, 8\]"),
    "packed that is shorter": (changed("packed", lambda t: t[:-8].clone()), "offsets from 0 to the end of"),
    "offsets of another dtype": (changed("offsets", lambda t: t.int()), r"expected I64 \[5\], found I32 \[5\]"),
    "fewer offsets": (changed("offsets", lambda t: t[:-1].clone()), r"expected I64 \[5\], found I64 \[4\]"),
    "a first offset": (changed("offsets", put(0, 8)), "offsets from 0 to the end of .* found 8 to"),
    "a last offset": (changed("offsets", put(-1, 2**62)), "offsets from 0 to the end of"),
    "lengths": (changed("code", put(0, 3)), "tensor 'a.lossless_code': expected the lengths of a complete code"),
    "lengths beyond the limit": (changed("code", put(0, 200)), "the lengths of a complete code"),
    "the size of chunks": (changed("code", put(256, 60)), r"expected chunks of at most 16384 numbers, found 2\*\*60"),
    "a short code": (changed("code", lambda t: t[:-1].clone()), r"expected U8 \[264\], found U8 \[263\]"),
    "no code": (lambda path: write_weight(path, code=None), "expected tensor 'a.lossless_code' for 'a.*', found none"),
    "no weight": (lambda path: write_weight(path, packed=None), "expected tensor 'a' for 'a.*', found none"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_sentence(case, tmp_path):
    make, message = WRONG[case]
    with pytest.raises(CheckpointError, match=rf"x.safetensors.*{message}") as error:
        make(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_another_version_is_refused(plain, tmp_path):
    model = compressed(plain("llama"), tmp_path / "out")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="in version 2 of finetune_lossless .* expected version 1"):
        cut(model)


def test_damage_within_is_noticed_by_file_and_place(tmp_path):
    path = tmp_path / "x.safetensors"
    weight = changed("offsets", put(2, 3))(path)
    with pytest.raises(CheckpointError, match=r"x.safetensors: the compressed weight at byte \d+ is damaged: .* again$"):
        weight.decode(weight.load(read_source), torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"damaged: a chunk is said to be at bytes \d+ to 3"):
        weight.rows([(11, 20)])


def test_mutated_files_give_the_same_numbers_or_one_sentence(tmp_path):
    path, draws = tmp_path / "x.safetensors", random.Random(19)
    weight = write_weight(path)
    expected, original, refused = weight.decode(weight.load(read_source), torch.bfloat16), path.read_bytes(), 0
    for _ in range(300):
        data = bytearray(original)
        for _ in range(draws.randint(1, 3)):
            data[draws.randrange(len(data))] = draws.randrange(256)
        path.write_bytes(data)
        try:
            found = LosslessWeight.find({entry.name: entry for entry in read_header(path)}, SECTION)["a"]
            weight = LosslessWeight.make((ROWS, COLUMNS), found, SECTION)
            numbers = weight.decode(weight.load(read_source), torch.bfloat16)
            rows = weight.rows([(3, 9), (30, 31)])
            some = rows.decode(rows.load(read_source), torch.bfloat16)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        except KeyError:  # the weight has another name now: nobody finds it
            refused += 1
        else:
            assert equal_bits(numbers, expected) and equal_bits(some, torch.cat([expected[3:9], expected[30:31]]))
    assert refused > 250


def test_a_run_over_a_damaged_model_ends_with_one_sentence(plain, tmp_path):
    model = compressed(plain("llama"), tmp_path / "compressed")
    entry = read_checkpoint(model).tensors["model.layers.1.mlp.up_proj.weight"]
    data = bytearray(entry.path.read_bytes())
    data[entry.offset + entry.num_bytes // 2] ^= 16
    entry.path.write_bytes(data)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a b", "completion": " c"}] * 8)
    config = make_config(model, tmp_path / "out", data=rows)
    with pytest.raises(UserError, match=f"{entry.path.name}: the compressed weight .* damaged: a checksum does not fit"):
        Trainer(config).train()


def test_plain_weights_say_that_they_need_no_host():
    assert not PlainTensor.needs_host and LosslessWeight.needs_host
