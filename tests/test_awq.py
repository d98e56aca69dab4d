"""Weights as AWQ packs them: the numbers of AutoAWQ, what does not fit, and what a user does with them."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from extents import read_source
from grouped_checkpoints import Awq, write_grouped
from packed_checkpoints import edit, set_config
from safetensors.torch import load_file
from test_gptq import RECORDED, changed, read, without, without_kernels, write
from text_models import assert_resumes, assert_same_answers, write_model

from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import CheckpointError
from finetune.offload.sizing.meta_operations import LiveBytes
from finetune.offload.weights.formats import PlainTensor
from finetune.offload.weights.formats.awq import PackedAwq
from finetune.offload.weights.parts import cut


@pytest.mark.parametrize("size, dtype", product([16, 64], [torch.float16, torch.bfloat16]))
def test_numbers_are_those_of_the_library(size, dtype):
    """`dequantize_gemm` on a CPU, which AutoAWQ and GPTQModel have alike, of random words."""
    name = f"awq.{size}.{str(dtype).removeprefix('torch.')}"
    expected = load_file(RECORDED)[f"{name}.expected"]
    weight, stored = read(RECORDED, tuple(expected.shape), Awq(size).section, name)
    assert expected.dtype == dtype
    for wanted in (dtype, torch.float32):
        assert weight.decode(stored, wanted).equal(expected.to(wanted))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("outputs, inputs", [(8, 1), (40, 72), (104, 96)])
def test_numbers_are_those_of_the_published_format(outputs, inputs, native, tmp_path, monkeypatch):
    if not native:
        without_kernels(monkeypatch)
    matrix = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(3))
    sizes = [size for size in (-1, 1, 8, 24) if inputs % size == 0]
    for size, dtype, at_once in product(sizes, (torch.float16, torch.bfloat16), (768, 11)):
        monkeypatch.setattr("finetune.offload.weights.formats.base.ROWS_AT_ONCE", at_once)
        how = Awq(size, dtype)
        stored, expected = how.pack(matrix)
        weight, stored = read(write(tmp_path / "x.safetensors", stored), (outputs, inputs), how.section)
        found = weight.decode(stored, dtype)
        assert found.equal(expected) and found.is_contiguous()
        assert weight.decode(stored, torch.float32).equal(expected.float())
        ranges = [(1, 2), (3, 5), (5, outputs)]
        some = weight.rows(ranges)
        assert some.decode(some.load(read_source), dtype).equal(torch.cat([expected[a:b] for a, b in ranges]))
        assert weight.rows([(0, outputs)]) is weight


def test_little_is_allocated_beside_the_numbers():
    rows, columns = 4096, 2048
    weight = PackedAwq(
        PlainTensor(torch.int32, (columns, rows // 8), ()), PlainTensor(torch.int32, (columns // 128, rows // 8), ()),
        PlainTensor(torch.float16, (columns // 128, rows), ()), None, (rows, columns), 4, 128, ((0, rows),),
    )  # fmt: skip
    stored = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in weight.tensors.items()}
    counter = LiveBytes()
    for tensor in stored.values():
        counter.ignore(tensor)
    with counter:
        numbers = weight.decode(stored, torch.float32)
    assert numbers.nbytes == 4 * rows * columns < counter.peak_bytes < 1.6 * numbers.nbytes


# What does not fit.

WRONG = {
    "codes' shape": (changed(".qweight", lambda w: w[:9].clone()), r"'a.qweight': expected I32 \[40, 3\], found I32 \[9, 3\]"),
    "codes' dtype": (changed(".qweight", torch.Tensor.float), r"'a.qweight': expected I32 \[40, 3\], found F32 \[40, 3\]"),
    "zeros' shape": (changed(".qzeros", lambda z: z[:2].clone()), r"'a.qzeros': expected I32 \[5, 3\], found I32 \[2, 3\]"),
    "zeros' dtype": (changed(".qzeros", torch.Tensor.long), r"'a.qzeros': expected I32 \[5, 3\], found I64 \[5, 3\]"),
    "scales' dtype": (changed(".scales", torch.Tensor.float), "'a.scales': expected F16 or BF16, found F32"),
    "scales' shape": (changed(".scales", lambda s: s[0].clone()), r"'a.scales': expected F16 \[5, 24\], found F16 \[24\]"),
    "no scales": (without(".scales"), "expected tensor 'a.scales' for 'a.*', found none"),
    "no zeros": (without(".qzeros"), "expected tensor 'a.qzeros' for 'a.*', found none"),
    "no codes": (without(".qweight"), "expected tensor 'a.qweight' for 'a.*', found none"),
    "twice": (lambda s: s | {".weight": torch.ones(24, 40)}, "'a.weight': expected no plain weight beside a packed one"),
    "an order": (lambda s: s | {".g_idx": torch.zeros(40, dtype=torch.int32)}, "'a.qweight': expected no g_idx beside it"),
    "activations": (lambda s: s | {".act.scales": torch.ones(40)}, "'a.act.scales': expected codes beside scales, found none"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_sentence(case, tmp_path):
    change, message = WRONG[case]
    stored = change(Awq().pack(torch.randn(24, 40))[0])
    with pytest.raises(CheckpointError, match=rf"^[^\n]*x.safetensors[^\n]*{message}[^\n]*$"):
        read(write(tmp_path / "x.safetensors", stored), (24, 40), Awq().section)


SECTIONS = {
    "bits": ({"bits": 8}, "'a.qweight': expected bits to be 4 .*, found 8"),
    "no bits": ({"bits": None}, "expected bits to be 4 .*, found None"),
    "size": ({"group_size": -2}, "expected group_size to be -1 or more than 0 .*, found -2"),
    "a word": ({"group_size": "8"}, "expected group_size to be -1 or more than 0 .*, found 8"),
    "other size": ({"group_size": 20}, r"'a.qzeros': expected I32 \[2, 3\], found I32 \[5, 3\]"),
    "a short group": ({"group_size": 16}, "expected 40 inputs to be whole groups, found a group_size of 16"),
    "gemv": ({"version": "GEMV"}, r"in the version gemv .*, expected gemm"),
    "marlin": ({"version": "marlin"}, r"in the version marlin .*, expected gemm"),
    "exllama": ({"version": "exllama"}, r"in the version exllama .*, expected gemm"),
    "llm-awq": ({"backend": "llm-awq"}, r"in the version llm-awq .*, expected gemm"),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_a_section_that_does_not_fit_is_one_sentence(case, tmp_path):
    change, message = SECTIONS[case]
    path = write(tmp_path / "x.safetensors", Awq().pack(torch.randn(24, 40))[0])
    with pytest.raises(CheckpointError, match=rf"^[^\n]*x.safetensors[^\n]*{message}[^\n]*$"):
        read(path, (24, 40), Awq().section | change)


def test_a_version_that_is_not_named(tmp_path):
    """Is gemm, as Transformers has it."""
    stored, expected = Awq().pack(torch.randn(24, 40))
    section = {key: value for key, value in Awq().section.items() if key != "version"}
    weight, stored = read(write(tmp_path / "x.safetensors", stored), (24, 40), section)
    assert weight.decode(stored, torch.float16).equal(expected)


def test_outputs_that_do_not_fill_words(tmp_path):
    path = write(tmp_path / "x.safetensors", Awq().pack(torch.randn(24, 40))[0])
    with pytest.raises(CheckpointError, match="'a.qweight': expected a multiple of 8 outputs, found 20"):
        read(path, (20, 40), Awq().section)


@pytest.fixture(scope="module")
def plain_llama(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("llama") / "model", dtype=torch.float16)


def test_a_damaged_model_is_refused_by_its_file_and_tensor(plain_llama, tmp_path):
    model, _ = write_grouped(plain_llama, tmp_path, Awq())
    name = "model.layers.1.self_attn.k_proj.qzeros"
    edit(model, {name: torch.zeros(2, 3, dtype=torch.int32)})
    with pytest.raises(UserError, match=rf"model-.*safetensors: tensor '{name}': expected I32 \[5, 3\], found I32 \[2, 3\]"):
        cut(model)


def test_a_model_of_gptq_that_is_said_to_be_of_awq(plain_llama, tmp_path):
    model, _ = write_grouped(plain_llama, tmp_path, Awq())
    set_config(model, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 8})
    with pytest.raises(UserError, match=r"proj.qweight': expected I32 \[7, 40\], found I32 \[56, 5\]"):
        cut(model)


# What a user does.


def test_eval_and_generate(plain_llama, tmp_path, quick_data):
    assert_same_answers(write_grouped(plain_llama, tmp_path, Awq()), tmp_path)


def test_a_stopped_run_goes_on_with_the_same_bits(plain_llama, tmp_path, quick_data):
    model, _ = write_grouped(plain_llama, tmp_path, Awq())
    assert_resumes(model, tmp_path)
