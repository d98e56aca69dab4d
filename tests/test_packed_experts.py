"""Stacked parameters that are put together from packed weights: their numbers, single experts, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from expert_checkpoints import KINDS, MODELS
from extents import equal_bits, read_source
from packed_bases import BASES
from packed_checkpoints import edit
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, save_tiny
from transformers.core_model_loading import Concatenate, Transpose, WeightConverter

from finetune.offload.files.checkpoint import CheckpointError, read_checkpoint, read_header
from finetune.offload.weights.assembly import Sources
from finetune.offload.weights.conversion import run_converter
from finetune.offload.weights.formats import StoredWeight, find_weights
from finetune.offload.weights.formats.stacked import JoinedRows, StackedWeights
from finetune.offload.weights.layout import bind_views, layout_block
from finetune.offload.weights.parameter_map import ParameterMap, map_parameters


@pytest.fixture
def moe(tmp_path, monkeypatch) -> Callable[[str, str], tuple[Path, Path]]:
    def get(name: str, kind: str) -> tuple[Path, Path]:
        monkeypatch.setitem(CONFIGS, name, MODELS[name])
        return KINDS[kind](save_tiny(name, tmp_path / "model"), tmp_path)

    return get


def mapped(model: Path) -> ParameterMap:
    with torch.device("meta"):
        skeleton = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(model))
    return map_parameters(skeleton, read_checkpoint(model))


def numbers(weight: StoredWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return weight.decode(weight.load(read_source), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_numbers_are_those_that_transformers_puts_together(name, kind, moe):
    """Of the decoded checkpoint; and of every expert alone, out of a slot that has nothing else."""
    packed, decoded = moe(name, kind)
    expected = tf.AutoModelForCausalLM.from_pretrained(decoded).state_dict()
    sources, found = mapped(packed), 0
    for parameter, weight in sources.items():
        if not isinstance(weight, StackedWeights):
            continue
        found += 1
        dense = expected[parameter]
        assert weight.shape == tuple(dense.shape) and not weight.can_be_updated
        assert equal_bits(numbers(weight), dense)
        assert equal_bits(numbers(weight, torch.bfloat16), dense.bfloat16())
        assert numbers(weight).shape == weight.decode(meta(weight), torch.float32).shape
        assert weight.num_bytes == sum(tensor.num_bytes for tensor in weight.tensors.values())
        names = weight.rows([(0, 1)]).tensors.keys()
        for expert in range(len(dense)):
            alone = weight.rows([(expert, expert + 1)])
            assert alone.shape == (1, *dense.shape[1:]) and alone.tensors.keys() == names
            assert alone.num_bytes <= weight.row_bytes(1)
            layout = layout_block({"x.gate": alone})
            slot = filled(layout)
            assert equal_bits(layout.decode(slot, "x.gate", torch.float32), dense[expert : expert + 1])
        some = weight.rows([(3, 4), (0, 2)])
        assert equal_bits(numbers(some), dense[[3, 0, 1]])
        assert weight.rows([]).shape == (0, *dense.shape[1:])
    assert found == 2 * (2 if name == "qwen3-moe" else 3)


def meta(weight: StoredWeight) -> Any:
    return weight.load(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


def filled(layout: Any) -> dict[str, torch.Tensor]:
    slot = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for path, offset, num_bytes, start in layout.reads:
        data = bytearray(path.read_bytes()[offset : offset + num_bytes])
        slot[start : start + num_bytes] = torch.frombuffer(data, dtype=torch.uint8)
    return bind_views(slot, layout)


EXPERT = "model.layers.0.mlp.experts.3."


def test_experts_may_be_stored_in_several_formats(moe):
    """Where a checkpoint leaves a few of them as they were."""
    packed, decoded = moe("qwen3-moe", "gptq")
    plain = {key: value for shard in decoded.glob("*.safetensors") for key, value in load_file(shard).items()}
    name = f"{EXPERT}up_proj.weight"
    edit(packed, {f"{EXPERT}up_proj.{part}": None for part in ("qweight", "qzeros", "scales", "g_idx")})
    save_file({name: plain[name].bfloat16()}, packed / "more.safetensors")
    for index in packed.glob("*.index.json"):
        index.unlink()
    weight = mapped(packed)["model.layers.0.mlp.experts.gate_up_proj"]
    expected = torch.cat([plain[f"{EXPERT}gate_proj.weight"], plain[name].bfloat16().float()])
    assert weight.word == "GPTQ and bfloat16"
    assert equal_bits(numbers(weight)[3], expected)
    assert equal_bits(numbers(weight.rows([(3, 4)]))[0], expected)


BROKEN = {
    "an expert without its scales": (
        "fp8", {"up_proj.weight_scale_inv": None}, r"experts\.3\.up_proj\.weight' .* stored as float8_e4m3fn and has no scales"
    ),
    "an expert that is missing": (
        "fp8", {"up_proj.weight_scale_inv": None, "up_proj.weight": None}, r"experts.gate_up_proj' .*(failed|has shape)"
    ),
    "a matrix too small": ("awq", {"down_proj.qweight": torch.zeros(16, 5, dtype=torch.int32)}, r"expected I32 \[2, 5"),
    "no matrix": ("gptq", {"down_proj.qweight": torch.zeros(24, dtype=torch.int32)}, "expected a matrix, found a shape of"),
    "no shape": ("int4", {"gate_proj.weight_shape": None}, "stored as compressed-tensors, which isn't supported"),
    "a shape that is none": ("int4", {"gate_proj.weight_shape": torch.tensor([0, -4])}, "expected two sizes"),
    "another shape": ("int4", {"gate_proj.weight_shape": torch.tensor([24, 48])}, r"weight_packed': expected I32 \[24, 6\]"),
    "a state that is not one": (
        "nf4", {"gate_proj.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(b'{"shape": [4]}'), dtype=torch.uint8)},
        "expected shape to be two sizes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_parts_that_do_not_fit_are_refused(case, moe):
    kind, changes, message = BROKEN[case]
    packed, _ = moe("qwen3-moe", kind)
    edit(packed, {EXPERT + name: value for name, value in changes.items()})
    with pytest.raises(CheckpointError, match=message):
        mapped(packed)


class Model(torch.nn.Module):
    config = tf.LlamaConfig()


def convert(tmp_path: Path, operations: list, sources: list[str], target: str) -> tuple[StoredWeight, dict[str, torch.Tensor]]:
    """Two matrices in FP8, of 32 and 16 rows, through these operations; and their numbers."""
    stored, dense = {}, {}
    for name, rows in (("a", 32), ("b", 16)):
        parts, dense[name] = BASES["fp8"].pack(torch.randn(rows, 48))
        stored |= {name + suffix: part for suffix, part in parts.items()}
    save_file(stored, tmp_path / "x.safetensors")
    entries = {entry.name: entry for entry in read_header(tmp_path / "x.safetensors")}
    section = BASES["fp8"].section
    made, converter = Sources(section), WeightConverter(sources, [target], operations)
    for name, found in find_weights(entries, section).items():
        if name in sources:
            converter.add_tensor(target, name, name, made.place(target, name, found))
    placement = run_converter(converter, target, Model())[target]
    assert made.has_packed(placement)
    return made.assemble(target, placement), dense


def test_rows_of_several_matrices_are_joined(tmp_path):
    weight, dense = convert(tmp_path, [Concatenate(dim=0)], ["a.weight", "b.weight"], "c.weight")
    whole = torch.cat([dense["a"], dense["b"]])
    assert isinstance(weight, JoinedRows) and equal_bits(numbers(weight), whole)
    some = weight.rows([(5, 40), (0, 32), (47, 48)])
    assert equal_bits(numbers(some), torch.cat([whole[5:40], whole[:32], whole[47:]]))


class Halves(Concatenate):
    """The second half of the first matrix, then the second matrix, then the first half."""

    def convert(self, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
        first, second = (value[0] for value in input_dict.values())
        low, high = first.chunk(2)
        return {"c.weight": torch.cat([high, second, low])}


def test_runs_of_rows_are_cut(tmp_path):
    weight, dense = convert(tmp_path, [Halves()], ["a.weight", "b.weight"], "c.weight")
    assert equal_bits(numbers(weight), torch.cat([dense["a"][16:], dense["b"], dense["a"][:16]]))


class Pieces(Concatenate):
    """The matrix cut and put together again."""

    def convert(self, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return {"c.weight": torch.cat(next(iter(input_dict.values()))[0].chunk(4))}


def test_a_matrix_that_is_whole_again_is_itself(tmp_path):
    weight, dense = convert(tmp_path, [Pieces()], ["a.weight"], "c.weight")
    assert len(weight.tensors) == 2 and equal_bits(numbers(weight.rows([(3, 17)])), dense["a"][3:17])


class Columns(Concatenate):
    def convert(self, input_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return {"c.weight": next(iter(input_dict.values()))[0].chunk(2, 1)[0]}


@pytest.mark.parametrize("operation", [Transpose(0, 1), Columns()])
def test_what_is_not_whole_rows_is_refused(operation, tmp_path):
    with pytest.raises(CheckpointError, match="stored as fp8 with scales, and not of whole rows of them"):
        convert(tmp_path, [operation], ["a.weight"], "c.weight")
