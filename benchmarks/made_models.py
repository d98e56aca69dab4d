"""Checkpoints with random weights, a tokenizer of words and rows of tokens, for benchmarks that bring their own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

DRAWN = 1 << 24  # numbers that are drawn; larger tensors repeat them


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Of the words w0, w1, ..."""
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2").save_pretrained(folder)


def write_rows(path: Path, count: int, shortest: int, longest: int, vocab: int) -> None:
    """Rows of `shortest` to `longest` tokens."""
    rng = random.Random(0)
    rows = ([rng.randrange(3, vocab) for _ in range(rng.randint(shortest, longest))] for _ in range(count))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))


def write_llama(folder: Path, config: LlamaConfig) -> None:
    """In bf16, a shard for each block: memory stays near one block's."""
    folder.mkdir(parents=True, exist_ok=True)
    index, total = {}, 0
    for number, shapes in enumerate(_shards(config)):
        tensors = {name: _weight(shape) for name, shape in shapes.items()}
        save_file(tensors, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, f"model-{number:05d}.safetensors")
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    write_tokenizer(folder, min(config.vocab_size, 4096))


def _shards(config: LlamaConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    keys = config.num_key_value_heads * (hidden // config.num_attention_heads)
    yield {"model.embed_tokens.weight": (vocab, hidden)}
    for block in range(config.num_hidden_layers):
        attention = {"q_proj": (hidden, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, hidden)}
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
        inside = {f"self_attn.{name}": shape for name, shape in attention.items()}
        inside |= {f"mlp.{name}": shape for name, shape in mlp.items()} | norms
        yield {f"model.layers.{block}.{name}.weight": shape for name, shape in inside.items()}
    yield {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def _weight(shape: tuple[int, ...]) -> torch.Tensor:
    """Normal with deviation 0.02; of norms, ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    count = shape[0] * shape[1]
    drawn = torch.empty(min(count, DRAWN)).normal_(0, 0.02).bfloat16()
    return drawn.repeat(-(-count // drawn.numel()))[:count].view(shape).contiguous()
