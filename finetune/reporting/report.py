"""What a run leaves to read: metrics.jsonl, one row a step, and one for each later evaluation of what it has made; report.json
at the end; a table of plan and outcome."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.memory.errors import UserError
from finetune.memory.units import format_bytes
from finetune.offload.files.sealed import SEAL, seal, unseal

METRIC_KEYS = (
    "step",  # optimizer updates done, from 1
    "epoch",  # epochs done, a fraction
    "loss",  # mean over the step's trained tokens, before the update
    "learning_rate",
    "grad_norm",  # before clipping
    "tokens",  # of this step, without padding
    "seconds",  # of this step
    "tokens_per_s",
    "disk_read_bytes",  # of this step
    "disk_write_bytes",
    "stall_seconds",  # of this step: the computing thread waited for a transfer
    "host_peak_bytes",  # of the whole process, since its start
    "device_peak_bytes",
)


class MetricsError(UserError):
    """A metrics file of an earlier run that cannot be continued."""


class MetricsWriter:
    """Appends one JSON row a step, with a checksum of itself; each row is in the kernel's hands before `write` returns.
    last_row: the newest, None where there is none.

    Rows after `resume_step`, the step a run goes on from, are dropped first (0: a new run, all are), so that no step
    stands in the file twice. A last line that a killed process left half written is dropped too. The file is private.

    Raises MetricsError: a damaged row that is not the last. UserError: the disk is full.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        kept = _rows_until(path, resume_step) if resume_step and path.exists() else iter(())
        self.last_step = resume_step
        self.last_row: dict[str, Any] | None = None
        self._path = path
        self._start, self._line = 0, b""  # of the last step's row
        self._behind = b""  # rows of evaluations after it
        _write_atomically(path, self._noted(kept))
        self._file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends `row`; numbers that are not finite become null. Further keys than METRIC_KEYS are welcome.

        Raises ValueError: keys are missing, or the step is not after the last one. OSError, with the path: the disk is full.
        """
        missing = [key for key in METRIC_KEYS if key not in row]
        if missing:
            raise ValueError(f"metrics row lacks {', '.join(missing)}")
        if row["step"] <= self.last_step:
            raise ValueError(f"metrics row of step {row['step']} after step {self.last_step}")
        start = self._start + len(self._line) + len(self._behind)
        self._behind = b""
        self._put(row, start, b"")
        self.last_step = row["step"]

    def amend(self, values: Mapping[str, Any]) -> None:
        """Writes the last step's row once more, with `values` in it; of a row that was lost nothing is written.

        Raises OSError, with the path: the disk is full.
        """
        if self.last_row is not None and self.last_row["step"] == self.last_step:
            self._put({**self.last_row, **values}, self._start, self._line)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All that are in the file."""
        return read_metrics(self._path)

    def _put(self, row: Mapping[str, Any], start: int, old: bytes) -> None:
        """Writes the last step's row where `old` stood."""
        line = _line_of(row)
        try:
            self._replace(line + self._behind, start)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._replace(old + self._behind, start)  # no half row
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self.last_row, self._start, self._line = dict(row), start, line

    def _replace(self, line: bytes, start: int) -> None:
        """These lines are from now on what the file holds from `start` on."""
        end = start + len(line)
        while line:
            line = line[os.pwrite(self._file, line, end - len(line)) :]
        os.ftruncate(self._file, end)

    def _noted(self, lines: Iterator[str]) -> Iterator[str]:
        """The lines, on their way to the beginning of the file."""
        for line in lines:
            if "loss" in json.loads(line):
                self._start += len(self._line) + len(self._behind)
                self._line, self._behind = line.encode(), b""
            else:
                self._behind += line.encode()
            yield line
        if self._line:
            self.last_row = unseal(json.loads(self._line))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def add_evaluation(path: Path, step: int, evaluated_on: str, values: Mapping[str, Any]) -> bool:
    """Appends what was measured of a run's result, under the names of `finetune.evaluate`, to its metrics file; step: that it
    is of. Returns whether it is there: nothing is put behind a half-written line. Raises OSError."""
    row = {"step": step, "evaluated_on": evaluated_on} | {f"eval_{key}": value for key, value in values.items()}
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                return False
        file.write(_line_of(row))
    return True


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of steps in a metrics file, in order; a half-written last line is left out.

    Raises MetricsError: a damaged row that is not the last.
    """
    return (row for row in _read_rows(path) if "loss" in row)


def _line_of(row: Mapping[str, Any]) -> bytes:
    return to_json(seal(_finite(row))).encode() + b"\n"


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Also those of evaluations."""
    damaged = ""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if damaged:
                raise MetricsError(damaged)
            try:
                row = json.loads(line)
                if SEAL in row:
                    row = unseal(row)
                elif not line.endswith(b"\n") or not isinstance(row["step"], int):
                    raise ValueError("not a row")
            except (ValueError, KeyError, TypeError) as error:
                why = f"found {line[:60]!r} ({error})"
                damaged = f"{path}:{number}: expected a row of metrics, {why}; move the file away, and go on with --resume"
                continue
            yield row


def last_step(path: Path) -> int:
    """The largest step of all rows that are whole; 0 when there is none."""
    step = 0
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            step = max(step, (unseal(row) if SEAL in row else row)["step"])
    return step


def _rows_until(path: Path, last_step: int) -> Iterator[str]:
    """The rows of steps up to `last_step`, each step once, whatever was put behind them, and of evaluations of these."""
    step = 0
    for row in _read_rows(path):
        if row["step"] <= last_step and ("loss" not in row or row["step"] > step):
            step = max(step, row["step"])
            yield to_json(seal(row)) + "\n"


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Replaces `path` by `report` as JSON, whole or not at all; the file is private. Not-finite numbers become null.

    Raises UserError: the disk is full.
    """
    _write_atomically(path, iter([to_json(report, indent=2) + "\n"]))


def write_text(path: Path, text: str) -> None:
    """As `write_report`, of any text."""
    _write_atomically(path, iter([text]))


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON (RFC 8259): NaN and infinities, which it does not know, become null; paths become strings."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _write_atomically(path: Path, lines: Iterator[str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. Make room, or mend it, then go on with --resume"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


_SUMMARY_ROWS = {
    "host_peak_bytes": ("host memory peak", format_bytes),
    "device_peak_bytes": ("device memory peak", format_bytes),
    "disk_bytes": ("disk space", format_bytes),
    "disk_read_bytes": ("disk read a step", format_bytes),
    "disk_write_bytes": ("disk written a step", format_bytes),
    "step_seconds": ("seconds a step", "{:.2f}".format),
    "stall_seconds": ("stalled seconds a step", "{:.2f}".format),
}


def summary_table(report: Mapping[str, Any]) -> str:
    """Plan beside outcome, as text: `report["predicted"]`, `["measured"]` and `["budget"]` map names to values.

    The names are those of `_SUMMARY_ROWS`; a row is shown where at least one of the three has a value.
    """
    columns = ("predicted", "measured", "budget")
    cells = [("", *columns)]
    for key, (title, show) in _SUMMARY_ROWS.items():
        values = [report.get(column, {}).get(key) for column in columns]
        if any(value is not None for value in values):
            cells.append((title, *("" if value is None else show(value) for value in values)))
    widths = [max(len(row[index]) for row in cells) for index in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in cells
    )
