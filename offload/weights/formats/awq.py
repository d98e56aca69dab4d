"""The format of AWQ, as AutoAWQ saves it for its matrix-matrix kernels (`version: gemm`): 4 bits.

[Note: AWQ's order]
Codes and zero points are packed along the outputs, eight in a word of 32 bits. Its fields, the lowest first, are outputs 0, 2,
4, 6, 1, 3, 5 and 7. Groups are in the order of the inputs. See [Note: grouped codes].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from finetune.offload.files.checkpoint import CheckpointError, TensorEntry
from finetune.offload.weights.formats.grouped import GroupedWeight, check_parts, check_words, find_grouped, unpack
from finetune.offload.weights.formats.plain import PlainTensor
from finetune.offload.weights.formats.stored_parts import check, matrix_shape

_BITS = 4
_PER_WORD = 8


@dataclass(frozen=True, slots=True)
class PackedAwq(GroupedWeight):
    """A matrix that AWQ has packed, or rows of one; `codes` are [inputs, words of outputs]."""

    word = "AWQ"

    @classmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        if quantization is not None and quantization.get("quant_method") == "awq":
            _check_activations(entries)
        return find_grouped(entries, quantization, "awq")

    @classmethod
    def matrix_shape(cls, parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
        return matrix_shape(parts["scales"])[1], matrix_shape(parts["codes"])[0]

    @classmethod
    def make(
        cls, shape: tuple[int, ...], parts: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> PackedAwq:
        codes, (outputs, inputs) = parts["codes"], shape
        _check_version(codes, quantization)
        bits, group_size = (quantization.get(key) for key in ("bits", "group_size"))
        check(codes, type(bits) is int and bits == _BITS, f"bits to be {_BITS} (quantization_config)", bits)
        is_right = type(group_size) is int and (group_size > 0 or group_size == -1)
        check(codes, is_right, "group_size to be -1 or more than 0 (quantization_config)", group_size)
        size = inputs if group_size == -1 else group_size
        check(codes, inputs % size == 0, f"{inputs} inputs to be whole groups", f"a group_size of {size} (quantization_config)")
        check_words(codes, outputs, bits, "outputs")
        check_parts(shape, parts, bits, inputs // size, (inputs, outputs // _PER_WORD))
        check(codes, "groups" not in parts, "no g_idx beside it", "one")
        stored = (PlainTensor.of(parts[part]) for part in ("codes", "zeros", "scales"))
        return cls(*stored, None, shape, bits, size, ((0, outputs),))

    def _code_columns(self, start: int, stop: int) -> tuple[int, int]:
        return start // _PER_WORD, stop // _PER_WORD

    def _row_codes(self, codes: Tensor, start: int, stop: int) -> Tensor:
        first, last = start // _PER_WORD, -(-stop // _PER_WORD)
        fields = unpack(codes[:, first:last], self.bits).view(len(codes), -1, 2, _PER_WORD // 2)
        rows = fields.permute(1, 3, 2, 0).reshape(-1, len(codes))
        return rows[start - first * _PER_WORD : stop - first * _PER_WORD]

    def _zero_points(self, zeros: Tensor) -> Tensor:
        fields = unpack(zeros, self.bits).view(len(zeros), -1, 2, _PER_WORD // 2)
        return fields.transpose(2, 3).reshape(len(zeros), -1)


def _check_version(entry: TensorEntry, quantization: Mapping[str, Any]) -> None:
    """Raises CheckpointError for weights in another order than that of `gemm`."""
    keys = ("version", "format", "checkpoint_format")
    names = {str(quantization[key]).lower() for key in keys if quantization.get(key) is not None} or {"gemm"}
    if quantization.get("backend") == "llm-awq":
        names = {"llm-awq"}
    if names != {"gemm"}:
        raise CheckpointError(
            f"{entry.path}: the weights are packed by AWQ in the version {' and '.join(sorted(names)):.60} (quantization_config"
            " in config.json), expected gemm: use a checkpoint in that version, or the original weights"
        )


def _check_activations(entries: Mapping[str, TensorEntry]) -> None:
    """Raises CheckpointError for a model whose activations AWQ scales too (`ScaledActivation`): it computes otherwise."""
    for name, entry in entries.items():
        base = name.removesuffix("scales")
        if name.endswith(".scales") and not entries.keys() & {f"{base}qweight", f"{base}qzeros"}:
            raise CheckpointError(
                f"{entry.path}: tensor '{name}': expected codes beside scales, found none: where AWQ has scaled a model's "
                "activations, use the original weights"
            )
