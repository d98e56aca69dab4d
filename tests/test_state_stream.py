"""The stream of optimizer state gives what was written last, whatever is kept, skipped or out of order; wrong calls raise."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import finetune.offload.update.units
from finetune.memory.errors import UserError
from finetune.memory.slots import Slab
from finetune.offload.devices.base import map_host_bytes
from finetune.offload.residency.io import FaultPlan, IOEngine
from finetune.offload.update.gradient_spill import GradientSpill
from finetune.offload.update.rules import OPTIMIZERS
from finetune.offload.update.store import WorkingStore
from finetune.offload.update.stream import Keeping, Request, StateStream
from finetune.offload.update.units import UpdateUnit, make_unit
from finetune.offload.weights.formats import Extent, PlainTensor
from finetune.offload.weights.layout import layout_block

PIECES = 5


@pytest.fixture
def units(tmp_path, monkeypatch) -> list[UpdateUnit]:
    """Three bf16 matrices of five pieces of a page."""
    monkeypatch.setattr(finetune.offload.update.units, "PIECE_BYTES", 4096)
    shape = (PIECES, 2048)
    sources = [PlainTensor(torch.bfloat16, shape, (Extent(tmp_path / "x", 0, PIECES * 4096, 0),)) for _ in "abc"]
    return [make_unit(name, layout_block({"w": s}), {"w": f"{name}.w"}) for name, s in zip("abc", sources, strict=True)]


def make_stream(io: IOEngine, directory: Path, units, *, buffers: int = 4, kept: int = 0) -> StateStream:
    store = WorkingStore(directory, io, {})
    slot_bytes = Keeping().piece_format(units[0], 0, OPTIMIZERS["adamw"]()).num_bytes
    pool = Slab(map_host_bytes(slot_bytes * (buffers + kept))).carve("state", slot_bytes, buffers + kept)
    return StateStream(io, store, pool, keeping=Keeping(), threads=1, kept_pieces=kept)


def request(unit: UpdateUnit, rule: str = "adamw") -> Request:
    return Request(unit, frozenset({"w"}), OPTIMIZERS[rule]())


@pytest.mark.parametrize("rule", ["adamw", "lamb"])
@pytest.mark.parametrize("buffers, kept", [(1, 0), (4, 0), (4, 3), (2, 3 * PIECES)])
def test_what_was_written_last_is_found(buffers, kept, rule, units, tmp_path):
    order = random.Random(buffers + kept)
    expected = {(unit.name, index): (0, 0) for unit in units for index in range(PIECES)}  # stamp, updates
    stamp = 0
    with IOEngine("threads", request_bytes=4096, inject=FaultPlan(short_every=3, short_bytes=512)) as io:
        stream = make_stream(io, tmp_path / "store", units, buffers=buffers, kept=kept)
        for step in range(1, 8):
            chosen = order.sample(units, order.randrange(1, 4))
            stream.begin([request(unit, rule) for unit in chosen])
            if order.random() < 0.3:
                order.shuffle(chosen)  # they come in another order, and one more does
                chosen.append(order.choice([unit for unit in units if unit not in chosen] or chosen[:1]))
            for unit in dict.fromkeys(unit.name for unit in chosen):
                unit = next(u for u in units if u.name == unit)
                indices = sorted(order.sample(range(PIECES), order.randrange(PIECES + 1)))
                for changing in (False, True) if rule == "lamb" else (True,):
                    for index in indices:
                        piece = stream.take(request(unit, rule), index)
                        wanted, updates = expected[unit.name, index]
                        assert bool((piece.all_state == wanted).all()) and piece.updates == updates
                        assert bool((piece.masters(torch.uint8) == wanted).all())
                        if changing:
                            stamp = stamp % 250 + 1
                            piece.buffer.fill_(stamp)
                            stream.write(piece, updates + 1)
                            expected[unit.name, index] = (stamp, updates + 1)
                        else:
                            stream.put_back(piece)
                        stream.fetch_ahead()
            if order.random() < 0.5:
                stream.settle(units[0].name)
            stream.drain()
            stream._store.commit(step, {})
        assert stream._pool.free_count == buffers + kept - sum(piece.kept for piece in stream._pieces.values())
        assert all(piece.kept for piece in stream._pieces.values()) and len(stream._pieces) <= kept
        stream._store.close()


def test_wrong_orders_of_calls(units, tmp_path):
    with IOEngine("threads") as io:
        stream = make_stream(io, tmp_path / "store", units)
        stream.begin([request(units[0])])
        piece = stream.take(request(units[0]), 0)
        with pytest.raises(RuntimeError, match="piece 0 of a: expected ready, it is in use"):
            stream.take(request(units[0]), 0)
        stream.write(piece, 1)
        for again in (lambda: stream.write(piece, 2), lambda: piece.buffer, lambda: stream.put_back(piece)):
            with pytest.raises(RuntimeError, match="piece 0 of a: expected in use, it is writing"):
                again()
        stream.drain()
        with pytest.raises(RuntimeError, match="piece 0 of a: expected in use, it is away"):
            stream.write(piece, 2)
        assert stream._store.pieces["a", 0].updates == 1
        stream._store.close()


def test_damage_is_found_before_it_is_used(units, tmp_path):
    with IOEngine("threads") as io:
        stream = make_stream(io, tmp_path / "store", units)
        piece = stream.take(request(units[0]), 2)
        piece.buffer.fill_(7)
        stream.write(piece, 1)
        stream.drain()
        stored = stream._store.pieces["a", 2]
        with open(stream._store.path, "r+b") as file:
            file.seek(stored.state_offset + 100)
            file.write(b"\0")
        with pytest.raises(UserError, match="state of a, bytes 8192 to 12288 of the unit, are not what was written"):
            stream.take(request(units[0]), 2)
        stream._store.close()


def test_gradients_wait_on_disk(tmp_path):
    with IOEngine("threads") as io:
        spill = GradientSpill(io, tmp_path)
        generator = torch.Generator().manual_seed(1)
        gradients = {name: {"w": torch.randn(70, 30, generator=generator), "b": torch.ones(3)} for name in "abc"}
        for name in gradients:
            spill.put(name, gradients[name])
        with pytest.raises(RuntimeError, match="gradients of b: expected in use, it is away"):
            spill.put("b", gradients["b"])  # the first ones would be lost
        assert spill.take("none") == {} == spill.peek("none")
        for take in (spill.peek, spill.peek, spill.take):
            for name in "bca":
                found = take(name)
                assert found.keys() == {"w", "b"} and all(found[key].equal(gradients[name][key]) for key in found)
        assert spill.take("a") == {}
        size = (tmp_path / "gradients").stat().st_size
        spill.put("a", gradients["b"])
        assert spill.take("a")["w"].equal(gradients["b"]["w"])
        assert (tmp_path / "gradients").stat().st_size == size  # room is used again
        spill.close()
    assert not list(tmp_path.iterdir())
