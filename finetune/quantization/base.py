"""The directory that a session reads its model from: the user's own, or the quantised one, made where it is not there yet."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finetune.config import Config
from finetune.memory.arena import trim_malloc
from finetune.memory.errors import UserError
from finetune.memory.meter import host_bytes
from finetune.memory.units import format_bytes, format_seconds, parse_bytes, total_host_bytes
from finetune.offload.devices import DescribedDevice, Device
from finetune.offload.files.checkpoint import CheckpointError, is_gguf, read_checkpoint, resolve_model
from finetune.offload.files.lock import lock
from finetune.offload.files.new_directory import flush
from finetune.offload.files.sealed import json_digest, seal
from finetune.offload.quantize.kernels import Blocks, pack_4bit, pack_int8
from finetune.offload.quantize.outline import Outline, Packing, outline, write_side, write_sparse
from finetune.offload.quantize.stream import PROGRESS, Written, working_bytes, write_quantized
from finetune.offload.sizing.calibration import NoRates, Rates, try_rates
from finetune.offload.weights.digest import model_digest
from finetune.offload.weights.parts import ModelParts, cut
from finetune.quantization.cache import FORMAT, NOTE, cache_home, open_lock, partial_path, whole
from finetune.reporting.progress import Ticker, say
from finetune.runs.disk import free_bytes
from finetune.runs.exports import side_files

_SPARE_BYTES = 64 << 20  # of the disk, left free
_PROBE_WEIGHTS = 1 << 22


class Base:
    """Where a session finds its model. Holds its lock until `close`.

    source: the user's model. directory: what is read. words: what a plan says of quantising; "": nothing. rates: what this
    machine does with the original, where `directory` is only an outline; None: measure.
    """

    def __init__(self, source: Path) -> None:
        self.source = self.directory = source
        self.words = ""
        self.rates: Rates | NoRates | None = None
        self._lock = -1
        self._outline: tempfile.TemporaryDirectory | None = None

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        if self._outline is not None:
            self._outline.cleanup()
            self._outline = None


def open_base(
    config: Config, source: Path, device: Device, choose_dtype: Callable[[torch.dtype], torch.dtype], only_plan: bool
) -> Base:
    """The base of a session of `config`, whose model is in `source`.

    choose_dtype: as `finetune.offload.weights.parts.cut` takes it. only_plan: nothing is quantised; where that has not been
    done, the directory has headers and holes.
    Raises UserError when it cannot be quantised, or the disk or the memory does not suffice for that.
    """
    base = Base(source)
    if config.quantize is not None:
        try:
            cut_source = partial(cut, source, choose_dtype, trust_remote_code=config.trust_remote_code)
            _Quantization(base, config).open(device, cut_source, only_plan)
        except BaseException:
            base.close()
            raise
    return base


def is_quantized(config: Config) -> bool:
    """Whether the model of `config`, which is to be quantised, is there and whole. Raises UserError for an original that cannot
    be read."""
    return whole(_Quantization(Base(resolve_model(config.model)), config).target) is not None


class _Quantization:
    """Of a model. target: the directory where it is kept."""

    def __init__(self, base: Base, config: Config) -> None:
        if is_gguf(base.source):
            raise CheckpointError(
                f"{base.source}: the weights of a GGUF file are not quantised once more: leave --quantize out, or name the "
                "original model"
            )
        self._base, self._config = base, config
        self._packing = _packing(config)
        self._cache = config.quantization.cache or cache_home()
        self._side_files = side_files(base.source, (config.output, self._cache))
        self._original = self._describe_original()
        self._name = self._directory_name()
        self.target = self._cache / self._name

    def open(self, device: Device, cut_source: Callable[[], ModelParts], only_plan: bool) -> None:
        """As `open_base`. cut_source: gives the parts of the original."""
        base, target = self._base, self.target
        if not only_plan:
            try:
                self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
                base._lock = open_lock(self._cache, self._name)
            except OSError as error:
                raise UserError(f"{self._cache}: {error.strerror}: name another quantization.cache") from error
            self._wait(shared=True)
        about = whole(target)
        if about is None and not only_plan:
            os.close(base._lock)
            base._lock = open_lock(self._cache, self._name)
            self._wait(shared=False)
            about = whole(target)  # another process may have made it meanwhile
            if about is None:
                about = self._make(cut_source(), device)
            lock(base._lock, shared=True)
        if about is not None:
            base.directory = target
            base.words = (
                f"quantised to {self._packing.word}: {_mixture(self._packing, about)}{about['bits_per_weight']:.2f} bits a "
                f"weight of the model, relative RMS error {about['relative_error']:.2%}; kept in {target}"
            )
            return
        parts = cut_source()
        plan = outline(parts, self._packing)
        base.words, _, base.rates = self._predict(plan, parts, device)
        base._outline = tempfile.TemporaryDirectory(prefix="finetune-outline-")
        base.directory = Path(base._outline.name) / self._name
        base.directory.mkdir()
        write_sparse(plan, base.directory, self._side_files)

    def _describe_original(self) -> dict[str, Any]:
        """What makes the original this one: its digest, and sizes and times of all files that are read or copied."""
        checkpoint = read_checkpoint(self._base.source)
        files = sorted({*checkpoint.files, *self._side_files.values()})
        stats = [(str(path.relative_to(self._base.source)), path.stat()) for path in files]
        return {
            "digest": model_digest(checkpoint),
            "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        }

    def _directory_name(self) -> str:
        parts = [part for part in self._config.model.rstrip("/").split("/") if part]
        is_path = Path(self._config.model).expanduser().is_dir()
        words = "".join(c if c.isalnum() or c in "._-" else "-" for c in (parts[-1] if is_path else "--".join(parts)))
        packing = self._packing
        kind = [packing.kind] if packing.bits is None else [packing.kind, packing.bits]
        digest = json_digest([FORMAT, self._original, *kind, packing.nested])
        return f"{words.lstrip('.') or 'model'}-{packing.word.replace(' ', '')}-{digest[:12]}"

    def _wait(self, shared: bool) -> None:
        try:
            lock(self._base._lock, shared=shared)
        except BlockingIOError:
            say(f"another process is at {self.target}: waiting for it")
            lock(self._base._lock, shared=shared, wait=True)

    def _predict(self, plan: Outline, parts: ModelParts, device: Device) -> tuple[str, int, Rates | NoRates | None]:
        """What quantising takes, in words; the bytes that are still to be written; this machine's rates. None: it is done on
        another one."""
        unfinished = partial_path(self._cache, self._name)
        there = Written.read(unfinished, plan)
        left = plan.num_bytes - sum(there.num_bytes.values())
        read = sum(file.stat().st_size for file in plan.checkpoint.files)
        rates = None if isinstance(device, DescribedDevice) else try_rates(parts, device)
        seconds = ""
        if rates:
            share = left / plan.num_bytes
            packing = _packing_seconds(plan)
            moving = (read + plan.num_bytes) / rates.read_bytes_per_second
            seconds = f", in about {format_seconds(share * max(packing, moving))}"
        words = (
            f"to be quantised first, to {self._packing.word}: {_mixture(self._packing, _about_matrices(plan))}"
            f"{format_bytes(read)} become {format_bytes(plan.num_bytes)} ({plan.bits_per_weight:.2f} bits a weight of the "
            f"model) in {self._cache}{seconds}; {format_bytes(free_bytes(self._cache))} are free there"
        )
        if plan.stacked_bytes:
            words += f"; {format_bytes(plan.stacked_bytes)} of experts lie stacked in the files and stay as they are"
        if there.num_bytes:
            words += f"; {format_bytes(plan.num_bytes - left)} are there from an earlier process"
        return words, left, rates

    def _make(self, parts: ModelParts, device: Device) -> dict[str, Any]:
        """Quantises; returns what quantized.json says."""
        plan = outline(parts, self._packing)
        words, left, _ = self._predict(plan, parts, device)
        free = free_bytes(self._cache)
        if left + _SPARE_BYTES > free:
            raise UserError(
                f"{self._cache}: {format_bytes(left)} are to be written there and {format_bytes(_SPARE_BYTES)} left free, "
                f"{format_bytes(free)} are free: make room (`finetune cache` lists what is there), or name another "
                "quantization.cache"
            )
        self._check_memory(plan)
        say(words)
        unfinished = partial_path(self._cache, self._name)
        unfinished.mkdir(mode=0o700, exist_ok=True)
        started = time.perf_counter()
        written = write_quantized(plan, unfinished, Ticker("quantising"))
        about = self._finish(plan, written, unfinished)
        trim_malloc()
        say(
            f"quantised in {format_seconds(time.perf_counter() - started)}: {format_bytes(plan.num_bytes)}, relative RMS error "
            f"{written.relative_error:.2%}"
        )
        return about

    def _finish(self, plan: Outline, written: Written, unfinished: Path) -> dict[str, Any]:
        for name, path in self._side_files.items():
            (unfinished / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copyfile(path, unfinished / name)
        write_side(plan, unfinished)
        about = {
            "format": FORMAT,
            "model": self._config.model,
            "original": self._original,
            "kind": self._packing.kind,
            "nested": self._packing.nested,
            "bits": self._packing.bits,
            **_about_matrices(plan),
            "bits_per_weight": plan.bits_per_weight,
            "relative_error": written.relative_error,
            "digest": model_digest(read_checkpoint(unfinished)),
            "files": written.num_bytes,
        }
        (unfinished / NOTE).write_text(json.dumps(seal(about), indent=1))
        if self._describe_original() != self._original:
            shutil.rmtree(unfinished)
            raise UserError(f"{self._base.source}: its files have changed while they were quantised: start again")
        shutil.rmtree(self.target, ignore_errors=True)  # damaged
        for path in (*unfinished.rglob("*"), unfinished):
            path.chmod(0o700 if path.is_dir() else 0o600)
            flush(path)
        # Killed before this, the next process finds all files of weights in the unfinished directory; after it, here.
        unfinished.rename(self.target)
        flush(self._cache)
        (self.target / PROGRESS).unlink()
        return about

    def _check_memory(self, plan: Outline) -> None:
        amount = self._config.host_memory
        if amount is None:
            return
        try:
            limit = parse_bytes(amount, total_host_bytes())
        except ValueError as error:
            raise UserError(f"host_memory: {error}") from None
        need = host_bytes() + working_bytes(plan)
        if need > limit:
            raise UserError(
                f"quantising takes {format_bytes(need)} of host memory ({format_bytes(working_bytes(plan))} of them for "
                f"buffers and the scales of the largest matrix), {format_bytes(limit)} are allowed: raise --host-memory"
            )


def _packing(config: Config) -> Packing:
    """How `quantize` of a configuration packs weights."""
    if isinstance(config.quantize, float):
        return Packing(None, config.quantization.nested, config.quantize)
    return Packing(config.quantize, config.quantize == "nf4" and config.quantization.nested)


def _about_matrices(plan: Outline) -> dict[str, Any]:
    """Of what is said of a model in quantized.json: how many matrices are of each kind ("": as they are), and their average."""
    return {"matrices": plan.matrices, "matrix_bits": plan.matrix_bits}


def _mixture(packing: Packing, about: Mapping[str, Any]) -> str:
    """The beginning of a sentence where a budget of bits is given. about: as `_about_matrices`."""
    if packing.bits is None:
        return ""
    counts = [f"{count} in {kind}" if kind else f"{count} as they are" for kind, count in about["matrices"].items()]
    return f"matrices with {about['matrix_bits']:.2f} bits a weight ({', '.join(counts)}); "


def _packing_seconds(plan: Outline) -> float:
    """That the kernels take, from a probe."""
    source = torch.ones(_PROBE_WEIGHTS // 1024, 1024, dtype=torch.bfloat16)
    packed, blocks = torch.empty(source.numel(), dtype=torch.uint8), Blocks.of(source.numel())
    kernels = {
        "nf4": lambda: pack_4bit(source, packed, blocks),
        "int8": lambda: pack_int8(source, packed, torch.empty(len(source))),
    }
    total = 0.0
    for kind in set(plan.kinds.values()) & kernels.keys():
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            kernels[kind]()
            seconds.append(time.perf_counter() - started)
        num_bytes = sum(entry.num_bytes for entry in plan.packed_entries if plan.kinds[entry.name] == kind)
        total += num_bytes / source.nbytes * min(seconds)
    return total
