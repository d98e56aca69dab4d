"""What became of the runs of a sweep: ranked, as a table for people and as `sweep.json` for programs and for `--resume`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from finetune.memory.errors import UserError
from finetune.memory.units import format_seconds
from finetune.reporting.report import read_metrics, write_report
from finetune.runs.best import read_best

WAITING, FINISHED, STOPPED, FAILED = "waiting", "finished", "stopped", "failed"
FORMAT = 1
FILE = "sweep.json"


@dataclass(slots=True)
class Outcome:
    """Of one run. state: one of the words above; error: of one that failed, in words."""

    name: str
    output: str  # its directory
    settings: dict[str, Any] = field(default_factory=dict)  # what is its own, by dotted keys
    state: str = WAITING
    error: str = ""
    steps: int = 0  # done in all
    num_steps: int | None = None  # of its schedule
    last_loss: float | None = None  # of its last step
    evaluation: dict[str, float] | None = None  # values of the last one, or of the best step where that is the result
    seconds: float | None = None  # that its steps took, together with those of others

    def take(self, directory: Path) -> None:
        """What the run's own metrics say of its last step, and of the one that is its result."""
        last, self.seconds = None, None
        path, best = directory / "metrics.jsonl", read_best(directory)
        result = {}  # the row of the step whose adapter is the run's
        for row in read_metrics(path) if path.is_file() else ():
            last, self.seconds = row, (self.seconds or 0.0) + row["seconds"]
            if best is None or row["step"] == best["step"]:
                result = row
        if last is not None:
            self.steps, self.last_loss = last["step"], last["loss"]
            values = {key.removeprefix("eval_"): value for key, value in result.items() if key.startswith("eval_")}
            self.evaluation = values or None

    @property
    def loss(self) -> float | None:
        """By which it is ranked: of its evaluation, else of its last step."""
        return self.last_loss if self.evaluation is None else self.evaluation["loss"]


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The best first: by the loss of the evaluation, then those without one by that of the last step, then the rest."""

    def place(one: Outcome) -> tuple[int, float]:
        loss = one.loss
        if one.state in (FAILED, WAITING) or loss is None or not math.isfinite(loss):
            return 2, 0.0
        return (1 if one.evaluation is None else 0), loss

    return sorted(outcomes, key=place)


def write_outcomes(directory: Path, outcomes: Sequence[Outcome], about: Mapping[str, Any]) -> None:
    """Replaces `sweep.json`. about: what it says of the whole sweep. Raises UserError: the disk is full."""
    runs = [{"rank": rank, **asdict(one)} for rank, one in enumerate(ranked(outcomes), start=1)]
    write_report(directory / FILE, {"format": FORMAT, **about, "runs": runs})


def read_outcomes(directory: Path) -> dict[str, Outcome]:
    """Of an earlier process, by name; none where there is no file. Raises UserError when it is damaged."""
    path = directory / FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, expected {FORMAT}")
        runs = [Outcome(**{key: value for key, value in run.items() if key != "rank"}) for run in found["runs"]]
        return {run.name: run for run in runs}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged, or no sweep has made it ({error}): move it away; the runs go on from their own states"
        ) from error


def print_table(outcomes: Sequence[Outcome], stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    has_accuracy = any("accuracy" in (one.evaluation or {}) for one in outcomes)
    columns = ["", "run", "eval loss", *(["accuracy"] if has_accuracy else []), "last loss", "steps", "time", ""]
    for column in columns:
        table.add_column(column, justify="left" if column in ("run", "") else "right", no_wrap=column == "run")
    for rank, one in enumerate(ranked(outcomes), start=1):
        evaluation = one.evaluation or {}
        cells = [str(rank), one.name, _number(evaluation.get("loss"))]
        cells += [_number(evaluation.get("accuracy"))] if has_accuracy else []
        cells += [
            _number(one.last_loss),
            f"{one.steps}/{one.num_steps}" if one.num_steps else str(one.steps),
            "" if one.seconds is None else format_seconds(one.seconds),
            "" if one.state == FINISHED else f"{one.state}{': ' if one.error else ''}{one.error}",
        ]
        table.add_row(*map(Text, cells))
    wide = None if stream.isatty() else 200
    Console(file=stream, width=wide, highlight=False).print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
