"""Kills a run with SIGKILL at random moments, resumes it each time, and compares what it leaves with an unbroken run's.

    python benchmarks/kill_resume.py --kills 50 --work DIR -- --method zo --model MODEL --data FILE ...
    python benchmarks/kill_resume.py --kills 30 --methods lora zo zo-lora lisa adafactor 8bit one-version --work DIR \\
        -- --model MODEL --data FILE ...

What stands after `--` are arguments of `finetune run` without --output and --resume; the run must be long enough to be killed
so often. Three kills of four come within `--longest` seconds after a process has begun its steps, the others while it starts.
Compared byte for byte: every file of the exported model or of the adapter, and the journal where there is one. A store of one
version cannot go on from within a step: there every kill is a run of its own, which must go on to the same bytes or be refused
in the words that say so. The exit code is 1 where something differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import finetune.trainer  # noqa: F401  for the forks
from finetune.cli import app

METHODS = {
    "lora": ["--method", "lora", "--set", "training.save_steps=2"],
    "zo": ["--method", "zo", "--set", "zo.fold_steps=5"],
    "zo-lora": ["--method", "zo", "--set", "zo.fold_steps=5", "--set", "zo.parameters=lora"],
    "zo-prefix": ["--method", "zo", "--set", "zo.fold_steps=5", "--set", "zo.parameters=prefix"],
    "lisa": ["--method", "lisa", "--set", "selection.interval=3", "--set", "selection.layers=1"],
    "adafactor": ["--method", "full", "--set", "optimizer.name=adafactor"],
    "8bit": ["--method", "full", "--set", "optimizer.state=8bit"],
    "one-version": ["--method", "full", "--set", "optimizer.versions=1"],
}
PROMISE = "they are a mixture of two steps. Begin again"


class Process:
    """A `finetune` command in a fork of this process, which has imported what it needs: kills fall into work, not imports."""

    def __init__(self, command: str, arguments: list[str], output: Path) -> None:
        self._words = tempfile.TemporaryFile("w+")
        self._id = os.fork()
        self.returncode: int | None = None
        if self._id == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(self._words.fileno(), 2)
            code = 1
            try:
                app([command, *arguments, "--output", str(output)], prog_name="finetune")
            except SystemExit as ended:
                code = ended.code
            finally:
                os._exit(code)

    @property
    def words(self) -> str:
        self._words.seek(0)
        return self._words.read()

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code; None where the process still lives after so many seconds."""
        if seconds is None:
            return self._wait(0)
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        return self.returncode

    def kill(self) -> None:
        os.kill(self._id, signal.SIGKILL)
        self.wait()

    def _wait(self, flags: int) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self._id, flags))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode


def finish(process: Process) -> None:
    if process.wait():
        sys.exit(f"a run failed with exit code {process.returncode}:\n{process.words[-3000:]}")


def digests(arguments: list[str], output: Path, exported: Path) -> dict[str, str]:
    files = [output / "journal.zo"] if (output / "journal.zo").exists() else []
    if (output / "adapter").exists():
        files += (output / "adapter").iterdir()
    else:
        model = arguments[arguments.index("--model") + 1]
        finish(Process("export", ["--model", model, "--to", str(exported)], output))
        files += exported.iterdir()
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    shutil.rmtree(exported, ignore_errors=True)
    return found


def wait_for_steps(process: Process, output: Path) -> None:
    """Until the process has begun its steps, when it writes its file of metrics anew, or has ended."""
    metrics = output / "metrics.jsonl"

    def node() -> int:
        return metrics.stat().st_ino if metrics.exists() else 0

    before = node()
    while process.poll() is None and node() == before:
        time.sleep(0.002)


def killed(process: Process, output: Path, rng: random.Random, start_seconds: float, longest: float) -> bool:
    """Whether the process lived until it was killed."""
    if starting := rng.random() < 0.25:
        longest = start_seconds
    if not starting:
        wait_for_steps(process, output)
    if process.wait(rng.uniform(0, longest)) is not None:
        return False
    process.kill()
    return True


class Comparison:
    """An unbroken run, and how one that is killed compares with it."""

    def __init__(self, arguments: list[str], work: Path, options: argparse.Namespace) -> None:
        self._arguments, self._work, self._options = arguments, work, options
        self._rng = random.Random(options.seed)
        self._output = work / "killed"
        started = time.perf_counter()
        process = Process("run", arguments, work / "whole")
        wait_for_steps(process, work / "whole")
        self._start_seconds = time.perf_counter() - started
        finish(process)
        self._expected = digests(arguments, work / "whole", work / "exported")

    def killed_again_and_again(self) -> str:
        """A run that comes to its end before it was killed so often is compared, and another one begun."""
        kills = runs = 0
        while kills < self._options.kills:
            shutil.rmtree(self._output, ignore_errors=True)
            runs += 1
            process = Process("run", [*self._arguments, "--resume"], self._output)
            while killed(process, self._output, self._rng, self._start_seconds, self._options.longest):
                kills += 1
                process = Process("run", [*self._arguments, "--resume"], self._output)
                if kills == self._options.kills:
                    break
            finish(process)
            if different := self._different():
                return f"different after {kills} kills: {different}"
        return f"{kills} kills in {runs} runs, {len(self._expected)} files of each compared, all equal"

    def killed_once_each(self) -> str:
        refused = 0
        for _ in range(self._options.kills):
            shutil.rmtree(self._output, ignore_errors=True)
            process = Process("run", self._arguments, self._output)
            if not killed(process, self._output, self._rng, self._start_seconds, self._options.longest):
                sys.exit("a run came to its end before it was killed: name more steps")
            process = Process("run", [*self._arguments, "--resume"], self._output)
            if process.wait() == 1 and PROMISE in process.words:
                refused += 1
                continue
            finish(process)
            if different := self._different():
                return f"different: {different}"
        return f"{self._options.kills} kills, {refused} within a step and refused, the others all equal"

    def _different(self) -> str:
        found = digests(self._arguments, self._output, self._work / "exported")
        names = sorted(self._expected.keys() | found.keys())
        return ", ".join(name for name in names if self._expected.get(name) != found.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--longest", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[])
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    arguments = [word for word in options.arguments if word != "--"]
    wrong = False
    for name in options.methods or ["run"]:
        comparison = Comparison([*METHODS.get(name, []), *arguments], options.work / name, options)
        result = comparison.killed_once_each() if name == "one-version" else comparison.killed_again_and_again()
        wrong |= "different" in result
        print(f"{name}: {result}", flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
