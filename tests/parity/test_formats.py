"""A weight format that only this file knows: what a new one has to bring. A run over it has the bits of the plain loop over the
numbers that it stands for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import assert_same_bits, make_config, reference_run, streamed_run

import finetune.offload.weights.binding
import finetune.offload.weights.formats
import finetune.offload.weights.parts
from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import TensorEntry
from finetune.offload.weights.formats import PlainTensor, Stored, StoredWeight
from finetune.trainer import Trainer

METHOD = "int8 rows"


@dataclass(frozen=True)
class Int8Rows(StoredWeight):
    """A matrix of int8, with a number in fp32 by which each row is multiplied: `NAME` and `NAME_scales` in the files."""

    word = METHOD
    numbers: PlainTensor
    scales: PlainTensor

    @classmethod
    def find(
        cls, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None
    ) -> dict[str, dict[str, TensorEntry]]:
        if quantization is None or quantization["quant_method"] != METHOD:
            return {}
        found = {name.removesuffix("_scales"): entry for name, entry in entries.items() if name.endswith("_scales")}
        return {name: {"numbers": entries[name], "scales": scales} for name, scales in found.items()}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def rows(self, ranges: Iterable[tuple[int, int]]) -> Int8Rows:
        ranges = list(ranges)
        return Int8Rows(self.numbers.rows(ranges), self.scales.rows(ranges))

    def decode_into(self, stored: Stored, numbers: torch.Tensor) -> None:
        numbers.copy_(stored["numbers"].float() * stored["scales"][:, None])


@pytest.fixture
def stored_twice(checkpoint, tmp_path, monkeypatch):
    """Of a tiny model: a checkpoint of `Int8Rows`, and one of the numbers that these are, in fp32."""
    formats = finetune.offload.weights.formats
    monkeypatch.setattr(formats, "FORMATS", (Int8Rows, *formats.FORMATS))

    def get(name: str) -> tuple[Path, Path]:
        packed, decoded = (shutil.copytree(checkpoint(name), tmp_path / kind) for kind in ("packed", "decoded"))
        for shard in sorted(packed.glob("*.safetensors")):
            stored, dense = {}, load_file(shard)
            for key, value in dense.items():
                if value.dim() == 2:
                    scales = value.abs().amax(1) / 127
                    stored[f"{key}_scales"], value = scales, (value / scales[:, None]).round().to(torch.int8)
                    dense[key] = value.float() * scales[:, None]
                stored[key] = value
            save_file(stored, shard)
            save_file(dense, decoded / shard.name)
        config = json.loads((packed / "config.json").read_text())
        (packed / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": METHOD}}))
        return packed, decoded

    return get


@pytest.mark.parametrize(
    "name, device, least_bytes", [("llama", "cpu", 0), ("gpt2", "cpu", 1 << 20), ("qwen3", "simulated", 0)]
)
def test_adapters(name, device, least_bytes, stored_twice, tokens, tmp_path, monkeypatch):
    """Linear layers that keep their weight packed and those that have it decoded, rows of embeddings, tied tables."""
    monkeypatch.setattr(finetune.offload.weights.binding, "LAZY_MIN_BYTES", least_bytes)
    monkeypatch.setattr(finetune.offload.weights.parts, "ROWS_ON_DEMAND_MIN_BYTES", least_bytes)
    packed, decoded = stored_twice(name)
    config = make_config(packed, tokens, tmp_path / "out", device=device, engine={"resident_blocks": 1})
    assert_same_bits(streamed_run(config), reference_run(make_config(decoded, tokens, tmp_path / "plain")))


def test_chunks_of_the_head(stored_twice, tokens, tmp_path):
    """Rows of a packed matrix, against the same rows of the decoded one."""
    runs = [
        streamed_run(make_config(model, tokens, tmp_path / f"out-{model.name}", engine={"loss_tile_vocab": 32}))
        for model in stored_twice("llama")
    ]
    assert_same_bits(*runs)


def test_plain_weights_are_trained_beside_packed_ones(stored_twice, tokens, tmp_path):
    runs = []
    for model in stored_twice("llama"):
        config = make_config(model, tokens, tmp_path / f"out-{model.name}", method="full", train=["norm"])
        Trainer(config).train()
        lines = (config.output / "metrics.jsonl").read_text().splitlines()
        runs.append([json.loads(line)["loss"] for line in lines])
    assert runs[0] == runs[1] and len(set(runs[0])) == 4


@pytest.mark.parametrize("method", ["full", "zo"])
def test_what_would_change_packed_weights_is_refused(method, stored_twice, tokens, tmp_path):
    config = make_config(stored_twice("llama")[0], tokens, tmp_path / "out", method=method)
    with pytest.raises(UserError, match=f"is stored as {METHOD}, expected bfloat16, float16 or float32"):
        Trainer(config).train()


def test_a_quantisation_that_nobody_knows_is_refused(stored_twice, tokens, tmp_path):
    model, _ = stored_twice("llama")
    path = model / "config.json"
    path.write_text(path.read_text().replace(METHOD, "another"))
    with pytest.raises(UserError, match=r"the weights are quantised \(quantization_config in config.json\)"):
        Trainer(make_config(model, tokens, tmp_path / "out")).train()
