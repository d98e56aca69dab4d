"""The tensor arena, in processes of its own: once installed, an arena stays until the process ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the arena needs Linux")

PRELUDE = """
import ctypes, gc, os, random, threading
import torch
from finetune.memory.arena import install_arena
MIB, PAGE = 1 << 20, 4096
def make(capacity_bytes=64 * MIB, **options):
    arena = install_arena(capacity_bytes, **options)
    assert arena, arena
    return arena
def tensor(size_bytes, value=None):
    made = torch.empty(size_bytes, dtype=torch.uint8)
    return made if value is None else made.fill_(value)
def equal(stats, **wanted):
    found = {name: getattr(stats, name) for name in wanted}
    assert found == wanted, (found, wanted)
"""


def run(body: str) -> str:
    """Runs `body` after the prelude; a failed assert, a crash or a crash at exit fails the test."""
    program = PRELUDE + textwrap.dedent(body)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_counts_reuse_overflow_and_replacement() -> None:
    run("""
    early = tensor(8 * MIB, 7)  # from the C library, freed under the arena
    arena = make()
    equal(arena.stats(), capacity_bytes=64 * MIB, used_bytes=0, peak_bytes=0, blocks=0, largest_free_bytes=64 * MIB)

    # Whole pages for what is at least min_block_bytes, nothing for what is smaller.
    odd, small = tensor(40_001), tensor(32 * 1024 - 1)
    equal(arena.stats(), used_bytes=10 * PAGE, blocks=1)
    assert odd.data_ptr() % 64 == 0
    del odd, small
    equal(arena.stats(), used_bytes=0, blocks=0, peak_bytes=10 * PAGE, largest_free_bytes=64 * MIB)

    # Freed neighbours merge, in every order of freeing, and the same memory comes again.
    first_address = None
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        three = [tensor(16 * MIB) for _ in range(3)]
        first_address = first_address or three[0].data_ptr()
        assert three[0].data_ptr() == first_address
        for index in order:
            three[index] = None
        equal(arena.stats(), used_bytes=0, largest_free_bytes=64 * MIB)

    # First fit: a hole that is large enough is taken, and its rest stays usable.
    a, b, c = tensor(8 * MIB), tensor(8 * MIB), tensor(8 * MIB)
    hole = b.data_ptr()
    del b
    d = tensor(3 * MIB)
    assert d.data_ptr() == hole
    e = tensor(5 * MIB)
    assert e.data_ptr() == hole + 3 * MIB
    equal(arena.stats(), used_bytes=24 * MIB, largest_free_bytes=40 * MIB, blocks=4)
    del a, c, d, e

    # Resizing keeps contents.
    grown = tensor(MIB, 3)
    grown.resize_(5 * MIB)
    assert (grown[:MIB] == 3).all()
    del grown

    # Full: the rest is mapped outside, with the right contents, counted, and given back.
    arena.reset_peak()
    many = [tensor(20 * MIB, i) for i in range(5)]
    equal(arena.stats(), used_bytes=60 * MIB, overflow_bytes=40 * MIB, peak_bytes=60 * MIB)
    assert [int(t.float().mean()) for t in [t[:: PAGE] for t in many]] == list(range(5))
    del many
    equal(arena.stats(), used_bytes=0, overflow_bytes=0, overflow_peak_bytes=40 * MIB)
    arena.reset_peak()
    equal(arena.stats(), peak_bytes=0, overflow_peak_bytes=0)
    huge = tensor(65 * MIB, 1)
    equal(arena.stats(), used_bytes=0, overflow_bytes=65 * MIB)
    del huge

    # What cannot be had is torch's own error.
    try:
        tensor(1 << 60)
    except RuntimeError as error:
        assert "memory" in str(error)
    else:
        raise AssertionError("2**60 bytes were given")

    # Another capacity: tensors of the old region live on, new ones come from the new one, nothing is lost.
    old = tensor(4 * MIB, 9)
    again = make(32 * MIB)
    equal(again.stats(), capacity_bytes=32 * MIB, used_bytes=0)
    new = tensor(4 * MIB, 8)
    equal(again.stats(), used_bytes=4 * MIB)
    assert (old == 9).all() and (new == 8).all()
    del old
    equal(again.stats(), used_bytes=4 * MIB)
    make(32 * MIB)  # the same capacity changes nothing
    equal(again.stats(), used_bytes=4 * MIB)
    assert (early == 7).all()
    del early

    # A tensor and the arrays that look into it survive each other and the interpreter's end.
    view = tensor(2 * MIB, 5).numpy()
    gc.collect()
    assert (view == 5).all()
    """)


def test_long_lived_tensors_keep_to_the_high_end() -> None:
    run("""
    arena = make()
    temporary = tensor(4 * MIB)
    base = temporary.data_ptr()
    with arena.long_lived():
        kept = tensor(4 * MIB)
        other_thread = []
        thread = threading.Thread(target=lambda: other_thread.append(tensor(MIB)))
        thread.start()
        thread.join()
        second = tensor(2 * MIB)
        with arena.long_lived():
            pass
        third = tensor(MIB)
    after = tensor(MIB)
    assert kept.data_ptr() == base + 60 * MIB
    assert second.data_ptr() == base + 58 * MIB
    assert third.data_ptr() == base + 57 * MIB
    assert other_thread[0].data_ptr() == base + 4 * MIB  # the choice is of one thread
    assert after.data_ptr() == base + 5 * MIB
    equal(arena.stats(), extent_bytes=13 * MIB, used_bytes=13 * MIB)
    try:
        with arena.long_lived():
            raise KeyError
    except KeyError:
        pass
    assert tensor(MIB).data_ptr() < base + 16 * MIB

    # Where the high end has no room that is large enough, a hole below is taken before the system is asked.
    del temporary
    with arena.long_lived():
        fill = tensor(51 * MIB)
        last = tensor(4 * MIB)
    assert last.data_ptr() == base
    equal(arena.stats(), overflow_bytes=0, used_bytes=64 * MIB, largest_free_bytes=0, extent_bytes=64 * MIB)
    """)


def test_random_use_keeps_contents_and_counts() -> None:
    run("""
    arena = make(48 * MIB)
    random.seed(3)
    live, peak_bytes = [], 0
    for step in range(4000):
        if live and (random.random() < 0.5 or len(live) > 40):
            held, value, _ = live.pop(random.randrange(len(live)))
            assert held[0] == held[-1] == held[held.numel() // 2] == value, step
        else:
            size_bytes = int(2 ** random.uniform(15.1, 22))
            value = step % 251
            held = torch.empty(size_bytes, dtype=torch.uint8)
            held[0] = held[-1] = held[size_bytes // 2] = value
            live.append((held, value, -(-size_bytes // PAGE) * PAGE))
        held = None
        stats = arena.stats()
        assert stats.used_bytes + stats.overflow_bytes == sum(size for _, _, size in live), step
        assert stats.used_bytes + stats.largest_free_bytes <= stats.capacity_bytes
        peak_bytes = max(peak_bytes, stats.used_bytes)
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel()) for t, _, _ in live)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))
    equal(arena.stats(), peak_bytes=peak_bytes)
    assert arena.stats().overflow_peak_bytes > 0  # the sizes are chosen so that both ways were walked
    live.clear()
    equal(arena.stats(), used_bytes=0, overflow_bytes=0, largest_free_bytes=48 * MIB, blocks=0)
    """)


def test_threads_allocate_together() -> None:
    run("""
    arena = make(32 * MIB)
    failures = []
    def work(value):
        for round in range(300):
            made = [tensor(40_000 + 4096 * (round % 7), value) for _ in range(6)]
            if not all((t == value).all() for t in made):
                failures.append(value)
    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    equal(arena.stats(), used_bytes=0, overflow_bytes=0, largest_free_bytes=32 * MIB)
    """)


def test_a_forked_child_has_an_arena_of_its_own() -> None:
    run("""
    torch.set_num_threads(1)  # OpenMP's own threads don't survive a fork
    arena = make()
    shared = tensor(MIB, 1)
    child = os.fork()
    if child == 0:
        mine = tensor(4 * MIB, 2)
        shared.fill_(3)
        os._exit(0 if arena.stats().used_bytes == 5 * MIB and bool((mine == 2).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (shared == 1).all()
    equal(arena.stats(), used_bytes=MIB)
    """)


def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    run("""
    from finetune.memory.meter import host_bytes
    arena = make(256 * MIB)
    before = host_bytes()
    live = tensor(8 * MIB, 6)
    for _ in range(3):
        used = [tensor(8 * MIB, 1) for _ in range(6)]
        resident = host_bytes() - before
        assert 54 * MIB < resident < 62 * MIB, resident
        used.clear()
        assert host_bytes() - before > 54 * MIB
    assert (live == 6).all()
    """)


def test_a_training_step_repeats_in_the_same_memory_with_the_same_bits() -> None:
    output = run("""
    torch.set_num_threads(1)
    def train(steps):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(384, 777), torch.nn.GELU(), torch.nn.Linear(777, 384))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        seen = []
        for step in range(steps):
            length = (200, 512, 333, 401)[step % 4]
            inputs = torch.randn(length, 384)
            loss = (model(inputs) - inputs).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del loss, inputs
            if arena:
                seen.append(arena.stats())
        return [p.detach().clone() for p in model.parameters()], seen
    arena = None
    plain, _ = train(12)
    arena = make()
    ours, seen = train(12)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours))
    assert seen[3].extent_bytes == seen[-1].extent_bytes  # each length once, then nothing new is touched
    assert seen[-1].peak_bytes <= seen[-1].extent_bytes < 1.15 * seen[-1].peak_bytes
    assert seen[-1].overflow_peak_bytes == 0
    """)
    assert output == ""


def test_where_there_is_no_extension_the_reason_is_told() -> None:
    run("""
    import sys
    sys.modules["finetune_native"] = None
    result = install_arena(64 * MIB)
    assert not result and "finetune_native" in result.reason, result
    """)


def test_absurd_sizes_are_refused() -> None:
    run("""
    result = install_arena(1 << 60)
    assert not result and str(1 << 60) in result.reason, result
    tensor(MIB, 1)
    for sizes in ((0, 1), (MIB, 0), (-1, 1)):
        try:
            install_arena(*sizes)
        except ValueError as error:
            assert str(sizes[0]) in str(error)
        else:
            raise AssertionError(sizes)
    """)


def test_tuned_malloc_returns_large_blocks_when_freed() -> None:
    run("""
    from finetune.memory.arena import trim_malloc, tune_malloc
    from finetune.memory.meter import host_bytes
    if not tune_malloc():  # musl
        raise SystemExit(0)
    # Raises glibc's own, growing threshold in an untuned process: after that 24 MiB blocks would be kept.
    del_me = tensor(30 * MIB, 1)
    del del_me
    before = host_bytes()
    held = tensor(24 * MIB, 1)
    assert host_bytes() - before > 20 * MIB
    del held
    assert host_bytes() - before < 4 * MIB
    assert trim_malloc() in (True, False)
    """)


def test_what_is_given_back_leaves_the_process() -> None:
    """Run apart: the arena is the process's own. 256 MiB of it are touched; a tensor that is kept stays valid."""
    code = """
import torch
from finetune.memory.arena import install_arena
from finetune.memory.meter import host_bytes
arena = install_arena(300 << 20)
before = host_bytes()
kept = torch.full((1 << 20,), 7.0)
large = torch.ones(252 << 18)
assert host_bytes() - before > 250 << 20
del large
arena.give_back()
assert host_bytes() - before < 8 << 20, host_bytes() - before
assert bool((kept == 7).all())
again = torch.ones(1 << 20)
assert arena.stats().used_bytes == 0 and float(again.sum()) == 1 << 20
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
