"""Placements against the same operations of Transformers and PyTorch on real tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from extents import read_source
from transformers import core_model_loading as ops

from finetune.offload.files.checkpoint import CheckpointError, TensorEntry
from finetune.offload.weights.conversion import PlacementTensor, extents_of, run_converter
from finetune.offload.weights.formats import PlainTensor


class Reference:
    """Source tensors of numbered elements, in a file and in memory, converted by placement and by Transformers."""

    def __init__(self, path: Path, shapes: dict[str, list[tuple[int, ...]]], dtype: torch.dtype = torch.int32) -> None:
        self.tensors: dict[str, list[torch.Tensor]] = {}
        self.entries: dict[str, list[TensorEntry]] = {}
        offset, content = 3, b"\0\0\0"
        for key, sizes in shapes.items():
            for size in sizes:
                tensor = torch.arange(offset, offset + int(np.prod(size)), dtype=dtype).reshape(size)
                data = tensor.numpy().tobytes()
                self.tensors.setdefault(key, []).append(tensor)
                self.entries.setdefault(key, []).append(TensorEntry(key, "I32", tuple(size), path, offset, len(data)))
                content += data
                offset += len(data)
        path.write_bytes(content)

    def convert(self, operations: list[Any], targets: list[str], model: Any, name: str) -> None:
        converters = [ops.WeightConverter(list(self.tensors), list(targets), operations) for _ in range(2)]
        for key in self.tensors:
            for tensor, entry in zip(self.tensors[key], self.entries[key], strict=True):
                converters[0].add_tensor(name, key, key, tensor)
                converters[1].add_tensor(name, key, key, PlacementTensor.of(entry))
        expected = {
            key: value[0] if isinstance(value, list) else value
            for key, value in converters[0].convert(name, model=model, config=model.config).items()
        }
        placed = run_converter(converters[1], name, model)
        assert placed.keys() == expected.keys()
        for key, placement in placed.items():
            source = PlainTensor(torch.int32, tuple(placement.shape), extents_of(key, placement))
            assert read_source(source).equal(expected[key]), key


class FakeModel(torch.nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.empty(shape)))
        self.config = tf.LlamaConfig(num_attention_heads=2, num_hidden_layers=1)


PLACEMENTS: dict[str, tuple[list[Any], dict[str, list[tuple[int, ...]]], list[str]]] = {
    "chunk rows": ([ops.Chunk(dim=0)], {"qkv": [(9, 5)]}, ["q", "k", "v"]),
    "chunk columns": ([ops.Chunk(dim=1)], {"qkv": [(5, 9)]}, ["q", "k", "v"]),
    "chunk from the back": ([ops.Chunk(dim=-1)], {"qkv": [(2, 3, 8)]}, ["q", "k"]),
    "chunk bias": ([ops.Chunk(dim=0)], {"qkv": [(9,)]}, ["q", "k", "v"]),
    "split": ([ops.Split(dim=0)], {"qkv": [(9, 5)]}, ["q", "k", "v"]),
    "concatenate rows": ([ops.Concatenate(dim=0)], {"a": [(2, 5)], "b": [(3, 5)]}, ["q"]),
    "concatenate columns": ([ops.Concatenate(dim=1)], {"a": [(5, 2)], "b": [(5, 3)]}, ["q"]),
    "concatenate from the back": ([ops.Concatenate(dim=-1)], {"a": [(2, 5, 2)], "b": [(2, 5, 3)]}, ["q"]),
    "stack": ([ops.MergeModulelist(dim=0)], {"e": [(3, 5)] * 4}, ["q"]),
    "stack inside": ([ops.MergeModulelist(dim=1)], {"e": [(3, 5)] * 4}, ["q"]),
    "fuse experts": (
        [ops.MergeModulelist(dim=0), ops.Concatenate(dim=1)],
        {"gate": [(3, 5)] * 4, "up": [(3, 5)] * 4},
        ["q"],
    ),
    "unstack": ([ops.SplitModulelist(dim=0)], {"e": [(4, 3, 5)]}, ["q*"]),
    "interleave rows": ([ops.Interleave(dim=0)], {"a": [(8, 5)]}, ["q"]),
    "interleave experts": ([ops.Interleave(dim=1)], {"a": [(3, 8, 5)]}, ["q"]),
    "interleave last": ([ops.Interleave(dim=1)], {"a": [(3, 8)]}, ["q"]),
    "deinterleave": ([ops.Interleave(dim=0, inverse=True)], {"a": [(8, 5)]}, ["q"]),
    "interleave and chunk": ([ops.Interleave(dim=1), ops.Chunk(dim=1)], {"a": [(3, 8, 5)]}, ["q", "k"]),
    "rope": ([ops.PermuteForRope()], {"a": [(16, 5)]}, ["q"]),
    "rope bias": ([ops.PermuteForRope()], {"a": [(16,)]}, ["q"]),
    "rope back": ([ops.PermuteForRope(inverse=True)], {"a": [(16, 5)]}, ["q"]),
    "chunk and rope": (
        [ops.Chunk(dim=0), ops.PermuteForRope(permute_layer_names=["q", "k"])],
        {"qkv": [(24, 5)]},
        ["q", "k", "v"],
    ),
    "transpose": ([ops.Transpose(1, 2)], {"a": [(3, 4, 5)]}, ["q"]),
    "transpose if needed": ([ops.Transpose(0, 1, check_dims=True)], {"a": [(5, 3)]}, ["q"]),
    "transpose not needed": ([ops.Transpose(0, 1, check_dims=True)], {"a": [(3, 5)]}, ["q"]),
    "flatten": ([ops.Conv3dToLinear(2, (2, 3, 3))], {"a": [(4, 2, 2, 3, 3)]}, ["q"]),
    "ernie": ([ops.ErnieFuseAndSplitTextVisionExperts()], {"a": [(3, 5)] * 4, "b": [(3, 5)] * 4}, ["q", "k"]),
}


@pytest.mark.parametrize("case", PLACEMENTS)
def test_every_kind_of_conversion_is_placed(tmp_path: Path, case: str) -> None:
    operations, shapes, targets = PLACEMENTS[case]
    model = FakeModel(q=(3, 5), k=(4, 5), v=(2, 5))
    Reference(tmp_path / "data", shapes).convert(operations, targets, model, targets[0])


def test_any_chain_of_movements_is_placed(tmp_path: Path) -> None:
    """Random views, permutations, slices, stacks and concatenations against PyTorch's own."""
    random = np.random.default_rng(3)
    reference = Reference(tmp_path / "data", {"a": [(4, 6, 6)], "b": [(4, 6, 6)]})

    def move(tensors: list[torch.Tensor], step: int, choices: list[int]) -> list[torch.Tensor]:
        one, two = tensors
        dim = choices[0] % one.dim()
        if step == 0:
            order = list(np.argsort([choices[i] for i in range(one.dim())], kind="stable"))
            return [tensor.permute(*order) for tensor in tensors]
        if step == 1:
            sizes = [size for size in (2, 3, 4, 6, 8, 12) if one.numel() % size == 0]
            return [tensor.reshape(sizes[choices[1] % len(sizes)], -1) for tensor in tensors]
        if step == 2:
            return [tensor.reshape(-1) for tensor in tensors]
        if step == 3:
            return [torch.cat([one, two], dim), torch.cat([two, one], dim)]
        if step == 4:
            half = max(1, one.shape[dim] // 2)
            return [tensor.narrow(dim, choices[1] % (one.shape[dim] - half + 1), half) for tensor in tensors]
        if step == 5 and one.dim() < 5:
            return [torch.stack([one, two], dim - 1), torch.stack([two, one], dim - 1)]
        if step == 6:
            return [tensor[choices[1] % one.shape[0]].unsqueeze(0).contiguous() for tensor in tensors]
        return [tensor.transpose(dim, -1).unsqueeze(dim).squeeze(dim) for tensor in tensors]

    for _ in range(150):
        real = [reference.tensors[key][0] for key in "ab"]
        placed = [PlacementTensor.of(reference.entries[key][0]) for key in "ab"]
        for _ in range(5):
            step, choices = int(random.integers(8)), [int(choice) for choice in random.permutation(24)]
            real, placed = move(real, step, choices), move(placed, step, choices)
        for expected, placement in zip(real, placed, strict=True):
            source = PlainTensor(torch.int32, tuple(placement.shape), extents_of("x", placement))
            assert read_source(source).equal(expected)


def test_arithmetic_is_refused(tmp_path: Path) -> None:
    class MinusOne(ops.ConversionOps):
        def convert(self, input_dict: dict, source_patterns: list, target_patterns: list, **kwargs: Any) -> dict:
            return {target_patterns[0]: input_dict[source_patterns[0]][0] - 1}

    reference = Reference(tmp_path / "data", {"a": [(3, 5)]})
    converter = ops.WeightConverter("a", "q", [MinusOne()])
    converter.add_tensor("q", "a", "a", PlacementTensor.of(reference.entries["a"][0]))
    with pytest.raises(CheckpointError, match=r"parameter 'q' of FakeModel.*MinusOne.*computes new values"):
        run_converter(converter, "q", FakeModel())


def test_a_large_transposed_matrix_is_refused() -> None:
    entry = TensorEntry("a", "BF16", (3000, 4000), Path("x"), 8, 24_000_000)
    with pytest.raises(CheckpointError, match=r"12000000 pieces of about 2 bytes"):
        extents_of("a.weight", PlacementTensor.of(entry).transpose(0, 1))
