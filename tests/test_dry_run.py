"""The dry run's peak of one block visit against the bytes that are really live when the block runs."""

from __future__ import annotations

import weakref

import pytest
import torch
from tiny_models import CONFIGS, save_tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.methods import lora
from offload.block_store import bind_views
from offload.devices.base import map_host_bytes
from offload.dry_run import measure_visit
from offload.io import IOEngine
from offload.model_parts import cut


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
    model = lora.attach(parts.model, {"r": 3, "target_modules": "all-linear"}, seed=0).train()
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
        output = block(hidden, **kwargs)
        output = output if isinstance(output, torch.Tensor) else output[0]
        output.backward(torch.ones_like(output))
    # What the planner adds to the estimate is 15 %.
    assert measured.peak / 1.15 <= size.peak_bytes <= 1.6 * measured.peak
