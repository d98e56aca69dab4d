"""A model cut into what is streamed and what stays: blocks, head, embedding tables, edges.

Built from config.json and safetensors headers; no weight is read here. Built before adapters are put in, because it
holds the modules whose weights are streamed, and adapters wrap those.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.memory.errors import UserError
from finetune.offload.files.checkpoint import Checkpoint, is_gguf, read_checkpoint
from finetune.offload.files.gguf_file import read_gguf
from finetune.offload.step.head import default_tiles
from finetune.offload.weights.binding import Binding
from finetune.offload.weights.experts import ExpertStack, StackedMatrices, StreamedStack, can_be_streamed
from finetune.offload.weights.formats import PlainTensor, StoredWeight, find_weights, quantization_of
from finetune.offload.weights.formats.gguf import dtype_to_compute_in
from finetune.offload.weights.formats.plain import dense_bytes
from finetune.offload.weights.gguf_model import read_gguf_config
from finetune.offload.weights.layout import BlockLayout, layout_block
from finetune.offload.weights.parameter_map import ParameterMap, map_parameters
from finetune.offload.weights.skeleton import (
    build_on_meta,
    build_scorer,
    draw_scores,
    dtype_plan,
    find_blocks,
    input_table,
    read_config,
    set_placeholders,
)

SCORE = "score.weight"  # of Transformers' classifiers that are language models
ROWS_ON_DEMAND_MIN_BYTES = 1 << 20  # smaller embedding tables (positions, token types) stay in memory


@dataclass(frozen=True, slots=True)
class EdgeTensor:
    """A parameter or buffer outside of blocks, embeddings and head: loaded once, resident."""

    name: str
    """Fully qualified."""
    owner: nn.Module
    """The module that has it."""
    attribute: str
    """Its name there."""
    source: StoredWeight
    """How it is stored."""
    dtype: torch.dtype
    """In which it computes."""

    @property
    def num_bytes(self) -> int:
        """While it is resident."""
        return dense_bytes(self.source.shape, self.dtype)

    def install(self, value: torch.Tensor) -> None:
        """Makes `value`, in the dtype that computes, the module's own."""
        if self.attribute in self.owner._parameters:
            self.owner._parameters[self.attribute] = nn.Parameter(value, requires_grad=False)
        else:
            self.owner._buffers[self.attribute] = value


@dataclass(frozen=True, slots=True)
class HeadPart:
    """The language-model head in chunks of vocabulary rows."""

    name: str
    """Fully qualified, of the module."""
    module: nn.Linear
    """Without the adapter that may wrap it."""
    layouts: tuple[BlockLayout, ...]
    """Of each chunk: its "weight" and "bias"."""
    starts: tuple[int, ...]
    """The first row of each chunk."""
    binding: Binding
    """Of a head of one chunk."""
    tile_tokens: int
    """Rows of hidden states that meet a chunk at once."""
    tile_vocab: int
    """Rows of a chunk; the last one may have fewer."""


@dataclass(frozen=True, slots=True)
class ModelParts:
    """prefixes, blocks, layouts and bindings run in parallel, in module order."""

    directory: Path
    """Of config.json; of a GGUF model its file."""
    checkpoint: Checkpoint
    """The files that `sources` point into, by their headers."""
    model: nn.Module
    """The skeleton: its parameters are placeholders."""
    dtype: torch.dtype
    """In which the model computes, less what insists on another."""
    sources: ParameterMap
    """How every parameter and buffer is stored."""
    parameters: frozenset[str]
    """Fully qualified names of floating-point parameters."""
    prefixes: tuple[str, ...]
    """Fully qualified names of the blocks."""
    blocks: tuple[nn.Module, ...]
    """The repeated layers."""
    layouts: tuple[BlockLayout, ...]
    """How each block lies in a slot."""
    bindings: tuple[Binding, ...]
    """What puts a slot's bytes under a block's parameters."""
    head: HeadPart | None
    """None where the model's own loss takes whole logits, or none."""
    embeddings: tuple[tuple[str, nn.Embedding, StoredWeight], ...]
    """Tables of which rows are read on demand: name of the module, module, weight."""
    edges: tuple[EdgeTensor, ...]
    """Everything else, which stays in memory."""
    experts: tuple[StackedMatrices, ...] = ()
    """Stacks whose experts are streamed one by one; blocks are without them. In the order in which they are multiplied."""

    @property
    def edge_bytes(self) -> int:
        return sum(edge.num_bytes for edge in self.edges)

    def on(self, checkpoint: Checkpoint, sources: ParameterMap) -> ModelParts:
        """The same parts with their bytes in another checkpoint, in whatever formats `sources` says; the modules, which both
        have, are bound to those from now on."""
        head, apart = None, {matrices.stack.name for matrices in self.experts}
        local = {prefix: _local(sources, prefix, apart) for prefix in self.prefixes}
        for prefix, binding in zip(self.prefixes, self.bindings, strict=True):
            binding.read_as(local[prefix])
        for matrices in self.experts:
            matrices.stack = replace(matrices.stack, weight=sources[matrices.stack.name])
        if self.head is not None:
            of_head = _local(sources, self.head.name)
            self.head.binding.read_as(of_head)
            head = replace(self.head, layouts=_head_layouts(of_head, self.head.starts, self.head.tile_vocab))
        return replace(
            self,
            checkpoint=checkpoint,
            sources=sources,
            layouts=tuple(map(layout_block, local.values())),
            head=head,
            embeddings=tuple((name, module, sources[f"{name}.weight"]) for name, module, _ in self.embeddings),
            edges=tuple(replace(edge, source=sources[edge.name]) for edge in self.edges),
        )

    def read_whole(self, head: bool, tables: Collection[str]) -> ModelParts:
        """The same parts for adapters that look at whole tables: the head in one chunk, if `head`, and the embedding tables
        with these names resident."""
        whole = self.head
        if head and whole is not None and len(whole.layouts) > 1:
            rows = whole.module.weight.shape[0]
            tile_tokens, _ = default_tiles(rows, 0)
            layouts = _head_layouts(_local(self.sources, whole.name), (0,), rows)
            whole = replace(whole, layouts=layouts, starts=(0,), tile_tokens=tile_tokens, tile_vocab=rows)
        resident = tuple(
            EdgeTensor(f"{name}.weight", module, "weight", source, module.weight.dtype)
            for name, module, source in self.embeddings
            if name in tables
        )
        embeddings = tuple(part for part in self.embeddings if part[0] not in tables)
        return replace(self, head=whole, embeddings=embeddings, edges=(*self.edges, *resident))


def cut(
    directory: Path,
    choose_dtype: Callable[[torch.dtype], torch.dtype] = lambda stored: stored,
    *,
    trust_remote_code: bool = False,
    tile_tokens: int | None = None,
    tile_vocab: int | None = None,
    trains_weights: bool = False,
    streams_experts: bool = False,
    score_seed: int | None = None,
) -> ModelParts:
    """directory: of a model, or its GGUF file. choose_dtype: given the dtype that most bytes of the checkpoint have, the one to
    compute in. trains_weights: whether gradients of the model's own weights are wanted: of tables only the input embedding is
    read on demand then, for it is the one whose rows are known before a step. streams_experts: whether experts are fetched one
    by one where that is possible; nothing may change their weights then. score_seed: the model gives texts a score; its head
    for that is drawn with this seed where the checkpoint has none. None: the model is the one that config.json names.

    Raises UserError (CheckpointError) for a directory that is not a complete safetensors checkpoint, and for a GGUF file that
    cannot be read.
    """
    checkpoint = read_gguf(directory) if is_gguf(directory) else read_checkpoint(directory)
    config = read_gguf_config(checkpoint) if checkpoint.is_gguf else read_config(directory, trust_remote_code)
    dtype = choose_dtype(stored_dtype(checkpoint, quantization_of(config)))
    if score_seed is None:
        model = build_on_meta(config, directory, dtype, trust_remote_code)
    else:
        model = build_scorer(config, directory, dtype)
    sources = map_parameters(model, checkpoint, fresh=() if score_seed is None else (SCORE,))
    has_score = score_seed is None or SCORE in sources
    if not has_score and trains_weights:
        raise UserError(
            f"{directory}: expected a checkpoint with {SCORE} where the model's own weights are trained, found none: use "
            "method lora, or save the model as AutoModelForSequenceClassification with num_labels=1 first"
        )
    _refuse_absent(directory, model, sources.absent)
    dtypes = dtype_plan(model, dtype)
    blocks = find_blocks(model)
    head_module = _head_module(model)
    set_placeholders(model, dtypes)
    if not has_score:
        draw_scores(model, score_seed)
    dtypes |= {name: buffer.dtype for name, buffer in model.named_buffers(remove_duplicate=False)}
    experts = _cut_experts(blocks, sources, dtypes) if streams_experts else ()
    apart = {matrices.stack.name for matrices in experts}
    local = {prefix: _local(sources, prefix, apart) for prefix in blocks}
    taken = apart | {f"{prefix}.{name}" for prefix, weights in local.items() for name in weights}
    bindings = (Binding(blocks[prefix], _local(dtypes, prefix), weights) for prefix, weights in local.items())
    head = None
    if head_module is not None:
        prefix = next(name for name, module in model.named_modules() if module is head_module)
        weights = _local(sources, prefix)
        taken |= {f"{prefix}.{name}" for name in weights}
        head = _cut_head(prefix, head_module, weights, _local(dtypes, prefix), tile_tokens, tile_vocab, trains_weights)
    embeddings = _cut_embeddings(model, sources, taken, trains_weights)
    taken |= {f"{name}.weight" for name, _, _ in embeddings}
    edges = (_edge(model, name, source, dtypes[name]) for name, source in sources.items() if name not in taken)
    parameters = {name for name, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()}
    return ModelParts(
        directory, checkpoint, model, dtype, sources, frozenset(parameters), tuple(blocks), tuple(blocks.values()),
        tuple(layout_block(weights) for weights in local.values()), tuple(bindings), head, embeddings, tuple(edges), experts,
    )  # fmt: skip


def _local(values: Mapping[str, Any], prefix: str, without: Collection[str] = ()) -> dict[str, Any]:
    """What is within the module `prefix`, by local name. without: fully qualified names."""
    return {
        name[len(prefix) + 1 :]: value
        for name, value in values.items()
        if name.startswith(f"{prefix}.") and name not in without
    }


def _cut_experts(
    blocks: Mapping[str, nn.Module], sources: ParameterMap, dtypes: Mapping[str, torch.dtype]
) -> tuple[StackedMatrices, ...]:
    """Puts stand-ins in place of the stacked parameters of experts."""
    found: list[StackedMatrices] = []
    for index, (prefix, block) in enumerate(blocks.items()):
        for local, parameter in block.named_parameters():
            name, owner = f"{prefix}.{local}", block.get_submodule(local.rpartition(".")[0])
            attribute = local.rpartition(".")[2]
            if name in sources and can_be_streamed(owner, attribute, sources[name]):
                stack = ExpertStack(index, name, owner, attribute, sources[name], dtypes[name])
                found.append(StackedMatrices(stack, len(found)))
                owner._parameters[attribute] = nn.Parameter(StreamedStack.of(parameter.data, found[-1]), requires_grad=False)
    return tuple(found)


def _edge(model: nn.Module, name: str, source: StoredWeight, dtype: torch.dtype) -> EdgeTensor:
    owner, _, attribute = name.rpartition(".")
    return EdgeTensor(name, model.get_submodule(owner), attribute, source, dtype)


def _refuse_absent(directory: Path, model: nn.Module, absent: Sequence[str]) -> None:
    if absent:
        raise UserError(
            f"{directory}: the checkpoint lacks {len(absent)} tensors that {type(model).__name__} would start at "
            f"random ({', '.join(absent[:3])}...). Fine-tune a checkpoint that has them, or name another class in "
            "config.json's architectures"
        )


def _cut_embeddings(
    model: nn.Module, sources: ParameterMap, taken: Collection[str], trains_weights: bool
) -> tuple[tuple[str, nn.Embedding, StoredWeight], ...]:
    found = []
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if isinstance(module, nn.Embedding) and weight not in taken and weight in sources:
            # A subclass may take something else than ids (OPT's positions take the mask): only the input table surely doesn't.
            is_input = module is input_table(model)
            is_large = sources[weight].num_bytes >= ROWS_ON_DEMAND_MIN_BYTES
            if is_input if trains_weights else is_large and (is_input or type(module) is nn.Embedding):
                found.append((name, module, sources[weight]))
    return tuple(found)


def stored_dtype(checkpoint: Checkpoint, quantization: Mapping[str, Any] | None) -> torch.dtype:
    """The floating-point dtype that most bytes of the plain weights have. Beside packed ones these are embeddings, norms and
    heads: the dtype of what enters a packed layer, in which bitsandbytes and others multiply too. That of scales says nothing.
    A format may say it of all weights, see `StoredWeight.dense_dtype`.

    quantization: `quantization_config` of config.json.
    """
    if checkpoint.is_gguf:
        return dtype_to_compute_in(checkpoint.tensors)
    sizes: dict[str, int] = {}
    for form, parts in find_weights(checkpoint.tensors, quantization).values():
        if (said := form.dense_dtype(quantization)) is not None:
            sizes = {said: 1}
            break
        if form is PlainTensor:
            sizes[parts[""].dtype] = sizes.get(parts[""].dtype, 0) + parts[""].num_bytes
    known = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    names = [name for name in sizes if name in known]
    if not names:
        raise UserError(
            f"{checkpoint.directory}: expected weights in BF16, F16 or F32, found {', '.join(sorted(sizes)) or 'none'}: "
            "convert the checkpoint first"
        )
    return known[max(names, key=lambda name: sizes[name])]


def _head_module(model: nn.Module) -> nn.Linear | None:
    """The head of a causal language model, whose loss is tiled; None for models that bring their own loss."""
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return None
    module = model.get_output_embeddings()
    return module if isinstance(module, nn.Linear) else None


def _cut_head(
    name: str,
    module: nn.Linear,
    sources: dict[str, StoredWeight],
    dtypes: dict[str, torch.dtype],
    tile_tokens: int | None,
    tile_vocab: int | None,
    trained: bool,
) -> HeadPart:
    weight = sources["weight"]
    # Chunks of a trained head are units of the working store, which must be the same on every machine.
    row_bytes = weight.num_bytes // weight.shape[0] if trained else dense_bytes(weight.shape[1:], dtypes["weight"])
    default_tokens, default_vocab = default_tiles(weight.shape[0], row_bytes, trained)
    tile_vocab = min(tile_vocab or default_vocab, weight.shape[0])
    starts = tuple(range(0, weight.shape[0], tile_vocab))
    layouts = _head_layouts(sources, starts, tile_vocab)
    binding = Binding(module, dtypes, sources)
    binding.convert_at_bind()  # once a step, not once a tile
    return HeadPart(name, module, layouts, starts, binding, tile_tokens or default_tokens, tile_vocab)


def _head_layouts(sources: Mapping[str, StoredWeight], starts: Sequence[int], tile_vocab: int) -> tuple[BlockLayout, ...]:
    return tuple(
        layout_block({n: s.rows([(start, min(start + tile_vocab, s.shape[0]))]) for n, s in sources.items()})
        for start in starts
    )


def describe_blocks(blocks: Sequence[nn.Module]) -> str:
    """Class names with counts, for messages: "22 x LlamaDecoderLayer"."""
    counts: dict[str, int] = {}
    for block in blocks:
        counts[type(block).__name__] = counts.get(type(block).__name__, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in counts.items())
