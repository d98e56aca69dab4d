"""Checksums, the model that it was trained on and the run that made it: an adapter carries them in the metadata of its
safetensors file, where PEFT and others pass them over.

An adapter that PEFT has saved again, or that came from elsewhere, has none and is taken as it is.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from finetune.memory.errors import UserError
from finetune.offload.files.sealed import crc_text, json_digest

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TENSORS_SUM, _CONFIG_SUM = "tensors_checksum", "config_checksum"
_BASE_NAME, _BASE_DIGEST, _RUN, _STEP = "base_model", "base_model_digest", "run", "step"
# Of a configuration, what people change by hand when they move models and adapters; no number follows from it.
_FREE_KEYS = {"base_model_name_or_path", "revision", "inference_mode"}
_BLOCK_BYTES = 1 << 20
_REMEDY = "Bring it back from a copy, or let the run that made it write it again (the same command with --resume)"


def seal_adapter(directory: Path, about: Mapping[str, Any]) -> None:
    """Adds checksums of weights and configuration to the adapter that was just written to `directory`. about: what its
    run says of itself, and the step. Raises OSError."""
    with open(directory / WEIGHTS, "rb") as file:
        tensors_sum = _tensors_sum(_read_json_header(file), file)
    _add(directory, {
        _TENSORS_SUM: tensors_sum,
        _CONFIG_SUM: _config_sum(directory),
        _BASE_NAME: about["model"]["name"],
        _BASE_DIGEST: about["model"]["digest"],
        _RUN: about["run"],
    } | ({_STEP: str(about["step"])} if "step" in about else {}))  # fmt: skip


def rename_base(directory: Path, name: str) -> None:
    """The adapter in `directory` is from now on one that was trained on `name`; its checksums fit as before. Raises OSError."""
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    (directory / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": name}, indent=2), encoding="utf-8")
    if _BASE_NAME in _metadata(directory):
        _add(directory, {_BASE_NAME: name})


def _add(directory: Path, added: Mapping[str, str]) -> None:
    """To the metadata of the weights, in place of what stands there under the same names."""
    path, sealed = directory / WEIGHTS, directory / f".{WEIGHTS}.sealed"
    with open(path, "rb") as old, open(sealed, "wb") as new:
        header = _read_json_header(old)
        start, metadata = old.tell(), {**header.get("__metadata__", {}), **added}
        text = json.dumps({**header, "__metadata__": metadata}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        old.seek(start)
        shutil.copyfileobj(old, new, _BLOCK_BYTES)
    os.replace(sealed, path)


def trained_on(directory: Path) -> dict[str, str] | None:
    """"name" and "digest" of the model that the adapter was trained on; None where it does not say."""
    found = _metadata(directory)
    return {"name": found[_BASE_NAME], "digest": found[_BASE_DIGEST]} if {_BASE_NAME, _BASE_DIGEST} <= found.keys() else None


def made_by(directory: Path) -> dict[str, str]:
    """"run": the digest of the run that has written the adapter; empty where it does not say."""
    found = _metadata(directory)
    return {"run": found[_RUN]} if _RUN in found else {}


def step_of(directory: Path) -> int | None:
    """Updates that have made the adapter; None where it does not say."""
    found = _metadata(directory).get(_STEP, "")
    return int(found) if found.isdecimal() else None


def check_adapter(directory: Path) -> None:
    """Raises UserError when weights or configuration are not what they were when they were written together."""
    part = WEIGHTS
    try:
        with open(directory / WEIGHTS, "rb") as file:
            header = _read_json_header(file)
            sums = header.get("__metadata__", {})
            if _TENSORS_SUM in sums and sums[_TENSORS_SUM] != _tensors_sum(header, file):
                raise ValueError("its checksum does not fit")
        part = CONFIG
        differs = _CONFIG_SUM in sums and sums[_CONFIG_SUM] != _config_sum(directory)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{directory / part} is damaged ({error}). {_REMEDY}") from error
    if differs:
        raise UserError(
            f"{directory / CONFIG} is not the one that was saved with the weights beside it. {_REMEDY}; to keep a change that "
            "was meant, load the adapter with PEFT and save it again"
        )


def _metadata(directory: Path) -> dict[str, str]:
    try:
        with open(directory / WEIGHTS, "rb") as file:
            return dict(_read_json_header(file).get("__metadata__", {}))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _read_json_header(file: BinaryIO) -> dict[str, Any]:
    num_bytes = int.from_bytes(file.read(8), "little")
    if num_bytes > os.fstat(file.fileno()).st_size:
        raise ValueError("its header is longer than the file")
    return json.loads(file.read(num_bytes))


def _tensors_sum(header: Mapping[str, Any], file: BinaryIO) -> str:
    """Of names, dtypes, shapes and places, and of the data, which is read on from where `file` is."""
    value = 0
    while block := file.read(_BLOCK_BYTES):
        value = zlib.crc32(block, value)
    tensors = {name: info for name, info in header.items() if name != "__metadata__"}
    return json_digest([tensors, crc_text(value)])


def _config_sum(directory: Path) -> str:
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    return json_digest({key: value for key, value in config.items() if key not in _FREE_KEYS})
