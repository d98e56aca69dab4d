"""A user's first hours: the commands of README.md in their order, in a terminal of 80 columns, and the screens they leave.

    python benchmarks/first_hours.py --clone DIR --screens DIR

DIR of `--clone` is a fresh clone. Blocks of README.md that begin with ```sh are run in one shell there, up to the heading
"Methods". The first training is interrupted with Ctrl-C at its third step, and a conversation gets one turn. NN.txt has what
block NN showed; every state of a line that was drawn over is a line. A block that fails ends the script; so does a screen of a
training without the time left, the phase of the step and the memory.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from pathlib import Path

COLUMNS, LINES = 80, 24
END = re.compile(rb"<<(\d+)>>")
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")
LIVE = {"time left": rb"ETA ~?\d", "phase": rb"forward|backward|update", "memory": rb"host \d"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clone", type=Path, required=True)
    parser.add_argument("--screens", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.screens.mkdir(parents=True, exist_ok=True)
    text = (arguments.clone / "README.md").read_text(encoding="utf-8").split("\n## Methods")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    shell = Shell(arguments.clone)
    interrupted = False
    for number, block in enumerate(blocks, start=1):
        trains = block.startswith("finetune run")
        started = time.monotonic()
        status, shown = shell.run(block, interrupt=trains and not interrupted, say=chat_turn(block))
        (arguments.screens / f"{number:02}.txt").write_bytes(b"$ " + block.encode() + b"\n" + readable(shown))
        print(f"{number:02}: {block.splitlines()[0]}: exit code {status}, {time.monotonic() - started:.0f} s", flush=True)
        if status != (130 if trains and not interrupted else 0):
            sys.exit(readable(shown).decode(errors="replace")[-2000:])
        interrupted |= trains
        missing = [name for name, words in LIVE.items() if not re.search(words, shown)]
        if trains and missing:
            sys.exit(f"not on the screen: {', '.join(missing)}")


def chat_turn(block: str) -> str:
    return "What is a good film like?\n\n" if block.startswith("finetune chat") else ""


def readable(shown: bytes) -> bytes:
    """Without escapes; each state of a line that was drawn over is a line."""
    lines = re.split(rb"[\r\n]+", ESCAPES.sub(b"\r", shown))
    return b"\n".join(line.rstrip() for line in lines if line.strip()) + b"\n"


class Shell:
    """A shell in a terminal of its own."""

    def __init__(self, folder: Path):
        pid, self._terminal = pty.fork()
        if pid == 0:
            os.chdir(folder)
            environment = {**os.environ, "PS1": "", "TERM": "xterm"}
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "--noediting"], environment)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        attributes = termios.tcgetattr(self._terminal)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(self._terminal, termios.TCSANOW, attributes)
        self._script = folder / ".first_hours.sh"

    def run(self, block: str, interrupt: bool, say: str) -> tuple[int, bytes]:
        """Exit code, and all that was shown. interrupt: Ctrl-C at the third step. say: typed when a prompt waits."""
        self._script.write_text(block)
        os.write(self._terminal, f". ./{self._script.name}; printf '<<%d>>\\n' $?\n".encode())
        shown = b""
        while not (end := END.search(shown)):
            if select.select([self._terminal], [], [], 1.0)[0]:
                shown += os.read(self._terminal, 1 << 16)
            if interrupt and re.search(rb"step 3/", shown):
                os.write(self._terminal, b"\x03")
                interrupt = False
            if say and shown.rstrip().endswith(b">"):
                os.write(self._terminal, say.encode())
                say = ""
        return int(end[1]), shown[: end.start()]


if __name__ == "__main__":
    main()
