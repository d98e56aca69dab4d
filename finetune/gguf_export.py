"""A model as a GGUF file: as it is, with an adapter merged into it, or with the weights that a run has tuned."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.config import Config
from finetune.data.gguf_tokenizer import add_tokenizer, copy_tokenizer
from finetune.data.tokenizer_files import read_tokenizer, tokenizer_folder
from finetune.memory.arena import tune_malloc
from finetune.memory.errors import UserError
from finetune.memory.units import format_bytes
from finetune.offload.devices import choose_device
from finetune.offload.files.checkpoint import resolve_model
from finetune.offload.files.new_directory import new_directory
from finetune.offload.residency.io import IOEngine
from finetune.offload.rewrite.gguf_contents import (
    GgufContents,
    add_architecture,
    check_read_back,
    check_type,
    gguf_contents,
)
from finetune.offload.rewrite.gguf_writer import QUANTIZING_BYTES, GgufFile
from finetune.offload.rewrite.writer import decoded_rows, decoding_bytes
from finetune.offload.weights.formats import PlainTensor
from finetune.offload.weights.parts import ModelParts, cut
from finetune.offload.weights.streamed_parts import read_tensor
from finetune.quantization.base import open_base
from finetune.runs.disk import free_bytes
from finetune.runs.exports import Progress, check_memory

_SPARE_BYTES = 64 << 20  # of the disk, left free

Values = Callable[[Collection[str]], Iterator[tuple[str, int, Tensor]]]
"""Gives (parameter, its first row, numbers of some rows) of all parameters that are written; of those given, all rows."""


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What is written as GGUF."""

    source: Path
    """The model's directory or GGUF file, for its tokenizer and its name."""
    parts: ModelParts
    apart: frozenset[str]
    """Parameters that are tied and shall not be."""
    values: Values
    trusts_code: bool = False


def check_target(target: Path) -> None:
    """Raises UserError for a place where there is something already, or that is not named as a GGUF file."""
    if target.suffix != ".gguf":
        raise UserError(f"--gguf writes one file: expected --to FILE.gguf, found {target}")
    if target.exists():
        raise UserError(f"{target} exists: name a file that does not, so that nothing is overwritten")


def write_gguf(model: GgufModel, kind: str, target: Path, io: IOEngine, progress: Progress) -> int:
    """Writes the file and returns its bytes. kind: of `GGUF_TYPES`.

    Before any number is written, the new header is read back as any GGUF file is: what the model has and llama.cpp's files
    cannot say is refused. Raises UserError.
    """
    import gguf

    check_type(kind)
    check_target(target)
    config = model.parts.model.config
    contents = gguf_contents(model.parts, model.apart, kind)
    writer = gguf.GGUFWriter(None, contents.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(re.sub(r"\.gguf$", "", model.source.name))
    add_architecture(writer, config, kind)
    if tokenizer_folder(model.source) is None:
        copy_tokenizer(writer, model.source)
    else:
        add_tokenizer(writer, _tokenizer(model), config.vocab_size, config)
    with new_gguf(target, contents.num_bytes) as path:
        file = GgufFile(io, writer, contents.tensors, path, progress)
        if contents.rope_factors is not None:
            file.put(contents.homes[""][0], 0, contents.rope_factors)
        _check_header(path, target, model)
        _write(file, contents, model.values)
    return target.stat().st_size


@contextmanager
def new_gguf(target: Path, num_bytes: int) -> Iterator[Path]:
    """Gives the path of a file to write, of so many bytes; at the end of the block it is `target`, whole and durable, for its
    owner alone. Raises UserError for a disk without room, and for an OSError."""
    free = free_bytes(target.absolute().parent)
    if num_bytes + _SPARE_BYTES > free:
        raise UserError(
            f"{target}: {format_bytes(num_bytes)} are to be written, {format_bytes(free)} are free: make room, or name another "
            "place"
        )
    made = target.with_name(f"{target.name}.parts")
    try:
        with new_directory(made) as temporary:
            yield temporary / target.name
        (made / target.name).rename(target)
        made.rmdir()
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}. Make room, or name another place") from error


def _check_header(path: Path, target: Path, model: GgufModel) -> None:
    try:
        found = cut(path).model.config
    except UserError as error:
        raise UserError(f"this model can't be written as GGUF: {str(error).replace(str(path), target.name)}") from error
    check_read_back(model.parts.model.config, found, bool(model.apart))


def _write(file: GgufFile, contents: GgufContents, values: Values) -> None:
    for parameter, first, numbers in values(contents.heads):
        for home, row, part in contents.stored(parameter, first, numbers):
            file.put(home, row, part)
    file.finish()


def _tokenizer(model: GgufModel) -> Any:
    try:
        return read_tokenizer(model.source, model.trusts_code)
    except Exception as error:  # whatever Transformers' parts raise for what they cannot read
        raise UserError(
            f"the tokenizer of {model.source} cannot be read, and a GGUF file needs one: {' '.join(str(error).split()):.300}"
        ) from error


def stored_values(
    parts: ModelParts, read: Callable[[PlainTensor], Tensor], without: Collection[str], apart: Collection[str] = ()
) -> Values:
    """Those of the files, but for the parameters `without`. apart: of tied ones, those that are no more."""

    def values(whole: Collection[str]) -> Iterator[tuple[str, int, Tensor]]:
        for parameter, weight in parts.sources.items():
            if parameter not in without and (parameter in apart or parameter not in parts.sources.tied):
                dtype = weight.dtype if isinstance(weight, PlainTensor) else parts.dtype
                for first, numbers in decoded_rows(weight, dtype, read, parameter in whole):
                    yield parameter, first, numbers

    return values


def write_model(config: Config, target: Path, kind: str, tuned: Path | None, progress: Progress) -> int:
    """Writes `config.model` as a GGUF file, and returns its bytes. tuned: the directory of a checkpoint with other weights of
    the model; None: its own.

    Memory is that of one matrix. Raises UserError.
    """
    check_type(kind)
    check_target(target)
    with ExitStack() as held:
        source = resolve_model(config.model)
        directory = tuned
        if tuned is None:
            base = open_base(config, source, choose_device("cpu"), lambda stored: stored, only_plan=False)
            held.callback(base.close)
            directory = base.directory
        io = held.enter_context(IOEngine(config.engine.io_backend))
        parts = cut(directory, trust_remote_code=config.trust_remote_code)
        heads = gguf_contents(parts, frozenset(), kind).heads
        need = max(decoding_bytes(weight, name in heads) for name, weight in parts.sources.items())
        check_memory(config, need + QUANTIZING_BYTES, "writing GGUF", "one matrix")
        tune_malloc()  # what a matrix takes goes back to the system at once
        values = stored_values(parts, partial(read_tensor, io, {}), ())
        model = GgufModel(source, parts, frozenset(), values, config.trust_remote_code)
        return write_gguf(model, kind, target, io, progress)
