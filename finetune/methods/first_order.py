"""What all methods with gradients share. See [Note: the reference loop] in `finetune.trainer`."""

from __future__ import annotations

import hashlib
from math import isfinite

from finetune.objectives.errors import StepNotKept


def lane_seed(seed: int, step: int, micro_batch: int) -> int:
    """The random seed of micro-batch `micro_batch` of step `step` (both from 0): a 63-bit hash of the three numbers."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_finite(step: int, loss: float, grad_norm: float) -> None:
    """Raises StepNotKept unless loss and norm of the gradients of step `step` (from 0) are finite."""
    for what, value in (("the loss", loss), ("the norm of the gradients", grad_norm)):
        if not isfinite(value):
            raise StepNotKept(
                f"{what} of step {step + 1} is {value}, so it is not kept: lower training.learning_rate, or look for "
                "faulty data"
            )
