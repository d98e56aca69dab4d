"""Kills a run with SIGKILL at random moments, resumes it each time, and compares what it leaves with an unbroken run's.

    python benchmarks/kill_resume.py --kills 50 --longest 12 --work DIR -- --method zo --model MODEL --data FILE ...

What stands after `--` are arguments of `finetune run` without --output and --resume; the run must be long enough to be killed
so often (`--longest`: seconds that a process lives at most). Compared byte for byte: every file of the exported model or of
the adapter, and the journal where there is one. The exit code is 1 where something differs.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path


def finetune(command: str, arguments: list[str], output: Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "finetune", command, *arguments, "--output", str(output)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> None:
    words = process.communicate()[1]
    if process.returncode:
        sys.exit(f"a run failed with exit code {process.returncode}:\n{words[-3000:]}")


def digests(arguments: list[str], output: Path, exported: Path) -> dict[str, str]:
    files = [output / "journal.zo"] if (output / "journal.zo").exists() else []
    if (output / "adapter").exists():
        files += (output / "adapter").iterdir()
    else:
        model = arguments[arguments.index("--model") + 1]
        finish(finetune("export", ["--model", model, "--to", str(exported)], output))
        files += exported.iterdir()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--longest", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    arguments = [word for word in options.arguments if word != "--"]
    rng = random.Random(options.seed)
    whole, killed = options.work / "whole", options.work / "killed"
    finish(finetune("run", arguments, whole))
    kills = 0
    while kills < options.kills:
        process = finetune("run", [*arguments, "--resume"], killed)
        try:
            process.wait(rng.uniform(0, options.longest))
            break  # it came to its end first
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    else:
        process = finetune("run", [*arguments, "--resume"], killed)
    started = time.perf_counter()
    finish(process)
    print(f"{kills} kills; the last process ended after {time.perf_counter() - started:.1f} s more", flush=True)
    expected = digests(arguments, whole, options.work / "whole-model")
    found = digests(arguments, killed, options.work / "killed-model")
    different = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    print(f"{len(expected)} files compared" + (f", different: {', '.join(different)}" if different else ", all equal"))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
