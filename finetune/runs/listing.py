"""Runs beside each other, as their directories have them: nothing but JSON files is read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.memory.errors import UserError
from finetune.offload.files.sealed import SEAL, unseal
from finetune.runs.directory import LOCK, PREVIOUS, RUN, reading, recorded
from finetune.runs.identity import flat

MOST_LEVELS = 4
"""Of directories that are looked through."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a directory says of the run in it."""

    directory: Path  # as it was named
    about: Mapping[str, Any]  # run.json
    step: int  # updates that metrics.jsonl has
    loss: float | None  # of the last one
    measured: Mapping[str, float]  # the last evaluation, by name
    evaluated_on: str  # what that was measured on; empty: the run's own evaluation data
    is_under_way: bool  # whether a process is at it
    changed_seconds: float  # when it last wrote, since 1970

    @property
    def state(self) -> str:
        if self.is_under_way:
            return "running"
        return "finished" if (self.directory / "report.json").exists() else "stopped"


def find_runs(places: Sequence[Path]) -> list[Run]:
    """The runs in `places`, or below them; set-aside ones are left out. Raises UserError where a place has none."""
    found = []
    for place in places:
        runs = [_read(directory) for directory in _directories(place, MOST_LEVELS)]
        if not runs:
            raise UserError(f"{place}: expected the directory of a run, or one with runs in it, found none")
        found += runs
    return found


def _directories(place: Path, levels: int) -> Iterator[Path]:
    if (place / RUN).is_file():
        yield place
        return
    if levels and place.is_dir():
        with contextlib.suppress(PermissionError):
            for entry in sorted(place.iterdir()):
                if entry.is_dir() and not entry.is_symlink() and entry.name[0] != "." and entry.name != PREVIOUS:
                    yield from _directories(entry, levels - 1)


def _read(directory: Path) -> Run:
    about, metrics = recorded(directory) or {}, directory / "metrics.jsonl"
    last, measured, evaluated_on = _last_rows(metrics)
    is_under_way = False
    if os.path.lexists(directory / LOCK):
        with reading(directory) as is_free:
            is_under_way = not is_free
    newest = metrics if metrics.exists() else directory / RUN
    step, loss = last.get("step", 0), last.get("loss")
    return Run(directory, about, step, loss, measured, evaluated_on, is_under_way, newest.stat().st_mtime)


def _last_rows(metrics: Path) -> tuple[dict[str, Any], dict[str, float], str]:
    """The last whole row of a step, the values of the last evaluation, and what that was measured on."""
    last, measured, evaluated_on = {}, {}, ""
    for line in reversed(metrics.read_bytes().splitlines() if metrics.is_file() else []):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            row = unseal(row) if SEAL in row else row
            if "loss" in row and row["step"] > last.get("step", 0):
                last = row
            if not measured:
                measured = {key.removeprefix("eval_"): value for key, value in row.items() if key.startswith("eval_")}
                evaluated_on = row.get("evaluated_on", "")
        if measured and last:
            break
    return last, measured, evaluated_on


def describe_runs(runs: Sequence[Run]) -> str:
    """A table; of several runs, also the settings in which they differ."""
    titles = ("run", "method", "model", "step", "loss", "eval loss", "accuracy", "on", "state", "last written")
    lines = _aligned([titles, *map(_cells, runs)])
    known = [run for run in runs if "settings" in run.about]  # earlier versions said less
    differing = _differences(known) if len(known) > 1 else []
    if differing:
        names = [str(run.directory) for run in known]
        lines += ["", "settings that differ:", *(f"  {line}" for line in _aligned([("", *names), *differing]))]
    return "\n".join(lines)


def _cells(run: Run) -> tuple[str, ...]:
    model = run.about.get("model", "")
    name = model["name"] if isinstance(model, Mapping) else model
    written = datetime.fromtimestamp(run.changed_seconds).strftime("%Y-%m-%d %H:%M")
    numbers = (run.loss, run.measured.get("loss"), run.measured.get("accuracy"))
    shown = ["" if number is None else f"{number:.4f}" for number in numbers]
    steps = f"{run.step}/{run.about.get('num_steps', '?')}"
    cells = (str(run.directory), run.about.get("method", ""), Path(name).name, steps, *shown)
    return *cells, run.evaluated_on, run.state, written


def _differences(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """What only one of the runs has follows from its method."""
    settings = [{"data": (run.about.get("data") or {}).get("digest", "")[:8]} | flat(run.about["settings"]) for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one if key != "method")
    rows = []
    for key in keys:
        values = [str(one[key]) for one in settings if key in one]
        if len(values) > 1 and len(set(values)) > 1:
            rows.append((key, *(_shown(one.get(key, "")) for one in settings)))
    return rows


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Without columns that are empty but for their title."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:]) or len(rows) == 1]
    widths = [max(map(len, column)) for column in columns]
    lines = (zip(row, widths, strict=True) for row in zip(*columns, strict=True))
    return ["  ".join(cell.ljust(width) for cell, width in line).rstrip() for line in lines]
