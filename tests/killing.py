"""Runs that are killed at random moments."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from test_resume import ROOT


def kill_again_and_again(configuration: Path, mark: Callable[[], int], times: int, longest_seconds: float) -> int:
    """Starts `finetune run` up to `times` times and kills it, at a random moment within `longest_seconds` after `mark()`, which
    tells how far the run is, has changed; until it comes to its end. Returns how often it was killed."""
    chance, kills = random.Random(4), 0
    for _ in range(times):
        before, deadline = mark(), time.monotonic() + 600
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune", "run", str(configuration)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while process.poll() is None and mark() == before:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.uniform(0, longest_seconds))
        if process.poll() is None:
            process.kill()
            kills += 1
        _, words = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -9, words
    return kills
