"""An adapter merged into the model that it was trained on, written as a checkpoint of its own, in a stream."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from finetune.adapters.merging import Layer, Merging
from finetune.adapters.seal import CONFIG
from finetune.config import Config
from finetune.data.tokenizer_files import read_tokenizer
from finetune.gguf_export import GgufModel, check_target, stored_values, write_gguf
from finetune.memory.arena import tune_malloc
from finetune.memory.errors import UserError
from finetune.memory.units import format_bytes
from finetune.methods.results import SavedAdapter, find_result
from finetune.offload.devices import choose_device
from finetune.offload.files.checkpoint import INDEX_FILE, resolve_model
from finetune.offload.files.new_directory import new_directory
from finetune.offload.files.safetensors_files import write_index
from finetune.offload.residency.io import IOEngine
from finetune.offload.rewrite.contents import Contents, contents, written_dtype
from finetune.offload.rewrite.gguf_contents import check_type, gguf_contents
from finetune.offload.rewrite.gguf_writer import QUANTIZING_BYTES
from finetune.offload.rewrite.writer import Writer, change, decoding_bytes, kept_bytes
from finetune.offload.weights.formats import PlainTensor
from finetune.offload.weights.gguf_model import read_gguf_config
from finetune.offload.weights.parts import cut
from finetune.offload.weights.streamed_parts import read_tensor
from finetune.quantization.base import Base, open_base
from finetune.quantization.cache import whole
from finetune.runs.directory import reading
from finetune.runs.disk import free_bytes
from finetune.runs.exports import Progress, check_memory, check_new, side_files
from finetune.runs.model_card import CARD, model_card, run_of

FORMS = ("plain", "packed")
_SPARE_BYTES = 64 << 20  # of the disk, left free
_MOST_LOST = 0.5


@dataclass
class PackingError:
    """How far matrices that were packed again are from their merged weights: sums of squares over all of them."""

    matrices: int = 0
    error: float = 0.0
    """Of the packed weights less the merged ones."""
    change: float = 0.0
    """Of the merged weights less the base's."""
    weights: float = 0.0
    """Of the merged weights."""
    worst: tuple[float, str] = (0.0, "")
    """The largest relative error of a matrix, and its name."""
    base: float | None = None
    """The relative error that the base itself has had since --quantize packed it; None: it was packed elsewhere."""

    @property
    def relative(self) -> float:
        """By the Frobenius norm of the merged weights."""
        return sqrt(self.error / self.weights) if self.weights else 0.0

    @property
    def relative_change(self) -> float:
        """The same of what the adapter has changed."""
        return sqrt(self.change / self.weights) if self.weights else 0.0

    @property
    def lost(self) -> float:
        """Of what the adapter has changed, the share that the error is."""
        return sqrt(self.error / self.change) if self.change else 0.0

    def describe(self) -> str:
        """For people."""
        error, name = self.worst
        words = (
            f"packed again: {self.matrices} matrices are off by {self.relative:.2%} of their merged weights (relative "
            f"Frobenius error; the most: {error:.2%}, {name}), by {self.lost:.0%} of what the adapter has changed "
            f"({self.relative_change:.2%})"
        )
        if self.base is not None:
            words += f"; the base is off by {self.base:.2%} of the original model"
        if self.lost > _MOST_LOST:
            words += "\nnote: that is most of what was learned: use --merge plain, or the base with --adapter"
        return words


@dataclass
class Merged:
    """What was written."""

    num_bytes: int  # of weights
    changed: int  # parameters with an adapter in them
    notes: list[str] = field(default_factory=list)
    """What the user should know."""
    packing: PackingError | None = None
    """None: nothing was packed again."""

    def describe(self, directory: Path) -> str:
        """For people."""
        words = f"{directory}: the model with the adapter in {self.changed} weights, {format_bytes(self.num_bytes)}"
        return "\n".join([words, *self.notes, *(() if self.packing is None else (self.packing.describe(),))])


def merge(
    config: Config,
    directory: Path,
    form: str,
    adapter: Path | str | None = None,
    progress: Progress = lambda done, total: None,
    gguf: str | None = None,
) -> Merged:
    """Writes `config.model` with `adapter` merged into it, by PEFT's own arithmetic, to `directory`, for its owner alone.

    form: "plain": without packed weights, in the dtype of the others; "packed": what is packed stays so. adapter: a directory
    or hub id, or the directory of a run; None: the run in `config.output`. progress: bytes written, and of all. gguf: one of
    `GGUF_TYPES`, to write the plain numbers as a GGUF file `directory` instead.

    Memory is that of a few matrices, whatever the model's size. Nothing is written before disk and memory are known to
    suffice. Raises UserError.
    """
    if form not in FORMS:
        raise UserError(f"--merge: expected {' or '.join(FORMS)}, found {form!r:.60}")
    if gguf is None:
        check_new(directory)
    else:
        check_type(gguf)
        check_target(directory)
        if form != "plain":
            raise UserError("--gguf packs numbers in ways of its own: give it with --merge plain")
    with contextlib.ExitStack() as held:
        held.enter_context(reading(config.output) if adapter is None else contextlib.nullcontext())
        setup = find_result(config, config.output if adapter is None else adapter)
        held.callback(setup.close)
        if not isinstance(setup, SavedAdapter):
            raise UserError(
                f"{adapter or config.output} has tuned the model's own weights, not an adapter: leave --merge out to export it"
            )
        source = resolve_model(config.model)
        base = open_base(config, source, choose_device("cpu"), lambda stored: stored, only_plan=False)
        held.callback(base.close)
        io = held.enter_context(IOEngine(config.engine.io_backend))
        tune_malloc()  # what a layer takes goes back to the system at once
        place = run_of(config.output if adapter is None else Path(adapter))
        merging = _Merge(config, setup, base, form, io, place)
        return merging.write(directory, progress) if gguf is None else merging.write_gguf(directory, gguf, progress)


class _Merge:
    """One adapter and its base."""

    def __init__(self, config: Config, setup: SavedAdapter, base: Base, form: str, io: IOEngine, run: Path) -> None:
        self._config, self._base, self._io, self._run = config, base, io, run
        self._is_packed = form == "packed"
        self._parts = cut(base.directory, trust_remote_code=config.trust_remote_code)
        old = self._parts.sources
        if self._is_packed and all(isinstance(weight, PlainTensor) for weight in old.values()):
            raise UserError(
                f"{base.directory}: --merge packed is for a model whose weights are packed, and these are not: use --merge "
                "plain; the result can be packed with --quantize where it is used"
            )
        names = {id(module): name for name, module in self._parts.model.named_modules()}
        adapted, parts = setup.wrap(self._parts)
        self._notes = setup.notes
        self._new = parts.sources
        """With what the adapter brings whole in place of the base's own."""
        self._merging = Merging(adapted, names, old)
        self._layers = {parameter: layer for layer in self._merging.layers for _, _, parameter in layer.weights}
        self._read: Callable[[PlainTensor], Tensor] = partial(read_tensor, io, {})
        self._dtype = partial(written_dtype, self._parts)
        self._changed = {*self._layers, *(name for name in old if self._new[name] != old[name])}
        tables = (self._new[name] for name in self._changed - self._layers.keys())
        self._check_memory(max(
            self._merging.peak_bytes(self._dtype, self._value), *(2 * weight.num_bytes for weight in tables), 0
        ))  # fmt: skip
        self._apart = self._end_ties()

    def write(self, directory: Path, progress: Progress) -> Merged:
        plan = contents(self._parts, self._changed, self._apart, self._is_packed)
        sides = side_files(self._base.source, (self._config.output, directory)) if self._base.source.is_dir() else {}
        sides = {name: path for name, path in sides.items() if name != Path(CONFIG)}
        self._check_disk(directory, plan.num_bytes + sum(path.stat().st_size for path in sides.values()))
        self._check_memory(kept_bytes(plan))
        self._packed = frozenset(plan.packed)
        result = Merged(plan.num_bytes, len(self._changed), self._notes)
        if plan.packed:
            about = whole(self._base.directory) if self._config.quantize else None
            result.packing = PackingError(base=None if about is None else about["relative_error"])
        try:
            with new_directory(directory) as temporary:
                for name, path in sides.items():
                    (temporary / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    shutil.copyfile(path, temporary / name)
                self._write_weights(Writer(self._io, plan, temporary, self._read, progress), result.packing)
                self._describe(temporary, plan)
                words = "The base model with an adapter merged into it, made with finetune."
                card = model_card(self._run, self._config.model, "transformers", words, self._base.source / CARD)
                (temporary / CARD).write_text(card, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write the model to {directory}: {error.strerror or error}. Make room, or name another directory"
            ) from error
        return result

    def write_gguf(self, target: Path, kind: str, progress: Progress) -> Merged:
        parts = replace(self._parts, sources=self._new)
        heads = gguf_contents(parts, self._apart, kind).heads
        kept = ((name, weight) for name, weight in self._new.items() if name not in self._changed)
        self._check_memory(QUANTIZING_BYTES + max(decoding_bytes(weight, name in heads) for name, weight in kept))
        rest = stored_values(parts, self._read, self._changed, self._apart)

        def values(whole: Collection[str]) -> Iterator[tuple[str, int, Tensor]]:
            for parameter, value in self._changed_values():
                yield parameter, 0, value
            yield from rest(whole)

        model = GgufModel(self._base.source, parts, self._apart, values, self._config.trust_remote_code)
        return Merged(write_gguf(model, kind, target, self._io, progress), len(self._changed), self._notes)

    def _changed_values(self) -> Iterator[tuple[str, Tensor]]:
        for layer in self._merging.layers:
            for parameter, value in self._merging.merge(layer, self._value).items():
                if parameter in self._changed:
                    yield parameter, value
        for parameter in sorted(self._changed - self._layers.keys()):
            yield parameter, self._value(parameter)

    def _write_weights(self, writer: Writer, packing: PackingError | None) -> None:
        writer.keep()
        for parameter, value in self._changed_values():
            self._put(writer, parameter, value, packing)
        writer.finish()

    def _put(self, writer: Writer, parameter: str, value: Tensor, packing: PackingError | None) -> None:
        for name, sums in writer.put(parameter, value).items():
            packing.matrices += 1
            packing.error += sums.error
            packing.weights += sums.weights
            packing.worst = max(packing.worst, (sqrt(sums.error / sums.weights) if sums.weights else 0.0, name))
        if parameter in self._packed:
            packing.change += change(self._parts.sources[parameter], value, self._read).error

    def _value(self, parameter: str) -> Tensor:
        """What the adapter meets: the base's, or what the adapter brings in its place, in the dtype of the base's."""
        weight = self._new[parameter]
        return weight.decode(weight.load(self._read), self._dtype(self._parts.sources[parameter]))

    def _end_ties(self) -> frozenset[str]:
        """Names of tied parameters that are no longer what they were tied to: they get tensors of their own. Of those that
        still are, none is in `_changed` any more. See [Note: merging]."""
        groups: dict[str, list[str]] = {}
        for name, home in self._parts.sources.tied.items():
            groups.setdefault(home, []).append(name)
        apart: set[str] = set()
        for home, names in groups.items():
            if self._changed.isdisjoint((home, *names)):
                continue
            digests = {self._digest(name) for name in (home, *names)}
            if len(digests) == 1:
                self._changed.difference_update(names)
                continue
            ties = getattr(self._parts.model, "all_tied_weights_keys", {})
            if shared := [name for name in names if name not in ties and home not in ties]:
                raise UserError(f"{shared[0]} and {home} are one module of the model, and the adapter has changed only one")
            apart.update(names)
            self._notes.append(
                f"note: {' and '.join((home, *names))} were one weight; with the adapter they differ and are written apart "
                "(tie_word_embeddings is false)"
            )
        return frozenset(apart)

    def _digest(self, parameter: str) -> bytes:
        layer: Layer | None = self._layers.get(parameter)
        value = self._value(parameter) if layer is None else self._merging.merge(layer, self._value)[parameter]
        return hashlib.blake2b(value.contiguous().view(-1).view(torch.uint8).numpy()).digest()

    def _check_disk(self, directory: Path, need: int) -> None:
        free = free_bytes(directory.absolute().parent)
        if need + _SPARE_BYTES > free:
            raise UserError(
                f"{directory}: {format_bytes(need)} are to be written, {format_bytes(free)} are free: make room, or name "
                "another directory"
            )

    def _check_memory(self, need: int) -> None:
        check_memory(self._config, need, "merging", "one layer")

    def _describe(self, directory: Path, plan: Contents) -> None:
        """config.json, the index, and of a GGUF model the tokenizer, which other files have beside them."""
        parts = self._parts
        if parts.checkpoint.is_gguf:
            try:
                read_tokenizer(self._base.source, trust_remote_code=False).save_pretrained(directory)
            except Exception as error:  # whatever Transformers' parts raise for what they cannot read
                self._notes.append(
                    f"note: no tokenizer is written, for Transformers cannot read that of {self._base.source} "
                    f"({' '.join(str(error).split()):.200}): take the original model's"
                )
            values = read_gguf_config(parts.checkpoint).to_dict()
        else:
            values = json.loads((self._base.directory / "config.json").read_bytes())
        if not self._is_packed and not all(isinstance(weight, PlainTensor) for weight in parts.sources.values()):
            values = {key: value for key, value in values.items() if key not in ("quantization_config", "compression_config")}
            word = str(parts.dtype).removeprefix("torch.")
            values |= {key: word for key in ("dtype", "torch_dtype") if key in values}
        if self._apart:
            values["tie_word_embeddings"] = False
            if isinstance(values.get("text_config"), dict):
                values["text_config"]["tie_word_embeddings"] = False
        (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if len(plan.files) > 1:
            homes = {name: file.name for file in plan.files for name in file.names}
            write_index(directory / INDEX_FILE, homes, plan.num_bytes)

