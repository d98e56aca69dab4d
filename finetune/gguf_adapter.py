"""A LoRA adapter as a GGUF file, for `llama-cli --lora`.

llama.cpp multiplies B A by alpha / rank, with one alpha for the file. What its files cannot say is refused.

Source: `convert_lora_to_gguf.py` and `src/llama-adapter.cpp` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.config import Config
from finetune.gguf_export import check_target, new_gguf
from finetune.memory.errors import UserError
from finetune.methods.results import SavedAdapter, find_result
from finetune.offload.files.checkpoint import resolve_model
from finetune.offload.residency.io import IOEngine
from finetune.offload.rewrite.gguf_contents import check_type, interleaved, laid_out, names_of
from finetune.offload.rewrite.gguf_writer import GgufFile
from finetune.offload.rewrite.writer import decoded_rows
from finetune.offload.weights.formats import PlainTensor
from finetune.offload.weights.gguf_model import architecture_of, quantization_config
from finetune.offload.weights.parts import ModelParts, cut
from finetune.offload.weights.streamed_parts import read_tensor
from finetune.runs.directory import reading
from finetune.runs.exports import Progress

ADAPTER_TYPES = ("f32", "f16", "bf16", "q8_0")
_REFUSED = {
    "use_dora": "the magnitudes (use_dora)", "lora_bias": "the biases (lora_bias)",
    "trainable_token_indices": "trainable_token_indices", "target_parameters": "experts (target_parameters)",
    "layer_replication": "layer_replication", "alora_invocation_tokens": "aLoRA", "use_qalora": "use_qalora",
    "arrow_config": "arrow_config", "use_bdlora": "use_bdlora", "velora_config": "velora_config",
    "monteclora_config": "monteclora_config",
}  # fmt: skip


def write_adapter(config: Config, target: Path, kind: str, adapter: Path | str | None, progress: Progress) -> int:
    """Writes the adapter of `config.model` as a GGUF file, and returns its bytes.

    kind: of `ADAPTER_TYPES`. adapter: as `merge` takes it. Raises UserError.
    """
    check_type(kind, ADAPTER_TYPES)
    check_target(target)
    with ExitStack() as held:
        held.enter_context(reading(config.output) if adapter is None else nullcontext())
        setup = find_result(config, config.output if adapter is None else adapter)
        held.callback(setup.close)
        if not isinstance(setup, SavedAdapter):
            raise UserError(f"{adapter or config.output} has no adapter: expected one for a GGUF adapter")
        parts = cut(resolve_model(config.model), trust_remote_code=config.trust_remote_code)
        architecture = architecture_of(parts.model.config)
        names = {id(module): name for name, module in parts.model.named_modules()}
        tensors = names_of(parts, architecture)
        changes = quantization_config(architecture, parts.model.config)["interleaved_heads"]
        adapted, new = setup.wrap(parts)
        _check_kind(adapted)
        io = held.enter_context(IOEngine(config.engine.io_backend))
        _check_tables(parts, new, partial(read_tensor, io, {}))
        found: dict[str, Tensor] = {}
        alphas: set[float] = set()
        for name, one, other, scaling in _low_rank(adapted, names):
            home = tensors[f"{name}.weight"][0]
            if f"{name}.weight" in parts.sources.tied:
                raise UserError(f"{name} is tied to the embedding, and llama.cpp has no tensor for an adapter of it alone")
            heads = next((count for word, count in changes.items() if word in home), 0)
            found[f"{home}.lora_a"] = one
            found[f"{home}.lora_b"] = interleaved(other, heads) if heads else other
            alphas.add(scaling)
        if len(alphas) != 1:
            raise UserError(
                f"llama.cpp scales all of an adapter by one alpha / rank, and this one has {len(alphas)} alphas "
                "(alpha_pattern, or rsLoRA with several ranks): merge it with --merge plain"
            )
        return _write(io, architecture, found, alphas.pop(), kind, target, progress)


def _check_kind(adapted: nn.Module) -> None:
    config = adapted.active_peft_config
    if config.peft_type != "LORA":
        raise UserError(f"llama.cpp knows LoRA alone, and this adapter is of kind {config.peft_type.lower()}: merge it instead")
    for key, word in _REFUSED.items():
        if getattr(config, key, None):
            raise UserError(f"llama.cpp has no place for {word} of an adapter: merge it into the model with --merge plain")


def _check_tables(old: ModelParts, new: ModelParts, read: Callable[[PlainTensor], Tensor]) -> None:
    """Beside the adapter of an embedding or a head, PEFT saves the table itself: that of the base is left out. Raises UserError
    for one that is another."""
    for name, weight in new.sources.items():
        if weight != (other := old.sources[name]):
            whole = not (weight.has_rows and other.has_rows)
            pairs = (decoded_rows(one, torch.float32, read, whole) for one in (weight, other))
            if not all(first.equal(second) for (_, first), (_, second) in zip(*pairs, strict=True)):
                raise UserError(f"this adapter brings a new {name}, and llama.cpp has no place for that: merge it instead")


def _low_rank(adapted: nn.Module, names: dict[int, str]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(the base's name, A, B, scaling x rank) of all layers with an adapter; that of an embedding as llama.cpp has it."""
    adapter = adapted.active_adapter
    for module in adapted.modules():
        if not hasattr(module, "lora_A"):
            continue
        name = names[id(module.get_base_layer())]
        if adapter in module.lora_A:
            one, other = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
        else:
            one, other = module.lora_embedding_A[adapter].detach().T, module.lora_embedding_B[adapter].detach()
        yield name, one, other, float(module.scaling[adapter]) * other.shape[1]


def _write(
    io: IOEngine, architecture: str, found: dict[str, Tensor], alpha: float, kind: str, target: Path, progress: Progress
) -> int:
    import gguf

    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tensors = laid_out({name: tuple(value.shape) for name, value in found.items()}, kind)
    with new_gguf(target, sum(prod(tensor.shape) * 4 for tensor in tensors)) as path:
        file = GgufFile(io, writer, tensors, path, progress)
        for tensor in tensors:
            file.put(tensor, 0, found[tensor.name])
        file.finish()
    return target.stat().st_size
