"""Weights as GPTQ packs them: the numbers of GPTQModel, what does not fit, and what a user does with them."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extents import read_source
from grouped_checkpoints import Gptq, write_grouped
from packed_checkpoints import edit, set_config
from safetensors.torch import load_file, save_file
from text_models import assert_resumes, assert_same_answers, write_model

from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import CheckpointError, read_header
from finetune.offload.sizing.meta_operations import LiveBytes
from finetune.offload.weights.formats import PlainTensor, StoredWeight, find_weights
from finetune.offload.weights.formats.gptq import PackedGptq
from finetune.offload.weights.parts import cut

RECORDED = Path(__file__).parent / "recorded_grouped.safetensors"
"""Random words, and what `TorchLinear` of GPTQModel 7.7.0 makes of them on a CPU, zero points converted by
`convert_gptq_v1_to_v2_format_module`; and what `dequantize_gemm` does."""


def read(path: Path, shape: tuple[int, ...], section: dict[str, Any], name: str = "a") -> tuple[StoredWeight, dict]:
    """The weight of the layer `name` in a file, and its stored tensors."""
    entries = {entry.name: entry for entry in read_header(path)}
    form, parts = find_weights(entries, section)[f"{name}.weight"]
    weight = form.make(shape, parts, section)
    return weight, weight.load(read_source)


def write(path: Path, stored: dict[str, torch.Tensor]) -> Path:
    save_file({f"a{suffix}": value for suffix, value in stored.items()}, path)
    return path


@pytest.mark.parametrize("order", ["in_order", "act_order"])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_numbers_are_those_of_gptqmodel(bits, form, order):
    """All zero points occur: of the first format also those whose one carries into the next."""
    name = f"{form}.{bits}.{order}"
    expected = load_file(RECORDED)[f"{name}.expected"]
    how = Gptq(bits, 24 if order == "act_order" else 16, order == "act_order", form)
    weight, stored = read(RECORDED, tuple(expected.shape), how.section, name)
    assert ("groups" in stored) == (order == "act_order")
    for dtype in (expected.dtype, torch.float32):
        assert weight.decode(stored, dtype).equal(expected.to(dtype))


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is where a device has none."""
    monkeypatch.setattr("finetune.offload.weights.formats.grouped.kernels_for", lambda tensor: None)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bits, outputs, inputs", [(2, 48, 80), (3, 96, 160), (4, 72, 40), (4, 24, 8), (8, 20, 84)])
def test_numbers_are_those_of_the_published_format(bits, outputs, inputs, native, tmp_path, monkeypatch):
    """Odd shapes, short last groups, groups of any size, with what says which input is in which and without."""
    if not native:
        without_kernels(monkeypatch)
    matrix = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(3))
    for size, (order, has_groups), form, dtype in product(
        (-1, 16, 24, 128), ((False, True), (False, False), (True, True)), ("gptq", "gptq_v2"), (torch.float16, torch.bfloat16)
    ):
        how = Gptq(bits, size, order, form, has_groups, dtype)
        stored, expected = how.pack(matrix)
        weight, stored = read(write(tmp_path / "x.safetensors", stored), (outputs, inputs), how.section)
        found = weight.decode(stored, dtype)
        assert found.equal(expected) and found.is_contiguous()
        assert weight.decode(stored, torch.float32).equal(expected.float())
        ranges = [(1, 2), (5, 13), (16, outputs)]
        some = weight.rows(ranges)
        assert some.decode(some.load(read_source), dtype).equal(torch.cat([expected[a:b] for a, b in ranges]))
        assert weight.rows([(0, outputs)]) is weight and weight.rows([(5, 13)]).num_bytes < weight.num_bytes


def test_more_rows_than_are_decoded_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.offload.weights.formats.base.ROWS_AT_ONCE", 7)
    for how in (Gptq(4), Gptq(3, act_order=True)):
        stored, expected = how.pack(torch.randn(64, 96))
        weight, stored = read(write(tmp_path / "x.safetensors", stored), (64, 96), how.section)
        assert weight.decode(stored, torch.float16).equal(expected)


@pytest.mark.parametrize("inputs", [64, 40])
def test_one_zero_point_for_all(inputs, tmp_path, monkeypatch):
    """As `sym` has it: all codes, negative scales, products that are too large for fp16 and ones that are subnormal in it."""
    torch.manual_seed(1)
    how, shape = Gptq(4, 16, format="gptq_v2"), (48, inputs)
    stored, _ = how.pack(torch.randn(shape))
    stored[".qzeros"].fill_(int("88888888", 16) - 2**32)
    stored[".scales"].copy_(torch.randn(stored[".scales"].shape) * 10.0 ** torch.randint(-7, 5, stored[".scales"].shape))
    weight, stored = read(write(tmp_path / "x.safetensors", stored), shape, how.section)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    found = [weight.decode(stored, dtype) for dtype in dtypes]
    without_kernels(monkeypatch)
    for numbers, dtype in zip(found, dtypes, strict=True):
        expected = weight.decode(stored, dtype)
        assert numbers.equal(expected) and expected.isinf().any() and len(expected.unique()) > 16
        assert numbers.signbit().equal(expected.signbit())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_0_that_carry(bits, tmp_path):
    """As GPTQModel saves them in the first format: one less in every field, borrowed from the next."""
    how, words = Gptq(bits), Gptq(bits, format="gptq_v2")
    stored, expected = words.pack(torch.rand(64, 32) + 0.5)  # positive: zero points are 0
    stored[".qzeros"] = torch.from_numpy(stored[".qzeros"].numpy() - np.int32(sum(1 << i for i in range(0, 32, bits))))
    weight, stored = read(write(tmp_path / "x.safetensors", stored), (64, 32), how.section)
    assert weight.decode(stored, torch.float16).equal(expected) and (expected > 0).all()


def test_layers_of_unlike_bits(tmp_path):
    """As `dynamic` of GPTQModel has them: what is stored says how many."""
    for bits, size in product((2, 3, 4, 8), (16, 32, -1)):
        how = Gptq(bits, size)
        stored, expected = how.pack(torch.randn(32, 64))
        section = Gptq(4, 128).section | {"dynamic": {"+:.*a$": {"bits": bits, "group_size": size}}}
        weight, stored = read(write(tmp_path / "x.safetensors", stored), (32, 64), section)
        assert weight.decode(stored, torch.float16).equal(expected)


def test_little_is_allocated_beside_the_numbers():
    rows, columns = 4096, 2048
    groups = PlainTensor(torch.int32, (columns,), ())
    for order in (None, groups):
        weight = PackedGptq(
            PlainTensor(torch.int32, (columns // 8, rows), ()), PlainTensor(torch.int32, (columns // 128, rows // 8), ()),
            PlainTensor(torch.float16, (columns // 128, rows), ()), order, (rows, columns), 4, 128, ((0, rows),), True,
        )  # fmt: skip
        stored = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in weight.tensors.items()}
        counter = LiveBytes()
        for tensor in stored.values():
            counter.ignore(tensor)
        with counter:
            numbers = weight.decode(stored, torch.float32)
        assert numbers.nbytes == 4 * rows * columns < counter.peak_bytes < 1.6 * numbers.nbytes


# What does not fit.


def changed(part: str, change) -> Any:
    return lambda stored: stored | {part: change(stored[part])}


def without(part: str) -> Any:
    return lambda stored: {name: value for name, value in stored.items() if name != part}


def put(place: int, value: int) -> Any:
    def change(groups: torch.Tensor) -> torch.Tensor:
        groups = groups.clone()
        groups[place] = value
        return groups

    return change


WRONG = {
    "a group too many": (changed(".g_idx", put(3, 3)), r"'a.g_idx': expected groups from 0 to 2, found 3"),
    "a group before the first": (changed(".g_idx", put(3, -1)), r"'a.g_idx': expected groups from 0 to 2, found -1"),
    "no order": (changed(".g_idx", torch.zeros_like), r"'a.g_idx': expected an input in each of 3 groups, found inputs in 1"),
    "groups' dtype": (changed(".g_idx", torch.Tensor.long), r"'a.g_idx': expected I32 \[40\], found I64 \[40\]"),
    "groups' length": (changed(".g_idx", lambda g: g[:-1].clone()), r"'a.g_idx': expected I32 \[40\], found I32 \[39\]"),
    "codes' shape": (changed(".qweight", lambda w: w[:4].clone()), r"'a.qweight': expected I32 \[5, 24\], found I32 \[4, 24\]"),
    "codes' dtype": (changed(".qweight", torch.Tensor.float), r"'a.qweight': expected I32 \[5, 24\], found F32 \[5, 24\]"),
    "zeros' shape": (changed(".qzeros", lambda z: z[:2].clone()), r"'a.qzeros': expected I32 \[3, 3\], found I32 \[2, 3\]"),
    "zeros' dtype": (changed(".qzeros", torch.Tensor.short), r"'a.qzeros': expected I32 \[3, 3\], found I16 \[3, 3\]"),
    "scales' dtype": (changed(".scales", torch.Tensor.float), r"'a.scales': expected F16 or BF16, found F32"),
    "scales' shape": (changed(".scales", lambda s: s[:2].clone()), r"'a.scales': expected F16 \[3, 24\], found F16 \[2, 24\]"),
    "no scales": (without(".scales"), r"expected tensor 'a.scales' for 'a.*', found none"),
    "no zeros": (without(".qzeros"), r"expected tensor 'a.qzeros' for 'a.*', found none"),
    "no codes": (without(".qweight"), r"expected tensor 'a.qweight' for 'a.*', found none"),
    "twice": (lambda s: s | {".weight": torch.ones(24, 40)}, r"'a.weight': expected no plain weight beside a packed one"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_sentence(case, tmp_path):
    change, message = WRONG[case]
    how = Gptq(4, act_order=True)
    stored = change(how.pack(torch.randn(24, 40))[0])
    with pytest.raises(CheckpointError, match=rf"^[^\n]*x.safetensors[^\n]*{message}[^\n]*$"):
        read(write(tmp_path / "x.safetensors", stored), (24, 40), how.section)


SECTIONS = {
    "bits": ({"bits": 5}, "'a.qweight': expected bits to be 2, 3, 4, 8 .*, found 5"),
    "no bits": ({"bits": None}, "expected bits to be .*, found None"),
    "a word": ({"bits": "4"}, "expected bits to be .*, found 4"),
    "true": ({"bits": True}, "expected bits to be .*, found True"),
    "other bits": ({"bits": 8}, r"expected I32 \[10, 24\], found I32 \[5, 24\]"),
    "size": ({"group_size": 0}, "expected group_size to be -1 or more than 0 .*, found 0"),
    "no size": ({"group_size": None}, "expected group_size to be .*, found None"),
    "other size": ({"group_size": 8}, r"'a.qzeros': expected I32 \[5, 3\], found I32 \[3, 3\]"),
    "marlin": ({"checkpoint_format": "marlin"}, "in the format marlin .*, expected gptq or gptq_v2"),
    "old marlin": ({"is_marlin_format": True}, "in the format marlin .*, expected gptq or gptq_v2"),
    "planes": ({"format": "gptq_p", "checkpoint_format": "gptq_p"}, "in the format gptq_p .*, expected gptq or gptq_v2"),
    "two formats": ({"format": "gptq_v2"}, "in the format gptq and gptq_v2 "),
    "rotated": ({"rotation": "hadamard"}, "in the format hadamard rotation "),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_a_section_that_does_not_fit_is_one_sentence(case, tmp_path):
    change, message = SECTIONS[case]
    how = Gptq(4, act_order=True)
    path = write(tmp_path / "x.safetensors", how.pack(torch.randn(24, 40))[0])
    with pytest.raises(CheckpointError, match=rf"^[^\n]*x.safetensors[^\n]*{message}[^\n]*$"):
        read(path, (24, 40), how.section | change)


@pytest.mark.parametrize("bits, shape, message", [
    (4, (24, 44), "'a.qweight': expected a multiple of 8 inputs, found 44"),
    (4, (20, 40), "'a.qweight': expected a multiple of 8 outputs, found 20"),
    (3, (32, 40), "'a.qweight': expected a multiple of 32 inputs, found 40"),
    (3, (40, 32), "'a.qweight': expected a multiple of 32 outputs, found 40"),
])  # fmt: skip
def test_shapes_that_the_format_does_not_have(bits, shape, message, tmp_path):
    """GPTQModel can't unpack them either."""
    how = Gptq(bits)
    path = write(tmp_path / "x.safetensors", how.pack(torch.randn(32, 64))[0])
    with pytest.raises(CheckpointError, match=message):
        read(path, shape, how.section)


def test_dynamic_codes_of_no_known_bits(tmp_path):
    how = Gptq(4)
    stored = how.pack(torch.randn(32, 64))[0]
    section = how.section | {"dynamic": {"a": {}}}
    for change, message in (
        (changed(".qweight", lambda w: w[:5].clone()), "expected codes of 2, 3, 4, 8 bits for 64 inputs, found 2.5 bits"),
        (changed(".scales", lambda s: s[0].clone()), r"expected matrices of codes and scales, found \[8, 32\] and \[32\]"),
        (changed(".qweight", lambda w: w[:4].clone()), r"'a.qzeros': expected I32 \[4, 2\], found I32 \[4, 4\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(write(tmp_path / "x.safetensors", change(stored)), (32, 64), section)


@pytest.fixture(scope="module")
def plain_llama(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("llama") / "model", dtype=torch.float16)


def test_a_config_that_says_nothing_is_refused_with_what_to_do(plain_llama, tmp_path):
    """AutoGPTQ and GPTQModel write quantize_config.json beside it."""
    model, _ = write_grouped(plain_llama, tmp_path, Gptq())
    set_config(model, quantization_config=None)
    message = "proj.qweight' is packed, and config.json does not say how: add a quantization_config to it, with .*quantize_conf"
    with pytest.raises(UserError, match=message):
        cut(model)


def test_a_damaged_model_is_refused_by_its_file_and_tensor(plain_llama, tmp_path):
    model, _ = write_grouped(plain_llama, tmp_path, Gptq())
    name = "model.layers.1.self_attn.k_proj.g_idx"
    edit(model, {name: torch.full((40,), 7, dtype=torch.int32)})
    with pytest.raises(UserError, match=rf"model-.*safetensors: tensor '{name}': expected groups from 0 to 2, found 7"):
        cut(model)


def test_layers_that_are_stored_transposed_are_refused(tmp_path):
    """GPT-2's."""
    plain = write_model("gpt2", tmp_path / "gpt2")
    name = "transformer.h.0.attn.c_proj"
    shard = next(path for path in plain.glob("*.safetensors") if f"{name}.weight" in load_file(path))
    tensors = load_file(shard)
    stored, _ = Gptq().pack(tensors.pop(f"{name}.weight"))
    save_file(tensors | {name + suffix: value for suffix, value in stored.items()}, shard)
    set_config(plain, quantization_config=Gptq().section)
    with pytest.raises(UserError, match=f"'{name}.weight' of a Conv1D is stored as GPTQ, which is read for Linear only"):
        cut(plain)


# What a user does.


def test_eval_and_generate(plain_llama, tmp_path, quick_data):
    """Without the libraries that Transformers and PEFT ask for where they load such a model themselves."""
    assert_same_answers(write_grouped(plain_llama, tmp_path, Gptq(act_order=True)), tmp_path)
    assert not {"gptqmodel", "optimum", "awq"} & sys.modules.keys()


def test_a_stopped_run_goes_on_with_the_same_bits(plain_llama, tmp_path, quick_data):
    model, _ = write_grouped(plain_llama, tmp_path, Gptq(act_order=True))
    assert_resumes(model, tmp_path)
