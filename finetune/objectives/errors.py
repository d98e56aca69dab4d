"""What a step ends in whose numbers are of no use."""

from __future__ import annotations

from finetune.memory.errors import UserError


class StepNotKept(UserError):
    """A step whose numbers are not finite: the method is as it was before it."""
