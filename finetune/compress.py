"""A bf16 model compressed without loss, as a directory beside it that runs read in its place."""

from __future__ import annotations

from pathlib import Path

from finetune.config import Config
from finetune.runs.disk import free_bytes
from finetune.runs.exports import Progress, check_new, side_files
from memory.errors import UserError
from memory.units import format_bytes
from offload.files.checkpoint import resolve_model
from offload.weights.compress import Compressed, compress_checkpoint
from offload.weights.formats import quantization_of
from offload.weights.parts import cut

BUFFER_BYTES = 64 << 20


def compress(config: Config, directory: Path, progress: Progress = lambda done, total: None) -> Compressed:
    """Writes `config.model`, compressed, to `directory`, with every file beside its weights. Memory does not depend on the
    model's size. Raises UserError."""
    check_new(directory)
    source = resolve_model(config.model)
    parts = cut(source, trust_remote_code=config.trust_remote_code)
    if others := [path.name for path in parts.checkpoint.files if path.suffix != ".safetensors"]:
        raise UserError(f"{source}: expected safetensors files to compress, found {others[0]}: name the original model")
    if quantization_of(parts.model.config) is not None:
        raise UserError(f"{source}: the weights are packed (quantization_config in config.json): name the original model")
    free, needed = free_bytes(directory.absolute().parent), parts.checkpoint.num_bytes
    if needed > free:
        raise UserError(
            f"{directory}: at most {format_bytes(needed)} are to be written, {format_bytes(free)} are free: make room, or name "
            "another directory"
        )
    return compress_checkpoint(parts, directory, BUFFER_BYTES, side_files(source, (config.output, directory)), progress)
