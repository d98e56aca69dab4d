"""A budget of bits spread over matrices: against every allocation there is, BAQ's closed form, and errors that are measured."""

from __future__ import annotations

from itertools import product
from math import log2
from pathlib import Path

import numpy as np
import pytest
import torch
from extents import read_source
from safetensors.torch import load_file
from test_quantize import matrix, quantized, unrounded
from text_models import write_model

from finetune.offload.files.checkpoint import CheckpointError, TensorEntry, read_checkpoint
from finetune.offload.quantize import sensitivity
from finetune.offload.quantize.allocation import Choice, allocate, least_bits
from finetune.offload.quantize.outline import Packing, outline
from finetune.offload.quantize.sensitivity import relative_errors
from finetune.offload.quantize.stream import Written, write_quantized
from finetune.offload.weights.parts import cut


def random_choices(seed: int) -> list[list[Choice]]:
    """Of five matrices of unlike sizes, some with errors that do not fall with their bits."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(5):
        count = int(generator.integers(1, 30))
        bits = [4 * count + int(generator.integers(0, 3)), 8 * count, 16 * count]
        errors = [float(generator.exponential()), float(generator.exponential() / 8), 0.0]
        made.append([Choice(bits[i], errors[i]) for i in generator.permutation(3)])
    return made


def total(choices: list[list[Choice]], found: list[int]) -> Choice:
    picked = [options[index] for options, index in zip(choices, found, strict=True)]
    return Choice(sum(one.bits for one in picked), sum(one.error for one in picked))


@pytest.mark.parametrize("seed", range(25))
def test_it_is_near_the_best_of_all_within_the_budget_and_better_with_more(seed):
    """Its distance from the best is at most what one upgrade of one matrix gains: with a part of the first one that did not
    fit it would fill the budget, and no allocation is better than that."""
    choices = random_choices(seed)
    every = [total(choices, list(found)) for found in product(*(range(len(options)) for options in choices))]
    least, most = least_bits(choices), max(one.bits for one in every)
    one_gain = max(a.error for options in choices for a in options)
    last = float("inf")
    for budget in range(least, most + 40, 37):
        found = total(choices, allocate(choices, budget))
        best = min(one.error for one in every if one.bits <= budget)
        assert found.bits <= budget and best <= found.error <= min(best + one_gain, last)
        last = found.error
    assert last == 0.0
    with pytest.raises(ValueError, match=f"for matrices that take {least}"):
        allocate(choices, least - 1)


@pytest.mark.parametrize("seed", range(10))
def test_it_is_the_best_of_all_where_every_upgrade_takes_as_much(seed):
    generator = np.random.default_rng(seed)
    choices = []
    for _ in range(4):
        drops = sorted(generator.exponential(size=3))
        choices.append([Choice(8 * i, float(sum(drops[: 3 - i]))) for i in range(4)])
    every = [total(choices, list(found)) for found in product(range(4), repeat=4)]
    for budget in range(0, 4 * 24 + 1, 4):
        best = min(one.error for one in every if one.bits <= budget)
        assert total(choices, allocate(choices, budget)).error == pytest.approx(best, rel=1e-12)


def test_with_all_bits_there_are_it_is_the_closed_form():
    """BAQ: b = mean + 1/2 log2(c / geometric mean of c), for errors c 2^(-2b)."""
    sensitivities = [4.0**k for k in (3, 0, -2, 5, -1)]
    mean = 9
    choices = [[Choice(bits, c * 4.0**-bits) for bits in range(30)] for c in sensitivities]
    middle = sum(log2(c) for c in sensitivities) / len(sensitivities)
    expected = [mean + (log2(c) - middle) / 2 for c in sensitivities]
    assert allocate(choices, mean * len(choices)) == expected == [11, 8, 6, 13, 7]


def entry_of(path: Path, name: str, weight: torch.Tensor) -> TensorEntry:
    offset = path.stat().st_size if path.exists() else 0
    with open(path, "ab") as file:
        file.write(weight.view(torch.uint8).numpy().tobytes())
    return TensorEntry(name, "BF16", tuple(weight.shape), path, offset, weight.nbytes)


def test_errors_are_those_of_the_matrices_that_are_written(tmp_path):
    model = write_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    entries = outline(cut(model), Packing("nf4")).packed_entries
    dense = {name: tensor for shard in model.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for packing in (Packing("nf4"), Packing("nf4", nested=False), Packing("int8")):
        found = relative_errors(entries, packing.nested)
        quantized(model, tmp_path / str(packing), packing)
        parts = cut(tmp_path / str(packing))
        for entry in entries:
            assert entry.shape[0] % 8 == 0  # so all rows are looked at
            value = dense[entry.name].double()
            weight = parts.sources[entry.name]
            error = (unrounded(weight, weight.load(read_source)) - value).square().sum() / value.square().sum()
            # A run of rows has blocks of its own, where rows are no multiple of a block.
            assert found[entry.name][packing.kind] == pytest.approx(float(error), rel=0.2 if packing.kind == "nf4" else 1e-4)


def test_a_sample_of_rows_tells_matrices_apart(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(4000, 256, generator=generator)
    peaked = flat.clone()
    peaked[:, 0] *= 60  # int8 has one scale for a row, nf4 for 64 numbers
    entries = [entry_of(tmp_path / "x", name, w.bfloat16()) for name, w in (("flat", flat), ("peaked", peaked))]
    whole = relative_errors(entries, nested=True)
    monkeypatch.setattr(sensitivity, "MATRIX_BYTES", 96 << 10)
    monkeypatch.setattr(sensitivity, "LEAST_BYTES", 1 << 10)
    some = relative_errors(entries, nested=True)
    for name in ("flat", "peaked"):
        assert some[name] != whole[name]
        assert some[name] == {kind: pytest.approx(error, rel=0.1) for kind, error in whole[name].items()}
    assert whole["peaked"]["int8"] > 3 * whole["flat"]["int8"] and whole["flat"]["nf4"] > 50 * whole["flat"]["int8"]
    assert relative_errors(entries[::-1], nested=True) == some


def test_numbers_that_a_format_cannot_hold_are_known(tmp_path):
    large, zero, bad = matrix((3, 5), torch.bfloat16) * 1e6, torch.zeros(4, 64).bfloat16(), torch.ones(4, 64).bfloat16()
    bad[2, 3] = float("inf")
    entries = [entry_of(tmp_path / "x", name, w) for name, w in (("large", large), ("zero", zero), ("bad", bad))]
    found = relative_errors(entries[:2], nested=False)
    assert found["large"].keys() == {"nf4"} and found["zero"] == {"nf4": 0.0, "int8": 0.0}
    with pytest.raises(CheckpointError, match="'bad' holds infinity or NaN"):
        relative_errors(entries, nested=False)


def matrix_bytes(directory: Path) -> dict[str, int]:
    """Name of each linear layer's weight -> bytes of all tensors that are stored of it."""
    found: dict[str, int] = {}
    for name, entry in read_checkpoint(directory).tensors.items():
        if "_proj." in name:
            base = name[: name.index("_proj.")] + "_proj.weight"
            found[base] = found.get(base, 0) + entry.num_bytes
    return found


@pytest.mark.parametrize("bits, nested", [(5.4, False), (6.5, False), (8, True), (8.7, True), (11.5, False), (15.9, False)])
def test_what_is_written_stays_within_the_budget(bits, nested, tmp_path):
    """And each matrix has the bytes that it has in a model of its format alone."""
    model = write_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    count = {name: num_bytes // 2 for name, num_bytes in matrix_bytes(model).items()}
    if bits == 8:
        with pytest.raises(CheckpointError, match="8 bits a weight are too few: its matrices take at least 8.6"):
            outline(cut(model), Packing(None, nested, bits))
        return
    packing = Packing(None, nested, bits)
    written = quantized(model, tmp_path / "new", packing)
    plan = outline(cut(model), packing)
    stored = matrix_bytes(tmp_path / "new")
    assert stored.keys() == count.keys() == plan.kinds.keys()
    average = 8 * sum(stored.values()) / sum(count.values())
    assert average <= plan.matrix_bits <= bits and bits - average < 16 * max(count.values()) / sum(count.values())
    assert sum(plan.matrices.values()) == len(count) and 0 < written.relative_error < 0.2
    tensors = {name: t for shard in (tmp_path / "new").glob("*.safetensors") for name, t in load_file(shard).items()}
    for kind in set(plan.kinds.values()):
        alone = model
        if kind:
            alone = tmp_path / kind
            quantized(model, alone, Packing(kind, nested))
        expected = {name: t for shard in alone.glob("*.safetensors") for name, t in load_file(shard).items()}
        for weight in (name for name, found in plan.kinds.items() if found == kind):
            mine = {n for n in tensors if n == weight or n.startswith((f"{weight}.", weight.removesuffix("weight") + "SCB"))}
            assert len(mine) == {None: 1, "int8": 2, "nf4": 6 if nested else 4}[kind]
            assert all(tensors[name].equal(expected[name]) for name in mine)
    assert len(set(plan.kinds.values())) == 2


def test_more_bits_never_make_a_larger_error(tmp_path):
    model = write_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    parts = cut(model)
    errors = relative_errors(outline(parts, Packing("nf4")).packed_entries, nested=False)
    found = []
    for bits in np.arange(5.3, 15.9, 0.4):
        kinds = outline(parts, Packing(None, False, float(bits))).kinds
        found.append(sum(errors[name][kind] if kind else 0.0 for name, kind in kinds.items()))
    assert found == sorted(found, reverse=True) and len(set(found)) > 5


def test_transformers_reads_or_refuses_what_is_written(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    import transformers as tf

    model = write_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    mixed, partly = (tmp_path / name for name in ("mixed", "partly"))
    quantized(model, mixed, Packing(None, False, 6.5))
    with pytest.raises(ValueError, match="load_in_4bit and load_in_8bit are both True"):
        tf.AutoModelForCausalLM.from_pretrained(mixed, device_map="cpu")
    plan = outline(cut(model), Packing(None, False, 11.5))
    assert set(plan.kinds.values()) == {"int8", None}
    quantized(model, partly, plan.packing)
    loaded = tf.AutoModelForCausalLM.from_pretrained(partly, device_map="cpu").state_dict()
    expected = {name: t for path in partly.glob("*.safetensors") for name, t in load_file(path).items()}
    assert all(loaded[name].equal(expected[name]) and loaded[name].dtype == expected[name].dtype for name in plan.kinds)


def test_what_was_begun_in_other_kinds_is_not_gone_on_with(tmp_path):
    parts = cut(write_model("llama", tmp_path / "model"))
    plan, other = (outline(parts, Packing(None, False, bits)) for bits in (6.0, 7.0))
    assert plan.kinds != other.kinds
    (tmp_path / "new").mkdir()
    write_quantized(plan, tmp_path / "new")
    assert Written.read(tmp_path / "new", plan).num_bytes and not Written.read(tmp_path / "new", other).num_bytes
    write_quantized(other, tmp_path / "new")
    quantized(tmp_path / "model", tmp_path / "fresh", other.packing)
    for path in (tmp_path / "fresh").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "new" / path.name).read_bytes()

