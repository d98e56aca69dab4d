"""Evaluations of what a run has made, after it: rows of its metrics.jsonl, and of TensorBoard where the run reports there."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from finetune.config import Config
from finetune.reporting.report import add_evaluation
from finetune.runs.directory import reading


def keep_evaluation(config: Config, run: Path, step: int, evaluated_on: str, values: Mapping[str, float]) -> None:
    """Adds what was measured of the result of the run in `run`, which is that of `step`. Where that cannot be, a note says so:
    what was measured is not lost for it."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        return
    with reading(run) as is_free:
        if not is_free:
            _note(run, "a run is under way there")
            return
        try:
            if not add_evaluation(metrics, step, evaluated_on, values):
                _note(run, "the last line of metrics.jsonl is half written")
            if "tensorboard" in config.training.report_to:
                _show_in_tensorboard(run, step, evaluated_on, values)
        except (OSError, ImportError) as error:
            _note(run, str(error))


def _show_in_tensorboard(run: Path, step: int, evaluated_on: str, values: Mapping[str, float]) -> None:
    """Under names of their own: curves of a run are of its own evaluation data."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard")) as writer:
        for key, value in values.items():
            writer.add_scalar(f"eval/{evaluated_on}/{key}", value, step)


def _note(run: Path, why: str) -> None:
    print(f"note: the evaluation is not recorded in {run}: {why}", file=sys.stderr)
