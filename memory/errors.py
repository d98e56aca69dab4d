"""The root of every error that is the user's to mend: shown as one message, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user or a limit of the machine; the message names the thing, expected, found, and what to do."""
