"""Which model a directory holds: the same for copies and links of a checkpoint, another for another fine-tune of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from pathlib import Path

from finetune.offload.files.checkpoint import Checkpoint, CheckpointError, TensorEntry
from finetune.offload.files.gguf_file import metadata_digest

SAMPLE_BYTES = 4096
MAX_SAMPLED_TENSORS = 2048
_NOT_MEANING = ("_name_or_path", "_commit_hash", "transformers_version")  # of config.json: who wrote it, and where


def model_digest(checkpoint: Checkpoint) -> str:
    """128 bits, in hexadecimal, of config.json's meaning (or a GGUF file's metadata), of names, dtypes and shapes of all
    tensors, and of a sample of bytes.

    The sample is the end and another piece of every tensor, of 2048 tensors where there are more: a few MiB are read,
    however large the model is. How tensors are spread over files does not matter. Raises CheckpointError.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        digest.update(metadata_digest(checkpoint.directory) if checkpoint.is_gguf else _meaning(checkpoint.directory))
        for name, entry in sorted(checkpoint.tensors.items()):
            digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\n".encode())
        for _, piece in sorted(_sample(checkpoint).items()):
            digest.update(piece)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.directory}: the model cannot be read: {error}") from error
    return digest.hexdigest()


def _meaning(directory: Path) -> bytes:
    config = json.loads((directory / "config.json").read_bytes())
    meaning = {key: value for key, value in config.items() if key not in _NOT_MEANING}
    return json.dumps(meaning, sort_keys=True).encode()


def _sample(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Tensor name -> bytes of it."""
    # Hashes of names choose: what a regular choice takes could be the same part of every layer.
    order = sorted(checkpoint.tensors.values(), key=lambda entry: _hash(entry.name))
    by_file: dict[Path, list[TensorEntry]] = defaultdict(list)
    for entry in order[:MAX_SAMPLED_TENSORS]:
        by_file[entry.path].append(entry)
    pieces: dict[str, bytes] = {}
    for path, entries in by_file.items():
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            for entry in entries:
                pieces[entry.name] = b"".join(
                    os.pread(descriptor, min(SAMPLE_BYTES, entry.num_bytes), entry.offset + start)
                    for start in _starts(entry)
                )
        finally:
            os.close(descriptor)
    return pieces


def _starts(entry: TensorEntry) -> list[int]:
    last = max(0, entry.num_bytes - SAMPLE_BYTES)
    return sorted({_hash(f"{entry.name}/start") % (last + 1), last})


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
