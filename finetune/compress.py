"""A bf16 model compressed without loss, as a directory beside it that runs read in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.config import Config
from finetune.memory.errors import UserError
from finetune.memory.units import format_bytes, format_seconds
from finetune.offload.devices import choose_device
from finetune.offload.files.checkpoint import resolve_model
from finetune.offload.sizing.calibration import try_rates
from finetune.offload.sizing.compression import try_compression
from finetune.offload.weights.compress import Compressed, compress_checkpoint
from finetune.offload.weights.formats import quantization_of
from finetune.offload.weights.parts import ModelParts, cut
from finetune.runs.disk import free_bytes
from finetune.runs.exports import Progress, check_new, side_files

BUFFER_BYTES = 64 << 20


def compress(
    config: Config,
    directory: Path,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda words: None,
) -> Compressed:
    """Writes `config.model`, compressed, to `directory`, with every file beside its weights. Memory does not depend on the
    model's size. say: is told before what that will give and take on this machine, where it can be known. Raises UserError."""
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
    if words := _what_it_gives(parts):
        say(words)
    return compress_checkpoint(parts, directory, BUFFER_BYTES, side_files(source, (config.output, directory)), progress)


def _what_it_gives(parts: ModelParts) -> str:
    """"": not known."""
    found, rates = try_compression(parts), try_rates(parts, choose_device("cpu"))
    if found is None or not rates:
        return ""
    saved = sum(layout.num_bytes for layout in parts.layouts) - sum(found.block_bytes)
    reading = saved / rates.read_bytes_per_second
    decoding = sum(map(sum, found.weight_bytes)) / found.decoded_bytes_per_second
    verdict = "it pays for steps that wait for the disk" if reading > decoding else "it does not pay on this machine"
    sizes = f"{format_bytes(found.model_bytes)} in place of {format_bytes(parts.checkpoint.num_bytes)}"
    return (
        f"about {sizes}: reading all blocks takes {format_seconds(reading)} less here, decoding them once "
        f"{format_seconds(decoding)} of compute, so {verdict}; `finetune plan` tells what it does to a run"
    )
