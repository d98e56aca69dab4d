"""Locks on open files, kept by a process until it closes the file or ends, also when it is killed."""

from __future__ import annotations

import errno
import fcntl

# What file systems answer that have no locks; EBADF: a directory on a network file system.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)


def lock(descriptor: int, shared: bool = False, wait: bool = False) -> bool:
    """Locks the open file against every other opening of it, in this process too; False where the file system has no locks.

    shared: with others who share. wait: until nobody has it; else raises BlockingIOError when another has.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
