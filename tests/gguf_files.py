"""GGUF files of tiny models, as llama.cpp's converter writes them, and the checkpoints of the numbers that they stand for.

Names, blocks and numbers are the package gguf's; the order of rows is that of `LlamaModel.permute` in llama.cpp's
`convert_hf_to_gguf.py`. Nothing of this is the project's code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as tf
from data_tools import write_tokenizer
from gguf import GGMLQuantizationType as Type

VOCAB = 345
_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
_HEAD = {"head_dim": 12}
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_TEXT, **_HEAD),
    "qwen2": lambda: tf.Qwen2Config(**_TEXT, tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3Config(**_TEXT, **_HEAD),
    "qwen3moe": lambda: tf.Qwen3MoeConfig(
        **_TEXT, **_HEAD, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True
    ),
    "phi3": lambda: tf.Phi3Config(**_TEXT, sliding_window=9),
    "gemma2": lambda: tf.Gemma2Config(
        **_TEXT, **_HEAD, sliding_window=6, final_logit_softcapping=3.0, attn_logit_softcapping=5.0, query_pre_attn_scalar=12
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(**_TEXT, **_HEAD, sliding_window=6, query_pre_attn_scalar=12),
}
MIXED = {
    "token_embd": "Q8_0", "output": "Q5_0", "attn_q": "Q4_0", "attn_k": "Q8_0", "attn_v": "Q5_1", "attn_qkv": "Q5_0",
    "attn_output": "F16", "ffn_gate": "Q4_1", "ffn_up": "IQ4_NL", "ffn_down": "Q4_K",
    "ffn_gate_inp": "F32", "ffn_gate_exps": "Q4_0", "ffn_up_exps": "Q8_0", "ffn_down_exps": "Q4_K",
}  # fmt: skip
"""Name of a tensor, without its block -> type."""


def write_gguf(kind: str, folder: Path, types: Mapping[str, str] | str = "Q8_0", text: bool = False) -> tuple[Path, Path]:
    """A GGUF file, and the directory of the same model with its numbers in fp32. types: of matrices, by name or of all.
    text: with a tokenizer; in the directory it is the one that Transformers makes of the file's."""
    torch.manual_seed(9)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
    rng = np.random.default_rng(4)
    path, dense = folder / f"{kind}.gguf", folder / "dense"
    writer = gguf.GGUFWriter(path, kind)
    add_metadata(writer, kind, model.config)
    if text:
        add_tokenizer(writer, folder / "tokenizer")
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == kind), len(model.model.layers))
    tied = set(model.all_tied_weights_keys)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tied:
                continue
            parameter.add_(torch.randn_like(parameter), alpha=0.06)
            module, _, end = name.rpartition(".")
            if parameter.dim() == 3:
                words = ("gate_proj", "up_proj") if end == "gate_up_proj" else (end,)
                for word, part in zip(words, parameter.chunk(len(words), 1), strict=True):
                    stored = names.get_name(f"{module}.{word}")
                    wanted = types if isinstance(types, str) else types[stored.rpartition(".")[2]]
                    numbers = add_tensor(writer, f"{stored}.weight", part.contiguous().numpy(), Type[wanted], rng)
                    part.copy_(torch.from_numpy(numbers))
                continue
            stored = names.get_name(module)
            order = _order(kind, stored, parameter.shape[0], model.config)
            shift = 1.0 if kind.startswith("gemma") and "norm" in stored else 0.0
            values = parameter.numpy()[order] + np.float32(shift)
            wanted = types if isinstance(types, str) else types.get(stored.rpartition(".")[2], "Q8_0")
            if values.ndim == 1:
                wanted = "F32"
            elif values.shape[1] % gguf.GGML_QUANT_SIZES[Type[wanted]][0]:
                wanted = "F16"  # llama.cpp too takes another type for such a matrix
            numbers = add_tensor(writer, f"{stored}.{end}", values, Type[wanted], rng)
            parameter.copy_(torch.from_numpy((numbers - np.float32(shift))[np.argsort(order)]))
    for method in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        method()
    model.save_pretrained(dense)
    if text:
        tf.AutoTokenizer.from_pretrained(folder, gguf_file=path.name).save_pretrained(dense)
    return path, dense


def _order(kind: str, stored: str, rows: int, config: Any) -> np.ndarray:
    """Which row of the model the file has at each place."""
    index = np.arange(rows)
    if kind != "llama" or not stored.endswith(("attn_q", "attn_k")):
        return index
    heads = config.num_attention_heads if stored.endswith("attn_q") else config.num_key_value_heads
    return index.reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Type, rng: np.random.Generator) -> np.ndarray:
    """Returns the numbers that are stored, fp32."""
    try:
        data = gguf.quantize(values, kind)
    except NotImplementedError:  # gguf only reads these: any bytes with scales of a fitting size
        elements, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        data = random_blocks(kind, values.size // elements, rng).reshape(*values.shape[:-1], -1)
        assert data.shape[-1] == values.shape[-1] // elements * num_bytes
    writer.add_tensor(name, data, raw_dtype=kind)
    return np.ascontiguousarray(gguf.dequantize(data, kind), dtype=np.float32)


HALVES = {
    Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,), Type.IQ4_XS: (0,),
    Type.IQ4_NL: (0,), Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2), Type.Q8_0: (0,),
}  # fmt: skip
"""Where a block has numbers in fp16."""


def random_blocks(kind: Type, count: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [count, bytes], whose numbers are small."""
    blocks = rng.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for start in HALVES[kind]:
        blocks[:, start : start + 2] = rng.normal(0, 1e-4, (count, 1)).astype(np.float16).view(np.uint8)
    return blocks


def add_metadata(writer: gguf.GGUFWriter, kind: str, config: Any) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    for key, value in {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim, "attention.value_length": head_dim, "vocab_size": config.vocab_size,
        "expert_count": getattr(config, "num_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "rope.dimension_count": head_dim, "attention.sliding_window": getattr(config, "sliding_window", None),
    }.items():  # fmt: skip
        if value is not None:
            writer.add_uint32(f"{kind}.{key}", value)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    for key, value in {
        "rope.freq_base": rope["rope_theta"], "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }.items():  # fmt: skip
        if value is not None:
            writer.add_float32(f"{kind}.{key}", value)
    for word, index in (("bos", config.bos_token_id), ("eos", config.eos_token_id), ("padding", config.pad_token_id)):
        writer.add_uint32(f"tokenizer.ggml.{word}_token_id", index)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    write_tokenizer(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"[PAD{index}]" for index in range(len(tokens), VOCAB)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index < 5 else 1 for index in range(VOCAB)])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}model: ")
