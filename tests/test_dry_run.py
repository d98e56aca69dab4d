"""The dry run's peak of one block visit against the bytes that are really live when the block runs."""

from __future__ import annotations

import weakref

import pytest
import torch
from mixtures import MIXTURES
from tiny_models import CONFIGS, make_config, save_tiny
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.adapters import lora, prefix
from finetune.memory.errors import UserError
from finetune.methods.base import make_method
from finetune.offload.devices.base import map_host_bytes
from finetune.offload.residency.io import IOEngine
from finetune.offload.sizing.chunked_dry_run import measure_chunked_visit
from finetune.offload.sizing.dry_run import MaskSize, first_call, measure_masks, measure_visit
from finetune.offload.sizing.needs import STEP
from finetune.offload.step.sequence_chunks import SequenceChunks
from finetune.offload.weights.layout import bind_views
from finetune.offload.weights.parts import cut
from finetune.planned_run import BatchShape
from finetune.session import Session


class PeakOfStorages(TorchDispatchMode):
    """Largest sum of the storages that operations have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outside = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._seen and key not in outside:
                    self._seen.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("rows, length", [(1, 23), (3, 131)])
def test_peak_of_a_training_visit(name, rows, length, tmp_path, monkeypatch):
    config = CONFIGS[name]()
    if name == "gpt2":
        config.n_positions = 131
        monkeypatch.setitem(CONFIGS, name, lambda: config)
    parts = cut(save_tiny(name, tmp_path))
    model, _ = lora.attach(parts.model, {"r": 3, "target_modules": "all-linear"}, seed=0)
    model.train()
    inputs = {"input_ids": torch.zeros(rows, length, dtype=torch.int64), "use_cache": False}
    size = measure_visit(parts, model, inputs, train=True)
    hidden = torch.randn(rows, length, 40)
    assert size.boundary_bytes == hidden.nbytes

    layout, block = parts.layouts[0], parts.blocks[0]
    slot = map_host_bytes(layout.num_bytes)
    with IOEngine("threads") as io:
        extents = [(io.open(r.path), r.file_offset, r.num_bytes, slot.data_ptr() + r.slot_offset) for r in layout.reads]
        io.wait(io.submit_reads(extents))
    parts.bindings[0].bind(bind_views(slot, layout))
    hidden.requires_grad_()
    kwargs = {} if name == "gpt2" else {"position_embeddings": (torch.ones(1, length, 12), torch.zeros(1, length, 12))}
    with PeakOfStorages() as measured:
        with torch.no_grad():
            block(hidden, **kwargs)
        before = measured.live
        output = block(hidden, **kwargs)
        output = output if isinstance(output, torch.Tensor) else output[0]
        shape, edge = output.shape, get_gradient_edge(output)
        del output
        graph_bytes = measured.live - before
        torch.autograd.backward([edge], [torch.ones(shape)])
    # What the planner adds to the estimate is 15 %.
    assert measured.peak / 1.15 <= size.peak_bytes <= 1.6 * measured.peak
    assert graph_bytes <= size.graph_bytes <= 1.02 * graph_bytes
    assert size.graph_blocks == len(parts.blocks)


def test_blocks_of_which_no_graphs_are_kept(tmp_path):
    """Those below the first adapter; those below a block of another class than the one that was measured."""
    parts = cut(save_tiny("llama", tmp_path))
    lora.attach(parts.model, {"r": 3, "target_modules": ["q_proj"], "layers_to_transform": [1, 4]}, seed=0)
    inputs = {"input_ids": torch.zeros(1, 9, dtype=torch.int64), "use_cache": False}
    assert measure_visit(parts, parts.model, inputs, train=True).graph_blocks == 4
    parts.blocks[2].__class__ = type("OtherLayer", (type(parts.blocks[2]),), {})
    assert measure_visit(parts, parts.model, inputs, train=True).graph_blocks == 2
    assert measure_visit(parts, parts.model, inputs, train=False).graph_blocks == 0


def test_blocks_of_one_class_that_are_unlike_are_all_measured(tmp_path, monkeypatch):
    """Linear attention and the usual one: the block with most weights is not the one that keeps most."""
    kinds = ["linear_attention", "full_attention"]
    sizes = []
    for layer_types in ([kinds[0]] * 3, [kinds[1]] * 3, [*kinds, kinds[0]]):
        config = MIXTURES["qwen3-next"]()
        config.layer_types = layer_types
        monkeypatch.setitem(CONFIGS, "hybrid", lambda config=config: config)
        parts = cut(save_tiny("hybrid", tmp_path / str(len(sizes))), streams_experts=True)
        lora.attach(parts.model, {"r": 3, "target_modules": ["q_proj", "in_proj_qkvz"]}, seed=0)
        inputs = {"input_ids": torch.zeros(1, 9, dtype=torch.int64), "use_cache": False}
        sizes.append(measure_visit(parts, parts.model, inputs, train=True))
    alone, both = sizes[:2], sizes[2]
    assert both.graph_bytes == max(size.graph_bytes for size in alone) > min(size.graph_bytes for size in alone)
    assert both.peak_bytes == max(size.peak_bytes for size in alone)


@pytest.mark.parametrize(
    ("name", "rows", "packed", "bytes_per_pair"),
    [
        ("llama", 1, False, 0),  # causal attention needs no mask
        ("llama", 3, False, 3),  # one of booleans, for every row
        ("llama", 1, True, 1),
        ("gemma3", 1, False, 1),  # that of a window, 6 tokens here
        ("gemma3", 2, False, 2 * 2),  # and that of whole texts
        ("gemma2", 2, False, 2 * 2 * 4),  # numbers that are added to scores
        ("llama-prefix", 1, False, 1),  # texts do not begin where keys do
    ],
)
def test_masks(name, rows, packed, bytes_per_pair, tmp_path):
    parts = cut(save_tiny(name.removesuffix("-prefix"), tmp_path))
    window = getattr(parts.model.config, "sliding_window", None)
    model = prefix.attach(parts.model, 4, seed=0) if name.endswith("prefix") else parts.model
    size = measure_masks(parts, model, rows, 4000, packed)
    assert size.kept_bytes == pytest.approx(bytes_per_pair * 4000**2, rel=1e-3)
    assert size.made_bytes <= 4 * size.kept_bytes  # positions are compared, masks combined
    assert getattr(parts.model.config, "sliding_window", None) == window


def test_a_window_longer_than_the_text_needs_no_mask(tmp_path):
    parts = cut(save_tiny("gemma3", tmp_path))
    parts.model.config.sliding_window = 4096
    assert measure_masks(parts, parts.model, 1, 4000, False).kept_bytes == 0
    assert measure_masks(parts, parts.model, 1, 5000, False).kept_bytes == 5000**2


@pytest.mark.parametrize("packed", [False, True])
def test_a_plan_counts_a_mask_for_every_lane(packed, tmp_path, monkeypatch):
    model = save_tiny("llama", tmp_path / "model")
    config = make_config(model, None, tmp_path / "out", method="zo", zo={"perturbations": 3})
    session = Session(make_method(config))
    shapes = [BatchShape.of_text(1 + (not packed), 90, 7, True, some) for some in (packed, False)]
    with_masks = session.plan(shapes[0]).needs.bytes_of(STEP)
    monkeypatch.setattr("finetune.needs_of_model.measure_masks", lambda *_: MaskSize(0, 0))
    without = session.plan(shapes[1]).needs.bytes_of(STEP)
    session.close()
    assert with_masks - without == 7 * 90**2 * (1 if packed else 2)


@pytest.mark.parametrize("layerdrop", [0.9, 1.0])
def test_a_pass_that_leaves_out_all_blocks_is_tried_again(layerdrop, tmp_path, monkeypatch):
    """LayerDrop of 0.9 leaves out all four in two passes of three."""

    def make():
        config = CONFIGS["opt-layerdrop"]()
        config.layerdrop = layerdrop
        return config

    monkeypatch.setitem(CONFIGS, "dropping", make)
    session = Session(make_method(make_config(save_tiny("dropping", tmp_path / "model"), None, tmp_path)), only_plan=True)
    try:
        for seed in range(4):
            torch.manual_seed(seed)
            if layerdrop < 1:
                assert session.plan(BatchShape.of_text(2, 20, 1, True)).plan.host_peak_bytes > 0
                continue
            with pytest.raises(UserError, match="OPTForCausalLM has run none of its blocks in 100 passes"):
                session.plan(BatchShape.of_text(2, 20, 1, True))
    finally:
        session.close()


@pytest.mark.parametrize(("name", "rows", "train"), [("llama", 2, True), ("gemma3", 1, True), ("llama", 1, False)])
def test_what_a_visit_in_chunks_takes_is_what_the_dry_run_says(name, rows, train, tmp_path):
    """And less than a whole visit. Of gemma3, masks of windows."""
    length, chunk = 1000, 64
    parts = cut(save_tiny(name, tmp_path))
    model, _ = lora.attach(parts.model, {"r": 3, "target_modules": "all-linear"}, seed=0)
    inputs = {"input_ids": torch.zeros(rows, length, dtype=torch.int64), "use_cache": False}
    size = measure_chunked_visit(parts, model, inputs, chunk, train)
    whole = measure_visit(parts, model, inputs, train)
    assert size.peak_bytes < whole.peak_bytes / (3 if train else 2)
    assert size.flops == pytest.approx(whole.flops, rel=0.01) and size.graph_blocks == 0

    layout, chunks, block = parts.layouts[0], SequenceChunks(chunk), parts.blocks[0]
    slot = map_host_bytes(layout.num_bytes)
    with IOEngine("threads") as io:
        extents = [(io.open(r.path), r.file_offset, r.num_bytes, slot.data_ptr() + r.slot_offset) for r in layout.reads]
        io.wait(io.submit_reads(extents))
    parts.bindings[0].bind(bind_views(slot, layout))
    with chunks.masks:
        _, args, kwargs = first_call(parts, model, inputs)
    hidden = torch.randn(rows, length, 40, requires_grad=train)

    def forward(args, kwargs):
        return block(*args, **kwargs)

    with PeakOfStorages() as measured:
        output = chunks.forward(block, forward, (hidden, *args[1:]), kwargs)
        if train:
            grads = {0: torch.ones(output.shape)}
            del output
            chunks.backward(block, forward, ((hidden, *args[1:]), kwargs), grads)
    assert measured.peak / 1.15 <= size.peak_bytes <= 1.6 * measured.peak
