"""The I/O engine against Python's own file access: every alignment, both backends, every kind of trouble."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from finetune.memory.errors import UserError
from finetune.offload.residency.io import FaultPlan, IOEngine, IOFailure

PAGE = 4096
SMALL_REQUEST = 64 * 1024  # makes a few hundred kilobytes a long transfer


def io_uring_reason() -> str:
    with IOEngine() as engine:
        return engine.backend_reason


@pytest.fixture(params=["io_uring", "threads"])
def backend(request):
    if request.param == "io_uring" and (reason := io_uring_reason()):
        pytest.skip(reason)
    return request.param


class Memory:
    """A page-aligned buffer whose bytes outside the wanted ones are watched."""

    def __init__(self, num_bytes: int, fill: int = 0xA5) -> None:
        self.map = mmap.mmap(-1, num_bytes + PAGE)
        self.array = np.frombuffer(self.map, dtype=np.uint8)
        self.array[:] = fill
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        assert self.address % PAGE == 0


def random_bytes(num_bytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def make_file(path: Path, num_bytes: int, seed: int = 0) -> np.ndarray:
    content = random_bytes(num_bytes, seed)
    path.write_bytes(content.tobytes())
    return content


def random_extents(rng: np.random.Generator, size: int, count: int) -> list[tuple[int, int]]:
    """(offset, bytes) in a file of `size`: bounds near pages, tiny ones, long ones, some up to the end."""
    extents = []
    for _ in range(count):
        num_bytes = int(rng.choice([1, 7, PAGE - 1, PAGE, PAGE + 1, 30_000, 33_333, 3 * SMALL_REQUEST + 5, 300_001]))
        offset = int(rng.integers(0, size - num_bytes + 1))
        offset = min(offset // PAGE * PAGE + int(rng.choice([0, 0, 1, 8, PAGE - 1])), size - 1)
        num_bytes = size - offset if rng.random() < 0.1 else min(num_bytes, size - offset)
        extents.append((offset, num_bytes))
    return extents


def place(extents: list[tuple[int, int]], rng: np.random.Generator) -> tuple[list[int], int]:
    """A place in memory for each extent: congruent to its offset modulo a page, aligned, or neither; never touching."""
    places, end = [], 0
    for offset, num_bytes in extents:
        start = (end + PAGE) // PAGE * PAGE + int(rng.choice([offset % PAGE, offset % PAGE, 0, 8, 1234]))
        places.append(start)
        end = start + num_bytes
    return places, end + PAGE


def check_reads(engine: IOEngine, path: Path, content: np.ndarray, seed: int, count: int = 40) -> None:
    rng = np.random.default_rng(seed)
    extents = random_extents(rng, len(content), count)
    places, total = place(extents, rng)
    memory = Memory(total)
    expected = memory.array.copy()
    for (offset, num_bytes), start in zip(extents, places, strict=True):
        expected[start : start + num_bytes] = content[offset : offset + num_bytes]
    file_id = engine.open(path)
    ticket = engine.submit_reads(
        [(file_id, offset, n, memory.address + start) for (offset, n), start in zip(extents, places, strict=True)]
    )
    assert engine.wait(ticket) >= 0.0
    assert engine.done(ticket)
    assert np.array_equal(memory.array, expected)
    engine.close_file(file_id)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 1_000_003])
def test_reads_of_any_alignment_equal_the_file(tmp_path, backend, size):
    content = make_file(tmp_path / "data", size)
    with IOEngine(backend, request_bytes=SMALL_REQUEST, staging_bytes=SMALL_REQUEST) as engine:
        assert engine.backend == backend
        rng = np.random.default_rng(1)
        if size < 500_000:
            for offset, shift in [(0, 0), (0, 1), (size // 2, size // 2), (size // 2, 3), (size - 1, 0)]:
                memory = Memory(size + PAGE)
                file_id = engine.open(tmp_path / "data")
                engine.wait(engine.submit_reads([(file_id, offset, size - offset, memory.address + shift)]))
                assert np.array_equal(memory.array[shift : shift + size - offset], content[offset:])
                assert (memory.array[:shift] == 0xA5).all() and (memory.array[shift + size - offset :] == 0xA5).all()
        else:
            for seed in rng.integers(0, 1000, 5):
                check_reads(engine, tmp_path / "data", content, int(seed))


def test_default_sizes_and_large_reads(tmp_path, backend):
    content = make_file(tmp_path / "data", 9 * (1 << 20) + 77)
    with IOEngine(backend) as engine:
        memory = Memory(2 * len(content) + 4 * PAGE)
        file_id = engine.open(tmp_path / "data")
        second = (len(content) // PAGE + 1) * PAGE + 8  # not congruent: all of it staged
        engine.wait(
            engine.submit_reads(
                [(file_id, 0, len(content), memory.address), (file_id, 0, len(content), memory.address + second)]
            )
        )
        assert np.array_equal(memory.array[: len(content)], content)
        assert np.array_equal(memory.array[second : second + len(content)], content)
        assert 2 * len(content) <= engine.read_bytes <= 2 * len(content) + 16 * PAGE
        assert engine.busy_seconds > 0


@pytest.mark.parametrize("place_name", ["disk", "memory"])
def test_file_systems_with_and_without_a_disk(tmp_path, backend, place_name):
    folder = tmp_path if place_name == "disk" else Path("/dev/shm")
    if not folder.is_dir():
        pytest.skip("no tmpfs here")
    path = folder / f"finetune-test-{os.getpid()}"
    try:
        content = make_file(path, 700_001)
        with IOEngine(backend, request_bytes=SMALL_REQUEST) as engine:
            check_reads(engine, path, content, seed=5)
    finally:
        path.unlink(missing_ok=True)


def test_refused_o_direct_falls_back_and_is_noted(tmp_path, backend):
    content = make_file(tmp_path / "data", 700_001)
    with IOEngine(backend, request_bytes=SMALL_REQUEST, inject=FaultPlan(einval_direct_every=3)) as engine:
        check_reads(engine, tmp_path / "data", content, seed=6)
        assert any("O_DIRECT" in note and str(tmp_path / "data") in note for note in engine.notes)


def test_several_files_and_many_tickets_waited_for_in_any_order(tmp_path, backend):
    rng = np.random.default_rng(2)
    contents = [make_file(tmp_path / f"shard{i}", 400_000 + 1237 * i, seed=i) for i in range(5)]
    with IOEngine(backend, queue_depth=7, request_bytes=SMALL_REQUEST, staging_bytes=1) as engine:
        files = [engine.open(tmp_path / f"shard{i}") for i in range(5)]
        jobs = []
        for _ in range(60):
            extents, where = [], []
            for which in rng.integers(0, 5, 3):
                offset, num_bytes = random_extents(rng, len(contents[which]), 1)[0]
                extents.append((offset, num_bytes))
                where.append(int(which))
            places, total = place(extents, rng)
            memory = Memory(total)
            ticket = engine.submit_reads(
                [(files[w], o, n, memory.address + p) for w, (o, n), p in zip(where, extents, places, strict=True)]
            )
            jobs.append((ticket, memory, extents, where, places))
        for index in rng.permutation(len(jobs)):
            ticket, memory, extents, where, places = jobs[index]
            engine.wait(ticket)
            for w, (o, n), p in zip(where, extents, places, strict=True):
                assert np.array_equal(memory.array[p : p + n], contents[w][o : o + n])
            engine.wait(ticket)  # a second time


@pytest.mark.parametrize(
    "faults",
    [
        {"short_every": 2, "short_bytes": 4096},
        {"short_every": 2, "short_bytes": 1000},
        {"short_every": 1, "short_bytes": 20_001},
        {"eagain_every": 2},
        {"eintr_every": 3, "short_every": 2},
    ],
    ids=str,
)
def test_short_transfers_continue_and_transient_errors_retry(tmp_path, backend, faults):
    content = make_file(tmp_path / "data", 900_001)
    with IOEngine(backend, request_bytes=SMALL_REQUEST, inject=FaultPlan(**faults)) as engine:
        check_reads(engine, tmp_path / "data", content, seed=7)
        check_writes(engine, tmp_path / "new", seed=8)


def check_writes(engine: IOEngine, path: Path, seed: int) -> None:
    """Writes pieces that tile a file at odd bounds from odd addresses, in random order; reads all back with Python."""
    rng = np.random.default_rng(seed)
    size = 700_123
    content = random_bytes(size, seed)
    bounds = np.unique(np.concatenate([[0, size], rng.integers(0, size, 25), rng.integers(0, 170, 6) * PAGE]))
    extents = [(int(a), int(b - a)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    rng.shuffle(extents)
    places, total = place(extents, rng)
    memory = Memory(total)
    for (offset, num_bytes), start in zip(extents, places, strict=True):
        memory.array[start : start + num_bytes] = content[offset : offset + num_bytes]
    path.write_bytes(b"")
    file_id = engine.open(path, writable=True)
    half = len(extents) // 2
    jobs = [(file_id, o, n, memory.address + p) for (o, n), p in zip(extents, places, strict=True)]
    tickets = [engine.submit_writes(jobs[:half]), engine.submit_writes(jobs[half:])]
    for ticket in tickets:
        engine.wait(ticket)
    engine.sync(file_id)
    assert path.read_bytes() == content.tobytes()
    back = Memory(size)
    engine.wait(engine.submit_reads([(file_id, 0, size, back.address)]))
    assert np.array_equal(back.array[:size], content)
    assert engine.write_bytes >= size
    engine.close_file(file_id)


@pytest.mark.parametrize("seed", range(3))
def test_writes_of_any_alignment_read_back(tmp_path, backend, seed):
    with IOEngine(backend, request_bytes=SMALL_REQUEST) as engine:
        check_writes(engine, tmp_path / "data", seed)


def test_partial_overwrite_keeps_the_neighbours(tmp_path, backend):
    content = make_file(tmp_path / "data", 100_000)
    source = Memory(50_000, fill=7)
    with IOEngine(backend) as engine:
        file_id = engine.open(tmp_path / "data", writable=True)
        engine.wait(engine.submit_writes([(file_id, 12_345, 40_001, source.address + 57)]))
    content[12_345 : 12_345 + 40_001] = 7
    assert (tmp_path / "data").read_bytes() == content.tobytes()


def test_created_file_is_private(tmp_path, backend):
    source = Memory(5000, fill=1)
    with IOEngine(backend) as engine:
        file_id = engine.open(tmp_path / "new", create=True)
        engine.wait(engine.submit_writes([(file_id, 0, 5000, source.address)]))
    assert (tmp_path / "new").read_bytes() == b"\x01" * 5000
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


def test_truncated_file_names_what_was_wanted_and_got(tmp_path, backend):
    make_file(tmp_path / "data", 300_001)
    memory = Memory(500_000)
    with IOEngine(backend, request_bytes=SMALL_REQUEST) as engine:
        file_id = engine.open(tmp_path / "data")
        for shift in (100, 5):  # in place and staged
            with pytest.raises(IOFailure) as caught:
                engine.wait(engine.submit_reads([(file_id, 100, 400_000, memory.address + shift)]))
            failure = caught.value
            assert (failure.offset, failure.wanted, failure.got, failure.errno) == (100, 400_000, 299_901, 0)
            assert failure.path == str(tmp_path / "data") and failure.path in str(failure)
        with pytest.raises(IOFailure) as caught:
            engine.wait(engine.submit_reads([(file_id, 301_000, 10, memory.address)]))
        assert (caught.value.wanted, caught.value.got) == (10, 0)
        ticket = engine.submit_reads([(file_id, 0, 300_001, memory.address)])
        engine.wait(ticket)  # a failure of one ticket leaves the next alone
        assert memory.array[:300_001].tobytes() == (tmp_path / "data").read_bytes()


def test_eio_is_raised_once_per_ticket_and_again_on_asking(tmp_path, backend):
    make_file(tmp_path / "data", 10 * SMALL_REQUEST)
    memory = Memory(10 * SMALL_REQUEST)
    with IOEngine(backend, queue_depth=1, request_bytes=SMALL_REQUEST, inject=FaultPlan(eio_at=4)) as engine:
        file_id = engine.open(tmp_path / "data")
        ticket = engine.submit_reads([(file_id, 0, 10 * SMALL_REQUEST, memory.address)])
        for _ in range(2):
            with pytest.raises(IOFailure, match="Input/output error") as caught:
                engine.wait(ticket)
            assert (caught.value.errno, caught.value.got) == (errno.EIO, 3 * SMALL_REQUEST)
        assert engine.read_bytes == 3 * SMALL_REQUEST  # nothing was asked for after the error
        assert engine.done(ticket)


def test_bad_address_is_an_error_and_not_a_crash(tmp_path, backend):
    make_file(tmp_path / "data", PAGE)
    with IOEngine(backend) as engine:
        file_id = engine.open(tmp_path / "data")
        with pytest.raises(IOFailure) as caught:
            engine.wait(engine.submit_reads([(file_id, 0, PAGE, PAGE)]))
        assert caught.value.errno == errno.EFAULT


def test_open_errors_name_the_path(tmp_path, backend):
    os.mkfifo(tmp_path / "pipe")
    with IOEngine(backend) as engine:
        with pytest.raises(UserError, match=r"missing\.safetensors.*no such file"):
            engine.open(tmp_path / "missing.safetensors")
        with pytest.raises(UserError, match="is a directory"):
            engine.open(tmp_path)
        with pytest.raises(UserError, match="not a regular file"):
            engine.open(tmp_path / "pipe")
        if os.geteuid() != 0:
            (tmp_path / "locked").touch(mode=0)
            with pytest.raises(UserError, match="permission denied"):
                engine.open(tmp_path / "locked")


def test_programmer_errors_are_value_errors(tmp_path, backend):
    make_file(tmp_path / "data", 10)
    memory = Memory(PAGE)
    with IOEngine(backend) as engine:
        file_id = engine.open(tmp_path / "data")
        with pytest.raises(ValueError, match="id 99"):
            engine.submit_reads([(99, 0, 1, memory.address)])
        with pytest.raises(ValueError, match="reading only"):
            engine.submit_writes([(file_id, 0, 1, memory.address)])
        with pytest.raises(ValueError, match="null"):
            engine.submit_reads([(file_id, 0, 1, 0)])
        with pytest.raises(ValueError, match="ticket"):
            engine.wait(1)
        engine.wait(engine.submit_reads([]))
        engine.wait(engine.submit_reads([(file_id, 5, 0, memory.address)]))
        engine.close_file(file_id)
        with pytest.raises(ValueError, match="no open file"):
            engine.submit_reads([(file_id, 0, 1, memory.address)])
    with pytest.raises(ValueError, match="closed"):
        engine.open(tmp_path / "data")
    with pytest.raises(ValueError, match="backend"):
        IOEngine("aio")


def test_close_in_flight_ends_every_ticket_and_then_leaves_memory_alone(tmp_path, backend):
    size = 64 << 20
    with open(tmp_path / "data", "wb") as file:
        file.truncate(size)
    memory = Memory(size)
    engine = IOEngine(backend, queue_depth=2, request_bytes=1 << 20)
    file_id = engine.open(tmp_path / "data")
    tickets = [engine.submit_reads([(file_id, 0, size, memory.address)]) for _ in range(50)]
    outcomes = []

    def wait_for_last() -> None:
        try:
            engine.wait(tickets[-1])
        except IOFailure as failure:
            outcomes.append(failure.errno)

    waiter = threading.Thread(target=wait_for_last)
    waiter.start()
    engine.close()
    waiter.join(timeout=10)
    assert outcomes == [errno.ECANCELED]
    memory.array[:] = 0x5A
    assert all(engine.done(ticket) for ticket in tickets)
    assert (memory.array == 0x5A).all()
    engine.close()


def test_registered_buffer_gives_the_same_bytes(tmp_path, backend):
    content = make_file(tmp_path / "data", 900_001)
    with IOEngine(backend, request_bytes=SMALL_REQUEST) as engine:
        first, second = Memory(1 << 20), Memory(1 << 20)
        engine.register_buffer(first.address, 1 << 20)
        engine.register_buffer(second.address, 1 << 20)
        assert engine.notes == [] or "ulimit -l" in engine.notes[0]
        file_id = engine.open(tmp_path / "data")
        for memory in (first, second):
            engine.wait(engine.submit_reads([(file_id, 0, len(content), memory.address)]))
            assert np.array_equal(memory.array[: len(content)], content)
        check_reads(engine, tmp_path / "data", content, seed=9)


def test_forbidden_io_uring_falls_back_to_threads_with_the_reason(tmp_path):
    content = make_file(tmp_path / "data", 500_003)
    with IOEngine("auto", inject=FaultPlan(setup_errno=errno.EPERM)) as engine:
        assert engine.backend == "threads"
        assert engine.backend_reason
        check_reads(engine, tmp_path / "data", content, seed=3, count=10)
    with pytest.raises(UserError, match="io_uring"):
        IOEngine("io_uring", inject=FaultPlan(setup_errno=errno.ENOSYS))


def test_more_files_than_the_ring_has_places_for(tmp_path, backend):
    memory = Memory(300 * 8)
    with IOEngine(backend) as engine:
        files = []
        for i in range(300):
            (tmp_path / str(i)).write_bytes(i.to_bytes(8, "little"))
            files.append(engine.open(tmp_path / str(i)))
        engine.wait(engine.submit_reads([(f, 0, 8, memory.address + 8 * i) for i, f in enumerate(files)]))
        assert memory.array[: 300 * 8].view(np.uint64).tolist() == list(range(300))


def run_python(code: str, *flags: str, timeout: float = 30) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=timeout)


@pytest.mark.every(2)
def test_works_under_python_O_and_ends_without_close(tmp_path, backend):
    content = make_file(tmp_path / "data", 20_001)
    code = f"""
import ctypes
from finetune.offload.residency.io import IOEngine
engine = IOEngine({backend!r})
file_id = engine.open({str(tmp_path / "data")!r})
buffer = ctypes.create_string_buffer(20_001)
engine.wait(engine.submit_reads([(file_id, 0, 20_001, ctypes.addressof(buffer))]))
import hashlib; print(hashlib.sha256(buffer.raw).hexdigest())
engine.submit_reads([(file_id, 0, 20_001, ctypes.addressof(buffer))])
"""
    result = run_python(code, "-O")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == hashlib.sha256(content.tobytes()).hexdigest()


@pytest.mark.every(2)
def test_ctrl_c_interrupts_a_wait(tmp_path, backend):
    with open(tmp_path / "data", "wb") as file:
        file.truncate(64 << 20)
    code = f"""
import ctypes, os, signal, threading
from finetune.offload.residency.io import FaultPlan, IOEngine
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
# Every transfer is put off for ever: the wait cannot end by itself within the five seconds that EAGAIN is endured.
engine = IOEngine({backend!r}, inject=FaultPlan(eagain_every=1))
file_id = engine.open({str(tmp_path / "data")!r})
buffer = ctypes.create_string_buffer(1 << 20)
ticket = engine.submit_reads([(file_id, 0, 1 << 20, ctypes.addressof(buffer))])
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    engine.wait(ticket)
except KeyboardInterrupt:
    print("interrupted", engine.done(ticket))
engine.close()
"""
    result = run_python(code)
    assert (result.stdout.strip(), result.returncode) == ("interrupted False", 0), result.stderr


def test_a_forked_child_does_not_disturb_the_engine(tmp_path, backend):
    content = make_file(tmp_path / "data", 400_001)
    with IOEngine(backend) as engine:
        pid = os.fork()
        if pid == 0:
            engine.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        check_reads(engine, tmp_path / "data", content, seed=4, count=5)
