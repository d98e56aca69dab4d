"""Embedding rows read on demand against the whole table."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from finetune.memory.errors import UserError
from finetune.offload.residency.io import IOEngine
from finetune.offload.weights.embedding import RowsOnDemand
from finetune.offload.weights.formats import Extent, PlainTensor

ROWS, WIDTH = 101, 13


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def table(request, tmp_path) -> tuple[torch.Tensor, PlainTensor]:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(request.param)
    path = tmp_path / "model.safetensors"
    save_file({"w": weight}, path)
    start = path.stat().st_size - weight.nbytes
    return weight, PlainTensor(weight.dtype, (ROWS, WIDTH), (Extent(path, start, weight.nbytes, 0),))


def placeholder(kind, padding_idx=None) -> nn.Embedding:
    module = kind(ROWS, WIDTH, padding_idx=padding_idx, device="meta")
    module.weight = nn.Parameter(torch.full((1,), float("nan")).expand(ROWS, WIDTH), requires_grad=False)
    return module


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_same_values_for_a_step_and_for_ids_that_come_unannounced(kind, table):
    weight, source = table
    module = placeholder(kind, padding_idx=0)
    reference = kind(ROWS, WIDTH, _weight=weight.float())
    first = torch.tensor([[0, 5, 5, 100], [99, 7, 0, 6]])
    with IOEngine("threads") as io:
        rows = RowsOnDemand(module, source, torch.float32, io, torch.device("cpu"))
        rows.read(first)
        read = io.read_bytes
        for ids in (first, first[:, 1:], first[0], torch.tensor([[42]]), torch.tensor([[3, 1], [100, 0]])):
            found = module(ids)
            assert found.dtype == torch.float32 and found.equal(reference(ids))
            if set(ids.flatten().tolist()) <= set(first.flatten().tolist()):
                assert io.read_bytes == read  # announced rows are read once
        assert bool(torch.isnan(module.weight).all())  # the placeholder is back


@pytest.mark.parametrize("wrong", [-1, ROWS, 10**9])
def test_ids_outside_the_table_are_named(wrong, table):
    _, source = table
    with IOEngine("threads") as io:
        rows = RowsOnDemand(placeholder(nn.Embedding), source, torch.float32, io, torch.device("cpu"))
        with pytest.raises(UserError, match=f"token id {wrong} is outside the embedding table of {ROWS} rows"):
            rows.read(torch.tensor([1, wrong, 5]))


def test_serves_its_module_and_wrappers_of_it(table):
    _, source = table
    module = placeholder(nn.Embedding)
    with IOEngine("threads") as io:
        rows = RowsOnDemand(module, source, torch.float32, io, torch.device("cpu"))
        assert rows.serves(module) and rows.serves(nn.Sequential(module))
        assert not rows.serves(nn.Embedding(2, 2))


def test_gradients_of_a_step_whose_forwards_ask_for_more_rows(table):
    """As where ids of another argument are looked up in the same table."""
    weight, source = table
    module = placeholder(nn.Embedding, padding_idx=0)
    reference = nn.Embedding(ROWS, WIDTH, padding_idx=0, _weight=weight.float())
    lanes = [torch.tensor([[5, 0, 7]]), torch.tensor([[42, 5]]), torch.tensor([[7, 7, 99]]), torch.tensor([[5, 42]])]
    with IOEngine("threads") as io:
        rows = RowsOnDemand(module, source, torch.float32, io, torch.device("cpu"))
        rows.trained = True
        for announced in (lanes[0], lanes[1]):  # the second step has nothing left of the first
            rows.read(announced)
            for scale, ids in enumerate(lanes, 1):
                for table_of in (module, reference):
                    (scale * table_of(ids).sin().sum()).backward()
            found = torch.zeros(ROWS, WIDTH).index_add_(0, rows.ids, rows.take_gradient())
            torch.testing.assert_close(found, reference.weight.grad)
            reference.weight.grad = None
        rows.read(lanes[0])
        assert rows.take_gradient() is None
