"""The trace of a run: its last step beside the step as it was predicted."""

from __future__ import annotations

from pathlib import Path

from finetune.memory.errors import UserError
from finetune.memory.trace import Trace, write_trace
from finetune.planned_run import PlannedRun
from finetune.prediction import predict_step


def write_traces(path: Path, planned: PlannedRun, trace: Trace | None = None) -> None:
    """trace: None: nothing has run. Raises UserError when the file cannot be written."""
    measured = {"the last step": trace.spans} if trace is not None else {}
    predicted = predict_step(planned, planned.rates, planned.timing).spans if planned.rates else ()
    try:
        write_trace(path, measured | {"predicted": predicted})
    except OSError as error:
        raise UserError(f"trace: {path} cannot be written: {error.strerror}. Mend it, or name another file") from None
