"""What a GGUF file of a model holds: its tensors, of which types, and what its metadata says of the architecture.

Types of tensors are those of llama.cpp's converter: vectors, norms and routers stay in fp32, rows that are no whole blocks
become F16. In files of 4 and 5 bits, embedding and head have 8, as llama.cpp's own quantising gives them more than others.

Source: `conversion/` of llama.cpp (`base.py`, `llama.py`, `qwen.py`, `phi.py`, `gemma.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from finetune.memory.errors import UserError
from finetune.offload.files.gguf_file import BLOCKS
from finetune.offload.weights.gguf_model import (
    ROPE_FACTORS,
    architecture_of,
    head_dim_of,
    llama3_factors,
    quantization_config,
    rope_of,
    tensor_names,
)
from finetune.offload.weights.parts import ModelParts

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""Of most matrices of a file: what the package gguf quantises to."""
_ALIGNMENT = 32
_ROUTER = "ffn_gate_inp"
_TABLES = ("token_embd.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class NewGgufTensor:
    """A tensor of the new file."""

    name: str
    block_type: str
    """ggml's word."""
    shape: tuple[int, ...]
    """Of the numbers, rows first."""
    offset: int = 0
    """From where the data begins."""

    @property
    def row_bytes(self) -> int:
        block = BLOCKS[self.block_type]
        return self.shape[-1] // block.elements * block.num_bytes

    @property
    def num_bytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes

    @property
    def padded_bytes(self) -> int:
        return -(-self.num_bytes // _ALIGNMENT) * _ALIGNMENT


def check_type(kind: str, known: tuple[str, ...] = GGUF_TYPES) -> None:
    """Raises UserError for a type that is not written, and without the package gguf."""
    if kind not in known:
        raise UserError(f"--gguf: expected one of {', '.join(known)}, found {kind!r:.60}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("GGUF is written with the package gguf, which is not installed: pip install gguf")


@dataclass(frozen=True, slots=True)
class GgufContents:
    """Of a new file."""

    architecture: str
    tensors: tuple[NewGgufTensor, ...]
    """In file order."""
    homes: dict[str, tuple[NewGgufTensor, ...]]
    """Parameter -> the tensors that it becomes."""
    rope_factors: torch.Tensor | None
    """fp32, written as they are."""
    heads: dict[str, int]
    """Parameter whose rows llama.cpp has in another order -> its heads. It is given whole."""
    shift: float
    """What is added to norms."""

    @property
    def num_bytes(self) -> int:
        """Of the data."""
        return sum(tensor.padded_bytes for tensor in self.tensors)

    def stored(self, parameter: str, first: int, numbers: torch.Tensor) -> Iterator[tuple[NewGgufTensor, int, torch.Tensor]]:
        """(tensor, its first row, numbers as llama.cpp has them) of rows of a parameter, or of matrices of stacked experts.

        See [Note: what llama.cpp changes] in `offload/weights/formats/gguf.py`."""
        homes = self.homes[parameter]
        if heads := self.heads.get(parameter):
            numbers = interleaved(numbers, heads)
        if self.shift and "norm" in homes[0].name:
            numbers = numbers.float() + self.shift
        parts = numbers.chunk(len(homes), 1) if len(homes) > 1 else (numbers,)
        for home, part in zip(homes, parts, strict=True):
            yield home, first * (home.shape[1] if len(home.shape) == 3 else 1), part


def gguf_contents(parts: ModelParts, apart: frozenset[str], kind: str) -> GgufContents:
    """Of the model of `parts`. apart: parameters that are tied and shall not be. kind: of `GGUF_TYPES`.

    Raises UserError for an architecture that is not written.
    """
    config = parts.model.config
    architecture = architecture_of(config)
    names = names_of(parts, architecture)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    for parameter, weight in parts.sources.items():
        if parameter in parts.sources.tied and parameter not in apart:
            continue
        stored, shape = names[parameter], tuple(weight.shape)
        if len(shape) == 3:
            shape = (shape[0], shape[1] // len(stored), shape[2])
        wanted |= {name: (parameter, shape) for name in stored}
    if apart and architecture == "gemma2":
        raise UserError("llama.cpp has no head for gemma2 that differs from the embedding, and with this adapter it does")
    factors, scaling = None, rope_of(config)
    if scaling["rope_type"] == "llama3":
        factors = llama3_factors(scaling, head_dim_of(config)).float()
    homes: dict[str, list[NewGgufTensor]] = {}
    if factors is not None:
        wanted = {ROPE_FACTORS: ("", tuple(factors.shape)), **wanted}
    tensors = laid_out({name: shape for name, (_, shape) in wanted.items()}, kind)
    for tensor in tensors:
        homes.setdefault(wanted[tensor.name][0], []).append(tensor)
    changes = quantization_config(architecture, config)
    heads = {
        parameter: count
        for parameter, (tensor, *_) in homes.items()
        for word, count in changes["interleaved_heads"].items()
        if word in tensor.name
    }
    whole = {parameter: tuple(found) for parameter, found in homes.items()}
    return GgufContents(architecture, tensors, whole, factors, heads, -changes["norm_shift"])


def names_of(parts: ModelParts, architecture: str) -> dict[str, tuple[str, ...]]:
    """Parameter -> the tensors that it becomes."""
    dimensions = {name: len(weight.shape) for name, weight in parts.sources.items()}
    return tensor_names(dimensions, architecture, parts.model.config.num_hidden_layers)


def laid_out(shapes: Mapping[str, tuple[int, ...]], kind: str) -> tuple[NewGgufTensor, ...]:
    """Tensors of these names and shapes, one after the other. kind: of `GGUF_TYPES`."""
    tensors: list[NewGgufTensor] = []
    offset = 0
    for name, shape in shapes.items():
        tensors.append(NewGgufTensor(name, _block_type(name, shape, kind), shape, offset))
        offset += tensors[-1].padded_bytes
    return tuple(tensors)


def interleaved(numbers: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows in llama.cpp's order."""
    pairs = numbers.reshape(heads, 2, len(numbers) // heads // 2, *numbers.shape[1:])
    return pairs.transpose(1, 2).reshape(numbers.shape)


def _block_type(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1 or _ROUTER in name:
        return "F32"
    wide = kind in ("f32", "f16", "bf16")
    word = (kind if wide or name not in _TABLES else "q8_0").upper()
    return "F16" if shape[-1] % BLOCKS[word].elements else word


def add_architecture(writer: GGUFWriter, config: PretrainedConfig, kind: str) -> None:
    """Everything that llama.cpp must know of the model besides its tensors and its tokenizer. kind: of `GGUF_TYPES`."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    rope, head_dim = rope_of(config), head_dim_of(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(round(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if writer.arch in ("phi3", "gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window or 0)
    for value, add in (
        (getattr(config, "attn_logit_softcapping", None), writer.add_attn_logit_softcapping),
        (getattr(config, "final_logit_softcapping", None), writer.add_final_logit_softcapping),
        (getattr(config, "num_experts", None), writer.add_expert_count),
        (getattr(config, "num_experts_per_tok", None), writer.add_expert_used_count),
        (getattr(config, "moe_intermediate_size", None), writer.add_expert_feed_forward_length),
    ):
        if value is not None:
            add(value)
    writer.add_file_type(LlamaFileType.ALL_F32 if kind == "f32" else LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)


# Of a configuration, what says nothing of the numbers that a model computes.
_SAYS_NOTHING = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "chunk_size_feed_forward", "dtype", "embd_pdrop", "id2label",
    "initializer_range", "label2id", "max_position_embeddings", "model_type", "output_attentions", "output_hidden_states",
    "output_router_logits", "pretraining_tp", "problem_type", "quantization_config", "resid_pdrop", "return_dict",
    "router_aux_loss_coef", "torch_dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "original_max_position_embeddings",
})  # fmt: skip


def check_read_back(config: PretrainedConfig, found: PretrainedConfig, apart: bool) -> None:
    """found: the configuration that the new file's metadata makes. apart: whether a tie is ended. Raises UserError for a
    setting of `config` that llama.cpp's files cannot say."""
    expected, values = _plain(config), _plain(found)
    if apart:
        expected["tie_word_embeddings"] = False
    for key, value in values.items():
        if key not in _SAYS_NOTHING and key in expected and not _is_same(expected[key], value):
            _refuse(key, expected[key], value)
    if config.model_type not in (found.model_type, "mistral"):
        _refuse("model_type", config.model_type, found.model_type)
    if config.model_type == "mistral" and config.sliding_window is not None:
        _refuse("sliding_window", config.sliding_window, None)


def _plain(config: PretrainedConfig) -> dict[str, Any]:
    values = config.to_dict()
    values["head_dim"] = head_dim_of(config)
    if not values.get("use_sliding_window", True):  # of Qwen: the others mean nothing then
        values |= {key: None for key in ("sliding_window", "max_window_layers") if key in values}
    return values


def _is_same(one: Any, other: Any) -> bool:
    """Numbers in fp32, in which a file has them."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() | other.keys()
        return all(_is_same(one.get(key), other.get(key)) for key in keys - _SAYS_NOTHING | {"rope_theta"} & keys)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return torch.tensor(one, dtype=torch.float32).equal(torch.tensor(other, dtype=torch.float32))
    return one == other


def _refuse(key: str, value: Any, found: Any) -> None:
    raise UserError(
        f"this model can't be written as GGUF: its {key} is {value!r:.80}, and llama.cpp's files of its kind mean {found!r:.80}"
    )
