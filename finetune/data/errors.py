"""The error of everything that is wrong with a user's data."""

from __future__ import annotations

from finetune.memory.errors import UserError


class DataError(UserError):
    """Data, tokenizer or chat template cannot be used as they are; a bad row is named by file and line."""
