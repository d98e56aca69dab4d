"""Quantising: bitsandbytes' bits and errors, and the checkpoint that is written, interrupted, changed and refused."""

from __future__ import annotations

import json
import resource
from math import prod
from pathlib import Path

import numpy as np
import pytest
import quantize_reference as reference
import torch
from extents import read_source
from packed_checkpoints import edit, set_config
from safetensors.torch import load_file
from text_models import write_model

from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import CheckpointError, TensorEntry, read_checkpoint
from finetune.offload.quantize import kernels
from finetune.offload.quantize.kernels import BLOCK, Blocks, nest, nested_map, pack_4bit, pack_int8
from finetune.offload.quantize.outline import NewFile, NewTensor, Packing, outline, write_side, write_sparse
from finetune.offload.quantize.stream import Written, working_bytes, write_quantized
from finetune.offload.weights.formats.bitsandbytes import Packed4Bit, Packed8Bit
from finetune.offload.weights.parts import cut

SHAPES = [(3, 5), (1, 64), (7, 77), (33, 65), (40, 4096)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Rows of unlike sizes; in one shape most are 0, in one all are tiny."""
    generator = torch.Generator().manual_seed(prod(shape))
    values = torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp()
    if shape[0] == 33:
        values[:20] = 0
    return (values * 1e-6 if shape[0] == 7 else values).to(dtype)


def packed(weight: torch.Tensor, code: str) -> tuple[torch.Tensor, Blocks, kernels.Sums]:
    result, blocks = torch.empty(-(-weight.numel() // 2), dtype=torch.uint8), Blocks.of(weight.numel())
    return result, blocks, pack_4bit(weight.reshape(-1), result, blocks, code)


def rounded(weight: torch.Tensor, code: str) -> tuple[torch.Tensor, torch.Tensor, kernels.Sums]:
    result, tops = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    return result, tops, pack_int8(weight, result, tops, code)


@pytest.mark.parametrize("code", kernels.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_formats(shape, dtype, code):
    weight = matrix(shape, dtype)
    result, blocks, _ = packed(weight, code)
    numbers, absmax = reference.nf4(weight)
    assert result.numpy().tolist() == numbers.tolist() and blocks.absmax.numpy().tolist() == absmax.tolist()
    small = nest(blocks)
    assert small.offset == pytest.approx(absmax.mean(dtype=np.float64), rel=1e-6)
    codes, tops = reference.nested(absmax, small.offset, nested_map().numpy())
    assert small.codes.numpy().tolist() == codes.tolist() and small.absmax.numpy().tolist() == tops.tolist()
    eight, tops, _ = rounded(weight, code)
    numbers, expected = reference.int8(weight)
    assert eight.numpy().tolist() == numbers.tolist() and tops.numpy().tolist() == expected.tolist()


def test_numbers_between_two_codes_get_the_lower_one():
    between = torch.tensor([(a + b) / 2 for a, b in zip(reference.NF4, reference.NF4[1:], strict=False)])
    weight = torch.cat([torch.ones(1), between, torch.zeros(48)])
    for code in kernels.INSTRUCTION_SETS:
        result = packed(weight, code)[0]
        found = torch.stack([result >> 4, result & 15], 1).view(-1)
        assert found[1:16].tolist() == list(range(15))


def test_the_nested_map_is_the_dynamic_type():
    assert nested_map().numpy() == pytest.approx(reference.nested_numbers(), rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_installed_bitsandbytes(shape, dtype, one_thread):
    library = pytest.importorskip("bitsandbytes")
    weight = matrix(shape, dtype)
    result, blocks, _ = packed(weight, kernels.INSTRUCTION_SETS[0])
    expected, state = library.functional.quantize_4bit(weight.clone(), quant_type="nf4")
    assert result.equal(expected.view(-1)) and blocks.absmax.equal(state.absmax)
    expected, state = library.functional.quantize_4bit(weight.clone(), quant_type="nf4", compress_statistics=True)
    small = nest(blocks)
    assert small.codes.equal(state.absmax) and small.absmax.equal(state.state2.absmax) and small.offset == float(state.offset)
    assert nested_map().equal(state.state2.code)
    layer = library.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    eight, tops, _ = rounded(weight, kernels.INSTRUCTION_SETS[0])
    assert eight.equal(layer.CB) and tops.equal(layer.SCB)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_offset_of_nested_absmax_is_the_mean_of_one_thread(one_thread):
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        absmax = torch.rand(40_000, generator=generator)
        torch.set_num_threads(1)
        expected = float(absmax.mean())
        torch.set_num_threads(2)
        assert nest(Blocks(absmax, torch.zeros(40_000), torch.zeros(40_000))).offset == expected


@pytest.mark.parametrize("code", kernels.INSTRUCTION_SETS)
def test_errors_are_those_of_the_numbers(code):
    weight = matrix((40, 4096), torch.float32)
    result, blocks, sums = packed(weight, code)
    found = torch.stack([result >> 4, result & 15], 1).view(-1, BLOCK)
    codes = torch.from_numpy(reference.NF4)[found.int()].double()
    small = nest(blocks)
    absmax = nested_map()[small.codes.int()] * small.absmax.repeat_interleave(256)[: len(small.codes)] + small.offset
    for scale, error in ((blocks.absmax, sums.error), (absmax, sums.error + small.error)):
        expected = (codes * scale.double()[:, None] - weight.double().view(-1, BLOCK)).square().sum()
        assert error == pytest.approx(float(expected), rel=1e-5)
    eight, tops, sums = rounded(weight, code)
    expected = (eight.double() * tops.double()[:, None] / 127 - weight.double()).square().sum()
    assert sums.error == pytest.approx(float(expected), rel=1e-5)
    assert sums.weights == pytest.approx(float(weight.double().square().sum()), rel=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("model") / "tiny", dtype=torch.bfloat16)


def quantized(model: Path, directory: Path, packing: Packing, **options: object) -> Written:
    directory.mkdir(exist_ok=True)
    plan = outline(cut(model), packing)
    written = write_quantized(plan, directory, **options)
    write_side(plan, directory)
    (directory / "progress.json").unlink()
    return written


def unrounded(weight: Packed4Bit | Packed8Bit, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The numbers of a whole weight in fp64: decoding rounds them to bf16."""
    if isinstance(weight, Packed8Bit):
        return stored["packed"].double() * stored["scales"].double()[:, None] / 127
    codes = torch.stack([stored["packed"] >> 4, stored["packed"] & 15], 1).view(-1)[: prod(weight.shape)].int()
    absmax = stored["absmax"]
    if weight.state.nested_offset is not None:
        outer = stored["nested_absmax"].double().repeat_interleave(256)[: len(absmax)]
        absmax = stored["nested_map"].double()[absmax.int()] * outer + weight.state.nested_offset
    scales = absmax.double().repeat_interleave(BLOCK)[: len(codes)]
    return (torch.from_numpy(reference.NF4).double()[codes] * scales).view(weight.shape)


@pytest.mark.parametrize("packing", [Packing("nf4"), Packing("nf4", nested=False), Packing("int8")], ids=str)
def test_a_checkpoint_is_written_as_published_ones_are(model, packing, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.offload.quantize.stream.CHUNK_BYTES", 4096)  # many pieces of each matrix
    written = quantized(model, tmp_path / "new", packing)
    parts, original = cut(tmp_path / "new"), cut(model)
    dense = {name: tensor for shard in model.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    error = weights = 0.0
    for name, weight in parts.sources.items():
        if not name.endswith("_proj.weight"):
            assert read_source(weight).equal(dense[name]) and weight.dtype == original.sources[name].dtype
            continue
        assert type(weight) is (Packed8Bit if packing.kind == "int8" else Packed4Bit)
        stored, value = weight.load(read_source), dense[name]
        if packing.kind == "int8":
            numbers, tops = reference.int8(value)
            assert stored["packed"].numpy().tolist() == numbers.tolist()
            assert stored["scales"].numpy().tolist() == tops.tolist()
        else:
            numbers, absmax = reference.nf4(value)
            assert stored["packed"].numpy().tolist() == numbers.tolist()
            assert packing.nested or stored["absmax"].numpy().tolist() == absmax.tolist()
            assert (weight.state.nested_offset is not None) == packing.nested
        error += float((unrounded(weight, stored) - value.double()).square().sum())
        weights += float(value.double().square().sum())
    assert written.relative_error == pytest.approx((error / weights) ** 0.5, rel=1e-5)
    for path in (tmp_path / "new").glob("*.safetensors"):
        load_file(path)
        assert path.stat().st_mode & 0o077 == 0


def test_what_is_packed_is_what_transformers_would_pack(tmp_path):
    base = pytest.importorskip("transformers.quantizers.base")
    from transformers.quantizers.quantizers_utils import should_convert_module

    for kind in ("llama", "gemma2"):
        parts = cut(write_model(kind, tmp_path / kind))
        skipped = base.get_keys_to_not_convert(parts.model)
        expected = {
            f"{name}.weight"
            for name, module in parts.model.named_modules()
            if type(module) is torch.nn.Linear and should_convert_module(name, skipped)
        }
        assert {entry.name for entry in outline(parts, Packing("nf4")).packed_entries} == expected


def test_transformers_reads_what_is_written(model, tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    import transformers as tf

    for packing in (Packing("nf4"), Packing("int8")):
        directory = tmp_path / packing.kind
        quantized(model, directory, packing)
        loaded = tf.AutoModelForCausalLM.from_pretrained(directory, device_map="cpu").state_dict()
        expected = {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}
        for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
            assert loaded[name].equal(expected[name])


class Stop(Exception):
    pass


def test_an_interrupted_one_goes_on_after_what_is_whole(tmp_path):
    model = write_model("llama", tmp_path / "model")
    quantized(model, tmp_path / "whole", Packing("nf4"))
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.safetensors")}
    assert len(expected) > 2
    largest = max(path.stat().st_size for path in read_checkpoint(model).files)

    def stop(done: int, total: int) -> None:
        if done > 2 * largest:
            raise Stop

    with pytest.raises(Stop):
        quantized(model, tmp_path / "new", Packing("nf4"), progress=stop)
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "new").glob("*.safetensors")}
    assert 1 < len(done) < len(expected) and not list((tmp_path / "new").glob(".*"))
    last = sorted(done)[-1]
    with open(tmp_path / "new" / last, "ab") as file:  # longer than was noted: it is written again
        file.write(b"x")
    first = sorted(done)[0]
    written = quantized(model, tmp_path / "new", Packing("nf4"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").glob("*.safetensors")} == expected
    assert (tmp_path / "new" / first).stat().st_mtime_ns == done[first]
    assert written.num_bytes.keys() == written.errors.keys() == expected.keys()


def test_a_full_disk_is_said_and_leaves_what_is_whole(model, tmp_path):
    plan = outline(cut(model), Packing("int8"))
    largest = max(file.num_bytes for file in plan.files)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 4096, limits[1]))
    try:
        with pytest.raises(UserError, match="make room, or name another quantization.cache"):
            write_quantized(plan, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob(".*"))
    assert {path.name for path in tmp_path.glob("*.safetensors")} == Written.read(tmp_path, plan).num_bytes.keys()
    assert len(write_quantized(plan, tmp_path).num_bytes) == len(plan.files)


@pytest.mark.parametrize(
    "kind, value, words", [("nf4", float("nan"), "NaN"), ("nf4", float("inf"), "NaN"), ("int8", 1e6, "beyond 65504")]
)
def test_weights_that_cannot_be_quantised_are_refused(kind, value, words, tmp_path):
    model = write_model("llama", tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = next(tensors[name] for path in model.glob("*.safetensors") if name in (tensors := load_file(path)))
    weight[3, 7] = value
    edit(model, {name: weight})
    (tmp_path / "new").mkdir()
    with pytest.raises(CheckpointError, match=f"'{name}' holds infinity or .*{words}"):
        write_quantized(outline(cut(model), Packing(kind)), tmp_path / "new")
    if kind == "int8":
        write_quantized(outline(cut(model), Packing("nf4")), tmp_path / "new")


def test_models_with_nothing_to_quantise_are_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="no linear layer"):
        outline(cut(write_model("gpt2", tmp_path / "gpt2")), Packing("nf4"))
    quantized(model, tmp_path / "new", Packing("nf4"))
    with pytest.raises(CheckpointError, match="quantised already"):
        outline(cut(tmp_path / "new"), Packing("nf4"))


def test_a_sparse_outline_is_cut_as_what_is_written(model, tmp_path):
    for packing in (Packing("nf4"), Packing("nf4", nested=False), Packing("int8")):
        written, sparse = tmp_path / f"written {packing}", tmp_path / f"sparse {packing}"
        quantized(model, written, packing)
        sparse.mkdir()
        plan = outline(cut(model), packing)
        write_sparse(plan, sparse, {})
        assert (sparse / "config.json").read_bytes() == (written / "config.json").read_bytes()
        there, here = cut(written), cut(sparse)
        sizes = [[layout.num_bytes for layout in parts.layouts] for parts in (there, here)]
        assert sizes[0] == sizes[1] and there.sources.keys() == here.sources.keys()
        assert {n: (w.shape, w.num_bytes) for n, w in there.sources.items()} == {
            n: (w.shape, w.num_bytes) for n, w in here.sources.items()
        }
        assert plan.num_bytes >= sum(path.stat().st_size for path in written.glob("*.safetensors"))


def test_ties_that_do_not_hold_are_known_to_the_outline(tmp_path):
    model = write_model("llama", tmp_path / "model")
    set_config(model, tie_word_embeddings=True)
    parts = cut(model)
    assert parts.sources.apart
    (tmp_path / "sparse").mkdir()
    write_sparse(outline(parts, Packing("nf4")), tmp_path / "sparse", {})
    assert cut(tmp_path / "sparse").sources.apart == parts.sources.apart


def test_every_number_is_aligned_in_a_file():
    """Also behind tensors that fill no whole words; a state's bytes are the last."""
    sizes = [("a", "U8", (5,)), ("b.weight", "BF16", (7, 3)), ("c", "F32", (3,)), ("d", "BF16", (5,)), ("e", "F32", (2,))]
    entries, items = [], {"U8": 1, "BF16": 2, "F32": 4}
    for name, dtype, shape in sizes:
        entries.append(TensorEntry(name, dtype, shape, Path("x"), 8, prod(shape) * items[dtype]))
    state = NewTensor("b.weight.quant_state.bitsandbytes__nf4", "U8", (3,), b"{ }")
    packed = (NewTensor("b.weight", "U8", (11, 1)), NewTensor("b.weight.absmax", "F32", (1,)), state)
    file = NewFile("y", tuple(entries), {"b.weight": packed})
    text, starts = file.header()
    table = json.loads(text[8:])
    for name, begin in starts.items():
        first, end = table[name]["data_offsets"]
        assert begin == len(text) + first and begin % items[table[name]["dtype"]] == 0, name
        assert end - first == prod(table[name]["shape"]) * items[table[name]["dtype"]]
    assert max(starts, key=starts.get) == state.name


def test_memory_follows_from_the_largest_matrix(model):
    small = working_bytes(outline(cut(model), Packing("nf4")))
    assert small < 64 << 20
    assert working_bytes(outline(cut(model), Packing("int8"))) <= small
