"""The model that a GGUF file holds: its configuration, and which tensor is which parameter.

Both are Transformers' own reading of GGUF. What that passes over, though it changes numbers, is set here; what cannot be set
is refused: nothing that the file says of its architecture is left unread.
"""

from __future__ import annotations

import importlib.util
import math
import re
import struct
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import Checkpoint, CheckpointError
from finetune.offload.files.gguf_file import MAGIC, GgufHeader, raw_metadata, read_gguf_header
from finetune.offload.weights.formats.gguf import METHOD
from finetune.offload.weights.formats.stored_parts import check, read_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ROPE_FACTORS = "rope_freqs.weight"
"""In which llama.cpp has how Llama 3 scales rotary frequencies: it is no parameter."""

_DEFAULT_THETA = 10000.0  # llama.cpp's, where a file does not say
# What every file must say, as integers.
_SIZES = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
}  # fmt: skip
# And every file of a mixture of experts.
_EXPERT_SIZES = {
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}  # fmt: skip
_MAX_SIZE = 1 << 24
# Says nothing of the numbers.
_PASSED_OVER = frozenset({"context_length", "rope.scaling.finetuned"})


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp's file of an architecture differs from the model that Transformers has."""

    interleaved_heads: bool = False
    """See [Note: what llama.cpp changes] in `offload/weights/formats/gguf.py`."""
    norm_shift: float = 0.0
    """What undoes it in norms."""
    scales_queries: bool = False
    """Whether queries are scaled by a number that only the number of layers tells."""
    wide_layers: int | None = None
    """How many layers the model has whose queries are scaled by hidden size / heads in place of the head's size."""
    has_experts: bool = False
    """Whether every block has a mixture of experts."""
    model_types: tuple[str, ...] = ()
    """Transformers' words for models that are written as it."""


_ARCHITECTURES = {
    "llama": _Architecture(interleaved_heads=True, model_types=("llama", "mistral")),
    "qwen2": _Architecture(model_types=("qwen2",)),
    "qwen3": _Architecture(model_types=("qwen3",)),
    "qwen3moe": _Architecture(has_experts=True, model_types=("qwen3_moe",)),
    "phi3": _Architecture(model_types=("phi3",)),
    "gemma2": _Architecture(norm_shift=-1.0, scales_queries=True, wide_layers=46, model_types=("gemma2",)),
    "gemma3": _Architecture(norm_shift=-1.0, scales_queries=True, wide_layers=62, model_types=("gemma3_text",)),
}


def architecture_of(config: PretrainedConfig) -> str:
    """GGUF's name for a model's architecture. Raises UserError where there is none that is read here too."""
    for name, architecture in _ARCHITECTURES.items():
        if config.model_type in architecture.model_types:
            return name
    known = ", ".join(word for architecture in _ARCHITECTURES.values() for word in architecture.model_types)
    raise UserError(f"models of type {config.model_type} can't be written as GGUF: expected one of {known}")


def quantization_config(name: str, config: PretrainedConfig) -> dict[str, Any]:
    """What is changed of the weights of a model of architecture `name`, see [Note: what llama.cpp changes] in
    `offload/weights/formats/gguf.py`."""
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    return {
        "quant_method": METHOD,
        "architecture": name,
        "interleaved_heads": heads if _ARCHITECTURES[name].interleaved_heads else {},
        "norm_shift": _ARCHITECTURES[name].norm_shift,
    }


def read_gguf_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration of the model in a GGUF file. Its `quantization_config` says how
    weights are to be found and decoded, see `finetune.offload.weights.formats.gguf`.

    Raises UserError for an architecture or a setting that is not supported, and without the package gguf.
    """
    path = checkpoint.directory
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path} is read with the package gguf, which is not installed: pip install gguf")
    header = read_gguf_header(path)
    name = header.values.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise UserError(
            f"{path} holds a model of architecture {name!r:.60}, which isn't supported from GGUF: expected one of "
            f"{', '.join(_ARCHITECTURES)}, or the original model as safetensors"
        )
    architecture = _ARCHITECTURES[name]
    said = {key.removeprefix(f"{name}."): v for key, v in header.values.items() if key.startswith(f"{name}.")}
    _check_sizes(header, checkpoint, said, _SIZES | (_EXPERT_SIZES if architecture.has_experts else {}))
    config = _by_transformers(header, checkpoint, name)
    _complete(config, architecture, said, checkpoint)
    _check_said(header, name, config, said)
    config.quantization_config = quantization_config(name, config)
    return config


def _check_sizes(
    header: GgufHeader, checkpoint: Checkpoint, said: Mapping[str, Any], sizes: Collection[str]
) -> None:
    """What a model is built from before the shapes of tensors are compared."""
    path = header.path
    for key in sizes:
        value = said.get(key)
        if type(value) is not int or not 0 < value < _MAX_SIZE:
            _refuse(path, key, "a positive integer", value)
    if "expert_count" in sizes and said["expert_used_count"] > said["expert_count"]:
        _refuse(path, "expert_used_count", f"at most {said['expert_count']} experts", said["expert_used_count"])
    blocks = {int(found[1]) for name in checkpoint.tensors if (found := re.match(r"blk\.(\d{1,6})\.", name))}
    if blocks != set(range(said["block_count"])):
        _refuse(path, "block_count", f"the number of blocks that there are tensors of, {len(blocks)}", said["block_count"])
    table = checkpoint.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{path}: expected a matrix 'token_embd.weight', found none: download the file again")
    for key, value in header.values.items():
        if key.startswith("tokenizer.") and key.endswith("_token_id"):
            if type(value) is not int or not 0 <= value < table.shape[0]:
                _refuse(path, key, f"one of {table.shape[0]} tokens", value)


def _by_transformers(header: GgufHeader, checkpoint: Checkpoint, name: str) -> PretrainedConfig:
    """Of a file with the same metadata, names of tensors and nothing else: Transformers makes objects of every token and merge
    of the file that it is given, and knows nothing of parts."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    kept = [
        span
        for key, span in header.spans.items()
        if key in header.values
        and (key == "general.architecture" or key.startswith(f"{name}.") or key.endswith("_token_id"))
    ]
    size_key = f"{name}.vocab_size"
    values = list(raw_metadata(header.path, kept))
    if size_key not in header.values:
        values.append(_text(size_key) + struct.pack("<II", 4, checkpoint.tensors["token_embd.weight"].shape[0]))
    # One number in fp32, at the beginning of the data, stands for all tensors.
    tensors = [_text(tensor) + struct.pack("<IQIQ", 1, 1, 0, 0) for tensor in checkpoint.tensors]
    start = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(values))
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(b"".join([start, *values, *tensors, bytes(64)]))
        file.flush()
        try:
            config = AutoConfig.from_pretrained(Path(file.name).parent, gguf_file=Path(file.name).name)
        except Exception as error:  # whatever Transformers' parts raise for metadata that they cannot read
            reason = " ".join(str(error).split()).replace(file.name, str(header.path))
            raise UserError(f"cannot read the model's configuration in {header.path}: {reason}") from error
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    return config


def _text(text: str) -> bytes:
    """A string as GGUF has it."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _complete(
    config: PretrainedConfig, architecture: _Architecture, said: Mapping[str, Any], checkpoint: Checkpoint
) -> None:
    """Sets what llama.cpp computes with and Transformers' reading passes over."""
    if type(said.get("attention.key_length")) is int:
        config.head_dim = said["attention.key_length"]
    for key, field in {
        "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }.items():  # fmt: skip
        if key in said and hasattr(config, field):
            setattr(config, field, said[key])
    if said.get("attention.sliding_window") == 0:  # of Phi-4, which has none
        config.sliding_window = None
    if architecture.has_experts:
        config.moe_intermediate_size = said["expert_feed_forward_length"]
    if architecture.scales_queries:
        is_wide = config.num_hidden_layers == architecture.wide_layers
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if is_wide else config.head_dim
    rope = rope_of(config)
    if said.get("rope.scaling.type") == "linear" and _is_positive(said.get("rope.scaling.factor")):
        rope |= {"rope_type": "linear", "factor": said["rope.scaling.factor"]}
    if ROPE_FACTORS in checkpoint.tensors:
        rope |= _llama3_scaling(config, checkpoint)


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """Of the layers that attend to everything."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def head_dim_of(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _llama3_scaling(config: PretrainedConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """How Llama 3 scales frequencies, found again from the numbers by which they are divided: those of all its models come
    from one formula with two of three constants (`_compute_llama3_parameters` in Transformers' `modeling_rope_utils.py`)."""
    entry = checkpoint.tensors[ROPE_FACTORS]
    size = head_dim_of(config)
    is_right = entry.dtype == "F32" and entry.shape == (size // 2,) and size % 2 == 0
    check(entry, is_right, f"F32 [{size // 2}]", f"{entry.dtype} {list(entry.shape)}")
    factors = torch.frombuffer(bytearray(read_bytes(entry, 1 << 20)), dtype=torch.float32).double()
    factor = round(float(factors[-1]), 3) if factors[-1].isfinite() else 0.0
    check(entry, factor >= 1, "factors of at least 1", factor)
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    is_right = torch.allclose(factors, llama3_factors(rope_of(config) | scaling, size), rtol=1e-4, atol=0)
    check(entry, is_right, "the factors of a Llama 3 model with a context of 8192 that is scaled", "others")
    return scaling


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """By which Llama 3's scaling divides the rotary frequencies: fp64 [head_dim / 2]. rope: the model's rotary parameters."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    lengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2).double() / head_dim)
    smooth = ((rope["original_max_position_embeddings"] / lengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def _check_said(header: GgufHeader, name: str, config: PretrainedConfig, said: Mapping[str, Any]) -> None:
    """Raises UserError for metadata of the architecture by which the model would compute otherwise than the configuration has
    it, or of which that is not known."""
    path = header.path
    if array := next((key for key in header.counts if key.startswith(f"{name}.")), None):
        raise UserError(f"{path}: metadata '{array}' differs between layers, which isn't supported from GGUF")
    rope, head_dim = rope_of(config), head_dim_of(config)
    expected: dict[str, Any] = {key: getattr(config, field) for key, field in _SIZES.items()} | {
        "vocab_size": config.vocab_size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.sliding_window": getattr(config, "sliding_window", None) or 0,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "rope.dimension_count": round(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": rope["rope_theta"],
        "rope.scaling.type": "linear" if rope["rope_type"] == "linear" else "none",
        "rope.scaling.factor": rope.get("factor", 1.0),
    } | {key: getattr(config, field, 0) for key, field in _EXPERT_SIZES.items()}  # fmt: skip
    if "sliding_attention" in config.rope_parameters:
        expected["rope.freq_base_swa"] = config.rope_parameters["sliding_attention"]["rope_theta"]
    needed = {"rope.freq_base": _DEFAULT_THETA, "attention.layer_norm_rms_epsilon": None}
    if name == "gemma3":
        needed["attention.sliding_window"] = None
    for key, value in (needed | dict(said)).items():
        if key in _PASSED_OVER:
            continue
        if key not in expected:
            raise UserError(
                f"{path}: metadata '{name}.{key}' ({value!r:.60}) isn't known from models of architecture {name}, and may "
                "change what they compute: use the original model as safetensors"
            )
        if not _is_same(value, expected[key]):
            _refuse(path, f"{name}.{key}", f"{expected[key]}", value)


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_same(value: Any, expected: Any) -> bool:
    """In fp32, in which files have most numbers that are not integers."""
    if type(value) in (int, float) and type(expected) in (int, float):
        return math.isfinite(value) and struct.pack("<f", value) == struct.pack("<f", expected)
    return type(value) is type(expected) and value == expected


def _refuse(path: Path, key: str, expected: str, found: Any) -> NoReturn:
    raise UserError(
        f"{path}: metadata '{key}': expected {expected}, found {found!r:.60}, which isn't supported from GGUF: use the "
        "original model as safetensors"
    )


def tensor_names(dimensions: Mapping[str, int], name: str, layers: int) -> dict[str, tuple[str, ...]]:
    """Parameter or buffer -> its tensors in a file of architecture `name`: of stacked experts those that hold the matrices one
    below the other, of others one. The names are those of the package gguf. dimensions: of each."""
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    architecture = next(key for key, word in MODEL_ARCH_NAMES.items() if word == name)
    known = get_tensor_name_map(architecture, layers)
    names: dict[str, tuple[str, ...]] = {}
    for parameter, count in dimensions.items():
        module, _, kind = parameter.rpartition(".")
        if count == 3:
            words = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            names[parameter] = tuple(f"{known.get_name(f'{module}.{word}')}.weight" for word in words)
        else:
            names[parameter] = (f"{known.get_name(module)}.{kind}",)
    return names


def gguf_names(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Parameter -> the tensor of the GGUF file that it is; stacked experts -> the tensors whose matrices they have, one below
    the other: Transformers has the gate's above those of the projection that it gates.

    Raises CheckpointError for tensors that no parameter takes: they would change what the model computes.
    """
    parameters, stacks = {}, {}
    dimensions = {parameter: value.dim() for parameter, value in model.state_dict(keep_vars=True).items()}
    architecture = model.config.quantization_config["architecture"]
    for parameter, names in tensor_names(dimensions, architecture, model.config.num_hidden_layers).items():
        if dimensions[parameter] == 3:
            stacks[parameter] = names
        else:
            parameters[names[0]] = parameter
    tensors = checkpoint.tensors.keys() - {ROPE_FACTORS}
    stacks = {parameter: keys for parameter, keys in stacks.items() if tensors.issuperset(keys)}
    stacked = {key for keys in stacks.values() for key in keys}
    if unknown := sorted(tensors - parameters.keys() - stacked):
        raise CheckpointError(
            f"{checkpoint.directory}: {len(unknown)} tensors belong to no parameter of {type(model).__name__} "
            f"({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}): use the original model as safetensors"
        )
    return {parameters[name]: name for name in tensors - stacked}, stacks
