"""Experts in MXFP4: Transformers' numbers, what does not fit, what is planned, and what a user does with them."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
import torch
from extents import read_source
from packed_checkpoints import edit, pack_mxfp4, set_config, write_twice
from safetensors.torch import save_file
from text_models import assert_resumes, assert_same_answers, write_model
from tiny_models import HEADS, IDS, TEXT
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import CheckpointError, read_header
from finetune.offload.sizing import dry_run
from finetune.offload.weights.formats import StoredWeight, find_weights
from finetune.offload.weights.formats.mxfp4 import MXFP4Experts
from finetune.offload.weights.formats.plain import PlainTensor
from finetune.offload.weights.parts import cut

SECTION = {"quant_method": "mxfp4"}
SHAPE = (3, 96, 50)
ENDS = ("experts.gate_up_proj", "experts.down_proj")


def read(
    folder: Path, stored: dict[str, torch.Tensor], shape: tuple[int, ...] = SHAPE
) -> tuple[StoredWeight, dict[str, torch.Tensor]]:
    """The weight `a` of a file with these tensors, and its stored tensors."""
    path = folder / "x.safetensors"
    save_file({f"a{suffix}": value for suffix, value in stored.items()}, path)
    form, parts = find_weights({entry.name: entry for entry in read_header(path)}, SECTION)["a"]
    weight = form.make(shape, parts, SECTION)
    return weight, weight.load(read_source)


def draw(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-1])


@pytest.mark.parametrize("shape", [SHAPE, (1, 32, 1), (2, 64, 1000)])
def test_numbers_and_some_experts(shape, tmp_path):
    stored, numbers = pack_mxfp4(draw(shape))
    weight, tensors = read(tmp_path, stored, shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert weight.decode(tensors, dtype).equal(numbers.to(dtype))
        assert weight.decode(tensors, dtype).equal(convert_moe_packed_tensors(*stored.values(), dtype=dtype))
    some = weight.rows([(shape[0] - 1, shape[0])])
    assert some.decode(some.load(read_source), torch.float32).equal(numbers[-1:])
    assert weight.rows([(0, shape[0])]) == weight
    assert weight.num_bytes == numbers.numel() * 17 // 32
    assert weight.decode({name: t.to("meta") for name, t in tensors.items()}, torch.float32).shape == shape


@pytest.mark.parametrize("kernels", [None, "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_at_every_exponent(dtype, kernels, monkeypatch):
    """From subnormal numbers to what is beyond a dtype, zeros of both signs too."""
    monkeypatch.setattr("finetune.offload.weights.formats.mxfp4.kernels_for", lambda tensor: kernels)
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[None, :, None].expand(1, 256, 16).contiguous()
    weight = MXFP4Experts(PlainTensor(torch.uint8, (1, 256, 16, 16), ()), PlainTensor(torch.uint8, (1, 256, 16), ()))
    found = weight.decode({"blocks": blocks, "scales": scales}, dtype)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert found.is_contiguous() and found.view(torch.uint8).equal(expected.view(torch.uint8))


WRONG = {
    "no scales": (lambda s: {"_blocks": s["_blocks"]}, "expected tensor 'a_scales' for 'a_blocks', found none"),
    "no blocks": (lambda s: {"_scales": s["_scales"]}, "expected tensor 'a_blocks' for 'a_scales', found none"),
    "twice": (lambda s: s | {"": torch.ones(SHAPE)}, "'a_blocks': expected no tensor of that name without _blocks"),
    "an expert less": (lambda s: s | {"_scales": s["_scales"][:2].clone()}, r"U8 \[3, 50, 3\], found U8 \[2, 50, 3\]"),
    "other blocks": (lambda s: s | {"_blocks": s["_blocks"].view(3, 50, 6, 8)}, r"\[3, 50, 3, 16\], found U8 \[3, 50, 6, 8\]"),
    "floats": (lambda s: s | {"_scales": s["_scales"].float()}, r"'a_scales': expected U8 .*, found F32 \[3, 50, 3\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_sentence(case, tmp_path):
    change, message = WRONG[case]
    with pytest.raises(CheckpointError, match=rf"x.safetensors: .*{message}"):
        read(tmp_path, change(pack_mxfp4(draw())[0]))


@pytest.mark.parametrize("shape", [(96, 50), (3, 48, 50)])
def test_parameters_that_are_no_stack_of_whole_blocks(shape, tmp_path):
    with pytest.raises(CheckpointError, match="expected stacked experts with rows of a multiple of 32 numbers, found"):
        read(tmp_path, pack_mxfp4(draw())[0], shape)


# A model.


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory) -> Path:
    """Tokenizer and sizes of vocabulary are those of the other text models."""
    folder = write_model("llama", tmp_path_factory.mktemp("gpt-oss") / "model", dtype=torch.bfloat16)
    vocabulary = AutoModelForCausalLM.from_pretrained(folder).config.vocab_size
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 5, "num_experts_per_tok": 2}
    torch.manual_seed(5)
    config = GptOssConfig(**TEXT | sizes | {"vocab_size": vocabulary}, **HEADS, **IDS)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def models(plain_model, tmp_path) -> tuple[Path, Path]:
    return write_twice(plain_model, tmp_path, lambda _, value: pack_mxfp4(value), SECTION, ENDS)


def test_a_model_that_transformers_dequantises(models):
    dense = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.bfloat16).state_dict()
    sources = cut(models[0]).sources
    assert dense.keys() == sources.keys()
    for name, source in sources.items():
        assert source.decode(source.load(read_source), torch.bfloat16).equal(dense[name])


def not_on_meta(*args) -> NoReturn:
    """As PyTorch's operators that have no meta kernel."""
    raise NotImplementedError


@pytest.mark.parametrize("runs_on_meta", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_plan_counts_all_experts_decoded(dtype, runs_on_meta, models, monkeypatch):
    """Both stacks of a block at once, also where its visit can only be estimated."""
    parts = cut(models[0], lambda stored: dtype)
    experts = [weight for weight in parts.layouts[0].weights.values() if isinstance(weight, MXFP4Experts)]
    decoded_bytes = sum(5 * columns * rows for _, columns, rows in (weight.shape for weight in experts)) * dtype.itemsize
    assert decoded_bytes == 5 * (64 * 192 + 96 * 64) * dtype.itemsize
    assert decoded_bytes <= parts.bindings[0].decoded_bytes
    if not runs_on_meta:
        monkeypatch.setattr(dry_run, "_run_on_meta", not_on_meta)
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "use_cache": False}
    assert dry_run.measure_visit(parts, parts.model, inputs, True).peak_bytes > decoded_bytes


def test_eval_and_generate(models, tmp_path, quick_data):
    assert_same_answers(models, tmp_path)


def test_a_stopped_run_goes_on_with_the_same_bits(models, tmp_path, quick_data):
    assert_resumes(models[0], tmp_path, target_modules=["q_proj"])


def test_a_damaged_model_is_refused_by_its_file_and_tensor(models):
    name = "model.layers.1.mlp.experts.down_proj_scales"
    edit(models[0], {name: torch.ones(5, 64, 2, dtype=torch.uint8)})
    with pytest.raises(UserError, match=rf"\.safetensors: tensor '{name}': expected U8 \[5, 64, 3\], found U8 \[5, 64, 2\]"):
        cut(models[0])
    set_config(models[0], quantization_config={"quant_method": "mxfp6"})
    with pytest.raises(UserError, match="by 'mxfp6', and no weight is stored as one of .*, mxfp4"):
        cut(models[0])
