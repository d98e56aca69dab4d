"""Mapped code in small pieces, in a process of its own: what the kernel then says of its mappings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

KIB = 1024
PROGRAM = """
import torch
from finetune.memory.mapped_files import read_code_in_small_pieces
x = torch.randn(70, 70, generator=torch.Generator().manual_seed(1))
before = (x @ x).sum().item()
read_code_in_small_pieces()
import tokenizers
read_code_in_small_pieces()
assert (x @ x).sum().item() == before
print(open("/proc/self/smaps").read())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_code_of_libraries_is_mapped_in_small_pieces_that_are_read_alone() -> None:
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    library = r"((?:libtorch|libpython|tokenizers)\S*)"
    mapping = rf"^([0-9a-f]+)-([0-9a-f]+) (r\S+) .*/{library}$(?:\n(?![0-9a-f]+-).*)*?\nVmFlags:(.*)$"
    code, data, names = [], [], set()
    for start, end, rights, name, flags in re.findall(mapping, result.stdout, re.MULTILINE):
        if "w" not in rights:
            assert " rr" in flags, f"{name} is read ahead"  # VM_RAND_READ
            (code if "x" in rights else data).append(int(end, 16) - int(start, 16))
            names.add(name)
    assert max(code) <= 64 * KIB  # 200 MiB of code are 3,200 pieces
    assert len(code) > 100 and len(data) < 100
    assert "tokenizers.abi3.so" in names  # loaded after the first time
