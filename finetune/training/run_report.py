"""What report.json says of a run: predicted and measured memory and time, and what lived where."""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.memory.expert_guesses import ExpertGuesses
from finetune.memory.meter import MemoryMeter
from finetune.memory.tensor_file import beside_file_bytes
from finetune.offload.sizing.needs import ACTIVATIONS, GRAPHS, HIDDEN_STATES, HOST_BLOCKS, TEXTS
from finetune.planned_run import PlannedRun
from finetune.prediction import predict_step
from finetune.session import Session
from finetune.training.loop import TrainingLoop


def run_report(
    planned: PlannedRun, session: Session, meter: MemoryMeter, loop: TrainingLoop
) -> dict[str, Any]:
    """JSON values, losses that are not finite among them; sizes in bytes. Stops the meter."""
    predicted = predict_step(planned, planned.rates, planned.timing)
    plan, blocks = planned.plan, planned.plan.slots[HOST_BLOCKS]
    return {
        "model": str(session.config.model),
        "steps": loop.step,
        "first_step": loop.first_step,
        "training_loss": loop.training_loss if loop.losses else None,
        "first_loss": loop.losses[0] if loop.losses else None,
        "last_loss": loop.losses[-1] if loop.losses else None,
        "seconds": loop.seconds,
        "budget": {"host_peak_bytes": plan.host_budget_bytes, "device_peak_bytes": plan.device_budget_bytes},
        "predicted": {
            "host_peak_bytes": plan.host_peak_bytes,
            "device_peak_bytes": plan.device_peak_bytes if session.on_device else None,
            "step_seconds": predicted.seconds,
            "stall_seconds": predicted.stall_seconds,
            "disk_read_bytes": predicted.read_bytes,
        },
        "measured": {
            "host_peak_bytes": meter.stop(),
            "device_peak_bytes": session.device.peak_bytes() if session.on_device else None,
            "step_seconds": float(np.median(loop.step_seconds)) if loop.step_seconds else None,
            **loop.moved_per_step(),
        },
        "plan": {
            "resident_blocks": blocks.kept,
            "blocks": len(session.parts.blocks),
            "lookahead": blocks.lookahead,
            "kept_graphs": plan.count(GRAPHS),
            "block_inputs": "disk" if plan.count(ACTIVATIONS) or plan.count(TEXTS) else "host",
            "hidden_states": "disk" if plan.count(HIDDEN_STATES) or plan.count(TEXTS) else "host",
            "dtype": str(session.parts.dtype).removeprefix("torch."),
            "host_parts": dict(plan.host_parts),
            "device_parts": dict(plan.device_parts),
        },
        "experts": None if not (guesses := session.streamed.guesses).chosen else _expert_report(guesses),
        "arena": None if session.arena is None else _arena_report(session),
    }


def _expert_report(guesses: ExpertGuesses) -> dict[str, float]:
    """Of passes of few tokens: experts that were chosen, that were fetched because a router was asked ahead, and of these the
    ones that were used."""
    counts = {"chosen": guesses.chosen, "guessed": guesses.guessed, "used": guesses.used}
    return {**counts, "share_right": guesses.share_right}


def _arena_report(session: Session) -> dict[str, int]:
    stats = session.arena.stats()
    return {
        "capacity_bytes": stats.capacity_bytes,
        "peak_bytes": stats.peak_bytes,
        "extent_bytes": stats.extent_bytes,
        "overflow_peak_bytes": stats.overflow_peak_bytes,
        "beside_file_bytes": beside_file_bytes(),
    }
