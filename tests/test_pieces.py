"""The machine of bytes that move: every change but those of its table raises, before anything moves."""

from __future__ import annotations

import ast
import inspect
import itertools
import random
import re

import numpy as np
import pytest
import torch

from finetune.memory.slots import Slab
from finetune.offload.residency.io import FaultPlan, IOEngine, IOFailure
from finetune.offload.residency.pieces import Piece, State, new_pool, pass_through
from finetune.offload.residency.tiers import Tier
from finetune.offload.step.activations import SpillingActivations
from finetune.offload.step.lane_storages import LaneActivations
from finetune.offload.update.gradient_spill import GradientSpill
from finetune.offload.update.stream import StateStream

CHANGES = {
    "fetch": (State.AWAY, State.FETCHING),
    "arrive": (State.FETCHING, State.READY),
    "acquire": (State.READY, State.IN_USE),
    "release": (State.IN_USE, State.READY),
    "write": (State.IN_USE, State.WRITING),
    "written": (State.WRITING, State.READY),
    "leave": (State.READY, State.AWAY),
}
USERS = {user.__name__: user for user in (Tier, StateStream, SpillingActivations, LaneActivations, GradientSpill)}
PATHS = {
    State.AWAY: [],
    State.FETCHING: ["fetch"],
    State.READY: ["fetch", "arrive"],
    State.IN_USE: ["fetch", "arrive", "acquire"],
    State.WRITING: ["fetch", "arrive", "acquire", "write"],
}


class FakeIO:
    """Tickets count from 0; `log` has what was asked."""

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.failing = False

    def submit_reads(self, extents) -> int:
        self.log.append(("read", *extents))
        return len(self.log) - 1

    def submit_writes(self, extents) -> int:
        self.log.append(("write", *extents))
        return len(self.log) - 1

    def wait(self, ticket: int) -> float:
        self.log.append(("wait", ticket))
        if self.failing:
            raise OSError("broken")
        return 1.0

    def done(self, ticket: int) -> bool:
        return False


def piece_in(state: State, io: FakeIO, pool) -> Piece:
    piece = Piece("the piece", io)
    for name in PATHS[state]:
        change(piece, name, pool)
    assert piece.state is state
    return piece


def change(piece: Piece, name: str, pool) -> None:
    arguments = {"fetch": (pool.lease() if pool.free_count else None, ["from"]), "write": (["to"],)}.get(name, ())
    getattr(piece, name)(*arguments)


def pool_of(count: int):
    return Slab(torch.zeros(4096 * count, dtype=torch.uint8)).carve("test", 4096, count)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("name", CHANGES)
def test_every_change_and_every_wrong_one(name, state):
    io, pool = FakeIO(), pool_of(1)
    piece = piece_in(state, io, pool)
    leaves, enters = CHANGES[name]
    before = list(io.log), pool.free_count
    if state is leaves:
        change(piece, name, pool)
        assert piece.state is enters and pool.free_count == (enters is State.AWAY)
    else:
        with pytest.raises(RuntimeError, match=f"the piece: expected {leaves.value}, it is {state.value}"):
            getattr(piece, name)(*{"fetch": (None, []), "write": ([],)}.get(name, ()))
        assert piece.state is state and (io.log, pool.free_count) == before


def test_the_table_names_who_makes_each_change():
    lines = [line for line in Piece.__doc__.splitlines() if line.startswith("        ")]
    columns = list(itertools.pairwise([*(match.start() for match in re.finditer(r"\S+", lines[0])), None]))
    head, *rows = [[line[low:high].strip() for low, high in columns] for line in lines]
    assert {by: (State[leaves], State[enters]) for leaves, enters, by, *_ in rows} == CHANGES
    for row in rows:
        for user, named in zip(head[3:-1], row[3:-1], strict=True):
            assert callers(USERS[user], row[2]) == set(filter(None, named.split(", "))), (user, row[2])


def callers(user: type, change: str) -> set[str]:
    """Methods of the class that call this method of something else."""
    methods = ast.parse(inspect.getsource(user)).body[0].body
    return {
        method.name
        for method in methods
        if isinstance(method, ast.FunctionDef)
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and node.attr == change and ast.unparse(node.value) != "self"
    }


@pytest.mark.parametrize("state", State)
def test_its_buffer_is_the_users_alone(state):
    piece = piece_in(state, FakeIO(), pool_of(1))
    if state is State.IN_USE:
        assert piece.buffer.data_ptr() == piece.lease.address
    else:
        with pytest.raises(RuntimeError, match=f"expected in use, it is {state.value}"):
            _ = piece.buffer


@pytest.mark.parametrize("state, wait", [(State.FETCHING, "arrive"), (State.WRITING, "written")])
def test_a_wait_that_fails_can_be_repeated(state, wait):
    io = FakeIO()
    piece = piece_in(state, io, pool_of(1))
    io.failing = True
    for waiting in (wait, wait, "settle"):
        with pytest.raises(OSError, match="broken"):
            getattr(piece, waiting)()
        assert piece.state is state and not piece.settled
    io.failing = False
    assert piece.settle() == 1.0 and piece.settle() == 0.0 and piece.settled
    assert piece.state is State.READY


def test_bytes_that_a_check_refuses_have_not_arrived():
    piece = piece_in(State.FETCHING, FakeIO(), pool_of(1))

    def check() -> None:
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        piece.arrive(check)
    with pytest.raises(RuntimeError, match="expected ready, it is fetching"):
        piece.acquire()


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_what_passes_through_is_copied(slots, tmp_path):
    """Some ranges are written somewhere else, some only looked at."""
    content = np.random.default_rng(slots).integers(0, 256, 100_000, dtype=np.uint8).tobytes()
    (tmp_path / "old").write_bytes(content)
    (tmp_path / "new").write_bytes(bytes(len(content)))
    ranges = [(low, min(7000, len(content) - low)) for low in range(0, len(content), 7000)]
    random.Random(1).shuffle(ranges)
    expected = bytearray(len(content))
    with IOEngine("threads", request_bytes=4096, inject=FaultPlan(short_every=3, short_bytes=512)) as io:
        pool = new_pool(7000, slots)
        assert pool.buffer.data_ptr() % 4096 == 0
        source, target = io.open(tmp_path / "old"), io.open(tmp_path / "new", writable=True)
        coming = ((number, source, *place) for number, place in enumerate(ranges))
        seen = []
        for number, piece in pass_through(io, pool, coming):
            offset, num_bytes = ranges[number]
            assert bytes(piece.buffer[:num_bytes].numpy()) == content[offset : offset + num_bytes]
            seen.append(number)
            if number % 3:
                piece.write([(target, offset, num_bytes, piece.lease.address)])
                expected[offset : offset + num_bytes] = content[offset : offset + num_bytes]
        assert seen == list(range(len(ranges))) and pool.free_count == slots
    assert (tmp_path / "new").read_bytes() == expected


def test_what_is_larger_than_a_slot_is_not_read(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10_000))
    with IOEngine("threads") as io:
        pool = new_pool(4096, 2)
        with pytest.raises(ValueError, match="4097 bytes for a slot of 4096"):
            list(pass_through(io, pool, [("a", io.open(tmp_path / "file"), 0, 4097)]))


def test_one_slot_is_read_used_and_written_in_turn():
    io, pool = FakeIO(), pool_of(1)
    for name, piece in pass_through(io, pool, [("a", 1, 0, 10), ("b", 1, 10, 10)]):
        piece.write([name])
    at = pool.buffer.data_ptr()
    assert io.log == [
        ("read", (1, 0, 10, at)), ("wait", 0), ("write", "a"), ("wait", 2),
        ("read", (1, 10, 10, at)), ("wait", 4), ("write", "b"), ("wait", 6),
    ]  # fmt: skip


def test_a_failed_read_or_write_ends_it(tmp_path):
    (tmp_path / "file").write_bytes(bytes(20_000))
    for at in (1, 3):
        with IOEngine("threads", request_bytes=4096, inject=FaultPlan(eio_at=at)) as io:
            file = io.open(tmp_path / "file", writable=True)
            with pytest.raises(IOFailure, match="Input/output error"):
                for number, piece in pass_through(io, new_pool(4096, 2), ((i, file, 4096 * i, 4096) for i in range(4))):
                    piece.write([(file, 4096 * number, 4096, piece.lease.address)])
