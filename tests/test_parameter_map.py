"""Bytes put together from a checkpoint's files against what Transformers itself loads from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from extents import equal_bits, read_source
from safetensors.torch import load_file, save_file

from finetune.memory.units import PAGE_BYTES
from finetune.offload.files.checkpoint import CheckpointError, TensorEntry, read_checkpoint
from finetune.offload.weights.conversion import PlacementTensor, extents_of
from finetune.offload.weights.formats import PlainTensor
from finetune.offload.weights.layout import align_views, aligned_bytes, bind_views, layout_block, row_ranges, view_slot
from finetune.offload.weights.parameter_map import map_parameters

TEXT = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
# Transformers defaults some of these to ids beyond the tiny vocabulary.
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CAUSAL, IMAGE, BASE = tf.AutoModelForCausalLM, tf.AutoModelForImageClassification, tf.AutoModel

MODELS: dict[str, tuple[Any, Callable[[], tf.PreTrainedConfig]]] = {
    "llama": (CAUSAL, lambda: tf.LlamaConfig(**TEXT, **HEADS)),
    "llama tied": (CAUSAL, lambda: tf.LlamaConfig(**TEXT, **HEADS, tie_word_embeddings=True)),
    "qwen2": (CAUSAL, lambda: tf.Qwen2Config(**TEXT, num_attention_heads=4, num_key_value_heads=2)),
    "qwen3": (CAUSAL, lambda: tf.Qwen3Config(**TEXT, **HEADS, tie_word_embeddings=True)),
    "gemma": (CAUSAL, lambda: tf.GemmaConfig(**TEXT, **HEADS, **IDS)),
    "gemma2": (CAUSAL, lambda: tf.Gemma2Config(**TEXT, **HEADS, **IDS)),
    "gemma3": (CAUSAL, lambda: tf.Gemma3TextConfig(**TEXT, **HEADS, **IDS)),
    "gpt2": (CAUSAL, lambda: tf.GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=3, n_head=4)),
    "opt": (
        CAUSAL,
        lambda: tf.OPTConfig(
            vocab_size=61,
            hidden_size=24,
            ffn_dim=36,
            num_hidden_layers=3,
            num_attention_heads=4,
            word_embed_proj_dim=16,
        ),
    ),
    "phi3": (CAUSAL, lambda: tf.Phi3Config(**TEXT, num_attention_heads=4, num_key_value_heads=2, **IDS)),
    "mixtral": (CAUSAL, lambda: tf.MixtralConfig(**TEXT, **HEADS, num_local_experts=5, num_experts_per_tok=2)),
    "qwen2-moe": (
        CAUSAL,
        lambda: tf.Qwen2MoeConfig(
            **TEXT,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=12,
            moe_intermediate_size=10,
            shared_expert_intermediate_size=14,
        ),
    ),
    "qwen3-moe": (
        CAUSAL,
        lambda: tf.Qwen3MoeConfig(
            **TEXT, **HEADS, num_experts=5, moe_intermediate_size=10, num_experts_per_tok=2, mlp_only_layers=[1]
        ),
    ),
    "deepseek-v3": (
        CAUSAL,
        lambda: tf.DeepseekV3Config(
            **TEXT,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=10,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=6,
            v_head_dim=6,
            first_k_dense_replace=1,
        ),
    ),
    "granite-moe": (CAUSAL, lambda: tf.GraniteMoeConfig(**TEXT, num_attention_heads=4, num_local_experts=3, **IDS)),
    "gpt-oss": (CAUSAL, lambda: tf.GptOssConfig(**TEXT, **HEADS, num_local_experts=4, **IDS)),
    "vit": (
        IMAGE,
        lambda: tf.ViTConfig(
            hidden_size=24,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        ),
    ),
    "bert": (
        tf.AutoModelForMaskedLM,
        lambda: tf.BertConfig(**TEXT, num_attention_heads=4, max_position_embeddings=20),
    ),
    "clip": (
        BASE,
        lambda: tf.CLIPConfig(
            text_config={**TEXT, **IDS, "num_attention_heads": 4, "max_position_embeddings": 20},
            vision_config={
                **TEXT,
                "num_attention_heads": 4,
                "image_size": 16,
                "patch_size": 4,
            },
        ),
    ),
    "t5": (
        tf.AutoModelForSeq2SeqLM,
        lambda: tf.T5Config(vocab_size=61, d_model=24, d_kv=6, d_ff=36, num_layers=2, num_heads=4, is_gated_act=True),
    ),
}


def build(case: str, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """A model with every tensor random (norm weights too), so that no two tensors hold the same bytes."""
    auto, config = MODELS[case]
    generator = torch.Generator().manual_seed(7)
    model = auto.from_config(config(), dtype=dtype)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        else:
            assert name.endswith(("position_ids", "num_batches_tracked"))
    return model


def meta(auto: Any, config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    with torch.device("meta"):
        return auto.from_config(config)


def fill(layout: Any) -> torch.Tensor:
    slot = torch.full((layout.num_bytes,), 0xAA, dtype=torch.uint8)
    for read in layout.reads:
        with open(read.path, "rb") as file:
            data = os.pread(file.fileno(), read.num_bytes, read.file_offset)
        assert len(data) == read.num_bytes
        slot[read.slot_offset : read.slot_offset + read.num_bytes] = torch.frombuffer(
            bytearray(data), dtype=torch.uint8
        )
    return slot


def check_against_transformers(directory: Path, auto: Any, dtype: torch.dtype) -> Any:
    reference = auto.from_pretrained(directory, dtype=dtype).state_dict()
    sources = map_parameters(meta(auto, tf.AutoConfig.from_pretrained(directory)), read_checkpoint(directory))
    assert sources.keys() | set(sources.absent) == reference.keys()
    for name, source in sources.items():
        # Transformers keeps a few parameters in fp32 whatever the checkpoint has; the source is what the file has.
        reference[name] = reference[name].to(source.dtype)
        assert equal_bits(read_source(source), reference[name]), name
    groups: dict[str, dict[str, PlainTensor]] = {}
    for name, source in sources.items():
        groups.setdefault(".".join(name.split(".")[:3]), {})[name] = source
    for group in groups.values():
        layout = layout_block(group)
        tensors = bind_views(fill(layout), layout)
        assert tensors.keys() == group.keys()
        for name, tensor in tensors.items():
            assert equal_bits(tensor, reference[name]), name
    return sources


@pytest.mark.parametrize("case", MODELS)
def test_bytes_equal_what_transformers_loads(tmp_path: Path, case: str) -> None:
    dtype = torch.bfloat16 if len(case) % 2 else torch.float32
    build(case, dtype).save_pretrained(tmp_path, max_shard_size="9KB" if len(case) % 3 else "1GB")
    sources = check_against_transformers(tmp_path, MODELS[case][0], dtype)
    assert sources.unused == ()
    assert sources.absent == ()


@pytest.mark.parametrize("case", ["mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v3"])
def test_experts_are_read_from_one_tensor_each_and_from_fused_ones(tmp_path: Path, case: str) -> None:
    model = build(case)
    model.save_pretrained(tmp_path)
    per_expert = map_parameters(meta(MODELS[case][0], model.config), read_checkpoint(tmp_path))
    name = next(name for name in per_expert if name.endswith("mlp.experts.gate_up_proj"))
    assert len(per_expert[name].extents) > 1
    # The same state dict under the model's own names: what Transformers 5 calls the fused layout.
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    fused = check_against_transformers(tmp_path, MODELS[case][0], torch.float32)
    assert len(fused[name].extents) == 1


def test_old_key_names_are_followed(tmp_path: Path) -> None:
    """BERT checkpoints of 2018 say gamma and beta; a base model's checkpoint lacks the prefix of the whole model."""
    model = build("bert")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in load_file(path).items()
    }
    assert any(key.endswith("gamma") for key in old)
    save_file(old, path)
    check_against_transformers(tmp_path, tf.AutoModelForMaskedLM, torch.float32)


def test_a_whole_models_checkpoint_serves_its_base_model(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    assert all(key.startswith("transformer.") for key in load_file(path))
    sources = check_against_transformers(tmp_path, BASE, torch.float32)
    assert "h.0.attn.c_attn.weight" in sources
    # And the other way round: names without the prefix.
    save_file({key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}, path)
    check_against_transformers(tmp_path, CAUSAL, torch.float32)


def edit(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path) | {key.replace("__", "."): tensor for key, tensor in changes.items()}
    save_file({key: tensor.clone() for key, tensor in tensors.items() if tensor is not None}, path)


def mapped(directory: Path, auto: Any = CAUSAL) -> Any:
    return map_parameters(meta(auto, tf.AutoConfig.from_pretrained(directory)), read_checkpoint(directory))


def test_tied_weights_have_one_home(tmp_path: Path) -> None:
    build("llama tied").save_pretrained(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    sources = mapped(tmp_path)
    assert sources.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert sources["lm_head.weight"] == sources["model.embed_tokens.weight"]
    layout = layout_block({"head": sources["lm_head.weight"], "embedding": sources["model.embed_tokens.weight"]})
    assert layout.views["head"] == layout.views["embedding"]
    assert layout.read_bytes == embedding.nbytes

    edit(tmp_path, lm_head__weight=embedding)
    sources = mapped(tmp_path)
    assert sources.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    ((home, copy),) = sources.copies
    assert home == sources["lm_head.weight"] != copy and read_source(copy).equal(embedding)

    edit(tmp_path, model__embed_tokens__weight=None)
    assert mapped(tmp_path).tied == {"model.embed_tokens.weight": "lm_head.weight"}
    check_against_transformers(tmp_path, CAUSAL, torch.float32)


def test_unlike_ends_of_a_tie_stay_apart(tmp_path: Path) -> None:
    build("llama tied").save_pretrained(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    last = embedding.clone()
    last[-1, -1] += 1
    edit(tmp_path, lm_head__weight=last)
    assert check_against_transformers(tmp_path, CAUSAL, torch.float32).tied == {}


def test_a_tie_without_either_end_is_missing(tmp_path: Path) -> None:
    build("llama tied").save_pretrained(tmp_path)
    edit(tmp_path, model__embed_tokens__weight=None)
    with pytest.raises(CheckpointError, match=r"2 parameter.*lm_head\.weight, model\.embed_tokens\.weight"):
        mapped(tmp_path)


def test_missing_parameters_are_listed(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    edit(tmp_path, model__layers__1__mlp__up_proj__weight=None, model__norm__weight=None)
    with pytest.raises(
        CheckpointError,
        match=r"2 parameter\(s\) of LlamaForCausalLM.*model\.layers\.1\.mlp\.up_proj\.weight, model\.norm",
    ):
        mapped(tmp_path)


def test_a_missing_parameter_that_the_index_names_is_a_bad_download(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    file = tmp_path / places["model.norm.weight"]
    save_file({name: value for name, value in load_file(file).items() if name != "model.norm.weight"}, file)
    with pytest.raises(CheckpointError, match=rf"'model\.norm\.weight' should be in {file.name}, which doesn't hold it"):
        mapped(tmp_path)


def test_a_missing_expert_is_seen(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    edit(tmp_path, model__layers__0__block_sparse_moe__experts__3__w2__weight=None)
    with pytest.raises(CheckpointError, match=r"experts\.down_proj' has shape \[4, 24, 36\].*expects \[5, 24, 36\]"):
        mapped(tmp_path)


def test_leftover_tensors_are_returned_and_known_ones_are_not(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    inv_freq = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(3)}
    edit(tmp_path, extra__weight=torch.ones(3), **inv_freq)
    assert mapped(tmp_path).unused == ("extra.weight",)


def test_what_transformers_allows_to_be_missing_is_absent(tmp_path: Path) -> None:
    config = tf.BartConfig(
        vocab_size=61,
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
    )
    tf.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    edit(tmp_path, final_logits_bias=None)
    assert mapped(tmp_path, tf.AutoModelForSeq2SeqLM).absent == ("final_logits_bias",)


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    edit(tmp_path, model__norm__weight=torch.ones(25))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight' has shape \[25\].*expects \[24\]"):
        mapped(tmp_path)


def test_one_parameter_has_one_dtype(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    edit(tmp_path, model__layers__0__block_sparse_moe__experts__3__w2__weight=torch.ones(24, 36, dtype=torch.bfloat16))
    with pytest.raises(
        CheckpointError, match=r"down_proj' is put together from tensors of unlike dtypes \(BF16, F32\)"
    ):
        mapped(tmp_path)


def test_parameters_keep_the_checkpoints_dtype(tmp_path: Path) -> None:
    build("llama", torch.bfloat16).save_pretrained(tmp_path)
    edit(tmp_path, model__norm__weight=torch.ones(24))
    sources = mapped(tmp_path)
    assert sources["model.norm.weight"].dtype == torch.float32
    assert sources["lm_head.weight"].dtype == torch.bfloat16


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantised"):
        mapped(tmp_path)


# Layouts.


def entry_source(path: Path, offset: int, shape: tuple[int, ...], dtype: str = "F32", size: int = 4) -> PlainTensor:
    entry = TensorEntry("x", dtype, shape, path, offset, int(np.prod(shape)) * size)
    return PlainTensor(
        {"F32": torch.float32, "BF16": torch.bfloat16}[dtype], shape, extents_of("x", PlacementTensor.of(entry))
    )


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    path = tmp_path / "noise"
    path.write_bytes(np.random.default_rng(5).integers(0, 256, 200_000, np.uint8).tobytes())
    return path


def check_layout(sources: dict[str, PlainTensor]) -> Any:
    """Every invariant that the docstring of BlockLayout names, and the bytes."""
    layout = layout_block(sources)
    assert layout.num_bytes % PAGE_BYTES == 0
    slot = fill(layout)
    tensors = bind_views(slot, layout)
    views, copies = align_views(layout)
    aligned = torch.zeros(aligned_bytes(layout), dtype=torch.uint8)
    for start, target, num_bytes in copies:
        aligned[target : target + num_bytes] = slot[start : start + num_bytes]
    for name, tensor in view_slot(aligned, views).items():
        assert views[name].slot_offset % 16 == 0 and equal_bits(tensor, tensors[name]), name
    for name, source in sources.items():
        view = layout.views[name]
        assert view.slot_offset % source.dtype.itemsize == 0
        assert view.slot_offset + source.num_bytes <= layout.num_bytes
        assert equal_bits(tensors[name], read_source(source)), name
    taken = np.zeros(layout.num_bytes, np.int8)
    for read in layout.reads:
        taken[read.slot_offset : read.slot_offset + read.num_bytes] += 1
    assert taken.max(initial=0) <= 1
    return layout


def test_neighbours_share_a_read_at_the_files_residue(noise: Path) -> None:
    sources = {
        "b": entry_source(noise, 1000 + 5 * 7 * 4, (3, 3)),
        "a": entry_source(noise, 1000, (5, 7)),
        "near": entry_source(noise, 4000, (10,)),
        "far": entry_source(noise, 90_000, (2000,)),
    }
    layout = check_layout(sources)
    assert [(read.file_offset, read.num_bytes) for read in layout.reads] == [(1000, 3040), (90_000, 8000)]
    for read in layout.reads:
        assert read.slot_offset % PAGE_BYTES == read.file_offset % PAGE_BYTES
    pages = [
        range(r.slot_offset // PAGE_BYTES, (r.slot_offset + r.num_bytes - 1) // PAGE_BYTES + 1) for r in layout.reads
    ]
    assert not set(pages[0]) & set(pages[1])


@pytest.mark.parametrize("offset", [0, 8, 1000])
def test_tensors_that_one_shift_aligns_are_one_copy(offset: int, noise: Path) -> None:
    sources, place = {}, offset
    for name, size in (("a", 1280), ("b", 384), ("c", 4), ("d", 64)):
        sources[name] = entry_source(noise, place, (size,), "BF16", 2)
        place += size * 2
    copies = align_views(check_layout(sources))[1]
    assert [num_bytes for _, _, num_bytes in copies] == [2 * (1280 + 384 + 4), 2 * 64]


def test_a_gap_of_a_page_splits_a_read(noise: Path) -> None:
    def reads(gap: int) -> int:
        return len(check_layout({"a": entry_source(noise, 8, (2,)), "b": entry_source(noise, 16 + gap, (2,))}).reads)

    assert [reads(0), reads(4092), reads(4096), reads(8192)] == [1, 1, 2, 2]


def test_files_are_not_merged(noise: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(noise.read_bytes()[::-1])
    sources = {"a": entry_source(noise, 8, (2,)), "b": entry_source(tmp_path / "other", 16, (2,))}
    assert len(check_layout(sources).reads) == 2


@pytest.mark.parametrize("offset", [1, 2, 3, 4095, 4097])
def test_tensors_off_their_own_alignment_are_placed_on_it(noise: Path, offset: int) -> None:
    sources = {
        "odd": entry_source(noise, offset, (33, 31)),
        "half": entry_source(noise, offset + 33 * 31 * 4, (7, 3), "BF16", 2),
    }
    check_layout(sources)


def test_parts_of_a_fused_tensor_lie_together(noise: Path) -> None:
    parts = [TensorEntry("e", "F32", (20, 50), noise, offset, 4000) for offset in (40_000, 8, 80_004, 100_000)]
    placement = torch.stack([PlacementTensor.of(part) for part in parts])
    fused = PlainTensor(torch.float32, (4, 20, 50), extents_of("e", placement))
    layout = check_layout({"fused": fused, "single": entry_source(noise, 4008, (9,))})
    assert len(fused.extents) == 4
    assert len(layout.reads) == 5


def test_most_bytes_of_a_fused_tensor_are_congruent(noise: Path) -> None:
    small = TensorEntry("e", "F32", (10, 50), noise, 104, 2000)
    large = TensorEntry("e", "F32", (100, 50), noise, 40_000, 20_000)
    placement = torch.cat([PlacementTensor.of(small), PlacementTensor.of(large)])
    layout = check_layout({"fused": PlainTensor(torch.float32, (110, 50), extents_of("e", placement))})
    assert layout.reads[1].slot_offset % PAGE_BYTES == layout.reads[1].file_offset % PAGE_BYTES


def test_empty_and_scalar_tensors(noise: Path) -> None:
    sources = {"empty": entry_source(noise, 8, (0, 4)), "scalar": entry_source(noise, 8, ())}
    layout = check_layout(sources)
    assert len(layout.reads) == 1
    assert layout_block({}).num_bytes == 0


def test_a_slot_that_does_not_fit_is_refused(noise: Path) -> None:
    layout = layout_block({"a": entry_source(noise, 8, (5,))})
    for slot in (
        torch.zeros(layout.num_bytes - 1, dtype=torch.uint8),
        torch.zeros(layout.num_bytes),
        torch.zeros(1, layout.num_bytes, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match="expected torch.uint8 of at least"):
            bind_views(slot, layout)


def test_views_share_the_slots_memory(noise: Path) -> None:
    layout = layout_block({"a": entry_source(noise, 8, (5,))})
    slot = fill(layout)
    tensor = bind_views(slot, layout)["a"]
    tensor.zero_()
    assert not slot[layout.views["a"].slot_offset :][:20].any()


# Rows on demand.


def rows_of(source: PlainTensor, row_ids: Any) -> tuple[torch.Tensor, int]:
    rows = source.rows(row_ranges(row_ids, source.shape[0]))
    assert len(rows.shape) == len(source.shape) and rows.shape[0] == len(set(torch.as_tensor(row_ids).flatten().tolist()))
    return read_source(rows), len(rows.extents)


def test_rows_are_unique_ascending_and_coalesced(noise: Path) -> None:
    source = entry_source(noise, 12, (100, 7))
    matrix = read_source(source)
    ids = torch.tensor([[99, 3, 4, 5], [3, 0, 98, 50]])
    rows, num_reads = rows_of(source, ids)
    assert equal_bits(rows, matrix[ids.unique()])
    assert num_reads == 4
    assert equal_bits(rows_of(source, [7])[0], matrix[7:8])
    assert rows_of(source, range(100))[1] == 1
    assert source.rows(row_ranges([], 100)).extents == ()


def test_rows_of_a_table_in_several_files(noise: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(noise.read_bytes()[::-1])
    entries = [TensorEntry("e", "BF16", (10, 5), path, 10, 100) for path in (noise, tmp_path / "other")]
    placement = torch.cat([PlacementTensor.of(entry) for entry in entries])
    source = PlainTensor(torch.bfloat16, (20, 5), extents_of("e", placement))
    matrix = read_source(source)
    rows, num_reads = rows_of(source, [8, 9, 10, 11, 19])
    assert equal_bits(rows, matrix[[8, 9, 10, 11, 19]])
    assert num_reads == 3
    halves = torch.cat([PlacementTensor.of(entry) for entry in entries], dim=1)
    source = PlainTensor(torch.bfloat16, (10, 10), extents_of("e", halves))
    assert equal_bits(rows_of(source, [3, 4, 9])[0], read_source(source)[[3, 4, 9]])


@pytest.mark.parametrize("row", [-1, 100])
def test_a_row_outside_the_table_is_named(noise: Path, row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row} of a matrix with 100 rows"):
        row_ranges([5, row], 100)
