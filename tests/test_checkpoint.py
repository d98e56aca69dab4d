"""The safetensors index against the safetensors library, and against files damaged by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import CheckpointError, read_checkpoint, read_header, resolve_model

ARRAYS = {
    "a.weight": np.arange(35, dtype=np.float32).reshape(5, 7),
    "b": np.arange(3, dtype=np.int8),
    "c.scalar": np.array(2.5, dtype=np.float64),
    "d.empty": np.zeros((0, 4), dtype=np.float16),
    "e.bool": np.array([True, False, True]),
}


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def info(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_entries_name_the_bytes_of_each_tensor(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "model.safetensors", metadata={"format": "np"})
    checkpoint = read_checkpoint(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert checkpoint.tensors.keys() == ARRAYS.keys()
    assert checkpoint.num_bytes == sum(array.nbytes for array in ARRAYS.values())
    for name, array in ARRAYS.items():
        entry = checkpoint.tensors[name]
        assert entry.shape == array.shape
        assert content[entry.offset : entry.offset + entry.num_bytes] == array.tobytes()
    assert [checkpoint.tensors[name].dtype for name in ARRAYS] == ["F32", "I8", "F64", "F16", "BOOL"]


def test_no_torch_is_imported() -> None:
    code = "import sys, finetune.offload.files.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


OK = info("F32", [2], 0, 8)
DAMAGED = {
    "empty file": (b"", b"", None, "8 bytes of header length"),
    "header longer than the file": ({"a": OK}, bytes(8), 10_000, "a header of 10000 bytes"),
    "header over the cap": ({"a": OK}, bytes(8), 100_000_001, "at most 100000000"),
    "header length of 2**64-1": ({"a": OK}, bytes(8), 2**64 - 1, "at most 100000000"),
    "not an object": (b"[1]", b"", None, "starts with '{'"),
    "not JSON": (b'{"a": ', b"", None, "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "not JSON"),
    "nested without end": (b'{"a":' * 100_000, b"", None, "not JSON"),
    "NaN": (b'{"a": NaN}', b"", None, "not JSON"),
    "duplicate key": (b'{"a":%s,"a":%s}' % ((json.dumps(OK).encode(),) * 2), bytes(8), None, "'a' is there twice"),
    "metadata not strings": ({"__metadata__": {"a": 1}, "a": OK}, bytes(8), None, "__metadata__"),
    "tensor not an object": ({"a": 3}, b"", None, "'a'"),
    "unknown dtype": ({"a": info("F31", [2], 0, 8)}, bytes(8), None, "dtype"),
    "dtype not a string": ({"a": info(["F32"], [2], 0, 8)}, bytes(8), None, "dtype"),
    "negative size": ({"a": info("F32", [-2], 0, 8)}, bytes(8), None, "non-negative"),
    "boolean size": ({"a": info("F32", [True, 2], 0, 8)}, bytes(8), None, "non-negative"),
    "fractional size": ({"a": info("F32", [2.0], 0, 8)}, bytes(8), None, "non-negative"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}, bytes(8), None, "data_offsets"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), None, "data_offsets"),
    "fewer bytes than the shape": ({"a": info("F32", [3], 0, 8)}, bytes(8), None, "to have 12 bytes, found 8"),
    "product overflows": ({"a": info("F32", [2**40, 2**40], 0, 8)}, bytes(8), None, "fewer than 2**63"),
    "sub-byte remainder": ({"a": info("F4", [3], 0, 2)}, bytes(2), None, "whole byte"),
    "hole at the start": ({"a": info("F32", [2], 4, 12)}, bytes(12), None, "start at data byte 0"),
    "hole between": ({"a": OK, "b": info("F32", [2], 12, 20)}, bytes(20), None, "'b' to start at data byte 8"),
    "overlap": ({"a": OK, "b": info("F32", [2], 4, 12)}, bytes(12), None, "'b' to start at data byte 8"),
    "end before begin": ({"a": info("F32", [0], 0, 0), "b": info("U8", [1], 0, -1)}, b"", None, "data_offsets"),
    "truncated": ({"a": OK}, bytes(7), None, "the file is truncated"),
    "longer": ({"a": OK}, bytes(9), None, "the file is longer than it should be"),
    "no tensors but data": ({}, bytes(1), None, "end of the header"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_as_the_library_refuses_them(tmp_path: Path, case: str) -> None:
    header, data, length, message = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    if case == "empty file":
        path.write_bytes(b"\0" * 7)
    else:
        write(path, header, data, length)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, UserError)
    # The library takes the last of two equal keys; otherwise it refuses the same files.
    if case != "duplicate key":
        with pytest.raises((SafetensorError, OSError)):
            safe_open(path, "np")


def test_what_the_library_takes_is_taken(tmp_path: Path) -> None:
    sub_byte = write(tmp_path / "x", {"a": info("F4", [2, 3], 0, 3), "z": info("F32", [0, 9], 3, 3)}, b"abc")
    assert [(entry.name, entry.num_bytes) for entry in read_header(sub_byte)] == [("a", 3), ("z", 0)]
    empty = write(tmp_path / "y", {})
    assert read_header(empty) == []
    for path in (sub_byte, empty):
        with safe_open(path, "np") as file:
            assert set(file.keys()) == {entry.name for entry in read_header(path)}


def shard(directory: Path, shards: dict[str, list[str]], index: str = "model.safetensors.index.json") -> None:
    for name, tensors in shards.items():
        save_file({tensor: np.full(3, ord(tensor[0]), np.float32) for tensor in tensors}, directory / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (directory / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def edit_index(directory: Path, **weight_map: object) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))


def test_shards_of_an_index(tmp_path: Path) -> None:
    shard(tmp_path, {"m-1.safetensors": ["a", "b"], "m-2.safetensors": ["c"]})
    checkpoint = read_checkpoint(tmp_path)
    assert {name: entry.path.name for name, entry in checkpoint.tensors.items()} == {
        "a": "m-1.safetensors",
        "b": "m-1.safetensors",
        "c": "m-2.safetensors",
    }
    assert "2 shard" in checkpoint.found


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard(tmp_path, {"m-1.safetensors": ["a"], "m-2.safetensors": ["c"]})
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 2 shards and 1 are missing, the first m-2\.safetensors"):
        read_checkpoint(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_lost(tmp_path: Path) -> None:
    """Whether that matters the model says."""
    shard(tmp_path, {"m-1.safetensors": ["a", "b"], "m-2.safetensors": ["c"]})
    edit_index(tmp_path, zz="m-2.safetensors", a="m-2.safetensors")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.lost == {"zz": "m-2.safetensors"}
    assert {name: entry.path.name for name, entry in checkpoint.tensors.items()} == {
        "a": "m-1.safetensors",
        "b": "m-1.safetensors",
        "c": "m-2.safetensors",
    }


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Transformers takes the last one, whatever the index says."""
    shard(tmp_path, {"m-1.safetensors": ["a", "b"], "m-2.safetensors": ["a"]})
    with pytest.raises(CheckpointError, match=r"'a' is in both m-1\.safetensors and m-2\.safetensors"):
        read_checkpoint(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    shard(tmp_path, {"m-1.safetensors": ["a"], "m-2.safetensors": ["c"]})
    path = tmp_path / "m-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"m-2\.safetensors: damaged.*tensor 'c'.*truncated"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/passwd", "x/../../m", "..\\m", "", 3, "a\0b"])
def test_an_index_stays_in_its_directory(tmp_path: Path, name: object) -> None:
    shard(tmp_path, {"m-1.safetensors": ["a"]})
    edit_index(tmp_path, b=name)
    with pytest.raises(CheckpointError, match="tensor 'b' is said to be in"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a":"x","a":"y"}}'])
def test_damaged_indices_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        read_checkpoint(tmp_path)


def test_one_variant_is_taken_and_two_are_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2)}, tmp_path / "model.fp16.safetensors")
    assert read_checkpoint(tmp_path).found == "model.fp16.safetensors"
    shard(tmp_path, {"m-1.safetensors": ["a"]}, "model.safetensors.index.bf16.json")
    with pytest.raises(CheckpointError, match=r"several variants of the weights \(bf16, fp16\)"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.fp16.safetensors").unlink()
    assert read_checkpoint(tmp_path).found == "model.safetensors.index.bf16.json, 1 shard(s)"
    save_file({"a": np.zeros(2)}, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path).found == "model.safetensors"


def test_files_without_an_index(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2)}, tmp_path / "x.safetensors")
    save_file({"b": np.zeros(2)}, tmp_path / "y.safetensors")
    save_file({"lora": np.zeros(2)}, tmp_path / "adapter_model.safetensors")
    assert set(read_checkpoint(tmp_path).tensors) == {"a", "b"}
    save_file({"b": np.zeros(2)}, tmp_path / "z.safetensors")
    with pytest.raises(CheckpointError, match=r"'b' is in both y\.safetensors and z\.safetensors"):
        read_checkpoint(tmp_path)


def test_missing_shards_are_seen_without_an_index(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2)}, tmp_path / "model-00001-of-00003.safetensors")
    save_file({"c": np.zeros(2)}, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"1 are missing, the first model-00002-of-00003\.safetensors"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "PyTorch checkpoint.*convert"),
        ("adapter_model.safetensors", "base model"),
        ("readme.txt", "no safetensors files.*found readme.txt"),
    ],
)
def test_other_formats_say_what_to_do(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


def test_a_model_is_a_directory_or_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(str(tmp_path / "file"))
    for name in (str(tmp_path / "nothing"), "./nothing", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such directory"):
            resolve_model(name)
    with pytest.raises(CheckpointError, match="no such directory"):
        read_checkpoint(tmp_path / "nothing")


def test_a_hub_id_offline_says_what_was_tried(tmp_path: Path) -> None:
    code = (
        "from finetune.offload.files.checkpoint import resolve_model, CheckpointError\n"
        "try: resolve_model('nobody/nothing')\n"
        "except CheckpointError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "model 'nobody/nothing'" in result.stdout
    assert str(tmp_path / "nobody" / "nothing") in result.stdout
    assert "hub" in result.stdout
