"""`quantize` over mixtures of experts: what is packed of them, their bytes, and runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import quantize_reference as reference
import text_models
import torch
import transformers as tf
from data_tools import prepare_in_this_process
from mixtures import MIXTURES
from safetensors.torch import load_file, save_file
from test_quantize import quantized
from text_models import VOCAB, make_config, write_model, write_rows
from tiny_models import aligned_copies

from finetune import Trainer
from finetune.evaluate import evaluate
from finetune.generate import generate
from finetune.offload.quantize.outline import Outline, Packing, outline, write_sparse
from finetune.offload.weights.formats.stacked import StackedWeights
from finetune.offload.weights.parts import cut
from finetune.quantization.cache import cache_home, cached_models

ENDS = ("proj.weight", "w1.weight", "w2.weight", "w3.weight")


@pytest.fixture
def moe(tmp_path, monkeypatch):
    def get(name: str) -> Path:
        config = MIXTURES[name]()
        config.vocab_size = VOCAB
        monkeypatch.setitem(text_models.CONFIGS, name, config)
        return write_model(name, tmp_path / name, dtype=torch.bfloat16)

    return get


def tensors(model: Path) -> dict[str, torch.Tensor]:
    return {name: value for shard in model.glob("*.safetensors") for name, value in load_file(shard).items()}


def outlined(model: Path) -> tuple[Outline, set[str]]:
    plan = outline(cut(model), Packing("nf4"))
    return plan, {entry.name for entry in plan.packed_entries}


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "deepseek-v3", "olmoe", "glm4-moe", "minimax", "qwen3.5-moe"])
def test_experts_are_packed_and_routers_are_not(name, moe):
    model = moe(name)
    plan, packed = outlined(model)
    dense = tensors(model)
    experts = {key for key in dense if ".experts." in key and key.endswith(".weight")}
    assert len(experts) >= 3 * 4 and experts <= packed and not plan.stacked_bytes
    routers = {key.removesuffix(".weight") for key in dense if key.endswith((".gate.weight", ".router.weight"))}
    assert routers and not {f"{router}.weight" for router in routers} & packed
    section = plan.config["quantization_config"]
    assert routers <= set(section["llm_int8_skip_modules"]) and "lm_head" in section["llm_int8_skip_modules"]


@pytest.mark.parametrize("name", ["gpt-oss", "llama4", "granite-moe"])
def test_experts_that_lie_stacked_stay_as_they_are(name, moe, tmp_path, monkeypatch):
    """It is said; the rest is packed."""
    model = moe(name)
    plan, packed = outlined(model)
    dense = tensors(model)
    stacked = {key for key, value in dense.items() if value.dim() == 3 and "conv1d" not in key}
    assert stacked and not stacked & packed and any("attn" in key for key in packed)
    assert plan.stacked_bytes == sum(dense[key].nbytes for key in stacked)
    prepare_in_this_process(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache home"))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "hello the cat", "completion": " sat on the mat"}])
    words = Trainer(make_config(model, tmp_path / "out", data=rows, quantize="nf4")).plan().describe()
    assert "of experts lie stacked in the files and stay as they are" in words


def test_experts_of_one_checkpoint_may_lie_in_both_ways(moe):
    """Of Qwen3-MoE's, one block's under the model's own names."""
    model = moe("qwen3-moe")
    dense = tensors(model)
    block = "model.layers.0.mlp.experts."
    rest = {key: value for key, value in dense.items() if not key.startswith(block)}
    loaded = tf.AutoModelForCausalLM.from_pretrained(model).state_dict()
    rest |= {key: value.clone() for key, value in loaded.items() if key.startswith(block)}
    for path in (*model.glob("*.safetensors"), *model.glob("*.index.json")):
        path.unlink()
    save_file(rest, model / "model.safetensors")
    plan, packed = outlined(model)
    assert plan.stacked_bytes == sum(value.nbytes for key, value in rest.items() if key.startswith(block))
    assert {key for key in packed if ".experts." in key} == {key for key in rest if "layers.2.mlp.experts." in key}


@pytest.mark.parametrize("packing", [Packing("nf4"), Packing("nf4", nested=False), Packing("int8")], ids=str)
def test_bytes_are_those_of_the_formats(packing, moe, tmp_path):
    """Written twice, they are the same; read, they are stacks of what bitsandbytes has; a plan is made over the same sizes."""
    model = moe("qwen3-moe")
    for folder in ("new", "again"):
        quantized(model, tmp_path / folder, packing)
    stored, dense = tensors(tmp_path / "new"), tensors(model)
    for path in (tmp_path / "new").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    for name in ("model.layers.0.mlp.experts.5.gate_proj.weight", "model.layers.2.mlp.experts.0.down_proj.weight"):
        codes, scales = (reference.int8 if packing.kind == "int8" else reference.nf4)(dense[name])
        assert stored[name].view(-1).tolist() == codes.reshape(-1).tolist()
        if packing.kind == "int8":
            assert stored[name.replace("weight", "SCB")].tolist() == scales.tolist()
        elif not packing.nested:
            assert stored[f"{name}.absmax"].tolist() == scales.tolist()
    parts = cut(tmp_path / "new")
    stacks = {name: weight for name, weight in parts.sources.items() if isinstance(weight, StackedWeights)}
    assert {weight.shape for weight in stacks.values()} == {(6, 48, 40), (6, 40, 24)} and len(stacks) == 4
    (tmp_path / "sparse").mkdir()
    write_sparse(outline(cut(model), packing), tmp_path / "sparse", {})
    sparse = cut(tmp_path / "sparse")
    assert [layout.num_bytes for layout in sparse.layouts] == [layout.num_bytes for layout in parts.layouts]


def test_numbers_are_those_of_the_installed_bitsandbytes(moe, tmp_path):
    library = pytest.importorskip("bitsandbytes")
    model = moe("mixtral")
    quantized(model, tmp_path / "new", Packing("nf4"))
    parts, dense = cut(tmp_path / "new"), tensors(model)
    layer = "model.layers.1.block_sparse_moe.experts."
    for expert in range(5):
        expected = [rounded(library, dense[f"{layer}{expert}.{word}.weight"]) for word in ("w1", "w3")]
        weight = parts.sources["model.layers.1.mlp.experts.gate_up_proj"].rows([(expert, expert + 1)])
        assert weight.decode(weight.load(read), torch.bfloat16)[0].equal(torch.cat(expected))


def rounded(library, weight: torch.Tensor) -> torch.Tensor:
    """As one row: the library's AVX-512 kernel takes a wrong absmax where a block goes on in the next one."""
    packed = library.functional.quantize_4bit(weight.reshape(1, -1).clone(), quant_type="nf4", compress_statistics=True)
    return library.functional.dequantize_4bit(*packed).view(weight.shape)


def read(tensor) -> torch.Tensor:
    data = b"".join(extent.path.read_bytes()[extent.file_offset :][: extent.num_bytes] for extent in tensor.extents)
    return torch.frombuffer(bytearray(data), dtype=tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("quantize", [{"quantize": "nf4"}, {"quantize": 7, "quantization": {"nested": False}}], ids=str)
def test_a_run_an_evaluation_and_text(quantize, moe, tmp_path, monkeypatch):
    """Over what is made for it: as over the directory that was made. A budget of bits makes stacks of both kinds."""
    prepare_in_this_process(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache home"))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"hello the {i} cat", "completion": " sat on"} for i in range(4)])
    options = {"data": rows, "training": {"max_steps": 2, "batch_size": 2}, "lora": {"r": 3}}
    here = make_config(moe("qwen3-moe"), tmp_path / "here", **quantize, **options)
    before = Trainer(here).plan()
    Trainer(here).train()
    after = Trainer(here).plan()
    assert after.plan.slots == before.plan.slots
    (made,) = cached_models(cache_home())
    words = {w.word for w in cut(made.path).sources.values() if isinstance(w, StackedWeights)}
    assert ("bitsandbytes 4-bit and bitsandbytes int8" in words) == ("quantization" in quantize)
    there = make_config(made.path, tmp_path / "there", **options)
    Trainer(there).train()
    found, expected = (load_file(c.output / "adapter" / "adapter_model.safetensors") for c in (here, there))
    assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in found)
    assert evaluate(here, here.output)["loss"] == evaluate(there, there.output)["loss"]
    texts = ["".join(generate(c, c.output, ["the cat"], max_new_tokens=4)) for c in (here, there)]
    assert texts[0] == texts[1]


def test_a_run_is_that_over_the_numbers_of_bitsandbytes(moe, tmp_path, monkeypatch):
    """Trained, evaluated and asked over a plain checkpoint of what the library makes of every matrix."""
    library = pytest.importorskip("bitsandbytes")
    prepare_in_this_process(monkeypatch)
    aligned_copies(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache home"))
    model = moe("qwen3-moe")
    _, packed = outlined(model)
    decoded = shutil.copytree(model, tmp_path / "decoded")
    for shard in decoded.glob("*.safetensors"):
        save_file({k: rounded(library, v) if k in packed else v for k, v in load_file(shard).items()}, shard)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"hello the {i} cat", "completion": " sat on"} for i in range(4)])
    results = []
    for base, more in ((model, {"quantize": "nf4"}), (decoded, {})):
        training = {"max_steps": 2, "batch_size": 2}
        config = make_config(base, tmp_path / f"out-{base.name}", data=rows, training=training, lora={"r": 3}, **more)
        Trainer(config).train()
        adapter = load_file(config.output / "adapter" / "adapter_model.safetensors")
        text = "".join(generate(config, config.output, ["the cat"], max_new_tokens=4))
        loss = evaluate(config, config.output)["loss"]
        results.append((loss, text, {name: value.tolist() for name, value in adapter.items()}))
    assert results[0] == results[1]
