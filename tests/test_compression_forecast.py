"""What a plan, and `compress` before it starts, say of compressing a model: sizes against those that come of it, verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import text_models
import torch
import transformers as tf
from test_cli import invoke
from text_models import VOCAB, make_config, write_model

from finetune import Trainer
from finetune.offload.sizing import compression
from finetune.offload.sizing.calibration import Rates
from finetune.offload.sizing.compression import Compression, try_compression
from finetune.offload.sizing.needs import HOST_BLOCKS
from finetune.offload.weights.parts import cut
from finetune.planned_run import PlannedRun
from finetune.prediction import predict_compressed, predict_step


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """With matrices that are large enough to be compressed."""
    config = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, max_position_embeddings=256,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(text_models.CONFIGS, "wide", config)
        return write_model("wide", tmp_path_factory.mktemp("model") / "wide", dtype=torch.bfloat16)


def plan(model: Path, output: Path, **more: object) -> PlannedRun:
    options = {"training": {"batch_size": 2}, "dataset": {"sequence_length": 64}, "lora": {"r": 3}} | more
    return Trainer(make_config(model, output, **options)).plan()


@pytest.mark.parametrize("numbers", [1 << 18, 1 << 12])
def test_sizes_are_those_that_come_of_it(numbers, model, tmp_path, monkeypatch):
    """A part of each matrix tells nearly as much as all of it."""
    monkeypatch.setattr(compression, "SAMPLE_NUMBERS", numbers)
    found = try_compression(cut(model))
    result = invoke("compress", "--model", str(model), "--to", str(tmp_path / "small"))
    assert result.exit_code == 0 and "reading all blocks takes" in result.output and "decoding them once" in result.output
    parts = cut(tmp_path / "small")
    assert found.model_bytes == pytest.approx(parts.checkpoint.num_bytes, rel=0.02)
    assert found.model_bytes < 0.75 * cut(model).checkpoint.num_bytes
    for mine, layout in zip(found.block_bytes, parts.layouts, strict=True):
        assert mine == pytest.approx(sum(weight.num_bytes for weight in layout.weights.values()), rel=0.05)
    heads, wide = 256 * 256 * 2, 384 * 256 * 2
    assert found.weight_bytes == ((wide,) * 3 + (heads,) * 4,) * 3 and found.decoded_bytes_per_second > 1e6


def test_it_pays_where_the_disk_is_slow_and_not_where_nothing_is_read(model, tmp_path):
    planned = plan(model, tmp_path / "out", engine={"resident_blocks": 0, "lookahead": 0})
    assert planned.compression is not None and "compressed without loss" in planned.describe()
    slow, fast = Rates(1e6, 1e12), Rates(1e15, 1e12)
    found = replace(planned.compression, decoded_bytes_per_second=1e12)
    assert predict_compressed(planned, slow, found).seconds < predict_step(planned, slow).seconds
    assert "it pays here" in replace(planned, rates=slow, compression=found).describe()
    planned = plan(model, tmp_path / "out", engine={"resident_blocks": 3, "lookahead": 0})
    found = replace(found, decoded_bytes_per_second=1e8)
    now, then = predict_step(planned, fast), predict_compressed(planned, fast, found)
    # Every block is visited twice, and what it takes to decode is not hidden by anything.
    stays = 2 * sum(map(sum, found.weight_bytes)) / 1e8
    assert then.seconds - now.seconds == pytest.approx(stays, rel=1e-6)
    assert "it does not pay here" in replace(planned, rates=fast, compression=found).describe()


def test_blocks_are_decoded_at_each_use_where_no_room_is_for_them(model, tmp_path):
    planned = plan(model, tmp_path / "out", engine={"resident_blocks": 0})
    slots = planned.plan.slots[HOST_BLOCKS]
    found = replace(planned.compression, decoded_bytes_per_second=1e8, weight_bytes=((slots.num_bytes,) * 2,) * 3)
    fast, uses = Rates(1e15, 1e12), planned.shape.micro_batches
    more = predict_compressed(planned, fast, found).seconds - predict_step(planned, fast).seconds
    assert more == pytest.approx((uses + 2 * uses) * 3 * 2 * slots.num_bytes / 1e8, rel=1e-6)


def test_what_it_frees_keeps_blocks(model, tmp_path):
    """Half the bytes: with slots for all three blocks but one, all stay, and nothing is read."""
    planned = plan(model, tmp_path / "out", engine={"resident_blocks": 1, "lookahead": 0})
    slow = Rates(1e6, 1e12)
    sizes = planned.streamed.block_bytes
    found = Compression(0.5, 1e12, 1, tuple(size // 2 for size in sizes), ((1,),) * 3)
    assert predict_step(planned, slow).read_bytes and not predict_compressed(planned, slow, found).read_bytes


@pytest.mark.parametrize("more", [{"method": "full"}, {"quantize": "nf4"}, {"device": "simulated"}], ids=str)
def test_nothing_is_said_where_no_run_could_go_over_it(more, model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if "method" in more:
        more |= {"lora": {}}
    planned = plan(model, tmp_path / "out", **more)
    assert planned.compression is None and "compressed without loss" not in planned.describe()


def test_models_with_nothing_to_compress_have_no_forecast(tmp_path):
    assert try_compression(cut(write_model("llama", tmp_path / "fp32"))) is None
    assert try_compression(cut(write_model("llama", tmp_path / "small", dtype=torch.bfloat16))) is None
