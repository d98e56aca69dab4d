"""Adapters merged in a stream: PEFT's `merge_and_unload` over the model in memory, bit for bit, or a refusal."""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import packed_bases
import peft
import pytest
import quantize_reference as reference
import torch
import transformers as tf
from expert_checkpoints import KINDS, MODELS
from extents import read_source
from gguf_files import MIXED, write_gguf
from grouped_checkpoints import Awq, Gptq, write_grouped
from packed_checkpoints import pack_mxfp4, write_packed, write_twice
from safetensors.torch import load_file, save_file
from test_cli import invoke
from text_models import make_config, write_model, write_rows
from tiny_models import CONFIGS, HEADS, IDS, TEXT, save_tiny

import finetune.merge
from finetune import Trainer
from finetune.compress import compress
from finetune.config import Config
from finetune.memory.arena import trim_malloc
from finetune.memory.errors import UserError
from finetune.memory.meter import MemoryMeter, host_bytes
from finetune.merge import Merged, merge
from finetune.offload.files import safetensors_files
from finetune.offload.files.checkpoint import read_checkpoint
from finetune.offload.rewrite import writer
from finetune.offload.weights.parts import cut


def save_adapter(model: Path, folder: Path, config: peft.PeftConfig) -> Path:
    """A PEFT adapter of a model, all of whose numbers were changed."""
    torch.manual_seed(6)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(load(model), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        adapted.save_pretrained(folder)
    return folder


def load(model: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(model, dtype="auto")


def by_peft(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load(model), adapter).merge_and_unload().state_dict()


def streamed(model: Path, adapter: Path, to: Path, form: str = "plain") -> Merged:
    return merge(Config(model=str(model), output=to.parent / "run"), to, form, adapter)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].equal(value), name


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    modules = targets[0] if targets == ("all-linear",) else list(targets)
    return peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", target_modules=modules, **options)


IA3 = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "lora": ("llama", lora("q_proj", "down_proj")),
    "every linear layer": ("gemma2", lora("all-linear")),
    "patterns": ("qwen3", lora("q_proj", "v_proj", rank_pattern={"q_proj": 5}, alpha_pattern={"v": 3}, use_rslora=True)),
    "dora": ("opt", lora("q_proj", "fc2", use_dora=True)),
    "dora of the ends": ("llama", lora("embed_tokens", "lm_head", use_dora=True)),
    "biases of lora": ("opt", lora("k_proj", lora_bias=True)),
    "transposed": ("gpt2", lora("c_attn", "c_proj", fan_in_fan_out=True)),
    "transposed dora": ("gpt2", lora("c_fc", fan_in_fan_out=True, use_dora=True)),
    "experts": ("mixtral", lora("q_proj", target_parameters=EXPERTS)),
    "trained whole": ("llama", lora("q_proj", modules_to_save=["lm_head", "embed_tokens", "model.norm"])),
    "biases": ("llama-tied", lora("q_proj", bias="all")),
    "rows": ("llama", lora("q_proj", trainable_token_indices=[5, 17])),
    "rows of tied ends": ("llama-tied", lora("q_proj", trainable_token_indices=[5, 17])),
    "trained whole, as one": ("qwen3", lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "ia3": ("llama-tied", IA3),
    "loha": ("llama", peft.LoHaConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "up_proj"])),
    "lokr": ("llama", peft.LoKrConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "up_proj"])),
    "vera": ("llama", peft.VeraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"])),
}  # fmt: skip


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_pefts_own_merge(case, dtype, tmp_path):
    name, config = CASES[case]
    model = save_tiny(name, tmp_path / "model", dtype)
    adapter = save_adapter(model, tmp_path / "adapter", config)
    streamed(model, adapter, tmp_path / "merged")
    assert_same(load(tmp_path / "merged").state_dict(), by_peft(model, adapter))


TIED = {
    "head": lora("lm_head"),
    "embedding": lora("q_proj", "embed_tokens"),
    "dora of the head": lora("lm_head", use_dora=True),
    "both": lora("embed_tokens", "lm_head"),
    "head trained whole": lora("q_proj", modules_to_save=["lm_head"]),
}


def logits(model: Path, adapter: Path | None = None) -> torch.Tensor:
    """Where there is an adapter, plain PEFT's."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load(model) if adapter is None else peft.PeftModel.from_pretrained(load(model), adapter)
        return loaded.eval()(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("case", TIED)
def test_ends_of_a_tie_that_differ_are_written_apart(case, tmp_path):
    """PEFT would put the change of one end into the other too, or both changes into both."""
    model = save_tiny("llama-tied", tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter", TIED[case])
    result = streamed(model, adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    assert any("written apart" in note for note in result.notes)
    found = logits(tmp_path / "merged")
    torch.testing.assert_close(found, logits(model, adapter), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(model), rtol=1e-2)
    apart = load(model)
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.clone())
    apart.config.tie_word_embeddings = False
    apart.save_pretrained(tmp_path / "apart")
    assert_same(load(tmp_path / "merged").state_dict(), by_peft(tmp_path / "apart", adapter))


def test_a_tie_that_an_adapter_keeps_is_kept(tmp_path):
    """PEFT would add the change twice."""
    model = save_tiny("llama-tied", tmp_path / "model")
    config = peft.LoraConfig(r=1, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    adapter = save_adapter(model, tmp_path / "adapter", config)
    assert not streamed(model, adapter, tmp_path / "merged").notes
    assert "lm_head.weight" not in read_checkpoint(tmp_path / "merged").tensors
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(model, adapter), rtol=1e-4, atol=1e-4)


def write_experts(model: Path, folder: Path) -> tuple[Path, Path]:
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return write_twice(model, folder, lambda _, value: pack_mxfp4(value), section, ("gate_up_proj", "down_proj"))


PACKED = {
    "nf4, nested": ("llama", partial(write_packed, kind="nf4", nested=True)),
    "fp4": ("llama", partial(write_packed, kind="fp4")),
    "int8": ("llama-tied", partial(write_packed, kind="int8")),
    "fp8": ("llama", partial(packed_bases.write, packed_bases.BASES["fp8"])),
    "int4": ("llama", partial(packed_bases.write, packed_bases.BASES["int4"])),
    "gptq": ("llama", partial(write_grouped, how=Gptq(act_order=True))),
    "awq": ("llama", partial(write_grouped, how=Awq())),
    "mxfp4": ("gpt-oss", write_experts),
    "experts in nf4": ("qwen3-moe", KINDS["nf4"]),
    "experts of awq": ("mixtral", KINDS["awq"]),
    "experts in fp8": ("deepseek-v3", KINDS["fp8"]),
}
STACKED = {"gpt-oss", "qwen3-moe", "mixtral", "deepseek-v3"}


def gpt_oss() -> tf.GptOssConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 5, "num_experts_per_tok": 2}
    return tf.GptOssConfig(**TEXT | sizes, **HEADS, **IDS)


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PACKED)
def test_packed_weights_become_plain_ones(case, dtype, tmp_path, monkeypatch):
    """Those with an adapter as PEFT merges it into the numbers that they stand for, the others as these."""
    for mixture, config in (MODELS | {"gpt-oss": gpt_oss}).items():
        monkeypatch.setitem(CONFIGS, mixture, config)
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 30_000)
    monkeypatch.setattr(writer, "CHUNK_BYTES", 2000)
    name, write = PACKED[case]
    packed, decoded = write(save_tiny(name, tmp_path / "model", dtype), tmp_path)
    if name in STACKED:
        config = lora("o_proj", target_parameters=["experts.gate_up_proj"])
    else:
        config = lora("q_proj", "up_proj", use_dora=case == "int8")
    adapter = save_adapter(decoded, tmp_path / "adapter", config)
    streamed(packed, adapter, tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert_same(load(tmp_path / "merged").state_dict(), by_peft(decoded, adapter))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3moe"])
def test_a_gguf_file_becomes_a_directory(kind, tmp_path):
    """With a tokenizer and a configuration. Some of its matrices lie in llama.cpp's order, its norms are shifted."""
    gguf, dense = write_gguf(kind, tmp_path, MIXED, text=kind == "llama")
    model = load(dense).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    adapter = save_adapter(tmp_path / "bf16", tmp_path / "adapter", lora("q_proj", "k_proj", "down_proj"))
    result = streamed(gguf, adapter, tmp_path / "merged")
    found = load(tmp_path / "merged")
    assert_same(found.state_dict(), by_peft(tmp_path / "bf16", adapter))
    assert found.config.use_cache == model.config.use_cache
    if kind != "llama":  # there is none in it
        assert "no tokenizer is written" in result.notes[-1]
        return
    text = "the cat sat on the mat"
    tokens = [tf.AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (tmp_path / "merged", dense)]
    assert tokens[0] == tokens[1]


def test_a_compressed_model_becomes_a_plain_one(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.offload.weights.compress.MIN_BYTES", 1000)
    model = save_tiny("llama", tmp_path / "model", torch.bfloat16)
    adapter = save_adapter(model, tmp_path / "adapter", lora("q_proj"))
    compress(Config(model=str(model), output=tmp_path / "run"), tmp_path / "compressed")
    streamed(tmp_path / "compressed", adapter, tmp_path / "merged")
    assert_same(load(tmp_path / "merged").state_dict(), by_peft(model, adapter))


def stored(model: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in model.glob("*.safetensors") for name, value in load_file(path).items()}


def relative(error: torch.Tensor, weight: torch.Tensor) -> float:
    return float(error.double().norm() / weight.double().norm())


@pytest.mark.parametrize("kind, nested", [("nf4", True), ("nf4", False), ("int8", False)])
def test_packed_again_in_the_same_format(kind, nested, tmp_path):
    """The bytes of quantising the merged weights, where there is an adapter; those of the base elsewhere."""
    model = save_tiny("llama-tied", tmp_path / "model", torch.bfloat16)
    packed, decoded = write_packed(model, tmp_path, kind, nested)
    adapter = save_adapter(decoded, tmp_path / "adapter", lora("q_proj", "up_proj", "lm_head"))
    streamed(packed, adapter, tmp_path / "plain")
    result = streamed(packed, adapter, tmp_path / "again", "packed")
    expected, merged, dense = stored(packed), stored(tmp_path / "plain"), stored(decoded)
    found = stored(tmp_path / "again")
    changed = [name for name in merged if name.endswith(("q_proj.weight", "up_proj.weight"))]
    assert result.packing.matrices == len(changed) == 6
    errors, numbers = {}, weights(tmp_path / "again")
    for name in changed:
        if kind == "int8":
            eight, tops = reference.int8(merged[name])
            assert found[name].tolist() == eight.tolist() and found[name.replace("weight", "SCB")].tolist() == tops.tolist()
        else:
            codes, absmax = reference.nf4(merged[name])
            assert found[name].view(-1).tolist() == codes.tolist() and found[name].shape[1] == 1
            assert nested or found[f"{name}.absmax"].tolist() == absmax.tolist()
        errors[name] = relative(numbers[name] - merged[name].float(), merged[name])
    for name in found.keys() - {name for name in found if any(name.startswith(one[:-6]) for one in changed)}:
        assert found[name].equal(expected.get(name, merged.get(name))), name  # the head is a new weight
    every = [torch.cat([values[name].float().view(-1) for name in changed]) for values in (numbers, merged, dense)]
    assert result.packing.relative == pytest.approx(relative(every[0] - every[1], every[1]), rel=1e-3)
    assert result.packing.relative_change == pytest.approx(relative(every[1] - every[2], every[1]), rel=1e-3)
    assert result.packing.worst[0] == pytest.approx(max(errors.values()), rel=1e-3)
    assert result.packing.worst[1] == max(errors, key=errors.get)
    section, again = (json.loads((folder / "config.json").read_text()) for folder in (packed, tmp_path / "again"))
    assert again == section | {"tie_word_embeddings": False}


def test_experts_are_packed_again_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "mixtral", MODELS["mixtral"])
    packed, decoded = KINDS["nf4"](save_tiny("mixtral", tmp_path / "model", torch.bfloat16), tmp_path)
    adapter = save_adapter(decoded, tmp_path / "adapter", lora("q_proj", target_parameters=["experts.down_proj"]))
    streamed(packed, adapter, tmp_path / "plain")
    result = streamed(packed, adapter, tmp_path / "again", "packed")
    base, merged, found = stored(packed), stored(tmp_path / "plain"), stored(tmp_path / "again")
    assert found.keys() == base.keys() and result.packing.matrices == 3 + 3 * 5 * 3
    for name, value in found.items():
        if ".experts." in name and f"{name}.absmax" in found:
            assert value.view(-1).tolist() == reference.nf4(merged[name])[0].tolist()
        elif ".experts." not in name and "q_proj" not in name:
            assert value.equal(base[name]), name


def weights(model: Path) -> dict[str, torch.Tensor]:
    """Of every parameter, fp32."""
    parts = cut(model)
    return {
        name: weight.decode(weight.load(read_source), torch.float32) for name, weight in parts.sources.items()
    }


def test_a_base_that_quantize_packs(tmp_path):
    """As a user does it, from the run's directory: with the model that the adapter was trained on, and no other."""
    model = write_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat", "completion": " sat"}] * 3)
    training = {"max_steps": 2, "batch_size": 1, "learning_rate": 5e-2}
    cache = {"quantize": "nf4", "quantization": {"cache": str(tmp_path / "cache")}}
    Trainer(make_config(model, tmp_path / "run", data=rows, training=training, lora={"r": 3}, **cache)).train()
    words = ("--output", str(tmp_path / "run"), "--merge")
    found = invoke("export", "--model", str(model), *words, "plain", "--to", str(tmp_path / "bare"))
    assert found.exit_code == 1 and "and --quantize as then" in found.stderr
    words = ("--quantize", "nf4", "--set", f"quantization.cache={tmp_path / 'cache'}", *words)
    for form in ("plain", "packed"):
        found = invoke("export", "--model", str(model), *words, form, "--to", str(tmp_path / form))
        assert found.exit_code == 0, found.stderr
        assert (tmp_path / form / "tokenizer.json").is_file() and not (tmp_path / form / "quantized.json").exists()
        assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / form, *(tmp_path / form).iterdir()))
    assert "matrices are off by" in found.stdout and "of the original model" in found.stdout
    (base,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    dense = shutil.copytree(model, tmp_path / "dense")
    for path in dense.glob("*.safetensors"):
        save_file({name: weights(base)[name].bfloat16() for name in load_file(path)}, path)
    assert_same(load(tmp_path / "plain").state_dict(), by_peft(dense, tmp_path / "run" / "adapter"))


def test_memory_is_that_of_one_layer_and_known_before(tmp_path, monkeypatch):
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = tf.LlamaConfig(vocab_size=101, num_key_value_heads=8, **sizes)
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    peft.get_peft_model(load(model), lora("all-linear", use_dora=True)).save_pretrained(adapter)
    needs, check = [], finetune.merge._Merge._check_memory

    def note(self: Any, need: int) -> None:
        gc.collect()
        trim_malloc()
        needs.append((need, host_bytes()))
        check(self, need)

    monkeypatch.setattr(finetune.merge._Merge, "_check_memory", note)
    with MemoryMeter(0.002) as meter:
        streamed(model, adapter, tmp_path / "merged")
    need, before = max(needs)
    assert meter.peak_bytes - before < need + (8 << 20) < read_checkpoint(model).num_bytes / 2
    with pytest.raises(UserError, match=r"merging takes .* for one layer\), .* are allowed: raise --host-memory"):
        merge(Config(model=str(model), host_memory=host_bytes() + need // 2), tmp_path / "more", "plain", adapter)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, 100 << 20))
    with pytest.raises(UserError, match="are to be written, 100.0 MiB are free: make room"):
        streamed(model, adapter, tmp_path / "more")
    assert not list(tmp_path.glob("*more*"))


def broken(adapter: Path) -> None:
    values = load_file(adapter / "adapter_model.safetensors")
    next(iter(values.values())).fill_(float("nan"))
    save_file(values, adapter / "adapter_model.safetensors")


REFUSED = {
    "prefix": (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "plain", "a prefix .* cannot be merged"),
    "no bias": (lora("q_proj", lora_bias=True), "plain", r"PEFT cannot merge .*q_proj.*base layer has no bias"),
    "not packed": (lora("q_proj"), "packed", "is for a model whose weights are packed, and these are not"),
    "another word": (lora("q_proj"), "nf4", "--merge: expected plain or packed, found 'nf4'"),
    "not finite": (lora("q_proj"), "plain", "new values of .*q_proj.weight are not all finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(case, tmp_path):
    config, form, words = REFUSED[case]
    model = save_tiny("llama", tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter", config)
    if case == "not finite":
        broken(adapter)
    with pytest.raises(UserError, match=words):
        streamed(model, adapter, tmp_path / "merged", form)
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "adapter", "run"}


def test_formats_that_new_values_cannot_be_packed_in(tmp_path):
    for number, kind in enumerate(["fp4", "int4"]):
        model, dense = PACKED[kind][1](save_tiny("llama", tmp_path / f"{number}" / "model"), tmp_path / f"{number}")
        adapter = save_adapter(dense, tmp_path / f"{number}" / "adapter", lora("q_proj"))
        with pytest.raises(UserError, match=r"q_proj.weight' is stored as .*, with --merge plain"):
            streamed(model, adapter, tmp_path / "merged", "packed")
    assert not (tmp_path / "merged").exists()


def test_where_it_is_written(tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter", lora("q_proj"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(UserError, match="there exists: name a directory that does not"):
        streamed(model, adapter, tmp_path / "there")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the model to .*Not a directory"):
        streamed(model, adapter, tmp_path / "file" / "merged")
    with pytest.raises(KeyboardInterrupt):
        merge(Config(model=str(model)), tmp_path / "new", "plain", adapter, progress=Stop().after)
    assert not list(tmp_path.glob("*new*"))
    both = shutil.copytree(model, tmp_path / "both")  # Transformers would load the adapter once more
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    streamed(both, both, tmp_path / "merged")
    assert_same(load(tmp_path / "merged").state_dict(), by_peft(model, adapter))


class Stop:
    calls = 0

    def after(self, done: int, total: int) -> None:
        self.calls += 1
        if self.calls > 3:
            raise KeyboardInterrupt
