"""FP8 with scales: Transformers' numbers, what does not fit, and what a user does with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from extents import read_source
from packed_checkpoints import Packed, e4m3_values, edit, pack_fp8, set_config, write_twice
from safetensors.torch import save_file
from text_models import assert_resumes, assert_same_answers, write_model
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import CheckpointError, read_header
from finetune.offload.weights.formats import StoredWeight, find_weights
from finetune.offload.weights.formats.fp8 import BlockFP8
from finetune.offload.weights.parts import cut

BLOCK = (16, 24)
SECTION = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read(
    folder: Path, stored: dict[str, torch.Tensor], shape: tuple[int, ...], section: dict = SECTION
) -> tuple[StoredWeight, dict[str, torch.Tensor]]:
    """The weight `a.weight` of a file with these tensors, and its stored tensors."""
    path = folder / "x.safetensors"
    save_file({f"a{suffix}": value for suffix, value in stored.items()}, path)
    form, parts = find_weights({entry.name: entry for entry in read_header(path)}, section)["a.weight"]
    weight = form.make(shape, parts, section)
    return weight, weight.load(read_source)


def draw(rows: int, columns: int) -> torch.Tensor:
    """With numbers of all magnitudes that E4M3 has."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 3, columns)


def test_codes_are_those_of_the_format():
    every_code = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.from_numpy(e4m3_values()).allclose(every_code.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16, "one", "one as a matrix", "a row"])
def test_numbers_are_those_of_transformers(scales, tmp_path):
    stored, numbers = pack_fp8(draw(48, 72), BLOCK, scales if isinstance(scales, torch.dtype) else torch.float32)
    section = SECTION
    if isinstance(scales, str):
        shape = {"one": (), "one as a matrix": (1, 1), "a row": (48, 1)}[scales]
        stored[".weight_scale_inv"] = torch.rand(shape)
        section = SECTION | {"weight_block_size": None}
    else:
        assert Fp8Dequantize(None)._dequantize_one(*stored.values(), torch.float32).equal(numbers)
    weight, tensors = read(tmp_path, stored, (48, 72), section)
    for dtype in DTYPES:
        expected = Fp8Dequantize(None)._dequantize_one(stored[".weight"], stored[".weight_scale_inv"], dtype)
        assert weight.decode(tensors, dtype).equal(expected)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_scales_that_are_powers_of_two(as_bytes, tmp_path):
    exponents = torch.randint(100, 140, (3, 3), dtype=torch.uint8)
    scales = exponents if as_bytes else exponents.view(torch.float8_e8m0fnu)
    packed = pack_fp8(draw(48, 72), BLOCK)[0][".weight"]
    stored = {".weight": packed, ".weight_scale_inv": scales}
    weight, tensors = read(tmp_path, stored, (48, 72), SECTION | {"scale_fmt": "ue8m0"})
    expected = Fp8Dequantize(None)._dequantize_one(packed, scales, torch.bfloat16)
    assert weight.decode(tensors, torch.bfloat16).equal(expected)
    if as_bytes:
        with pytest.raises(CheckpointError, match="expected a dtype out of F32, BF16, F16, F8_E8M0, found U8"):
            read(tmp_path, stored, (48, 72))


@pytest.mark.parametrize("shape", [(50, 37), (7, 100), (1, 1), (1600, 30)])
def test_ragged_blocks_and_their_rows(shape, tmp_path):
    """As Transformers' backward pass has them; its conversion would take blocks of other sizes."""
    stored, numbers = pack_fp8(draw(*shape), BLOCK)
    assert _dequantize_fp8_weight(stored[".weight"], stored[".weight_scale_inv"], list(BLOCK), torch.float32).equal(numbers)
    weight, tensors = read(tmp_path, stored, shape)
    for dtype in DTYPES:
        assert weight.decode(tensors, dtype).equal(numbers.to(dtype))
    ranges = [(start, stop) for start, stop in [(3, 5), (5, 6), (15, 17), (40, 50)] if stop <= shape[0]]
    if ranges:
        some = weight.rows(ranges)
        found = some.decode(some.load(read_source), torch.float32)
        assert found.equal(torch.cat([numbers[a:b] for a, b in ranges])) and some.num_bytes < weight.num_bytes
    assert weight.rows([(0, shape[0])]) == weight


def test_a_weight_of_one_scale_as_older_tools_write_it(tmp_path):
    packed = pack_fp8(draw(48, 72), BLOCK)[0][".weight"]
    scale = torch.tensor(0.03125 / 3, dtype=torch.bfloat16)
    stored = {".weight": packed, ".weight_scale": scale, ".input_scale": torch.tensor(0.5)}
    weight, tensors = read(tmp_path, stored, (48, 72), {"quant_method": "fp8", "activation_scheme": "static"})
    assert weight.decode(tensors, torch.float32).equal(packed.float() * scale.float())
    assert weight.num_bytes == 48 * 72 + 2


def test_it_takes_half_of_bf16_and_little_beside_the_numbers(tmp_path):
    weight, _ = read(tmp_path, pack_fp8(draw(48, 72), BLOCK)[0], (48, 72))
    assert weight.num_bytes == 48 * 72 + 4 * 3 * 3
    assert weight.decode({name: t.to("meta") for name, t in weight.load(read_source).items()}, torch.float32).is_meta


WRONG = {
    "no scale": (lambda s: {".weight": s[".weight"], ".activation_scale": torch.ones(())}, r"expected one of .*, found 0"),
    "no weight": (lambda s: {".weight_scale_inv": s[".weight_scale_inv"]}, "expected tensor 'a.weight' for 'a.*', found none"),
    "two scales": (lambda s: s | {".weight_scale": torch.ones(())}, r"expected one of .*, found 2"),
    "other blocks": (
        lambda s: s | {".weight_scale_inv": torch.ones(2, 3)},
        r"'a.weight_scale_inv': expected \[3, 3\], scales of blocks of \[16, 24\] of \[48, 72\], found \[2, 3\]",
    ),
    "transposed": (lambda s: s | {".weight": s[".weight"].t().contiguous()}, r"F8_E4M3 \[48, 72\], found F8_E4M3 \[72, 48\]"),
    "one for all": (lambda s: s | {".weight_scale_inv": torch.ones(())}, r"expected \[3, 3\], .*, found \[\]"),
    "a dimension more": (lambda s: s | {".weight_scale_inv": torch.ones(3, 3, 1)}, r"expected \[3, 3\], .*, found \[3, 3, 1\]"),
    "integers": (lambda s: s | {".weight_scale_inv": torch.ones(3, 3, dtype=torch.int64)}, "a dtype out of F32, .*, found I64"),
    "E5M2": (lambda s: s | {".weight": torch.ones(48, 72).to(torch.float8_e5m2)}, "expected F8_E4M3 .*, found F8_E5M2"),
    "fp4": (lambda s: s | {".weight": torch.ones(48, 36, dtype=torch.int8)}, r"F8_E4M3 \[48, 72\], found I8 \[48, 36\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_sentence(case, tmp_path):
    change, message = WRONG[case]
    stored = change(pack_fp8(draw(48, 72), BLOCK)[0])
    with pytest.raises(CheckpointError, match=rf"x.safetensors.*{message}"):
        read(tmp_path, stored, (48, 72))


@pytest.mark.parametrize("block", [[16], [16, 0], [16, True], "16x24", 16, [16, 24.0], [16, -24]])
def test_a_block_size_that_is_none(block, tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: expected weight_block_size of .* to be two sizes or null"):
        read(tmp_path, pack_fp8(draw(48, 72), BLOCK)[0], (48, 72), SECTION | {"weight_block_size": block})


# A model.


def pack(name: str, value: torch.Tensor) -> Packed | None:
    """`modules_to_not_convert` has left one layer alone."""
    return None if "layers.0.self_attn.k_proj" in name else pack_fp8(value, BLOCK)


@pytest.fixture(scope="module")
def plain_llama(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("llama") / "model", dtype=torch.bfloat16)


@pytest.fixture
def models(plain_llama, tmp_path) -> tuple[Path, Path]:
    section = SECTION | {"modules_to_not_convert": ["model.layers.0.self_attn.k_proj"], "activation_scheme": "dynamic"}
    return write_twice(plain_llama, tmp_path, pack, section)


def test_what_is_left_in_16_bits_stays_so(models):
    sources = cut(models[0]).sources
    kinds = {name: type(sources[f"model.layers.{name}.self_attn.k_proj.weight"]) for name in (0, 1)}
    assert kinds[1] is BlockFP8 is not kinds[0]
    assert cut(models[0]).dtype == sources["model.layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16


def test_a_model_that_transformers_dequantises(plain_llama, tmp_path):
    """With blocks that divide every layer: it loads the same from the quantised checkpoint and the decoded one."""
    section = {"quant_method": "fp8", "weight_block_size": [4, 8]}
    models = write_twice(plain_llama, tmp_path, lambda _, value: pack_fp8(value, (4, 8)), section)
    dense, expected = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict() for model in models)
    assert dense.keys() == expected.keys() and all(dense[name].equal(value) for name, value in expected.items())
    sources = cut(models[0]).sources
    for name, source in sources.items():
        assert source.decode(source.load(read_source), torch.bfloat16).equal(expected[name])


def test_a_weight_that_has_lost_its_scale_is_refused(models):
    name = "model.layers.1.mlp.up_proj.weight"
    edit(models[0], {f"{name}_scale_inv": None})
    with pytest.raises(UserError, match=f"parameter '{name}' is stored as float8_e4m3fn, expected a floating-point number of"):
        cut(models[0])


def test_names_of_scales_that_nobody_knows_are_refused(models):
    edit(models[0], {f"model.layers.{i}.{name}.weight_scale_inv": None for i in range(9) for name in
                     [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("up", "gate", "down")]})  # fmt: skip
    with pytest.raises(UserError, match="quantised .* by 'fp8', and no weight is stored as one of .*, fp8 with scales"):
        cut(models[0])


def test_eval_and_generate(models, tmp_path, quick_data, capsys):
    assert_same_answers(models, tmp_path)


def test_a_stopped_run_goes_on_with_the_same_bits(models, tmp_path, quick_data, capsys):
    assert_resumes(models[0], tmp_path)
    # Each of the three runs says it once.
    assert capsys.readouterr().err.count("losses are those of the dequantised weights") == 3


def test_a_damaged_model_is_refused_by_its_file_and_tensor(models):
    name = "model.layers.1.self_attn.k_proj.weight_scale_inv"
    edit(models[0], {name: torch.ones(7, 7)})
    with pytest.raises(UserError, match=rf"\.safetensors: tensor '{name}': expected \[2, 2\], .*, found \[7, 7\]"):
        cut(models[0])
    set_config(models[0], quantization_config=SECTION | {"weight_block_size": [[]]})
    with pytest.raises(UserError, match="expected weight_block_size"):
        cut(models[0])
