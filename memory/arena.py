"""Torch's CPU tensors in one bounded, recycled region, and the C library's allocator kept small where that can't be.

glibc keeps freed tensors it cannot reuse (2.0 GiB where 0.8 are needed), and returning them at each free makes the
kernel zero every page again, which doubles a step. The arena keeps freed memory, reuses it at once and never exceeds
its capacity without saying so.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass

MIN_BLOCK_BYTES = 32 * 1024

# <malloc.h>: mallopt's parameters.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


@dataclass(frozen=True, slots=True)
class ArenaStats:
    """State of the arena in bytes. `peak_bytes` and `overflow_peak_bytes` are since the last `reset_peak`.

    `extent_bytes` is what the arena has ever handed out, from its low and high ends together: its share of the
    process's resident memory, up to one huge page at each end. `overflow_bytes` live outside, mapped one by one,
    because the arena had no room: results stay right, but the memory is over what was planned.
    """

    capacity_bytes: int  # of address space
    used_bytes: int  # in blocks now
    peak_bytes: int
    extent_bytes: int
    largest_free_bytes: int  # of one free range
    blocks: int  # in use now
    overflow_bytes: int
    overflow_peak_bytes: int


class Arena:
    """The process's one arena. Made by `install_arena`; until `give_back`, or for the life of the process."""

    def __init__(self, native) -> None:
        self._native = native

    def stats(self) -> ArenaStats:
        return ArenaStats(**self._native.stats())

    def reset_peak(self) -> None:
        """Starts the peaks again from what is in use now."""
        self._native.reset_peak()

    def give_back(self) -> None:
        """From now on torch's tensors come from the C library, as before `install_arena`. What the region still holds stays
        valid; the rest of it goes back to the system."""
        self._native.install(1, sys.maxsize)

    @contextlib.contextmanager
    def long_lived(self) -> Iterator[None]:
        """Tensors that this thread allocates inside come from the high end, away from the temporaries at the low end,
        so that they leave no holes among them: adapters, optimizer state, kept activations, buffers of a whole run."""
        before = self._native.set_long_lived(True)
        try:
            yield
        finally:
            self._native.set_long_lived(before)


@dataclass(frozen=True, slots=True)
class ArenaUnavailable:
    """Why tensors stay with the C library's allocator. Falsy, so `if arena:` tells the two results apart."""

    reason: str  # in words, for messages

    def __bool__(self) -> bool:
        return False


def install_arena(capacity_bytes: int, min_block_bytes: int = MIN_BLOCK_BYTES) -> Arena | ArenaUnavailable:
    """From now on torch's CPU tensors of at least `min_block_bytes` live in one region of `capacity_bytes`.

    Reserves address space only; pages become resident when first used. Tensors that exist already stay where they are.
    A second call with another capacity replaces the region; the old one goes when its last tensor does. Smaller
    tensors and everything that is not torch's stay with the C library.
    """
    if capacity_bytes <= 0 or min_block_bytes <= 0:
        raise ValueError(f"arena sizes must be positive, got {capacity_bytes=} and {min_block_bytes=}")
    import torch  # its libraries must be loaded before they can be redirected

    try:
        from finetune_native import arena as native
    except ImportError as error:
        return ArenaUnavailable(f"the native extension cannot be imported: {error}")
    try:
        native.install(capacity_bytes, min_block_bytes)
    except RuntimeError as error:
        return ArenaUnavailable(str(error))
    arena = Arena(native)
    # The proof, whatever the build of torch: a tensor must appear in the count, inside or outside the region.
    before = arena.stats()
    probe = torch.empty(min_block_bytes, dtype=torch.uint8)
    after = arena.stats()
    del probe
    if after.used_bytes + after.overflow_bytes <= before.used_bytes + before.overflow_bytes:
        return ArenaUnavailable("torch was redirected but its tensors do not come from the arena")
    arena.reset_peak()
    return arena


def tune_malloc(mmap_threshold_bytes: int = 1 << 20, arenas: int = 1) -> bool:
    """Has glibc return blocks of `mmap_threshold_bytes` and more to the system when they are freed, and keep the
    number of heaps at `arenas`. Bounds memory at the price of zeroed pages; for the process's other allocations, and
    for tensors where there is no arena. False where the C library has no mallopt (macOS, musl)."""
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    settings = {_M_MMAP_THRESHOLD: mmap_threshold_bytes, _M_TRIM_THRESHOLD: mmap_threshold_bytes, _M_ARENA_MAX: arenas}
    return all([mallopt(parameter, value) == 1 for parameter, value in settings.items()])


def keep_freed_memory() -> bool:
    """Has glibc use what is freed again, blocks of up to 32 MiB, instead of asking the kernel for zeroed pages each time: while
    something is timed that will have an arena. Until `tune_malloc` or `trim_malloc` say otherwise."""
    mallopt = _glibc("mallopt")
    return mallopt is not None and all([mallopt(_M_MMAP_THRESHOLD, 32 << 20) == 1, mallopt(_M_TRIM_THRESHOLD, 1 << 30) == 1])


def trim_malloc() -> bool:
    """Returns what the C library holds free to the system; for the end of start-up. False where it returned nothing or
    can't."""
    malloc_trim = _glibc("malloc_trim")
    return malloc_trim is not None and malloc_trim(ctypes.c_size_t(0)) == 1


def _glibc(name: str):
    """The function, or None where the process's C library lacks it."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
