"""Block inputs that wait on disk come back with the same bits, through slow and faulty I/O and the smallest pool."""

from __future__ import annotations

import random

import pytest
import torch

import finetune.offload.step.activations
from finetune.memory.slots import Slab
from finetune.offload.devices.base import map_host_bytes
from finetune.offload.residency.io import FaultPlan, IOEngine, IOFailure
from finetune.offload.step.activations import Activations, SpillingActivations

SLOT_BYTES = 8192
FAULTS = {
    "none": FaultPlan(),
    "short": FaultPlan(short_every=2, short_bytes=512),
    "again": FaultPlan(eagain_every=3, eintr_every=2),
    "no O_DIRECT": FaultPlan(einval_direct_every=1),
}


@pytest.fixture(autouse=True)
def small_tensors_spill(monkeypatch):
    monkeypatch.setattr(finetune.offload.step.activations, "SPILL_MIN_BYTES", 64)


def make_tensor(generator: torch.Generator, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, 13, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("backend", ["threads", "auto"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("slots, host_bytes", [(1, 0), (2, 3000), (4, 0)])
def test_restored_bit_for_bit_in_reverse(slots, host_bytes, fault, backend, tmp_path):
    generator = torch.Generator().manual_seed(1)
    with IOEngine(backend, request_bytes=4096, inject=FAULTS[fault]) as io:
        pool = Slab(map_host_bytes(SLOT_BYTES * slots)).carve("a", SLOT_BYTES, slots)
        kept = SpillingActivations(io, pool, host_bytes, torch.device("cpu"), tmp_path)
        assert not list(tmp_path.iterdir())  # the file has no name
        for step in range(3):
            dtype = (torch.float32, torch.bfloat16, torch.float64)[step]
            originals = [make_tensor(generator, 1 + (7 * i) % 78, dtype) for i in range(17)]
            expected = [t.detach().clone() for t in originals]
            saved = []
            for tensor in originals:
                saved.append(kept.save(tensor))
                saved[-1].users += 1
            del originals, tensor
            kept.begin_backward(reversed(saved))
            for one, wanted in zip(reversed(saved), reversed(expected), strict=True):
                found = one.restore()
                assert found.dtype == wanted.dtype and found.equal(wanted)
                del found
                one.release()
            assert pool.free_count == slots
        kept.close()
        assert io.write_bytes > 0 or fault == "none"


def test_a_tensor_with_several_users_lives_until_the_last(tmp_path):
    with IOEngine("threads") as io:
        pool = Slab(map_host_bytes(SLOT_BYTES * 2)).carve("a", SLOT_BYTES, 2)
        kept = SpillingActivations(io, pool, 0, torch.device("cpu"), tmp_path)
        generator = torch.Generator().manual_seed(2)
        tensor = make_tensor(generator, 30)
        saved = kept.save(tensor)
        saved.users = 3
        kept.begin_backward([saved, saved, saved])
        for left in (2, 1, 0):
            assert saved.restore().equal(tensor.detach())
            saved.release()
            assert saved.users == left
        assert pool.free_count == 2
        with pytest.raises(RuntimeError, match="more often than it was used"):
            saved.release()
        kept.close()


def test_visits_that_are_never_restored_leave_nothing_behind(tmp_path):
    generator = torch.Generator().manual_seed(3)
    with IOEngine("threads") as io:
        pool = Slab(map_host_bytes(SLOT_BYTES * 2)).carve("a", SLOT_BYTES, 2)
        kept = SpillingActivations(io, pool, 4000, torch.device("cpu"), tmp_path)
        order = random.Random(4)
        for _ in range(5):
            saved = [kept.save(make_tensor(generator, 20 + i)) for i in range(9)]
            for one in saved:
                one.users += 1
            kept.begin_backward(reversed(saved))
            order.shuffle(saved)
            for one in saved:
                one.release()
            assert pool.free_count == 2
        end = kept._end
        saved = [kept.save(make_tensor(generator, 20 + i)) for i in range(9)]
        assert kept._end == end  # places in the file are used again
        for one in saved:
            one.users += 1
            one.release()
        kept.close()


def test_what_is_not_spilled(tmp_path):
    """Small, large, strided tensors and those without a gradient stay as they are."""
    with IOEngine("threads") as io:
        pool = Slab(map_host_bytes(SLOT_BYTES)).carve("a", SLOT_BYTES, 1)
        kept = SpillingActivations(io, pool, 0, torch.device("cpu"), tmp_path)
        tensors = [
            torch.ones(3, requires_grad=True),
            torch.ones(SLOT_BYTES // 4 + 1, requires_grad=True),
            torch.ones(40, 40, requires_grad=True)[:, ::2],
            torch.ones(40, 40),
        ]
        for tensor in tensors:
            saved = kept.save(tensor)
            saved.users = 1
            assert saved.restore().data_ptr() == tensor.data_ptr()
            saved.release()
        assert io.write_bytes == 0
        kept.close()


@pytest.mark.parametrize("at", [1, 4])
def test_a_failed_transfer_surfaces(at, tmp_path):
    generator = torch.Generator().manual_seed(5)
    with IOEngine("threads", request_bytes=4096, inject=FaultPlan(eio_at=at)) as io:
        pool = Slab(map_host_bytes(SLOT_BYTES * 2)).carve("a", SLOT_BYTES, 2)
        kept = SpillingActivations(io, pool, 0, torch.device("cpu"), tmp_path)
        with pytest.raises(IOFailure, match=r"activations-.*Input/output error"):
            saved = [kept.save(make_tensor(generator, 60)) for _ in range(6)]
            for one in saved:
                one.users += 1
            for one in reversed(saved):
                one.restore()
                one.release()


def test_in_memory(tmp_path):
    kept = Activations()
    tensor = torch.ones(3, requires_grad=True)
    saved = kept.save(tensor)
    saved.users = 1
    assert saved.restore().equal(tensor) and not saved.restore().requires_grad
    saved.release()
    with pytest.raises(RuntimeError, match="after its last release"):
        saved.restore()
