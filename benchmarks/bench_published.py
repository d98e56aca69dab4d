"""Plans of runs that others have published, for their machines: throughput of LoHan, device memory of ZO2.

    python benchmarks/bench_published.py [--only lohan|zo2] [--work DIR]

Nothing is measured: models are checkpoints of headers only, sparse files in a temporary directory (in DIR), the machine is
`benchmarks/machines/rtx4090-12-ssd.yaml`, and what is printed is what `finetune plan --machine` would predict for our own
engine. So a row compares limits of hardware, not two programs on one machine.

LoHan (Liao et al. 2024, arXiv 2403.06504, the authors' raw data): full fine-tuning with AdamW, 1024 tokens a row, weights and
optimizer state on the drives. Published are TFLOP/s; here they count, as Narayanan et al. 2021 (arXiv 2104.04473, section 5.1),
the recomputed forward too: 96 B s L h^2 (1 + s / 6h + V / 16Lh). The paper's first pages do not say so; without it (72 in place
of 96) the best points would be 207 TFLOP/s of a card of 165. Both medians are printed.

ZO2 (Wang et al. 2025, arXiv 2503.12668, its README): MeZO's update, one row of 2048 tokens in fp16, embeddings and head untied.
Theirs is what NVML says is in use, ours the smallest device budget that reads a block ahead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, OPTConfig

from finetune.config import Config
from finetune.machines.profiles import machine_text, read_machine
from finetune.methods.base import make_method
from finetune.objectives.base import objective_class
from finetune.planned_run import PlannedRun
from finetune.prediction import predict_step
from finetune.session import Session
from finetune.trainer import Trainer

MACHINE = Path(__file__).parent / "machines" / "rtx4090-12-ssd.yaml"
VOCABULARY = 50272
CONTEXT_BYTES = 500 << 20  # of the driver on the device, which NVML counts and our budgets don't; assumed


@dataclass(frozen=True)
class Size:
    """Of a model like OPT, whose MLP is four times as wide as its blocks."""

    name: str
    layers: int
    width: int
    heads: int


SIZES = {
    size.name: size
    for size in (
        Size("1.3B", 24, 2048, 32), Size("2.7B", 32, 2560, 32), Size("6.7B", 32, 4096, 32), Size("13B", 40, 5120, 40),
        Size("30B", 48, 7168, 56), Size("66B", 64, 9216, 72), Size("175B", 96, 12288, 96),
    )
}  # fmt: skip

TOKENS = 1024  # of a row
MICRO_BATCH = 8  # rows
LOHAN = (  # model, rows of a step, drives, TFLOP/s
    ("13B", 8, 12, 42.8), ("13B", 16, 12, 84.3), ("13B", 32, 12, 143.1), ("13B", 64, 12, 155.8), ("13B", 128, 12, 153.8),
    ("175B", 8, 12, 52.6), ("175B", 16, 12, 86.9),
    ("13B", 32, 1, 37.5), ("13B", 32, 2, 64.3), ("13B", 32, 3, 81.1), ("13B", 32, 6, 121.7), ("13B", 32, 12, 142.0),
    ("13B", 64, 1, 70.3), ("13B", 64, 2, 111.7), ("13B", 64, 3, 136.3), ("13B", 64, 6, 151.5), ("13B", 64, 12, 148.2),
)  # fmt: skip
ZO2 = {"1.3B": 3.75, "2.7B": 4.14, "6.7B": 4.99, "13B": 6.18, "30B": 8.86, "66B": 12.07, "175B": 18.04}  # GiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("lohan", "zo2"))
    parser.add_argument("--work", default=".", help="where the temporary directory is made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        if arguments.only != "zo2":
            compare_throughput(Path(work))
        if arguments.only != "lohan":
            compare_memory(Path(work))


def write_headers(directory: Path, size: Size, tied: bool, dtype: str) -> Path:
    """A checkpoint whose files have headers and a size, and no bytes on disk."""
    directory.mkdir()
    config = OPTConfig(
        hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=size.heads, ffn_dim=4 * size.width,
        word_embed_proj_dim=size.width, vocab_size=VOCABULARY, tie_word_embeddings=tied, dtype=dtype, dropout=0.0,
        architectures=["OPTForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    entries, end = {}, 0
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        start, end = end, end + 2 * tensor.numel()
        entries[name] = {
            "dtype": {"bfloat16": "BF16", "float16": "F16"}[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return directory


def write_machine(work: Path, drives: int) -> Path:
    """So many drives as one that is as fast as all of them."""
    machine = read_machine(MACHINE)
    one = machine.drives[0]
    together = one.model_copy(
        update={
            "read_bytes_per_second": drives * one.read_bytes_per_second,
            "write_bytes_per_second": drives * one.write_bytes_per_second,
        }
    )
    path = work / f"drives-{drives}.yaml"
    path.write_text(machine_text(machine.model_copy(update={"drives": (together,)})), encoding="utf-8")
    return path


def least_memory(config: Config) -> tuple[int, int, int]:
    """Bytes of host and device memory that a step needs, and of its largest block."""
    session = Session(make_method(config), only_plan=True)
    try:
        shape = objective_class(config).full_shape(config, session, config.dataset.sequence_length)
        block_bytes = max(layout.num_bytes for layout in session.parts.layouts)
        return *session.least_memory(shape), block_bytes
    finally:
        session.close()


def compare_throughput(work: Path) -> None:
    models = {name: write_headers(work / name, SIZES[name], True, "bfloat16") for name in ("13B", "175B")}
    found = []
    print(f"LoHan\n{'model':6}{'rows':>5}{'drives':>8}{'published':>11}{'predicted':>11}{'error':>8}{'s/step':>9}  waits for")
    for name, rows, drives, published in LOHAN:
        planned = plan_full(models[name], rows, write_machine(work, drives), work)
        step = predict_step(planned, planned.rates, planned.timing)
        predicted = step_operations(SIZES[name], rows) / step.seconds / 1e12
        found.append((published, predicted))
        print(
            f"{name:6}{rows:5}{drives:8}{published:11.1f}{predicted:11.1f}{predicted / published - 1:8.0%}{step.seconds:9.1f}  "
            + ", ".join(f"{server} {busy / step.seconds:.0%}" for server, busy in step.busy_seconds.items()),
            flush=True,
        )
    errors, others = ([abs(share * theirs / ours - 1) for ours, theirs in found] for share in (1, 0.75))
    print(f"error: median {statistics.median(errors):.1%}, largest {max(errors):.1%}")
    print(f"  if what was published counts no recomputation: median {statistics.median(others):.1%}")
    right, pairs = ordered_pairs(found)
    print(f"rank order: {right} of {pairs} pairs are in the published order, Spearman's rho {rank_correlation(found):.2f}")


def plan_full(model: Path, rows: int, machine: Path, work: Path) -> PlannedRun:
    """With host memory for what streams, and little more that weights or state could stay in."""
    values: dict[str, Any] = {
        "model": str(model), "method": "full", "machine": str(machine), "output": str(work / "out"),
        "training": {"batch_size": rows, "micro_batch_size": min(rows, MICRO_BATCH)},
        "dataset": {"sequence_length": TOKENS},
    }  # fmt: skip
    host_bytes, _, block_bytes = least_memory(Config(**values))
    # Blocks that are read ahead, and the state of two, six times as large with its weights, on its way.
    return Trainer(Config(**values, host_memory=host_bytes + (4 + 2 * 6) * block_bytes)).plan()


def step_operations(size: Size, rows: int) -> float:
    """Forward, recomputation and backward: twice the forward's."""
    share = 1 + TOKENS / (6 * size.width) + VOCABULARY / (16 * size.layers * size.width)
    return 96 * rows * TOKENS * size.layers * size.width**2 * share


def ordered_pairs(found: list[tuple[float, float]]) -> tuple[int, int]:
    """(pairs that are in the same order, pairs) of those that differ."""
    pairs = [(a, b) for a, b in combinations(found, 2) if a[0] != b[0] and a[1] != b[1]]
    return sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in pairs), len(pairs)


def rank_correlation(found: list[tuple[float, float]]) -> float:
    """Spearman's: of ranks, those of equal values being their mean."""
    columns = (sorted(column) for column in zip(*found, strict=True))
    places = [{value: column.index(value) + column.count(value) / 2 for value in column} for column in columns]
    return statistics.correlation(*([place[pair[i]] for pair in found] for i, place in enumerate(places)))


def compare_memory(work: Path) -> None:
    print(f"\nZO2\n{'model':6}{'published':>11}{'ours':>8}{'with the driver':>17}")
    for name, ours in memory_points(work):
        print(f"{name:6}{ZO2[name]:11.2f}{ours / 2**30:8.2f}{(ours + CONTEXT_BYTES) / 2**30:17.2f}", flush=True)


def memory_points(work: Path) -> Iterator[tuple[str, int]]:
    """(model, bytes of device memory)."""
    machine = write_machine(work, 12)
    for name in ZO2:
        model = write_headers(work / f"zo2-{name}", SIZES[name], False, "float16")
        config = Config(
            model=str(model), method="zo", machine=str(machine), output=work / "out",
            zo={"noise": "gaussian", "rounding": "nearest", "fold_steps": 1}, engine={"lookahead": 1},
            training={"batch_size": 1, "micro_batch_size": 1}, dataset={"sequence_length": 2048},
        )  # fmt: skip
        yield name, least_memory(config)[1]


if __name__ == "__main__":
    main()
