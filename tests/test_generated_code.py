"""Products of ever new shapes leave a process no larger: held against oneDNN itself, where the processor makes it compile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune.memory.onednn_cache import BYTES_PER_SHAPE, MAX_SHAPES, shapes_to_keep
from finetune.offload.devices.base import cpu_multiplies

ROOT = Path(__file__).parent.parent
RUN = """
import json, sys
from pathlib import Path
from tiny_models import make_config, save_tiny, token_data
from finetune.trainer import Trainer
import finetune.one_run
folder = Path(sys.argv[1])
finetune.one_run.prepare_for = lambda config, source, *to, **options: source
model, data = save_tiny("llama", folder / "model"), token_data(folder / "tokens", 64, 20, 400)
training = {"max_steps": 32, "batch_size": 2, "micro_batch_size": 1}
config = make_config(
    model, data, folder / "out", training=training, engine={"dtype": "bfloat16"}, dataset={"sequence_length": 400}
)
report = Trainer(config).train().report
print(json.dumps([report[key]["host_peak_bytes"] for key in ("predicted", "measured")]))
"""
GROW = """
import json, sys, torch
from finetune.memory.arena import tune_malloc
from finetune.memory.onednn_cache import BYTES_PER_BUFFER, keep_shapes
from finetune.memory.meter import host_bytes
torch.set_num_threads(1)
if sys.argv[1] != "unbounded":
    keep_shapes(int(sys.argv[1]))
    tune_malloc(mmap_threshold_bytes=BYTES_PER_BUFFER)
weights = [torch.randn(n, k).bfloat16() for n, k in ((576, 576), (1536, 576), (576, 1536))]
sizes = []
for rows in range(40, 160, 2):
    for weight in weights:
        torch.nn.functional.linear(torch.randn(rows, weight.shape[1]).bfloat16(), weight)
        torch.randn(rows, weight.shape[0]).bfloat16() @ weight
    sizes.append(host_bytes())
print(json.dumps(sizes))
"""


def sizes(kept: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", GROW, kept], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def free() -> list[int]:
    """Sizes of a process that keeps all."""
    if not cpu_multiplies(torch.bfloat16):
        pytest.skip("bf16 products are not compiled on this processor")
    free = sizes("unbounded")
    if free[-1] - free[9] < 20 << 20:
        pytest.skip("this build of torch keeps no code for each shape")
    return free


def test_memory_is_bounded(free):
    kept = 16
    bounded = sizes(str(kept))
    assert bounded[-1] - bounded[0] < kept * BYTES_PER_SHAPE
    late = bounded[len(bounded) // 2 :]
    assert max(late) - min(late) < 4 << 20  # nothing grows any more: one is as large as another is small


def test_a_run_over_rows_of_many_lengths_is_bounded(free, tmp_path):
    """Also by what is computed before its first step: a prediction runs blocks."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)], cwd=ROOT / "tests", capture_output=True, text=True, check=True
    )  # fmt: skip
    predicted, measured = json.loads(done.stdout.splitlines()[-1])
    assert measured <= predicted


def test_how_many_are_kept():
    assert [shapes_to_keep(n, experts=False) for n in (1, 2, 4, 100)] == [16, 32, 64, MAX_SHAPES]
    assert shapes_to_keep(1, experts=True) == MAX_SHAPES
