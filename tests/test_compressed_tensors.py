"""Weights as compressed-tensors stores them: the library's numbers, what does not fit, and what a user does with them."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extents import read_source
from packed_checkpoints import edit, pack_compressed, pack_fp8, set_config, write_twice
from safetensors.torch import save_file
from text_models import assert_same_answers, make_config, write_model, write_rows
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from finetune import Trainer
from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import CheckpointError, read_header
from finetune.offload.weights.formats import StoredWeight, find_weights
from finetune.offload.weights.formats.compressed_tensors import CompressedTensor
from finetune.offload.weights.parts import cut

SHAPE = (37, 65)
NAME = "m.layers.3.q_proj"


def section(form: str, weights: dict[str, Any], targets: tuple[str, ...] = ("Linear",), **more: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": list(targets), "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"], **more}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 13, "symmetric": False}
PACKED = section("pack-quantized", INT4)


def read(
    folder: Path, stored: dict[str, torch.Tensor], quantization: dict, shape: tuple[int, ...] = SHAPE
) -> tuple[StoredWeight, dict[str, torch.Tensor]]:
    """The weight `NAME.weight` of a file with these tensors, and its stored tensors."""
    path = folder / "x.safetensors"
    save_file({f"{NAME}{suffix}": value.contiguous() for suffix, value in stored.items()}, path)
    form, parts = find_weights({entry.name: entry for entry in read_header(path)}, quantization)[f"{NAME}.weight"]
    weight = form.make(shape, parts, quantization)
    return weight, weight.load(read_source)


def draw(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 2, shape[1])


STRATEGIES = {
    "tensor": ({}, SHAPE),
    "channel": ({}, (1, SHAPE[1])),
    "group": ({"group_size": 13}, (1, 13)),
    "block": ({"block_structure": [10, 30]}, (10, 30)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_numbers_and_their_rows(symmetric, strategy, dtype, tmp_path):
    options, block = STRATEGIES[strategy]
    sizes = [(8, False)] if strategy == "block" else [(2, True), (4, True), (8, True), (8, False), (4, False)]
    for bits, words in sizes:
        stored, numbers = pack_compressed(draw(), bits, block, dtype, symmetric, words)
        if words and strategy == "tensor" and not symmetric:
            continue  # the library packs zero points of rows and groups only
        weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric, **options}
        weight, tensors = read(tmp_path, stored, section("pack-quantized" if words else "int-quantized", weights))
        for compute in (torch.float32, torch.bfloat16):
            assert weight.decode(tensors, compute).equal(numbers.to(compute))
        ranges = [(1, 3), (3, 4), (9, 20), (36, 37)]
        some = weight.rows(ranges)
        expected = torch.cat([numbers[a:b] for a, b in ranges]).float()
        assert some.decode(some.load(read_source), torch.float32).equal(expected)
        assert some.num_bytes < weight.num_bytes and weight.rows([(0, 37)]) == weight
        assert weight.decode({name: t.to("meta") for name, t in tensors.items()}, torch.float32).shape == SHAPE


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp8(strategy, tmp_path):
    options, block = STRATEGIES[strategy]
    stored, numbers = pack_fp8(draw(), block, torch.bfloat16)
    stored = {".weight": stored[".weight"], ".weight_scale": stored[".weight_scale_inv"], ".input_scale": torch.ones(1)}
    scheme = {"num_bits": 8, "type": "float", "strategy": strategy, **options}
    weight, tensors = read(tmp_path, stored, section("float-quantized", scheme))
    assert weight.decode(tensors, torch.float32).equal(numbers.bfloat16().float())


def test_columns_of_groups_out_of_order(tmp_path):
    """As `weight_g_idx` says; a -1 takes it back."""
    order = np.random.default_rng(5).permutation(np.arange(65) // 13)
    for symmetric in (True, False):
        stored, numbers = pack_compressed(draw(), 4, (1, 13), symmetric=symmetric, order=order)
        quantization = section("pack-quantized", INT4 | {"symmetric": symmetric})
        weight, tensors = read(tmp_path, stored, quantization)
        assert weight.decode(tensors, torch.float32).equal(numbers.float())
        some = weight.rows([(5, 30)])
        assert some.decode(some.load(read_source), torch.float32).equal(numbers[5:30].float())
        in_order, numbers = pack_compressed(draw(), 4, (1, 13), symmetric=symmetric)
        weight, tensors = read(tmp_path, in_order | {".weight_g_idx": torch.full((65,), -1, dtype=torch.int32)}, quantization)
        assert weight.decode(tensors, torch.float32).equal(numbers.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized", "float-quantized", "naive-quantized"])
def test_numbers_are_those_of_the_installed_library(form, strategy, dtype, tmp_path):
    registry = pytest.importorskip("compressed_tensors.compressors").BaseCompressor
    quantization = pytest.importorskip("compressed_tensors.quantization")
    is_float, options = form == "float-quantized", STRATEGIES[strategy][0]
    for bits, symmetric in [(8, True)] if is_float else [(8, True), (8, False), (4, False)]:
        weights = {"num_bits": bits, "type": "float" if is_float else "int", "symmetric": symmetric, "strategy": strategy}
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights | options)
        library = registry.get_value_from_registry(form)
        rows, columns = STRATEGIES[strategy][1]
        grid = (1,) if strategy == "tensor" else (-(-37 // rows), -(-65 // columns))
        state = {"weight": draw().to(dtype), "weight_scale": (torch.rand(grid) * 3 + 0.1).to(dtype)}
        if not symmetric:
            state["weight_zero_point"] = torch.randint(-8, 8, grid, dtype=torch.int8)
        stored = library.compress(state, scheme)
        expected = library.decompress(stored, scheme)["weight"]
        written = section(form, json.loads(scheme.weights.model_dump_json()))
        weight, tensors = read(tmp_path, {f".{name}": value for name, value in stored.items()}, written)
        for compute in (torch.float32, torch.bfloat16):
            assert weight.decode(tensors, compute).equal(expected.to(compute))


def test_a_layers_own_group_comes_before_that_of_its_class(tmp_path):
    """Mixed precision: the format is the group's, a name or regular expression goes before a class, and what fits is taken."""
    eight, numbers = pack_fp8(draw(), (1, 65))
    eight = {".weight": eight[".weight"], ".weight_scale": eight[".weight_scale_inv"]}
    four = pack_compressed(draw(), 4, (1, 13), symmetric=False)
    for targets, stored, expected in ((["re:.*q_proj$"], eight, numbers), ([NAME], eight, numbers), (["re:.*v_proj"], *four)):
        groups = {
            "group_0": {"targets": ["Linear"], "weights": INT4, "format": "pack-quantized"},
            "group_1": {
                "targets": targets, "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "format": "float-quantized", "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
            },
        }  # fmt: skip
        quantization = section("mixed-precision", {}) | {"config_groups": groups}
        weight, tensors = read(tmp_path, stored, quantization)
        assert weight.decode(tensors, torch.float32).equal(expected.float())
        assert bool(weight.note) == (stored is eight)


def words(change: dict[str, Any], **more: Any) -> dict[str, Any]:
    return section("pack-quantized", INT4 | change, **more)


REFUSED = {
    "a format": (section("nvfp4-pack-quantized", INT4), "with the format 'nvfp4-pack-quantized', which isn't read; its"),
    "a sparse format": (section("marlin-24", INT4), "with the format 'marlin-24'"),
    "no format": (section(None, INT4), "with the format None"),
    "sparsity": (words({}, sparsity_config={"format": "sparse-24-bitmask"}), "with sparse weights .'sparse-24-bitmask'."),
    "transforms": (words({}, transform_config={"config_groups": {"u": {}}}), "with transformed weights"),
    "3 bits": (words({"num_bits": 3}), "with 3 bits of type int in the format pack-quantized"),
    "a true bit": (words({"num_bits": True}), "with True bits"),
    "packed floats": (words({"type": "float"}), "with type 'float' in the format pack-quantized"),
    "a strategy": (words({"strategy": "tensor_group"}), "with the strategy 'tensor_group'"),
    "a group size": (words({"group_size": 0}), r"config.json: .* expected group_size of weights of group_0 to be positive"),
    "a block": (words({"strategy": "block", "block_structure": "2xa"}), "expected block_structure of weights of group_0"),
    "symmetry": (words({"symmetric": "no"}), "expected symmetric of weights of group_0 to be true or false, found no"),
    "no groups": (PACKED | {"config_groups": None}, "expected config_groups to be an object of objects, found None"),
    "a preset": (PACKED | {"config_groups": {"W4A16": ["Linear"]}}, "expected config_groups to be an object of objects"),
    "another layer": (section("pack-quantized", INT4, ("re:.*v_proj",)), f"a target for '{NAME}', found none"),
    "no expression": (section("pack-quantized", INT4, ("re:(",)), "to be a regular expression"),
    "targets": (section("pack-quantized", INT4, (4,)), "expected targets of group_0 to be a list of names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_schemes_that_are_not_read_are_refused_by_their_name(case, tmp_path):
    quantization, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, pack_compressed(draw(), 4, (1, 13), symmetric=False)[0], quantization)


WRONG = {
    ".weight_packed": [
        (None, r"expected a tensor '\*.weight_packed' beside it"),
        (torch.zeros(37, 8, dtype=torch.int32), r"expected I32 \[37, 9\], found I32 \[37, 8\]"),
        (torch.zeros(37, 9), r"expected I32 \[37, 9\], found F32 \[37, 9\]"),
    ],
    ".weight_scale": [
        (None, r"expected a tensor '\*.weight_scale' beside it"),
        (torch.ones(37, 4), r"expected \[37, 5\], scales of blocks of \[1, 13\], found \[37, 4\]"),
        (torch.ones(37, 5, dtype=torch.int32), "expected a dtype out of F32, BF16, F16, found I32"),
    ],
    ".weight_zero_point": [
        (None, r"expected a tensor '\*.weight_zero_point' beside it"),
        (torch.zeros(4, 5, dtype=torch.int32), r"expected I32 \[5, 5\], found I32 \[4, 5\]"),
        (torch.zeros(37, 5, dtype=torch.int8), r"expected I32 \[5, 5\], found I8 \[37, 5\]"),
    ],
    ".weight_shape": [
        (torch.tensor([65, 37]), r"expected \[37, 65\], found \[65, 37\]"),
        (torch.tensor([37]), r"expected I64 \[2\], found I64 \[1\]"),
        (torch.tensor([37.0, 65.0]), r"expected I64 \[2\], found F32 \[2\]"),
    ],
    ".weight_g_idx": [
        (torch.arange(65, dtype=torch.int32), r"expected each of 5 groups of columns, found \[0, 1, 2, 3\]"),
        (torch.full((65,), -2, dtype=torch.int32), r"expected each of 5 groups of columns, found \[-2\]"),
        (torch.zeros(64, dtype=torch.int32), r"expected I32 \[65\], found I32 \[64\]"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("part", WRONG)
def test_what_does_not_fit_is_one_sentence(part, tmp_path):
    for value, message in WRONG[part]:
        stored = pack_compressed(draw(), 4, (1, 13), symmetric=False)[0]
        stored = {name: tensor for name, tensor in stored.items() if name != part} | ({} if value is None else {part: value})
        with pytest.raises(CheckpointError, match=rf"x.safetensors: tensor '{NAME}[^']*': {message}"):
            read(tmp_path, stored, PACKED)


def test_groups_that_do_not_divide_the_columns(tmp_path):
    with pytest.raises(CheckpointError, match="expected 65 columns in groups of a size that divides them, found 32"):
        read(tmp_path, pack_compressed(draw(), 4, (1, 32), symmetric=False)[0], words({"group_size": 32}))


def test_zero_points_beside_integers_of_their_own(tmp_path):
    """int8, for which zero points are not packed."""
    quantization = section("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False})
    stored, _ = pack_compressed(draw(), 8, (1, 65), symmetric=False, words=False)
    for value, message in [
        (torch.zeros(36, 1, dtype=torch.int8), r"expected \[37, 1\] like its scales, found \[36, 1\]"),
        (torch.zeros(37, 1), "expected a dtype out of I8, .*, found F32"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path, stored | {".weight_zero_point": value}, quantization)
    with pytest.raises(CheckpointError, match=r"expected I8 \[37, 65\], found BF16 \[37, 65\]"):
        read(tmp_path, stored | {".weight": torch.zeros(SHAPE, dtype=torch.bfloat16)}, quantization)


ODD = (None, True, 0, -1, 3, 13, 1.5, 10**30, "", "re:(", "Linear", "group", "tensor", "float", "2x2", [], [1, 2], {}, {"a": 1})


def changed(value: Any, rng: random.Random) -> Any:
    """A copy with one thing in it, or all of it, replaced or removed."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return deepcopy(rng.choice(ODD))
    copy = deepcopy(value)
    key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    if rng.random() < 0.2:
        del copy[key]
    else:
        copy[key] = changed(copy[key], rng)
    return copy


def test_configurations_that_were_changed_at_random_give_the_same_numbers_or_a_sentence(tmp_path):
    rng, refused = random.Random(5), 0
    stored, numbers = pack_compressed(draw(), 4, (1, 13), symmetric=False)
    whole = section("pack-quantized", INT4, sparsity_config={"format": "dense"}, transform_config={}, kv_cache_scheme=None)
    for _ in range(300):
        quantization = changed({key: value for key, value in whole.items() if key != "quant_method"}, rng)
        if not isinstance(quantization, dict):
            continue  # Transformers refuses it
        try:
            weight, tensors = read(tmp_path, stored, {**quantization, "quant_method": "compressed-tensors"})
        except CheckpointError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
            refused += 1
            continue
        assert weight.decode(tensors, torch.float32).equal(numbers.float())
    assert refused > 100


# A model.


def test_a_model_that_transformers_dequantises(plain_llama, tmp_path):
    pytest.importorskip("compressed_tensors")
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 4}
    quantization = section("pack-quantized", weights, quantization_status="compressed")
    model, _ = write_twice(plain_llama, tmp_path, lambda _, value: pack_compressed(value, 4, (1, 4)), quantization)
    choice = CompressedTensorsConfig(dequantize=True)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=choice).state_dict()
    for name, source in cut(model).sources.items():
        assert source.decode(source.load(read_source), torch.bfloat16).equal(dense[name])


@pytest.fixture(scope="module")
def plain_llama(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("llama") / "model", dtype=torch.bfloat16)


@pytest.fixture
def models(plain_llama, tmp_path) -> tuple[Path, Path]:
    """MLPs in 4 bits; attention in FP8, whose inputs are quantised by the library."""

    def pack(name: str, value: torch.Tensor):
        if "mlp" in name:
            return pack_compressed(value, 4, (1, 4))
        stored, numbers = pack_fp8(value, (1, value.shape[1]), torch.bfloat16)
        return {".weight": stored[".weight"], ".weight_scale": stored[".weight_scale_inv"]}, numbers.bfloat16()

    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 4}
    eight = {"num_bits": 8, "type": "float", "strategy": "channel"}
    groups = {
        "a": {"targets": ["re:.*mlp.*"], "weights": four, "format": "pack-quantized"},
        "b": {"targets": ["Linear"], "weights": eight, "format": "float-quantized", "input_activations": {"dynamic": True}},
    }
    return write_twice(plain_llama, tmp_path, pack, section("mixed-precision", {}) | {"config_groups": groups})


def test_eval_and_generate(models, tmp_path, quick_data):
    assert_same_answers(models, tmp_path)


def test_the_user_is_told_once_that_inputs_are_not_quantised(models, tmp_path, quick_data, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "the cat sat"}])
    Trainer(make_config(models[0], tmp_path / "out", data=rows, training={"max_steps": 1, "batch_size": 1})).train()
    assert capsys.readouterr().err.count("losses are those of the dequantised weights") == 1


@pytest.mark.parametrize("inner", [False, True])
def test_an_older_configuration(inner, models):
    """`compression_config`, flat or with the quantisation inside of it."""
    path = models[0] / "config.json"
    config = json.loads(path.read_text())
    older = config.pop("quantization_config") | {"quant_method": "sparseml"}
    config["compression_config"] = {"quantization_config": older, "sparsity_config": {"format": "dense"}} if inner else older
    path.write_text(json.dumps(config))
    parts = cut(models[0])
    assert isinstance(parts.sources["model.layers.1.mlp.up_proj.weight"], CompressedTensor)
    assert parts.dtype == torch.bfloat16


def test_weights_that_no_group_has_lost_their_scale(models):
    name = "model.layers.1.self_attn.q_proj.weight"
    edit(models[0], {f"{name}_scale": None})
    with pytest.raises(UserError, match=f"parameter '{name}' is stored as float8_e4m3fn, expected a floating-point number"):
        cut(models[0])


def test_a_section_that_is_none_of_it(models):
    set_config(models[0], quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(UserError, match="expected config_groups to be an object of objects, found None"):
        cut(models[0])
