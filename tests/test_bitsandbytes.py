"""Weights as bitsandbytes packs them: its numbers, what does not fit, and what a user does with them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from extents import read_source
from packed_checkpoints import edit, pack_4bit, pack_int8, set_config, write_packed
from safetensors.torch import load_file, save_file
from text_models import assert_resumes, assert_same_answers, make_config, write_model, write_rows

from finetune import Trainer
from finetune.evaluate import evaluate
from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import CheckpointError, read_checkpoint, read_header
from finetune.offload.sizing.meta_operations import LiveBytes
from finetune.offload.weights.formats import PlainTensor, StoredWeight, find_weights
from finetune.offload.weights.formats.bitsandbytes import Packed4Bit, Packed8Bit, Span
from finetune.offload.weights.formats.bitsandbytes_files import State4Bit
from finetune.offload.weights.parts import cut, stored_dtype

RECORDED = Path(__file__).parent / "recorded_bitsandbytes.safetensors"
"""State dicts of bitsandbytes 0.50.2's own layers, and what its dequantisation makes of them on a CPU: `dequantize_4bit`; where
blocks go on in the next row (nf4_nested, fp4_odd), its implementation in PyTorch, see [Note: 4-bit blocks]."""

METHOD = {"quant_method": "bitsandbytes"}
NF4_STATE = ".quant_state.bitsandbytes__nf4"


def read(path: Path, name: str, shape: tuple[int, ...]) -> tuple[StoredWeight, dict[str, torch.Tensor]]:
    """The weight `name` of a file, and its stored tensors."""
    entries = {entry.name: entry for entry in read_header(path)}
    form, parts = find_weights(entries, METHOD)[name]
    weight = form.make(shape, parts, METHOD)
    return weight, weight.load(read_source)


def write(path: Path, stored: dict[str, torch.Tensor], name: str = "a") -> Path:
    save_file({name + suffix: value for suffix, value in stored.items()}, path)
    return path


@pytest.mark.parametrize("case", ["nf4_nested", "nf4_many_blocks", "nf4_in_shards", "fp4_odd", "fp4_nested", "int8"])
def test_numbers_are_those_of_bitsandbytes(case):
    expected = load_file(RECORDED)[f"{case}.expected"]
    weight, stored = read(RECORDED, f"{case}.weight", tuple(expected.shape))
    for dtype in (expected.dtype, torch.float32, torch.bfloat16):
        assert weight.decode(stored, dtype).equal(expected.to(dtype))
    ranges = [(1, 2), (3, 5)]
    some = weight.rows(ranges)
    assert some.decode(some.load(read_source), torch.float32).equal(torch.cat([expected[a:b] for a, b in ranges]).float())
    assert some.num_bytes < weight.num_bytes
    assert weight.rows([(0, len(expected))]) == weight


@pytest.mark.parametrize("block", [32, 64, 256, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_numbers_are_those_of_the_installed_bitsandbytes(kind, nested, block, tmp_path):
    library = pytest.importorskip("bitsandbytes").functional
    generator = torch.Generator().manual_seed(3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        matrix = torch.randn(3, 4096, generator=generator).to(dtype)
        packed, state = library.quantize_4bit(matrix, blocksize=block, compress_statistics=nested, quant_type=kind)
        stored = {"a": packed} | {f"a.{key}": value for key, value in state.as_dict(packed=True).items()}
        save_file(stored, tmp_path / "x.safetensors")
        weight, stored = read(tmp_path / "x.safetensors", "a", (3, 4096))
        assert weight.decode(stored, dtype).equal(library.dequantize_4bit(packed, state))


def test_a_packed_weight_takes_a_quarter_of_bf16(tmp_path):
    shape = (64, 4096)
    for nested, share in ((False, (0.5 + 4 / 64) / 2), (True, (0.5 + 1 / 64 + 4 / (64 * 256)) / 2)):
        path = write(tmp_path / "x.safetensors", pack_4bit(torch.randn(shape), "nf4", nested)[0])
        codes = 4 * 256 if nested else 0
        assert read(path, "a", shape)[0].num_bytes == share * 2 * 64 * 4096 + codes


ROWS, COLUMNS = 4096, 2048


def outline(dtype: torch.dtype, *shape: int) -> PlainTensor:
    return PlainTensor(dtype, shape, ())


LARGE = {
    "nf4": Packed4Bit(
        outline(torch.uint8, ROWS * COLUMNS // 2), outline(torch.uint8, ROWS * COLUMNS // 64),
        outline(torch.float32, ROWS * COLUMNS // 64 // 256), outline(torch.float32, 256), (ROWS, COLUMNS),
        State4Bit("nf4", 64, torch.bfloat16, 256, 0.1), (Span(0, ROWS * COLUMNS),),
    ),
    "int8": Packed8Bit(outline(torch.int8, ROWS, COLUMNS), outline(torch.float32, ROWS)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LARGE)
def test_little_is_allocated_beside_the_numbers(kind):
    weight = LARGE[kind]
    stored = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in weight.tensors.items()}
    counter = LiveBytes()
    for tensor in stored.values():
        counter.ignore(tensor)
    with counter:
        numbers = weight.decode(stored, torch.float32)
    assert numbers.nbytes == 4 * ROWS * COLUMNS < counter.peak_bytes < 1.15 * numbers.nbytes


# What does not fit.


def with_state(stored: dict[str, torch.Tensor], change) -> dict[str, torch.Tensor]:
    """change: takes and gives the JSON object, or bytes."""
    value = change(json.loads(bytes(stored[NF4_STATE].numpy())))
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return stored | {NF4_STATE: torch.tensor(list(data), dtype=torch.uint8)}


def without(stored: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in stored.items() if key != part}


WRONG = {
    "not JSON": (lambda s: with_state(s, lambda _: b"\x80\x04K\x01."), "not JSON"),
    "a list": (lambda s: with_state(s, lambda _: []), "expected a JSON object, found list"),
    "type": (lambda s: with_state(s, lambda v: v | {"quant_type": "fp4"}), "expected quant_type to be nf4, found 'fp4'"),
    "block size": (lambda s: with_state(s, lambda v: v | {"blocksize": 48}), "expected blocksize to be 32 or .*, found 48"),
    "a float": (lambda s: with_state(s, lambda v: v | {"blocksize": 64.0}), "expected blocksize to be .*, found 64.0"),
    "dtype": (lambda s: with_state(s, lambda v: v | {"dtype": "int8"}), "expected dtype to be bfloat16 or .*, found 'int8'"),
    "shape": (lambda s: with_state(s, lambda v: v | {"shape": [40, 96]}), r"expected shape to be \[96, 40\], found \[40, 96\]"),
    "offset": (lambda s: with_state(s, lambda v: v | {"nested_offset": 10**400}), "expected nested_offset to be a finite"),
    "no offset": (lambda s: with_state(s, lambda v: v | {"nested_offset": None}), "expected nested_offset to be .* found None"),
    "nested blocks": (lambda s: with_state(s, lambda v: v | {"nested_blocksize": True}), "expected nested_blocksize to be"),
    "too large": (lambda s: with_state(s, lambda _: b" " * 5000), "expected at most 4096 bytes, found 5000"),
    "packed": (lambda s: s | {"": s[""][:-1].clone()}, r"expected 1920 bytes for \[96, 40\], found 1919"),
    "absmax": (lambda s: s | {".absmax": s[".absmax"][:-1].clone()}, r"expected U8 \[60\], found U8 \[59\]"),
    "absmax's dtype": (lambda s: s | {".absmax": s[".absmax"].float()}, r"expected U8 \[60\], found F32 \[60\]"),
    "codes": (lambda s: s | {".quant_map": s[".quant_map"].flip(0)}, "expected the numbers of nf4, found"),
    "no state": (lambda s: without(s, NF4_STATE), "tensor 'a': expected one quant_state out of nf4, fp4 .*, found none"),
    "no codes": (lambda s: without(s, ".quant_map"), "expected tensor 'a.quant_map' for 'a.*', found none"),
    "no weight": (lambda s: without(s, ""), "expected tensor 'a' for 'a.*', found none"),
    "half nested": (lambda s: without(s, ".nested_absmax"), "'a.nested_quant_map': expected nested_absmax and"),
    "two states": (lambda s: s | {NF4_STATE[:-3] + "fp4": s[NF4_STATE].clone()}, "found nf4, fp4"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_sentence(case, tmp_path):
    change, message = WRONG[case]
    stored = change(pack_4bit(torch.randn(96, 40), "nf4", True)[0])
    with pytest.raises(CheckpointError, match=rf"x.safetensors.*{message}"):
        read(write(tmp_path / "x.safetensors", stored), "a", (96, 40))


INT8_WRONG = {
    ".SCB": (torch.ones(5), r"tensor 'a.SCB': expected F32 \[6\], found F32 \[5\]"),
    ".weight": (torch.ones(6, 4, dtype=torch.float16), r"tensor 'a.weight': expected I8 \[6, 4\], found F16 \[6, 4\]"),
    ".weight_format": (torch.tensor(2, dtype=torch.uint8), "tensor 'a.weight_format': expected 0, .*, found 2"),
}


@pytest.mark.parametrize("part", INT8_WRONG)
def test_an_int8_weight_that_does_not_fit(part, tmp_path):
    value, message = INT8_WRONG[part]
    with pytest.raises(CheckpointError, match=message):
        read(write(tmp_path / "x.safetensors", pack_int8(torch.randn(6, 4))[0] | {part: value}), "a.weight", (6, 4))


def test_states_that_were_changed_at_random_give_the_same_numbers_or_a_sentence(tmp_path):
    stored, numbers = pack_4bit(torch.randn(16, 64), "nf4", True)
    state, draw, refused = bytes(stored[NF4_STATE].numpy()), random.Random(5), 0
    known = json.loads(state)
    for _ in range(200):
        changed = bytearray(state)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(changed))
            changed[place : place + draw.randint(0, 2)] = bytes([draw.randrange(256)] * draw.randint(0, 2))
        path = write(tmp_path / "x.safetensors", stored | {NF4_STATE: torch.tensor(list(changed), dtype=torch.uint8)})
        try:
            weight, tensors = read(path, "a", (16, 64))
        except CheckpointError as error:
            assert "\n" not in str(error) and "x.safetensors" in str(error)
            refused += 1
            continue
        found = json.loads(bytes(changed))
        if all(found.get(name) == value for name, value in known.items()):  # else: another offset or dtype, as plausible
            assert weight.decode(tensors, torch.bfloat16).equal(numbers)
    assert refused > 100


@pytest.fixture(scope="module")
def plain_llama(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("llama") / "model", dtype=torch.bfloat16)


def test_a_method_that_nobody_reads_is_named_with_what_is_read(plain_llama, tmp_path):
    model, _ = write_packed(plain_llama, tmp_path, "nf4")
    set_config(model, quantization_config={"quant_method": "quip"})
    with pytest.raises(UserError, match="by 'quip', .* one of .*bitsandbytes 4-bit, bitsandbytes int8, .*: use the original"):
        cut(model)
    set_config(model, quantization_config=[4])
    with pytest.raises(UserError, match="cannot read the model's configuration"):
        cut(model)


def test_weights_that_are_said_to_be_packed_and_are_not(plain_llama, tmp_path):
    _, decoded = write_packed(plain_llama, tmp_path, "nf4")
    set_config(decoded, quantization_config=METHOD | {"load_in_4bit": True})
    with pytest.raises(UserError, match="if these are not quantised, remove quantization_config"):
        cut(decoded)


def test_a_damaged_model_is_refused_by_its_file_and_tensor(plain_llama, tmp_path):
    model, _ = write_packed(plain_llama, tmp_path, "nf4")
    name = "model.layers.1.self_attn.k_proj.weight.absmax"
    edit(model, {name: torch.ones(3)})
    with pytest.raises(UserError, match=rf"model-.*safetensors: tensor '{name}': expected F32 \[15\], found F32 \[3\]"):
        cut(model)


def test_layers_that_are_stored_transposed_are_refused(tmp_path):
    """bitsandbytes packs GPT-2's as those of linear layers: of a square one nobody would see it."""
    plain = write_model("gpt2", tmp_path / "gpt2")
    name = "transformer.h.0.attn.c_proj.weight"
    shard = next(path for path in plain.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    stored, _ = pack_4bit(tensors.pop(name), "nf4", False)
    save_file(tensors | {name + suffix: value for suffix, value in stored.items()}, shard)
    set_config(plain, quantization_config=METHOD)
    with pytest.raises(UserError, match=f"'{name}' of a Conv1D is stored as bitsandbytes 4-bit, which is read for Linear only"):
        cut(plain)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_auto_computes_in_the_dtype_of_what_is_not_packed(kind, plain_llama, tmp_path):
    """However many bytes of scales in fp32 there are."""
    model, _ = write_packed(plain_llama, tmp_path, kind)
    checkpoint = read_checkpoint(model)
    small = {name: entry for name, entry in checkpoint.tensors.items() if not name.startswith(("lm_head", "model.embed"))}
    sizes = [sum(entry.num_bytes for entry in small.values() if entry.dtype == dtype) for dtype in ("F32", "BF16")]
    assert sizes[0] > sizes[1] and stored_dtype(replace(checkpoint, tensors=small), METHOD) == torch.bfloat16
    parts = cut(model)
    assert parts.dtype == torch.bfloat16
    assert parts.sources["model.norm.weight"].dtype == parts.sources["lm_head.weight"].dtype == torch.bfloat16
    assert parts.model.config.quantization_config["quant_method"] == "bitsandbytes"
    assert type(parts.model.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear


# What a user does.


def test_eval_and_generate(plain_llama, tmp_path, quick_data):
    assert_same_answers(write_packed(plain_llama, tmp_path, "nf4", nested=True), tmp_path)


def test_use_of_a_run_that_trained_a_packed_layer_whole(plain_llama, tmp_path, quick_data, monkeypatch):
    """The adapter's file brings the layer's weight in the place of the packed one."""
    monkeypatch.setattr("finetune.offload.weights.binding.LAZY_MIN_BYTES", 0)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "hello the cat", "completion": " sat on the mat"}] * 2)
    lora = {"r": 2, "target_modules": ["q_proj"], "extra": {"modules_to_save": ["k_proj"]}}
    training = {"max_steps": 2, "batch_size": 1, "learning_rate": 1e-2}
    losses = []
    for model in write_packed(plain_llama, tmp_path, "nf4", nested=True):
        config = make_config(model, tmp_path / f"out-{model.name}", data=rows, training=training, lora=lora)
        Trainer(config).train()
        losses.append(evaluate(config, config.output)["loss"])
    assert losses[0] == losses[1]


def test_a_stopped_run_goes_on_with_the_same_bits(plain_llama, tmp_path, quick_data):
    model, _ = write_packed(plain_llama, tmp_path, "int8")
    assert_resumes(model, tmp_path)


def test_the_user_is_told_what_int8_losses_are(plain_llama, tmp_path, quick_data, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "the cat sat"}])
    model, _ = write_packed(plain_llama, tmp_path, "int8")
    Trainer(make_config(model, tmp_path / "out", data=rows, training={"max_steps": 1, "batch_size": 1})).train()
    assert capsys.readouterr().err.count("losses are those of the dequantised weights") == 1
