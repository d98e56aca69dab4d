"""Checkpoints whose weights are compressed without loss: written, read, run, and damaged."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from coded_numbers import Coded, draw
from extents import equal_bits, read_source
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from text_models import make_config, write_model, write_rows
from typer.testing import CliRunner

import finetune.offload.weights.compress as compress_module
from finetune import Trainer
from finetune.cli import app
from finetune.compress import compress
from finetune.memory.device_kinds import DEVICE_KINDS
from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import CheckpointError, read_checkpoint, read_header
from finetune.offload.weights.compress import compress_checkpoint
from finetune.offload.weights.formats import PlainTensor
from finetune.offload.weights.formats.lossless import CODE, CODE_BYTES, METHOD, OFFSETS, VERSION, LosslessWeight
from finetune.offload.weights.formats.lossless_code import CHUNK
from finetune.offload.weights.parts import cut, stored_dtype
from finetune.session import Session

pytestmark = pytest.mark.every(3)

SHARE = compress_module.SHARE
SECTION = {"quant_method": METHOD, "version": VERSION, "dtype": "BF16"}


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


def test_what_gains_too_little_stays_as_it_is(plain, tmp_path, monkeypatch):
    numbers = {kind: draw(kind, 3 * CHUNK) for kind in ("weights", "any bits")}
    save_file(numbers, tmp_path / "x.safetensors")
    entries = read_header(tmp_path / "x.safetensors")
    monkeypatch.setattr(compress_module, "SHARE", SHARE)
    writer = compress_module._Writer(CHUNK, dict.fromkeys(numbers, 512), lambda *_: None, 1)
    writer.write(tmp_path / "out.safetensors", entries)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == {"any bits", "weights", "weights" + OFFSETS, "weights" + CODE} and writer.weights == 1
    assert equal_bits(found["any bits"], numbers["any bits"]) and found["weights"].dtype == torch.uint8
    sources = cut(plain("llama")).sources
    least = sources["model.layers.1.mlp.up_proj.weight"].num_bytes
    monkeypatch.setattr(compress_module, "SHARE", 2)
    monkeypatch.setattr(compress_module, "MIN_BYTES", least)
    after = cut(compressed(plain("llama"), tmp_path / "out")).sources
    matrices = [name for name, weight in sources.items() if len(weight.shape) == 2]
    kept = {name for name in matrices if sources[name].num_bytes < least}
    assert kept and kept == {name for name in matrices if isinstance(after[name], PlainTensor)}


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
    with pytest.raises(UserError, match="expected matrices in bf16 of at least .* to compress, found none"):
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
    file, _ = write_gguf("llama", tmp_path)
    packed = command.invoke(app, ["compress", "--model", str(file), "--to", str(tmp_path / "twice")])
    assert packed.exit_code == 1 and "expected safetensors files to compress, found llama.gguf" in packed.output
    assert command.invoke(app, arguments[:-2]).exit_code == 1


def test_the_command_says_how_far_it_is(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.reporting.progress._LOG_STEP_SECONDS", 0)
    result = CliRunner().invoke(app, ["compress", "--model", str(plain("llama")), "--to", str(tmp_path / "out")])
    shares = [int(share) for share in re.findall(r"^compressing: (\d+)%, about .* left$", result.stderr, re.MULTILINE)]
    assert len(shares) > 1 and shares == sorted(shares) and max(shares) <= 100
    assert "compressing" not in result.stdout


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
