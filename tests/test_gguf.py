"""GGUF files: blocks to numbers, headers that are proved, metadata that is believed, and the tokenizer."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from gguf import GGMLQuantizationType as Type
from gguf_files import CONFIGS, MIXED, add_metadata, random_blocks, write_gguf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from finetune.data.tokenizer_files import read_tokenizer, split_note, write_tokenizer
from finetune.decoding import end_tokens
from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import CheckpointError, TensorEntry, resolve_model
from finetune.offload.files.gguf_file import BLOCK_TYPES, read_gguf, read_gguf_header
from finetune.offload.weights.digest import model_digest
from finetune.offload.weights.formats.gguf import GgufTensor
from finetune.offload.weights.formats.gguf_blocks import DECODERS
from finetune.offload.weights.formats.native_kernels import INSTRUCTION_SETS, decode_blocks
from finetune.offload.weights.gguf_model import read_gguf_config
from finetune.offload.weights.parts import cut

PLAIN = {"quant_method": "gguf", "interleaved_heads": {}, "norm_shift": 0.0}


def read(tensor) -> torch.Tensor:
    """Of a stored tensor, its bytes."""
    data = b"".join(e.path.read_bytes()[e.file_offset : e.file_offset + e.num_bytes] for e in tensor.extents)
    return torch.frombuffer(bytearray(data), dtype=tensor.dtype).view(tensor.shape)


def test_block_types_are_those_of_gguf():
    assert {kind: (block.word, (block.elements, block.num_bytes)) for kind, block in BLOCK_TYPES.items()} == {
        kind: (Type(kind).name, gguf.GGML_QUANT_SIZES[Type(kind)]) for kind in BLOCK_TYPES
    }


@pytest.mark.parametrize("word", DECODERS)
def test_decoders(word):
    """Any bytes at all, also as scales; and the shape on meta."""
    blocks = np.random.default_rng(1).integers(0, 256, (501, gguf.GGML_QUANT_SIZES[Type[word]][1]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(blocks, Type[word]))
    found = DECODERS[word](torch.from_numpy(blocks))
    is_number = ~expected.isnan()
    assert found.isnan().equal(~is_number)
    assert found[is_number].view(torch.int32).equal(expected[is_number].view(torch.int32))
    assert DECODERS[word](torch.from_numpy(blocks).to("meta")).shape == expected.shape


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("word", DECODERS)
def test_native_decoders(word, instructions):
    """Any bytes at all, on every instruction set, in every dtype; more blocks than a thread takes at once."""
    elements, num_bytes = gguf.GGML_QUANT_SIZES[Type[word]]
    blocks = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (70001 // elements, num_bytes), dtype=np.uint8))
    numbers = DECODERS[word](blocks)
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)):
        expected, found = numbers.to(dtype), torch.empty_like(numbers, dtype=dtype)
        assert decode_blocks(word, blocks, found, instructions) is found
        is_number = ~expected.isnan()
        assert found.isnan().equal(~is_number)
        assert found[is_number].view(bits).equal(expected[is_number].view(bits))
    for wrong in (blocks[:-1], blocks[:, ::2], blocks.to(torch.int8)):
        with pytest.raises(ValueError, match="contiguous numbers of torch.uint8"):
            decode_blocks(word, wrong, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("word", DECODERS)
def test_matrices_and_rows(word, dtype, tmp_path):
    rows, columns, start = 37, 512, 96
    elements, num_bytes = gguf.GGML_QUANT_SIZES[Type[word]]
    blocks = random_blocks(Type[word], rows * columns // elements, np.random.default_rng(2))
    path = tmp_path / "data"
    path.write_bytes(bytes(start) + blocks.tobytes())
    entry = TensorEntry("blk.0.ffn_up.weight", word, (rows, columns), path, start, blocks.nbytes)
    weight = GgufTensor.make((rows, columns), {"stored": entry}, PLAIN)
    expected = torch.from_numpy(gguf.dequantize(blocks, Type[word]).reshape(rows, columns)).to(dtype)
    assert weight.decode(weight.load(read), dtype).equal(expected)
    some = weight.rows([(3, 4), (30, 37)])
    assert some.num_bytes == 8 * columns // elements * num_bytes
    assert some.decode(some.load(read), dtype).equal(expected[[3, *range(30, 37)]])


@pytest.mark.parametrize("values, message", [((4, 64), "for matrices only"), ((30, 64), "even number of rows for each of 4")])
def test_tensors_that_cannot_be_weights(values, message, tmp_path):
    shape = values[1:] if "matrices" in message else values
    entry = TensorEntry("blk.0.attn_q.weight", "Q8_0", shape, tmp_path / "x", 0, int(np.prod(shape)) // 32 * 34)
    with pytest.raises(CheckpointError, match=message):
        GgufTensor.make(shape, {"stored": entry}, PLAIN | {"interleaved_heads": {".attn_q.": 4}})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Path]:
    return write_gguf("llama", tmp_path_factory.mktemp("llama"), MIXED, text=True)


def test_as_transformers_loads_the_file(model):
    """Configuration and every parameter."""
    path, _ = model
    loaded = tf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    parts = cut(path, lambda stored: torch.float32)
    for key in ("num_hidden_layers", "rms_norm_eps", "rope_parameters", "head_dim", "vocab_size", "tie_word_embeddings"):
        assert getattr(parts.model.config, key) == getattr(loaded.config, key)
    expected = loaded.state_dict()
    assert parts.sources.keys() == expected.keys()
    for name, weight in parts.sources.items():
        assert weight.decode(weight.load(read), torch.float32).equal(expected[name]), name


def test_experts_are_those_that_transformers_loads(tmp_path, monkeypatch):
    """Of Q4_0, Q8_0 and Q4_K; and one alone, which is read without the others."""
    config = CONFIGS["qwen3moe"]()
    config.moe_intermediate_size = 768  # what Transformers takes whatever the file says
    monkeypatch.setitem(CONFIGS, "qwen3moe", lambda: config)
    path, _ = write_gguf("qwen3moe", tmp_path, MIXED)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    sources, found = cut(path, lambda stored: torch.float32).sources, 0
    for name, weight in sources.items():
        assert weight.shape == tuple(loaded[name].shape)
        assert weight.decode(weight.load(read), torch.float32).equal(loaded[name]), name
        if len(weight.shape) == 3:
            found += 1
            alone = weight.rows([(3, 4)])
            assert alone.num_bytes == weight.num_bytes // 5
            assert alone.decode(alone.load(read), torch.float32).equal(loaded[name][3:4])
    assert found == 6


STACKS = {
    "no stack": ("blk.1.ffn_up_exps.weight", (2, 64), r"ffn_up_exps.weight': expected a stack of matrices"),
    "another number of experts": ("blk.1.ffn_up_exps.weight", (4, 256, 64), r"a stack of matrices like 'blk.1.ffn_gate_exps"),
    "rows too few": ("blk.1.ffn_up_exps.weight", (5, 128, 64), r"experts.gate_up_proj' has shape \[5, 384, 64\]"),
    "none": ("blk.1.ffn_up_exps.weight", None, "belong to no parameter .*ffn_gate_exps|experts.gate_up_proj"),
}


@pytest.mark.parametrize("case", STACKS)
def test_experts_that_do_not_fit_are_refused(case, tmp_path, monkeypatch):
    name, shape, message = STACKS[case]
    add = gguf.GGUFWriter.add_tensor

    def other(self, tensor, data, **options):
        if tensor != name:
            add(self, tensor, data, **options)
        elif shape is not None:
            add(self, tensor, np.zeros((*shape[:-1], shape[-1] // 32 * 34), np.uint8), raw_dtype=Type.Q8_0)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", other)
    path, _ = write_gguf("qwen3moe", tmp_path, MIXED)
    with pytest.raises(CheckpointError, match=message):
        cut(path)


def test_split_files_and_directories(model, tmp_path):
    """Parts are one model, whichever is named; it is the same model as the whole file."""
    path, _ = model
    split(path, tmp_path, 3)
    first = tmp_path / "m-00001-of-00003.gguf"
    for named in (tmp_path, first, tmp_path / "m-00002-of-00003.gguf"):
        assert resolve_model(str(named)) == first
    whole, parts = cut(path), cut(first)
    assert {name: weight.block_type for name, weight in parts.sources.items()} == {
        name: weight.block_type for name, weight in whole.sources.items()
    }
    assert parts.model.config.tie_word_embeddings is False  # the head is in another part than the metadata
    (tmp_path / "another.gguf").touch()
    with pytest.raises(CheckpointError, match=r"2 GGUF models \(another.gguf, m\): name the file"):
        resolve_model(str(tmp_path))
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match="one of 3 parts, and 1 are missing, the first m-00002-of-00003.gguf"):
        cut(first)


def split(path: Path, folder: Path, count: int) -> None:
    """As llama.cpp's gguf-split: metadata in the first part."""
    reader = gguf.GGUFReader(path)
    for number in range(count):
        writer = gguf.GGUFWriter(folder / f"m-{number + 1:05d}-of-{count:05d}.gguf", "llama")
        if number == 0:
            for field in list(reader.fields.values())[3:]:
                if field.name != "general.architecture":
                    kind = field.types[0]
                    writer.add_key_value(field.name, field.contents(), kind, field.types[-1])
        else:
            writer.kv_data[0].pop("general.architecture", None)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        for method in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
            method()


def test_digest(model, tmp_path):
    path, _ = model
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert model_digest(read_gguf(copy)) == model_digest(read_gguf(path))
    data = bytearray(path.read_bytes())
    last = read_gguf_header(path).tensors[-1]
    data[last.offset + last.num_bytes - 1] ^= 1
    copy.write_bytes(data)
    assert model_digest(read_gguf(copy)) != model_digest(read_gguf(path))


def test_tokenizer(model, tmp_path):
    """The file's own, as processes without torch have it too; that beside the file goes before it."""
    path, _ = model
    expected = tf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    write_tokenizer(path, tmp_path / "unpacked")
    for tokenizer in (read_tokenizer(path, False), read_tokenizer(tmp_path / "unpacked", False)):
        assert tokenizer.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
        assert tokenizer.special_tokens_map == expected.special_tokens_map
        assert tokenizer.chat_template == expected.chat_template and "model: " in tokenizer.chat_template
    assert end_tokens(path, None) == {1} and split_note(path) is None
    beside = tmp_path / "beside"
    beside.mkdir()
    copy = beside / "m.gguf"
    copy.write_bytes(path.read_bytes().replace(b"gpt-2", b"other"))
    assert "'other'" in split_note(copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (beside / name).write_bytes((path.parent / "tokenizer" / name).read_bytes())
    assert split_note(copy) is None
    assert read_tokenizer(copy, False).get_vocab() == tf.AutoTokenizer.from_pretrained(beside).get_vocab()


def header(tmp_path: Path, changes: dict, kind: str = "llama", extra: tuple[str, ...] = (), arch: str | None = None) -> Path:
    """A file whose metadata differs, and with further tensors."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, arch or kind)
    config = CONFIGS[kind]()
    add_metadata(writer, kind, config)
    for key, value in changes.items():
        writer.kv_data[0].pop(key, None)
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    names = ["token_embd.weight", *(f"blk.{i}.attn_norm.weight" for i in range(config.num_hidden_layers)), *extra]
    for name in names:
        shape = (config.vocab_size, 64) if name == "token_embd.weight" else (6,)
        writer.add_tensor(name, np.ones(shape, np.float32))
    for method in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        method()
    return path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"llama.block_count": 4}, "block_count.*number of blocks that there are tensors of, 3, found 4"),
        ({"llama.block_count": 1 << 30}, "block_count"),
        ({"llama.attention.head_count_kv": None}, "head_count_kv.*a positive integer, found None"),
        ({"llama.attention.head_count_kv": [2, 2, 1]}, "head_count_kv.*a positive integer"),
        ({"llama.embedding_length": "64"}, "embedding_length.*a positive integer, found '64'"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
        ({"llama.expert_count": 8}, "expert_count.*expected 0, found 8"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type.*expected none, found 'yarn'"),
        ({"llama.attention.scale": 0.25}, "attention.scale.*isn't known"),
        ({"llama.rope.dimension_count": 6}, "expected 12, found 6|expected 6, found 12"),
        ({"llama.sizes": [1, 2]}, "llama.sizes.*differs between layers"),
        ({"tokenizer.ggml.padding_token_id": 345}, "padding_token_id.*one of 345 tokens, found 345"),
        ({"llama.vocab_size": 400}, "has shape|vocab_size"),
        ({"qwen3moe.expert_count": None}, "expert_count.*a positive integer, found None"),
        ({"qwen3moe.expert_used_count": 6}, "expert_used_count.*at most 5 experts, found 6"),
        ({"qwen3moe.expert_feed_forward_length": 1 << 30}, "expert_feed_forward_length.*a positive integer"),
        ({"qwen3moe.expert_shared_feed_forward_length": 8}, "expert_shared_feed_forward_length.*isn't known"),
        ({"general.architecture": "rwkv6"}, "architecture 'rwkv6'.*expected one of llama"),
    ],
)
def test_metadata_that_is_refused(changes, message, tmp_path):
    kind = "qwen3moe" if "qwen3moe" in next(iter(changes)) else "llama"
    with pytest.raises(UserError, match=message):
        cut(header(tmp_path, changes, kind))


def test_tensors_that_no_parameter_takes_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"1 tensors belong to no parameter .*\(blk.0.attn_q.bias\)"):
        cut(header(tmp_path, {}, extra=("blk.0.attn_q.bias",)))


def test_linear_scaling_of_gemma(tmp_path):
    """Of the layers that attend to everything only."""
    changes = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    rope = read_gguf_config(read_gguf(header(tmp_path, changes, "gemma3"))).rope_parameters
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaling_of_llama_3(factor, tmp_path):
    """Found again from the numbers that llama.cpp's converter makes of it."""
    path = header(tmp_path, {}, extra=("rope_freqs.weight",))
    scaled = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = tf.LlamaConfig(head_dim=12, rope_parameters=scaled, max_position_embeddings=131072)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = 10000.0 ** -(torch.arange(0, 12, 2) / 12) / frequencies
    entry = read_gguf(path).tensors["rope_freqs.weight"]
    data = bytearray(path.read_bytes())
    data[entry.offset : entry.offset + 24] = factors.float().numpy().tobytes()
    path.write_bytes(data)
    assert read_gguf_config(read_gguf(path)).rope_parameters == scaled
    data[entry.offset + 8 : entry.offset + 12] = struct.pack("<f", 3.0)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="the factors of a Llama 3 model"):
        read_gguf_config(read_gguf(path))


def test_types_that_are_not_read(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 66), np.uint8), raw_dtype=Type.IQ2_XXS)
    for method in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        method()
    with pytest.raises(CheckpointError, match=r"'token_embd.weight' is stored as IQ2_XXS, which isn't read: .*Q4_K"):
        read_gguf(path)


def test_without_the_package(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(UserError, match="pip install gguf"):
        cut(model[0])


def test_truncated_files(model, tmp_path):
    data, copy = model[0].read_bytes(), tmp_path / "copy.gguf"
    end = read_gguf_header(model[0]).tensors[-1]
    for size in [0, 3, 7, 23, 24, *range(40, 20000, 997), len(data) // 2, end.offset + end.num_bytes - 1]:
        copy.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="damaged: expected"):
            read_gguf(copy)


def test_mutated_headers(model, tmp_path):
    """A byte, or eight, of anything before the data: a sentence, or a model of the same shapes."""
    data, copy = model[0].read_bytes(), tmp_path / "copy.gguf"
    tensors = read_gguf_header(model[0]).tensors
    rng, refused = random.Random(3), 0
    for trial in range(400):
        changed, place = bytearray(data), rng.randrange(tensors[0].offset)
        for index in range(place, min(place + rng.choice((1, 8)), tensors[0].offset)):
            changed[index] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        copy.write_bytes(changed)
        try:
            checkpoint = read_gguf(copy)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and str(copy) in str(error)
        else:
            for entry in checkpoint.tensors.values():
                assert 0 < entry.offset and entry.offset + entry.num_bytes <= len(data)
        if trial % 20 == 0:
            try:
                parts = cut(copy)
            except UserError:
                continue
            for name, weight in parts.sources.items():
                assert weight.shape == parts.model.get_parameter(name).shape
    assert refused > 20
