"""GGUF that is written: against files of the package gguf, read back here and by others, with adapters merged or alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from extents import read_source
from gguf_files import CONFIGS, MIXED, write_gguf
from safetensors.torch import load_file
from test_cli import invoke
from test_merge import load, lora, save_adapter
from text_models import make_config, write_model, write_rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from finetune import Trainer
from finetune.config import Config
from finetune.data.gguf_tokenizer import add_tokenizer
from finetune.memory.errors import UserError
from finetune.merge import merge
from finetune.offload.rewrite import gguf_writer
from finetune.offload.weights.parts import cut


def types(kind: str) -> dict[str, str]:
    """As llama.cpp's converter gives them, with more bits for the ends."""
    ends = "Q8_0" if kind.startswith("Q") else kind
    return dict.fromkeys(MIXED, kind) | {"ffn_gate_inp": "F32", "token_embd": ends, "output": ends}


def stored(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def numbers(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(np.ascontiguousarray(tensor.data), tensor.tensor_type).copy())


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def export(model: Path, kind: str, to: Path, *words: str) -> Path:
    found = invoke("export", "--model", str(model), "--gguf", kind, "--to", str(to), *words)
    assert found.exit_code == 0, found.stderr
    return to


@pytest.mark.parametrize("architecture, kind", [
    ("llama", "Q4_0"), ("qwen2", "Q8_0"), ("qwen3", "F16"), ("qwen3moe", "Q5_1"), ("phi3", "BF16"), ("gemma2", "Q4_1"),
    ("gemma3", "Q5_0"),
])  # fmt: skip
def test_files_are_those_of_the_package_gguf(architecture, kind, tmp_path, monkeypatch):
    """Every tensor, its type and its bytes; all that the other file says. A few rows are quantised at once. The dense numbers
    are those that the other file stands for, and quantising them again gives them back."""
    monkeypatch.setattr(gguf_writer, "CHUNK_BYTES", 3000)
    written, dense = write_gguf(architecture, tmp_path, types(kind), text=True)
    shutil.copytree(tmp_path / "tokenizer", dense, dirs_exist_ok=True)
    found = export(dense, kind.lower(), tmp_path / "new.gguf")
    assert found.stat().st_mode & 0o077 == 0 and not list(tmp_path.glob("*.parts"))
    expected, tensors = stored(written), stored(found)
    assert tensors.keys() == expected.keys()
    sources = cut(dense).sources
    for name, tensor in expected.items():
        assert tensors[name].tensor_type == tensor.tensor_type and tensors[name].shape.tolist() == tensor.shape.tolist(), name
        again = gguf.quantize(numbers(tensor).numpy(), tensor.tensor_type)  # some types are not the same the second time
        assert np.array_equal(tensors[name].data.view(np.uint8), again.view(np.uint8)), name
    known = fields(found)
    for key, value in fields(written).items():
        if not key.startswith("tokenizer.") or architecture == "llama" and key != "tokenizer.ggml.token_type":
            assert known[key] == pytest.approx(value) if isinstance(value, float) else known[key] == value, key
    assert known["general.type"] == "model" and known["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    back = cut(found, lambda stored: torch.float32)
    for name, weight in back.sources.items():
        old = sources[name].decode(sources[name].load(read_source), torch.float32)
        error = (weight.decode(weight.load(read_source), torch.float32) - old).norm() / old.norm()
        assert error < {"F16": 1e-3, "BF16": 4e-3, "Q8_0": 1e-2}.get(kind, 0.2), name


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe", "gemma3"])
def test_numbers_are_read_back(architecture, tmp_path):
    """fp32 gives every bit, but for norms of Gemma, which are stored as w + 1; and gguf's own reader has the same."""
    _, dense = write_gguf(architecture, tmp_path, "F32", text=True)
    shutil.copytree(tmp_path / "tokenizer", dense, dirs_exist_ok=True)
    found = export(dense, "f32", tmp_path / "new.gguf")
    loaded = {}
    if architecture != "qwen3moe":  # whose experts' size Transformers does not read
        loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=found.name, dtype=torch.float32).state_dict()
    expected, sources = load(dense).state_dict(), cut(found, lambda stored: torch.float32).sources
    for name, value in expected.items():
        back = sources[name].decode(sources[name].load(read_source), torch.float32)
        assert name not in loaded or back.equal(loaded[name]), name
        assert torch.allclose(back, value, rtol=0, atol=2e-7) if "norm" in name else back.equal(value), name


def scored_tokenizer(folder: Path) -> None:
    """As Llama 2 has it: BPE with bytes, spaces as U+2581, one before the text."""
    words = ["▁the", "▁cat", "▁sat", "▁mat"]
    pieces, merges = sorted({letter for word in words for letter in word}), []
    for word in words:
        for end in range(2, len(word) + 1):
            if (pair := (word[: end - 1], word[end - 1])) not in merges:
                merges.append(pair)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *("".join(pair) for pair in merges)]
    vocab = {name: index for index, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def test_a_tokenizer_of_sentencepiece(tmp_path):
    _, dense = write_gguf("phi3", tmp_path, "F32")
    scored_tokenizer(dense)
    found = export(dense, "f16", tmp_path / "new.gguf")
    known = fields(found)
    assert known["tokenizer.ggml.model"] == "llama" and known["tokenizer.ggml.add_space_prefix"] is True
    assert known["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6] and known["tokenizer.ggml.token_type"][-1] == 5
    scores = dict(zip(known["tokenizer.ggml.tokens"], known["tokenizer.ggml.scores"], strict=True))
    assert scores["▁t"] > scores["▁th"] > scores["▁the"] > scores["▁c"] > scores["t"]
    back = tf.PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file=found.name)
    original = tf.AutoTokenizer.from_pretrained(dense)
    for text in ("the cat sat", "a mat, the théâtre"):
        assert back(text, add_special_tokens=False).input_ids == original(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("normalizer, word", [
    (normalizers.Lowercase(), "Lowercase"), (normalizers.Sequence([normalizers.NFKC(), normalizers.NFC()]), "NFKC"),
    (normalizers.Replace(" ", "_"), "Replace"), (normalizers.NFC(), None),
])  # fmt: skip
@pytest.mark.parametrize("is_scored", [False, True])
def test_what_a_tokenizer_does_to_text_before_is_said_or_refused(is_scored, normalizer, word):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], byte_fallback=is_scored))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast, writer = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer), gguf.GGUFWriter(None, "llama")
    if word is None and not is_scored:  # as llama.cpp's own converter passes over it
        add_tokenizer(writer, fast, 3, changed())
        return
    with pytest.raises(UserError, match=rf"changes a text before it splits it .{word or 'NFC'}"):
        add_tokenizer(writer, fast, 3, changed())


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
REFUSED = {
    "another model": (tf.OPTConfig(vocab_size=345), "models of type opt can't be written as GGUF: expected one of llama"),
    "rope": (lambda: changed(rope_parameters=LLAMA3 | {"low_freq_factor": 2.0}), "the factors of a Llama 3 model"),
    "activation": (lambda: changed(hidden_act="gelu"), "its hidden_act is 'gelu', and llama.cpp's files .* mean 'silu'"),
    "biases": (lambda: changed(attention_bias=True), "can't be written as GGUF|belong to no parameter"),
}


def changed(**options: Any) -> tf.LlamaConfig:
    config = CONFIGS["llama"]()
    for key, value in options.items():
        setattr(config, key, value)
    return config


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_say_is_refused_and_leaves_nothing(case, tmp_path):
    config, words = REFUSED[case]
    model = tmp_path / "model"
    tf.AutoModelForCausalLM.from_config(config() if callable(config) else config).save_pretrained(model)
    written = (model / "config.json").read_text()
    scored_tokenizer(model)
    (model / "config.json").write_text(written)
    with pytest.raises(UserError, match=words):
        from finetune.export import export_gguf

        export_gguf(Config(model=str(model)), tmp_path / "new.gguf", "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rope_of_llama3_and_wrong_words(tmp_path):
    model = tmp_path / "model"
    tf.AutoModelForCausalLM.from_config(changed(rope_parameters=LLAMA3)).save_pretrained(model)
    kept = (model / "config.json").read_text()
    scored_tokenizer(model)
    (model / "config.json").write_text(kept)
    found = export(model, "bf16", tmp_path / "new.gguf")
    assert cut(found).model.config.rope_parameters == LLAMA3
    for words, message in (
        (("--gguf", "q4_k", "--to", "x.gguf"), "--gguf: expected one of f32, f16, .* found 'q4_k'"),
        (("--gguf", "f16", "--to", str(tmp_path / "x")), "expected --to FILE.gguf"),
        (("--gguf", "f16", "--to", str(found)), "exists: name a file that does not"),
        (("--gguf", "f16", "--merge", "packed", "--to", "x.gguf"), "give it with --merge plain"),
    ):
        with pytest.raises(AssertionError, match=message):
            result = invoke("export", "--model", str(model), *words)
            assert result.exit_code == 0, " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    _, dense = write_gguf("llama", folder, "F32", text=True)
    kept = load(dense).to(torch.bfloat16)
    kept.save_pretrained(dense)
    shutil.copytree(folder / "tokenizer", dense, dirs_exist_ok=True)
    return dense


def test_a_merged_model_is_that_of_the_merged_directory(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", lora("q_proj", "k_proj", "down_proj", "embed_tokens"))
    found = export(base, "q8_0", tmp_path / "new.gguf", "--merge", "plain", "--adapter", str(adapter))
    merge(Config(model=str(base)), tmp_path / "merged", "plain", adapter)
    shutil.copytree(base, tmp_path / "other", ignore=lambda *_: {"model.safetensors", "config.json"})
    shutil.copytree(tmp_path / "merged", tmp_path / "other", dirs_exist_ok=True)
    again = export(tmp_path / "other", "q8_0", tmp_path / "again.gguf")
    expected = stored(again)
    for name, tensor in stored(found).items():
        assert np.array_equal(tensor.data, expected[name].data), name


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_an_adapter_alone(kind, base, tmp_path):
    """What llama.cpp computes of it, W + alpha / rank B A in its order of rows, is what PEFT computes."""
    config = peft.LoraConfig(
        r=32, lora_alpha=5, use_rslora=True, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "embed_tokens"]
    )
    adapter = save_adapter(base, tmp_path / "adapter", config)
    found = export(base, kind, tmp_path / "new.gguf", "--adapter", str(adapter))
    known, tensors, values = fields(found), stored(found), load_file(adapter / "adapter_model.safetensors")
    assert known["general.type"] == "adapter" and known["adapter.type"] == "lora" and known["general.architecture"] == "llama"
    assert known["adapter.lora.alpha"] == pytest.approx(5 * 32**0.5) and len(tensors) == 2 * (2 * 3 + 1)
    start = "base_model.model.model"
    for name, module in (("blk.1.attn_q", "layers.1.self_attn.q_proj"), ("blk.2.attn_v", "layers.2.self_attn.v_proj")):
        one, other = (numbers(tensors[f"{name}.weight.lora_{end}"]) for end in "ab")
        old, new = values[f"{start}.{module}.lora_A.weight"], values[f"{start}.{module}.lora_B.weight"]
        if "attn_q" in name:  # 4 heads of 12 rows
            new = new.view(4, 2, 6, -1).transpose(1, 2).reshape(new.shape)
        assert torch.allclose(one, old.float(), atol=0 if kind == "f32" else 0.02)
        assert torch.allclose(other, new.float(), atol=0 if kind == "f32" else 0.02)
    table = numbers(tensors["token_embd.weight.lora_a"])
    assert torch.allclose(table, values[f"{start}.embed_tokens.lora_embedding_A"].T.float(), atol=0 if kind == "f32" else 0.02)


@pytest.mark.parametrize("config, words", [
    (lora("q_proj", use_dora=True), "magnitudes"),
    (lora("q_proj", "v_proj", alpha_pattern={"v_proj": 3}), "has 2 alphas"),
    (lora("q_proj", modules_to_save=["lm_head"]), "brings a new lm_head.weight, and llama.cpp has no place for that"),
    (peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]), "of kind ia3"),
])  # fmt: skip
def test_adapters_that_llama_cpp_cannot_have(config, words, base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", config)
    found = invoke(
        "export", "--model", str(base), "--gguf", "f16", "--adapter", str(adapter), "--to", str(tmp_path / "new.gguf")
    )
    assert found.exit_code == 1 and words in " ".join(found.stderr.split())


def test_what_runs_have_left(tmp_path):
    """The weights that a run has tuned, by the run's directory alone."""
    model = write_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat", "completion": " sat"}] * 2)
    training = {"max_steps": 1, "batch_size": 1, "learning_rate": 1e-3}
    config = make_config(model, tmp_path / "run", data=rows, method="full", training=training)
    Trainer(config).train()
    found = invoke("export", str(tmp_path / "run"), "--gguf", "f32", "--to", str(tmp_path / "new.gguf"))
    assert found.exit_code == 0 and "the model after 1 steps" in found.stdout, found.stderr
    invoke("export", str(tmp_path / "run"), "--to", str(tmp_path / "tuned"))
    expected, sources = load(tmp_path / "tuned").state_dict(), cut(tmp_path / "new.gguf").sources
    for name, weight in sources.items():
        assert weight.decode(weight.load(read_source), torch.bfloat16).equal(expected[name]), name
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.jsonl", "run", "new.gguf", "tuned"}
