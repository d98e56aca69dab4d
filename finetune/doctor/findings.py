"""What `finetune doctor` says."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FINE, SLOW, FAULT = "ok", "slow", "fault"


class Finding(NamedTuple):
    level: str
    """ok; slow: it works, less well; fault: something will not work."""
    subject: str
    words: str
    mend: str = ""
    """What to do about it; "": nothing."""

    def __str__(self) -> str:
        mend = f": {self.mend}" if self.mend else ""
        return f"{self.level:5}  {self.subject}: {self.words}{mend}"


def read_setting(path: Path) -> str:
    """A file of /proc or /sys; "": there is no such one."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
