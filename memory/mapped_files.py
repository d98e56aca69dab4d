"""Pages of mapped files, which are libraries' code here: how they are read again after the kernel has dropped them."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_PIECE_BYTES = 64 * 1024  # what one miss reads
_MOST_PIECES = 8192  # of the 65,530 mappings that a process may have

# <sys/mman.h>
_MADV_RANDOM = 1
_MADV_DONTDUMP = 16
_MADV_DODUMP = 17

_loaded_before = 0  # libraries that had been loaded when the mappings were last cut


class _LoadedLibrary(ctypes.Structure):
    """struct dl_phdr_info of <link.h>"""

    _fields_ = [
        ("dlpi_addr", ctypes.c_void_p),
        ("dlpi_name", ctypes.c_char_p),
        ("dlpi_phdr", ctypes.c_void_p),
        ("dlpi_phnum", ctypes.c_uint16),
        ("dlpi_adds", ctypes.c_ulonglong),
        ("dlpi_subs", ctypes.c_ulonglong),
    ]


_Visitor = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_LoadedLibrary), ctypes.c_size_t, ctypes.c_void_p)


def read_code_in_small_pieces() -> None:
    """From now on a missing page of a mapped file is read with at most 64 KiB around it. Does nothing where there is no /proc.

    A kernel under a memory limit drops pages of code that has not run for a while. Then it reads as much around a missing page
    as the disk reads ahead, up to 8 MiB, in folios of up to 2 MiB that stay or go as a whole: the 20 MiB of code that a step
    runs, scattered over 400 MiB of libraries, push one another out of 80 MiB without end.

    `MADV_RANDOM` is all that it takes for data, and for code before Linux 6.16. Later kernels read ahead for code in spite of
    it, but never past the end of a mapping (do_sync_mmap_readahead in mm/filemap.c). So code is cut into small mappings:
    every other piece is marked not to be in core dumps, and what is marked differently is not one mapping. With very much code,
    pieces are larger.

    Takes 0.1 s where there is new code, and next to nothing else.
    """
    global _loaded_before
    if not sys.platform.startswith("linux") or (loaded := _libraries_ever_loaded()) == _loaded_before:
        return
    _loaded_before = loaded
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    code = []
    for line in _MAPS.read_text().splitlines():
        addresses, rights, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0].startswith("/") and "w" not in rights:
            start, end = (int(address, 16) for address in addresses.split("-"))
            madvise(start, end - start, _MADV_RANDOM)
            if "x" in rights:
                code.append((start, end))
    piece_bytes = _PIECE_BYTES
    while sum(end - start for start, end in code) > _MOST_PIECES * piece_bytes:
        piece_bytes *= 2
    for start, end in code:
        madvise(start, end - start, _MADV_DODUMP)
    for start, end in code:  # which pieces are marked follows from their addresses, so that a second call marks the same
        for address in range(start - start % (2 * piece_bytes), end, 2 * piece_bytes):
            first, last = max(start, address), min(end, address + piece_bytes)
            if first < last:
                madvise(first, last - first, _MADV_DONTDUMP)


def _libraries_ever_loaded() -> int:
    """By this process, those too that are gone again."""
    found = []

    @_Visitor
    def first_only(info, size, data) -> int:
        found.append(info.contents.dlpi_adds)
        return 1

    ctypes.CDLL(None).dl_iterate_phdr(first_only, None)
    return found[0]
